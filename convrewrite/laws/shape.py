"""Law `shape`: the output has the same structure, shapes and dtypes as the original's, in eval and train mode."""

from __future__ import annotations

from torch.utils._pytree import tree_flatten

from convrewrite.laws import LAWS
from convrewrite.laws.case import Case, tensors_of
from convrewrite.reports import LawResult


@LAWS.register("shape")
def shape(case: Case) -> LawResult:
    """Compare both outputs, tensor by tensor."""
    for mode, (old, new) in case.outputs.items():
        if type(old) is not type(new) or str(tree_flatten(old)[1]) != str(tree_flatten(new)[1]):
            return LawResult("shape", "broken", f"{mode}: output is {type(new).__name__}, was {type(old).__name__}")
        for i, (a, b) in enumerate(zip(tensors_of(old), tensors_of(new), strict=True)):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                detail = f"{mode}: output {i} is {tuple(b.shape)} {b.dtype}, was {tuple(a.shape)} {a.dtype}"
                return LawResult("shape", "broken", detail)
    outs = ", ".join("x".join(map(str, t.shape)) for t in tensors_of(case.outputs["eval"][1]))
    return LawResult("shape", "held", f"output {outs} in eval and train mode")
