"""ACmix equals its equation computed pixel by pixel, its authors' code, and the paper's parameter counts."""

from __future__ import annotations

import importlib.util
import os
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from convrewrite.blocks.acmix import ACmix, ACmixOptions
from convrewrite.sites import ConvSpec, Place
from tests.blocks import GRADIENT, TOLERANCE
from tests.blocks.reference import loop_acmix, unfold_acmix


def place(c_in: int, c_out: int, size: tuple[int, int], kernel: int = 3, batch: int = 1, **conv: Any) -> Place:
    """A place whose convolution pads "same" unless told otherwise."""
    same = conv.get("dilation", (1, 1))[0] * (kernel // 2)
    spec = ConvSpec(c_in, c_out, (kernel, kernel), **{"padding": (same,) * 4, **conv})
    return Place((batch, c_in, *size), (batch, c_out, *spec.out_size(*size)), spec)


def build(where: Place, **options: Any) -> ACmix:
    """An ACmix in float64 with every parameter at random."""
    torch.manual_seed(0)
    block = ACmix(where, ACmixOptions(**options)).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


CASES: dict[str, tuple[Place, dict[str, Any], dict[str, Any]]] = {
    "same": (place(3, 4, (6, 5)), {}, {}),
    "ordered": (place(3, 4, (5, 5)), {"layout": "ordered"}, {"layout": "ordered"}),
    "ordered, rates per channel": (
        place(3, 4, (4, 3)),
        {"layout": "ordered", "rates": "channel"},
        {"layout": "ordered"},
    ),
    "odd size, stride 2": (place(3, 4, (7, 5), stride=(2, 2)), {}, {"count": (4, 3), "stride": (2, 2)}),
    "even size, stride 2": (place(3, 4, (6, 4), stride=(2, 2)), {}, {"count": (3, 2), "stride": (2, 2)}),
    "dilation": (place(3, 4, (7, 6), dilation=(2, 2)), {}, {"dilation": (2, 2)}),
    "even window": (place(3, 4, (5, 6)), {"window": 4}, {"window": 4}),
    "even conv kernel": (place(3, 4, (5, 4)), {"kernel_conv": 2}, {"kernel_conv": 2}),
    "no padding": (place(3, 4, (7, 6), padding=(0, 0, 0, 0)), {}, {"start": (1, 1), "count": (5, 4)}),
    "no padding, kernel 5, stride 2": (
        place(3, 4, (9, 8), kernel=5, padding=(0, 0, 0, 0), stride=(2, 2)),
        {"window": 3},
        {"window": 3, "start": (2, 2), "count": (3, 2), "stride": (2, 2)},
    ),
    "uneven padding": (place(3, 4, (5, 5), padding=(0, 1, 1, 0)), {}, {"start": (0, 1), "count": (4, 4)}),
    "kernel 1, stride 2": (place(3, 4, (5, 4), kernel=1, stride=(2, 2)), {}, {"count": (3, 2), "stride": (2, 2)}),
    "1 x 1": (place(3, 4, (1, 1)), {}, {}),
    "2 x 3": (place(3, 4, (2, 3)), {}, {}),
}


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_equation_pixel_by_pixel(name: str, heads: int) -> None:
    where, options, geometry = CASES[name]
    block = build(where, heads=heads, **options)
    x = torch.randn(where.in_shape, dtype=torch.float64)
    want = loop_acmix(dict(block.state_dict()), x, heads=heads, **geometry)
    assert tuple(want.shape) == where.out_shape
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


def test_padding_beyond_same_is_zeros_around_the_input() -> None:
    where = place(3, 4, (4, 3), padding=(2, 3, 1, 2))
    block = build(where, heads=2)
    x = torch.randn(where.in_shape, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (1, 2, 0, 1))
    want = loop_acmix(dict(block.state_dict()), padded, heads=2)
    assert tuple(want.shape) == where.out_shape
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("size", [(9, 8), (24, 24)], ids=["whole map", "tiles"])
@pytest.mark.parametrize("stride", [1, 2])
def test_equals_the_plain_unfolded_form(size: tuple[int, int], stride: int) -> None:
    where = place(6, 8, size, batch=2, stride=(stride, stride))
    block = build(where, heads=4)
    x = torch.randn(where.in_shape, dtype=torch.float64)
    want = unfold_acmix(dict(block.state_dict()), x, heads=4, stride=stride)
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


def test_gradients_equal_the_plain_unfolded_form_s() -> None:
    where = place(4, 4, (20, 19), stride=(2, 2))
    block = build(where, heads=2)
    x = torch.randn(where.in_shape, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*block.named_parameters(), strict=True)
    ours = torch.autograd.grad(block(x).square().sum(), [x, *parameters])
    plain = unfold_acmix(dict(zip(names, parameters, strict=True)), x, heads=2, stride=2)
    want = torch.autograd.grad(plain.square().sum(), [x, *parameters])
    for name, got, expected in zip(("x", *names), ours, want, strict=True):
        assert got.shape == expected.shape, name
        torch.testing.assert_close(got, expected, **GRADIENT)


def test_gradients_are_those_of_finite_differences() -> None:
    block = build(place(2, 2, (3, 4), stride=(2, 1)), heads=2, window=3, kernel_conv=2)
    names, parameters = zip(*block.named_parameters(), strict=True)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_a_transposed_map_with_transposed_weights_gives_the_transposed_result() -> None:
    where = place(3, 4, (6, 5))
    block, turned = build(where, heads=2), build(where, heads=2)
    with torch.no_grad():
        turned.conv_p.weight.copy_(block.conv_p.weight.flip(1))
        turned.dep_conv.weight.copy_(block.dep_conv.weight.transpose(2, 3))
    x = torch.randn(where.in_shape, dtype=torch.float64)
    torch.testing.assert_close(turned(x.mT), block(x).mT, **TOLERANCE[x.dtype])
    turned.conv_p.weight.data.copy_(block.conv_p.weight)  # axes not told apart
    assert not torch.allclose(turned(x.mT), block(x).mT)


def test_starts_as_the_paper_s_shifts_and_half_rates() -> None:
    block = ACmix(place(8, 8, (5, 5)), ACmixOptions(heads=2))
    assert block.dep_conv.weight.shape == (8, 9, 3, 3)
    for tap in range(9):
        assert block.dep_conv.weight[3, tap].flatten().tolist() == [float(i == tap) for i in range(9)]
    assert block.rate1.tolist() == block.rate2.tolist() == [0.5]
    assert block.dep_conv.bias is None
    assert block.fc.bias is None


def test_resnet50_has_the_parameters_of_the_authors_code() -> None:
    total = 25_557_032  # torchvision's resnet50
    for channels, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        where = place(channels, channels, (7, 7))
        count = sum(p.numel() for p in ACmix(where, ACmixOptions()).parameters())
        assert count == ACmix.cost(where, ACmixOptions()).params
        total += blocks * (count - 9 * channels**2)
    assert total == 18_333_976


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Most bytes of tensors made under it that were alive at once; `given` (inputs, parameters) do not count."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.given = given
        self.seen = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


COSTED = {
    "28 x 28": place(64, 64, (28, 28), batch=2),
    "stride 2": place(32, 64, (29, 28), batch=2, stride=(2, 2)),
    "14 x 14": place(64, 128, (14, 14), batch=2),
    "no padding": place(64, 64, (30, 29), batch=2, padding=(0, 0, 0, 0)),
    "batch 8, in pieces": place(64, 128, (14, 14), batch=8),
    "batch 3, an image each": place(64, 256, (28, 28), batch=3),
}


@pytest.mark.parametrize("name", ["28 x 28", "14 x 14"])
def test_flops_are_torch_s_count_of_the_docstring_s_products(name: str) -> None:
    where, options = COSTED[name], ACmixOptions()
    batch, c_in, height, width = where.in_shape
    c_out, heads, dim = where.out_shape[1], 4, where.out_shape[1] // 4
    x = torch.empty(where.in_shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        qkv = torch.nn.functional.conv2d(x, x.new_empty(3 * c_out, c_in, 1, 1))
        torch.nn.functional.conv2d(x.new_empty(1, 2, height, width), x.new_empty(dim, 2, 1, 1))
        torch.nn.functional.conv2d(qkv, x.new_empty(c_out, 3 * heads, 3, 3), padding=1, groups=dim)
        pixels = batch * heads * height * width
        weights = torch.bmm(x.new_empty(pixels, 1, dim), x.new_empty(pixels, dim, 49))
        torch.bmm(weights, x.new_empty(pixels, 49, dim))
        torch.mm(x.new_empty(c_out * 9, 9), x.new_empty(9, 3 * heads))
    assert ACmix.cost(where, options).flops == counter.get_total_flops()


@pytest.mark.parametrize("name", COSTED)
def test_activation_bytes_are_those_measured_of_the_aten_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVREWRITE_BACKEND", "aten")
    where, options = COSTED[name], ACmixOptions()
    block, x = ACmix(where, options), torch.randn(where.in_shape)
    cost = ACmix.cost(where, options)
    with torch.no_grad(), LiveBytes([x, *block.parameters()]) as live:
        block(x)
    assert cost.act_infer == pytest.approx(live.peak, rel=0.05)
    kept = {}
    own = {p.untyped_storage()._cdata for p in [*block.parameters(), x]}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and tensor.is_floating_point():
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block(x)
    assert cost.act_train == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.05)
    del y


REFUSED: dict[str, tuple[Place, dict[str, Any]]] = {
    "64 channels not divisible by 6 heads": (place(64, 64, (8, 8)), {"heads": 6}),
    "convolution has 2 groups, acmix mixes all channels (groups must be 1)": (place(8, 8, (8, 8), groups=2), {}),
    "padding_mode 'reflect', acmix's convolution path pads with zeros": (
        place(8, 8, (8, 8), padding_mode="reflect"),
        {},
    ),
    "acmix can only replace a convolution, not be inserted": (Place((1, 8, 8, 8), (1, 8, 8, 8)), {}),
    "the convolution's output is empty (0 x 0)": (Place((1, 8, 2, 2), (1, 8, 0, 0), ConvSpec(8, 8, (3, 3))), {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_value_that_is_wrong(reason: str) -> None:
    where, options = REFUSED[reason]
    assert ACmix.refuse(where, ACmixOptions(**options)) == reason


@pytest.mark.parametrize("name", CASES)
def test_takes_every_place_of_this_file(name: str) -> None:
    where, options, _ = CASES[name]
    assert ACmix.refuse(where, ACmixOptions(heads=2, **options)) is None


@pytest.fixture
def authors() -> ModuleType:
    """The authors' module, from a checkout of LeapLabTHU/ACmix under $CONVREWRITE_PEERS/ACmix."""
    root = os.environ.get("CONVREWRITE_PEERS")
    if not root:
        pytest.skip("CONVREWRITE_PEERS is not set")
    path = Path(root) / "ACmix" / "ResNet" / "test_bottleneck.py"
    spec = importlib.util.spec_from_file_location("authors_acmix", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    original = module.position

    def position(height: int, width: int, is_cuda: bool) -> Tensor:
        torch.set_default_dtype(torch.float64)  # the coordinates are made in the default dtype
        try:
            result: Tensor = original(height, width, is_cuda)
        finally:
            torch.set_default_dtype(torch.float32)
        return result

    module.position = position
    result: ModuleType = module
    return result


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 24])
def test_equals_the_authors_code_from_its_own_state_dict(authors: ModuleType, size: int, stride: int) -> None:
    theirs = authors.ACmix(8, 16, stride=stride).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = build(place(8, 16, (size, size), stride=(stride, stride)))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, size, size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE[x.dtype])


@pytest.mark.parametrize("options", [{}, {"layout": "ordered", "rates": "channel"}, {"window": 3, "kernel_conv": 5}])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_few_images_at_a_time_is_all_at_once(
    options: dict[str, object], stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVREWRITE_BACKEND", "aten")
    monkeypatch.setattr("convrewrite.blocks.acmix.PIECE_ELEMENTS", 2 * 3 * 16 * 9 * 8)  # two images
    block = ACmix(place(8, 16, (9, 8), batch=5, stride=(stride, stride)), ACmixOptions(**options)).double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 8, 9, 8, dtype=torch.float64)
    for image in (x, x.to(memory_format=torch.channels_last), x[:0]):
        whole = block(image)
        with torch.no_grad():
            pieces = block(image)
        torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
        assert pieces.stride() == whole.stride()
