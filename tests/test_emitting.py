"""Rewritten models in other forms: compiled, exported, ONNX and one graph compute what the module computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convrewrite as cr
from convrewrite.blocks.base import Block
from convrewrite.emitting import EMITTERS, KINDS, emit, graph_breaks, write_onnx
from convrewrite.errors import ConvrewriteError, EditError

from .nets import SHAPE, Residual

Close = Callable[[Any, Any], None]
ONNX_TOLERANCE = 1e-4


def rewritten(start: str = "exact") -> nn.Module:
    return cr.rewrite(Residual(), "acmix", start=start, example=SHAPE).model.eval()


def resnet50(start: str) -> nn.Module:
    import torchvision

    return cr.rewrite(torchvision.models.resnet50().eval(), "acmix", start=start, example=(2, 3, 64, 64)).model


CASES = [
    pytest.param(rewritten, "exact", SHAPE, id="small-exact"),
    pytest.param(rewritten, "fresh", SHAPE, id="small-fresh"),
    pytest.param(resnet50, "exact", (2, 3, 64, 64), id="resnet50-exact", marks=pytest.mark.slow),
    pytest.param(resnet50, "fresh", (2, 3, 64, 64), id="resnet50-fresh", marks=pytest.mark.slow),
]
every_case = pytest.mark.parametrize(("build", "start", "shape"), CASES)


@every_case
def test_the_whole_model_compiles_without_a_graph_break(
    build: Callable[[str], nn.Module], start: str, shape: tuple[int, ...], close: Close
) -> None:
    model, x = build(start), torch.randn(shape)
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@every_case
def test_an_exported_program_computes_the_same(
    build: Callable[[str], nn.Module], start: str, shape: tuple[int, ...], close: Close
) -> None:
    model, x = build(start), torch.randn(shape)
    training = [m.training for m in model.modules()]
    program = emit(model, "exported", (x,))
    with torch.no_grad():
        close(program.module()(x), model(x))
    assert [m.training for m in model.modules()] == training


@every_case
def test_a_graph_computes_every_bit_the_same_in_both_modes(
    build: Callable[[str], nn.Module], start: str, shape: tuple[int, ...]
) -> None:
    model, x = build(start), torch.randn(shape)
    graph = emit(model, "graph", (x,))
    assert isinstance(graph, torch.fx.GraphModule)
    assert list(graph.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        expected = {}
        for training in (False, True):  # train mode has dropout and batch statistics: equal only if it follows
            for one in (model, graph):
                state = {k: v.clone() for k, v in model.state_dict().items()}
                torch.manual_seed(3)
                expected[one, training] = one.train(training)(x)
                model.load_state_dict(state)
            assert torch.equal(expected[graph, training], expected[model, training])
        assert not torch.equal(expected[model, False], expected[model, True])


@pytest.mark.parametrize(
    ("build", "start", "shape"), [CASES[1], pytest.param(*CASES[2].values, id="resnet50", marks=pytest.mark.slow)]
)
def test_onnx_runs_elsewhere_with_the_same_output(
    build: Callable[[str], nn.Module], start: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = build(start), torch.randn(shape)
    write_onnx(model, (x,), tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]  # the weights are inside
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        expected = model(x)
    assert float((found - expected).abs().max()) <= ONNX_TOLERANCE * float(expected.abs().max())


class Switching(Residual):
    """Computes something else in train mode, in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if self.training else y


class FunctionalDropout(Residual):
    """Reads the mode in a function's argument."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.forward_features(x).mean((2, 3)), 0.5, self.training))


class Breaking(Residual):
    """Forces a graph break between features and head; one before the first operation would split nothing."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.forward_features(x)
        torch._dynamo.graph_break()
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("net", [Switching, FunctionalDropout])
def test_a_forward_that_depends_on_the_mode_is_refused_as_a_graph(net: type[nn.Module]) -> None:
    model = cr.rewrite(net(), "acmix", example=SHAPE).model
    with pytest.raises(EditError, match="train and eval mode differ"):
        emit(model, "graph", (torch.randn(SHAPE),))


def test_blocks_stay_modules_in_the_graph() -> None:
    model = rewritten("fresh")
    graph = emit(model, "graph", ())
    called = {n.target for n in graph.graph.nodes if n.op == "call_module"}
    assert {name for name, m in model.named_modules() if isinstance(m, Block)} <= called


def test_a_rewrite_adds_no_graph_break_and_those_of_the_original_are_counted() -> None:
    x, breaking = torch.randn(SHAPE), Breaking()
    kept = graph_breaks(breaking, cr.rewrite(breaking, "acmix", example=SHAPE).model, (x,))
    assert (kept.before, kept.after, len(kept.reasons)) == (1, 1, 1)
    added = graph_breaks(Residual(), breaking, (x,))  # a break that was added would be seen
    assert (added.before, added.after) == (0, 1)


def test_module_is_the_model_itself_and_every_other_form_has_an_emitter() -> None:
    model = rewritten()
    assert emit(model, "module", ()) is model
    assert {*EMITTERS.names(), "module", "onnx"} == set(KINDS)


def test_an_unknown_form_and_a_wrong_example_are_errors_of_one_line(tmp_path: Path) -> None:
    model = rewritten()
    with pytest.raises(ConvrewriteError, match="did you mean 'graph'"):
        emit(model, "grap", ())
    wrong = (torch.randn(2, 4, 8, 8),)
    calls: list[Callable[[], object]] = [
        lambda: emit(model, "exported", wrong),
        lambda: graph_breaks(None, model, wrong),
        lambda: write_onnx(model, wrong, tmp_path / "model.onnx"),
    ]
    for call in calls:
        with pytest.raises(EditError) as caught:
            call()
        assert "\n" not in str(caught.value)
