"""Fits against optima found in other ways: brute force on explicit patches, singular values, kernels of the family."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.blocks.base import BLOCKS, Block, conv_spec
from convrewrite.blocks.sasa import SASAOptions
from convrewrite.calibration.moments import Sums, draw, patches
from convrewrite.errors import ConvrewriteError
from convrewrite.fits.base import FITS, can_fit, fit_of, refuse_fit
from convrewrite.fits.target import CORRELATION, Target, Window, prior
from convrewrite.fits.wide import best_mix, best_patterns, spread_groups
from convrewrite.sites import Place

OPTIONS: dict[str, dict[str, Any]] = {
    "acmix": {"heads": 4},
    "sasa_wide": {"heads": 4},
    "outlook_wide": {"heads": 4},
    "outlook": {"heads": 4},
    "sasa": {"heads": 2, "window": 3},
    "aa_conv": {"heads": 2, "upsilon": 0.25, "outputs": "chosen"},
}


def convolution(channels: int = 8, out: int = 8, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, **{"kernel_size": 3, "padding": 1, **settings}, dtype=torch.float64)


def built(name: str, conv: nn.Conv2d, side: int = 10, **options: Any) -> Block:
    spec = conv_spec(conv)
    place = Place((1, spec.in_channels, side, side), (1, spec.out_channels, *spec.out_size(side, side)), spec)
    cls = BLOCKS.get(name)
    return cls(place, cls.Options(**options)).double()


def smooth(count: int, channels: int, side: int = 10) -> Tensor:
    """Images with the correlations and the positive mean of activations."""
    noise = torch.randn(count, channels, side + 4, side + 4, dtype=torch.float64)
    mixed = torch.einsum("dc,nchw->ndhw", torch.randn(channels, channels, dtype=torch.float64), noise)
    return F.relu(F.avg_pool2d(mixed, 5, 1) + 0.1)


def seen(conv: nn.Conv2d, images: Tensor, window: Window, *, scale: Tensor | None = None) -> Target:
    """The target of `conv` on all patches of `images`, its own output being what is wanted."""
    y = conv(images).detach()
    at = draw((y.shape[0], y.shape[2], y.shape[3]), 10**9, torch.Generator())
    sums = Sums.empty(y.shape[1], images.shape[1], window.taps, full=True)
    sums.add(patches(images, conv_spec(conv), window, at), y[at[:, 0], :, at[:, 1], at[:, 2]])
    return sums.target(conv, window, torch.ones(y.shape[1], dtype=torch.float64) if scale is None else scale, 1e-9)


def fitted(name: str, conv: nn.Conv2d, images: Tensor | None, **options: Any) -> tuple[Block, float]:
    block, spec, fit = built(name, conv, **options), conv_spec(conv), FITS.get(name)
    window = fit.window(spec, block.options)
    target = prior(conv.weight, conv.bias, spec, window) if images is None else seen(conv, images, window)
    return block, fit.solve(block, spec, target)


def measured(conv: nn.Conv2d, block: Block, images: Tensor) -> float:
    with torch.no_grad():
        y, ours = conv(images), block(images)
    return float((y - ours).square().sum() / (y - y.mean((0, 2, 3), keepdim=True)).square().sum())


@pytest.mark.parametrize("window", [(3, 3), (5, 5), (1, 1)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"padding_mode": "reflect"}, {"padding": 0}, {"padding": 3}],
)
def test_patches_are_what_the_convolution_multiplies(settings: dict[str, Any], window: tuple[int, int]) -> None:
    conv = convolution(3, 2, **settings)
    x, spec = torch.randn(2, 3, 9, 8, dtype=torch.float64), conv_spec(conv)
    over = Window.over(spec, window)
    assert over is not None
    y = conv(x)
    at = draw((2, y.shape[2], y.shape[3]), 10**9, torch.Generator())
    kernel = over.place(conv.weight.detach())
    got = torch.einsum("nct,oct->no", patches(x, spec, over, at)[:, :-1], kernel) + conv.bias
    if window == (1, 1):
        centre = torch.zeros_like(conv.weight)
        centre[:, :, 1, 1] = conv.weight[:, :, 1, 1]
        y = conv._conv_forward(x, centre, conv.bias)
    wanted = y[at[:, 0], :, at[:, 1], at[:, 2]]
    assert float((got - wanted).detach().abs().max()) < 1e-12


def test_the_border_channel_is_one_on_the_map_and_zero_in_the_padding() -> None:
    conv = convolution(1, 1)
    over = Window.over(conv_spec(conv), (3, 3))
    assert over is not None
    corner = patches(torch.randn(1, 1, 4, 4), conv_spec(conv), over, torch.tensor([[0, 0, 0]]))[0, -1]
    assert corner.tolist() == [0, 0, 0, 0, 1, 1, 0, 1, 1]


def test_a_window_between_the_taps_is_no_window() -> None:
    even = conv_spec(convolution(kernel_size=2, dilation=2, padding=1))
    assert Window.over(even, (3, 3)) is None
    assert Window.over(even, (2, 2)) is not None


@pytest.mark.parametrize("layout", ["authors", "ordered"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_acmix_finds_a_kernel_of_its_own_family(heads: int, layout: str) -> None:
    torch.manual_seed(heads)
    conv = convolution(bias=False)
    rank = min(9, 3 * heads)
    dim = 8 // heads
    groups = torch.einsum("gnju,gjc->gncu", torch.randn(dim, heads, rank, 9), torch.randn(dim, rank, 8)).double()
    groups = groups if layout == "authors" else groups.transpose(0, 1)
    conv.weight.data = groups.reshape(8, 8, 3, 3)
    block, expected = fitted("acmix", conv, None, heads=heads, layout=layout)
    x = smooth(2, 8)
    assert expected < 1e-10
    assert measured(conv, block, x) < 1e-9


@pytest.mark.parametrize("heads", [2, 4])
def test_acmix_without_images_is_the_optimum_that_eckart_and_young_state(heads: int) -> None:
    """A group's whitened kernel keeps its largest singular values: what is lost is the sum of the others squared."""
    torch.manual_seed(0)
    conv = convolution(16, 16, bias=False)
    _, expected = fitted("acmix", conv, None, heads=heads)
    line = torch.tensor([[CORRELATION ** abs(i - j) for j in range(3)] for i in range(3)], dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.kron(line, line))
    lost = total = 0.0
    for group in conv.weight.detach().view(16 // heads, heads, 16, 9):
        values = torch.linalg.svdvals((group @ factor).transpose(1, 2).reshape(heads * 9, 16)).square()
        lost, total = lost + float(values[min(9, 3 * heads) :].sum()), total + float(values.sum())
    assert expected == pytest.approx(lost / total, rel=1e-6)


def test_acmix_gives_the_constant_through_its_projections() -> None:
    torch.manual_seed(0)
    conv, images = convolution(16, 16), smooth(24, 16)
    block, expected = fitted("acmix", conv, images, heads=4)
    assert conv.bias is not None and float(conv.bias.detach().abs().max()) > 0.01
    with torch.no_grad():
        wanted = conv(images)
        gap = (wanted - block(images)).mean((0, 2, 3))
    assert float(gap.abs().max()) < 0.02 * float(wanted.std())
    assert expected < 0.2


@pytest.mark.parametrize("name", ["acmix", "sasa_wide", "outlook_wide"])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"stride": 2}, {"dilation": 2, "padding": 2}])
def test_the_expected_error_is_the_measured_one(name: str, settings: dict[str, Any]) -> None:
    """On the very images of the fit, borders included."""
    torch.manual_seed(1)
    conv, images = convolution(16, 16, **settings), smooth(12, 16)
    block, expected = fitted(name, conv, images, **OPTIONS[name])
    assert expected > 1e-5
    assert measured(conv, block, images) == pytest.approx(expected, rel=1e-4)


def test_more_full_width_heads_are_never_worse_and_nine_are_exact() -> None:
    torch.manual_seed(2)
    conv, images = convolution(), smooth(12, 8)
    errors = [fitted("sasa_wide", conv, images, heads=heads)[1] for heads in range(2, 10)]
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-9 < 1e-3 < errors[0]


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_mix_is_the_least_squares_solution_on_explicit_patches(groups: int) -> None:
    torch.manual_seed(3)
    conv, images = convolution(groups=groups), smooth(8, 8)
    target = seen(conv, images, Window.of_kernel(conv_spec(conv)))
    patterns = torch.rand(3, 9, dtype=torch.float64).softmax(1)
    mix = best_mix(target, patterns, groups, centred=True)
    at = draw((8, 10, 10), 10**9, torch.Generator())
    phi = patches(images, conv_spec(conv), target.window, at)[:, :-1] @ patterns.t()  # (n, C, M)
    y = conv(images).detach().movedim(1, -1).flatten(0, 2)
    phi, y = phi - phi.mean(0), y - y.mean(0)
    for g, (part, wanted) in enumerate(zip(phi.chunk(groups, 1), y.chunk(groups, 1), strict=True)):
        best = (wanted - part.flatten(1) @ torch.linalg.lstsq(part.flatten(1), wanted).solution).square().sum()
        got = (wanted - part.flatten(1) @ mix.chunk(groups)[g].flatten(1).t()).square().sum()
        assert float(best) > 0 and float(got) == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("groups", [2, 8])
def test_of_a_grouped_convolution_the_moments_within_the_groups_tell_as_much_as_all(groups: int, centred: bool) -> None:
    """They are what is summed where a full covariance would not fit into memory."""
    torch.manual_seed(8)
    conv, images, found = convolution(groups=groups, bias=not centred), smooth(8, 8), []
    spec, window = conv_spec(conv), Window.of_kernel(conv_spec(conv))
    y = conv(images).detach().movedim(1, -1).flatten(0, 2)
    phi = patches(images, spec, window, draw((8, 10, 10), 10**9, torch.Generator()))
    for full in (True, False):
        sums = Sums.empty(8, 8, 9, full=full, groups=groups)
        for part in range(0, len(y), 100):
            sums.add(phi[part : part + 100], y[part : part + 100])
        target = sums.target(conv, window, torch.linspace(0.5, 2, 8).double(), 1e-9)
        assert (target.covariance is None) != full
        patterns = best_patterns(target, 3, groups, centred=centred)
        kernel = spread_groups(best_mix(target, patterns, groups, centred=centred), groups) @ patterns
        bias = target.best_bias(kernel) if centred else torch.zeros(8, dtype=torch.float64)
        found.append((patterns, kernel, torch.tensor(target.nmse(kernel, bias))))
    for ours, whole in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-7)
    assert float(found[0][2]) > 1e-3
    marginals = replace(target, within=None)
    assert target.nmse(kernel, bias) != pytest.approx(marginals.nmse(kernel, bias), rel=1e-3)


def test_augmented_convolution_keeps_the_other_filters_to_the_bit_and_puts_them_in_place() -> None:
    torch.manual_seed(4)
    conv, images = convolution(16, 16), smooth(8, 16)
    block, expected = fitted("aa_conv", conv, images, heads=2, upsilon=0.25, outputs="chosen")
    _, last = fitted("aa_conv", conv, images, heads=2, upsilon=0.25, outputs="last")
    with torch.no_grad():
        y, ours = conv(images), block(images)
    gaps = (y - ours).abs().amax((0, 2, 3))
    assert int((gaps < 1e-12).sum()) == 12
    assert expected <= last


def test_an_aa_conv_that_chooses_nothing_has_the_state_dict_of_its_paper() -> None:
    plain = built("aa_conv", convolution(16, 16), heads=2)
    chosen = built("aa_conv", convolution(16, 16), heads=2, outputs="chosen")
    assert set(chosen.state_dict()) - set(plain.state_dict()) == {"order"}
    chosen.load_state_dict({**plain.state_dict(), "order": torch.arange(16)})
    x = torch.randn(1, 16, 10, 10, dtype=torch.float64)
    assert torch.equal(plain(x), chosen(x))


@pytest.mark.parametrize("name", FITS.names())
def test_a_fit_is_better_than_the_mean_and_leaves_no_parameter_without_gradient(name: str) -> None:
    torch.manual_seed(5)
    conv, images = convolution(), smooth(16, 8)
    block, expected = fitted(name, conv, images, **OPTIONS.get(name, {}))
    assert 0 <= expected < 0.9
    out = block(images)
    assert measured(conv, block, images) < 0.95
    grads = torch.autograd.grad((out * torch.randn_like(out)).sum(), list(block.parameters()), allow_unused=True)
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("name", FITS.names())
def test_a_fit_without_images_needs_none_and_is_the_same_again(name: str) -> None:
    conv = convolution()
    torch.manual_seed(6)
    first, one = fitted(name, conv, None, **OPTIONS.get(name, {}))
    torch.manual_seed(6)
    second, two = fitted(name, conv, None, **OPTIONS.get(name, {}))
    assert one == two and 0 <= one <= 1.0000001
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", FITS.names())
def test_images_make_the_fit_better_than_the_prior_does(name: str) -> None:
    torch.manual_seed(7)
    conv, images = convolution(), smooth(16, 8)
    free, _ = fitted(name, conv, None, **OPTIONS.get(name, {}))
    aware, _ = fitted(name, conv, images, **OPTIONS.get(name, {}))
    assert measured(conv, aware, images) < measured(conv, free, images)


def test_a_fit_of_a_dead_convolution_is_finite() -> None:
    conv = convolution()
    conv.weight.data.zero_()
    for name in FITS.names():
        block, _ = fitted(name, conv, None, **OPTIONS.get(name, {}))
        assert all(bool(torch.isfinite(p).all()) for p in block.parameters()), name


def test_blocks_without_a_fit_and_places_that_cannot_be_fitted_say_why() -> None:
    spec = conv_spec(convolution(stride=2))
    place = Place((1, 8, 10, 10), (1, 8, 5, 5), spec)
    assert refuse_fit("mhsa", place, BLOCKS.get("mhsa").Options()) == "it cannot be solved from a convolution"
    dilated = Place((1, 8, 10, 10), (1, 8, 4, 4), conv_spec(convolution(stride=2, dilation=2)))
    for name, options in {"sasa": {"window": 3}, "outlook": {}}.items():
        reason = refuse_fit(name, dilated, BLOCKS.get(name).Options.model_validate(options))
        assert reason is not None and reason.startswith("stride 2 is made by pooling, which with dilation 2")
        assert can_fit(name, place, BLOCKS.get(name).Options.model_validate(options))
    untold = refuse_fit("sasa", place, SASAOptions(position="none"))
    assert untold is not None and untold.startswith("position none cannot tell offsets apart")
    assert can_fit("sasa", place, SASAOptions(position="none", offset_bias=True))
    assert not can_fit("acmix", Place((1, 8, 4, 4), (1, 8, 4, 4)), BLOCKS.get("acmix").Options())
    assert can_fit("sasa_wide", place, BLOCKS.get("sasa_wide").Options())


def test_a_block_has_one_fit() -> None:
    with pytest.raises(ConvrewriteError, match="registered twice"):
        fit_of("acmix")(lambda block, spec, target: 0.0)
