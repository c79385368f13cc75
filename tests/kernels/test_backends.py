"""Choosing a backend, and the operation under autograd, compile, export, autocast, deepcopy and without its library."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import convrewrite as cr
from convrewrite.blocks.acmix import ACmix, ACmixOptions
from convrewrite.blocks.base import Block
from convrewrite.blocks.local import local_attention
from convrewrite.blocks.sasa import SASA, SASAOptions
from convrewrite.errors import BackendError
from convrewrite.kernels import backends
from convrewrite.kernels.native import library
from convrewrite.kernels.op import local_attention_op
from convrewrite.sites import ConvSpec, Place
from tests.kernels.cases import EXAMPLE, assert_close, results
from tests.kernels.conftest import build

OP = "convrewrite.local_attention"


def block(cls: type[Block], **options: Any) -> Block:
    torch.manual_seed(0)
    place = Place((2, 8, 9, 10), (2, 8, 9, 10), ConvSpec(8, 8, (3, 3), padding=(1, 1, 1, 1)))
    return cls(place, cls.Options(heads=2, **options))


BLOCKS = [(ACmix, ACmixOptions), (SASA, SASAOptions)]
every_block = pytest.mark.parametrize("cls", [ACmix, SASA])


def names_of(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes}


def arguments(dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    t = EXAMPLE.tensors(dtype)
    t = {name: x.detach().requires_grad_() for name, x in t.items()}
    geometry = [list(EXAMPLE.window), list(EXAMPLE.stride), list(EXAMPLE.dilation), list(EXAMPLE.start)]
    return (*t.values(), *geometry, EXAMPLE.border, 0.6, "native")


@pytest.mark.usefixtures("native")
def test_torch_s_own_checks_of_an_operation_pass() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(local_attention_op, arguments())
        no_tables = (*arguments()[:3], None, None, None, *arguments()[6:])
        torch.library.opcheck(local_attention_op, no_tables)


@pytest.mark.usefixtures("native")
@every_block
def test_compiles_whole_and_gives_the_same_values_and_gradients(cls: type[Block]) -> None:
    module, x = block(cls).double(), torch.randn(2, 8, 9, 10, dtype=torch.float64)
    seen: list[set[str]] = []

    def inspect(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(names_of(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(module, fullgraph=True, backend=inspect)(x)
        assert any(OP in name for name in seen[0])
        want = torch.autograd.grad(module(x).square().sum(), list(module.parameters()), allow_unused=True)
        twin = torch.compile(module, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(twin(x).square().sum(), list(module.parameters()), allow_unused=True)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    torch._dynamo.reset()


@every_block
def test_an_exported_block_needs_none_of_our_operations(cls: type[Block]) -> None:
    module, x = block(cls).eval(), torch.randn(2, 8, 9, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cr.set_backend(module, "native")  # also where a kernel was asked for
        program = torch.export.export(module, (x,))
    assert not any(OP in name for name in names_of(program.graph))
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("native")
def test_the_operation_itself_can_be_exported() -> None:
    class Direct(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = local_attention_op(q, k, v, None, None, None, *arguments()[6:])[0]
            return out

    tensors = tuple(t.detach() for t in arguments()[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Direct(), tensors)
    assert any(OP in name for name in names_of(program.graph))
    assert torch.equal(program.module()(*tensors), Direct()(*tensors))


@pytest.mark.usefixtures("native")
@every_block
def test_autocast_returns_its_dtype_and_trains_float32_parameters(cls: type[Block]) -> None:
    module, x = block(cls), torch.randn(2, 8, 9, 10)
    cr.set_backend(module, "native")
    want = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=5e-2, atol=5e-2)
    got.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.usefixtures("native")
@every_block
def test_backends_agree_on_a_block_in_both_layouts(cls: type[Block]) -> None:
    module = block(cls).double()
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    cr.set_backend(module, "aten")
    want = module(x)
    cr.set_backend(module, "native")
    for given in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        torch.testing.assert_close(module(given), want, rtol=1e-11, atol=1e-11)


def test_set_backend_reaches_every_block_and_a_copy_keeps_it() -> None:
    model = torch.nn.Sequential(block(ACmix), torch.nn.Conv2d(8, 8, 1), torch.nn.ModuleList([block(SASA)]))
    keys = list(model.state_dict())
    assert cr.set_backend(model, "aten") == 2
    twin = copy.deepcopy(model)
    assert [m.backend for m in twin.modules() if isinstance(m, Block)] == ["aten", "aten"]
    assert list(model.state_dict()) == keys
    assert cr.set_backend(model, "auto") == 2
    assert [m.backend for m in twin.modules() if isinstance(m, Block)] == ["aten", "aten"]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every backend that computed something."""
    found: list[str] = []
    aten, op = "convrewrite.blocks.local.local_attention_aten", "convrewrite.blocks.local.local_attention_op"
    real_aten, real_op = local_attention.__globals__["local_attention_aten"], local_attention_op

    def spy_aten(*args: Any) -> Any:
        found.append("aten")
        return real_aten(*args)

    def spy_op(*args: Any) -> Any:
        found.append(args[-1])
        return real_op(*args)

    monkeypatch.setattr(aten, spy_aten)
    monkeypatch.setattr(op, spy_op)
    return found


@pytest.mark.usefixtures("native")
def test_argument_goes_before_environment_and_environment_before_auto(
    chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = EXAMPLE.tensors(torch.float32)
    for variable, argument, want in [
        (None, "auto", "native"),
        ("", "auto", "native"),
        ("aten", "auto", "aten"),
        ("aten", "native", "native"),
        ("auto", "aten", "aten"),
    ]:
        monkeypatch.delenv(backends.VARIABLE, raising=False)
        if variable is not None:
            monkeypatch.setenv(backends.VARIABLE, variable)
        local_attention(**tensors, **EXAMPLE.geometry, backend=argument)
        assert chosen.pop() == want, (variable, argument)


@pytest.mark.usefixtures("native")
def test_auto_falls_back_for_what_no_kernel_has(chosen: list[str]) -> None:
    tensors = EXAMPLE.tensors(torch.float32)
    local_attention(**tensors, relative=torch.randn(2, 4, 15), **EXAMPLE.geometry)
    meta = {name: t.to("meta") for name, t in tensors.items()}
    local_attention(**meta, **EXAMPLE.geometry)
    assert chosen == ["aten", "aten"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"backend": "nativ"}, "backend: no backend 'nativ'; did you mean 'native'?"),
        (
            {"backend": "native", "relative": torch.zeros(1, 4, 15)},
            "local_attention: backend 'native' cannot do this: a vector per tap (relative) has no kernel, only rows "
            "and columns have; use 'auto'",
        ),
        (
            {"backend": "triton"},
            "local_attention: backend 'triton' cannot do this: it runs on cuda, the tensors are on cpu; use 'auto'",
        ),
    ],
)
def test_a_backend_that_cannot_is_an_error_of_one_line(call: dict[str, Any], message: str) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and call["backend"] == "triton":
        pytest.skip("the interpreter runs it on cpu")
    with pytest.raises(BackendError) as caught:
        local_attention(**EXAMPLE.tensors(torch.float32), **EXAMPLE.geometry, **call)
    assert str(caught.value) == message


def test_wrong_names_are_errors_wherever_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"^set_backend: no backend 'c'; one of auto, aten, native, triton$"):
        cr.set_backend(block(ACmix), "c")
    monkeypatch.setenv(backends.VARIABLE, "atn")
    with pytest.raises(BackendError, match=r"^CONVREWRITE_BACKEND: no backend 'atn'; did you mean 'aten'\?$"):
        local_attention(**EXAMPLE.tensors(torch.float32), **EXAMPLE.geometry)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(library, "_file", lambda: tmp_path / "none.so")
    library.library.cache_clear()
    yield
    monkeypatch.undo()
    library.library.cache_clear()


@pytest.mark.usefixtures("absent")
def test_without_the_library_the_aten_form_runs_and_one_line_is_logged(
    chosen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    tensors = EXAMPLE.tensors(torch.float32)
    want = results(EXAMPLE, {name: t.double() for name, t in tensors.items()}, None)
    with caplog.at_level(logging.INFO, "convrewrite"):
        assert_close(results(EXAMPLE, tensors, "auto"), want, 1e-5)
        results(EXAMPLE, tensors, "auto")
    assert chosen == ["aten", "aten"]
    (record,) = caplog.records
    assert "no native CPU kernel" in record.message
    assert "\n" not in record.message
    with pytest.raises(BackendError, match=r"^local_attention: backend 'native' cannot do this: its library is absent"):
        results(EXAMPLE, tensors, "native")


def test_a_file_that_is_no_library_or_another_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "broken.so"
    file.write_bytes(b"not a library")
    with pytest.raises(OSError, match=r"broken\.so"):
        library.load(file)


def test_an_install_without_a_compiler_succeeds_and_has_no_library(tmp_path: Path) -> None:
    assert build(tmp_path, **{**os.environ, "CC": str(tmp_path / "no-compiler")}) is None


@pytest.mark.usefixtures("native")
def test_finite_differences_agree_with_the_gradients() -> None:
    tensors = {name: t.detach().requires_grad_() for name, t in EXAMPLE.tensors(torch.float64).items()}
    small = {**tensors, "q": tensors["q"][:1, :2, :3].detach().requires_grad_()}
    small["k"], small["v"] = (tensors[name][:1, :2, :3].detach().requires_grad_() for name in "kv")

    def run(*values: Tensor) -> Tensor:
        return local_attention(**dict(zip(small, values, strict=True)), **EXAMPLE.geometry, backend="native")

    assert torch.autograd.gradcheck(run, tuple(small.values()))
