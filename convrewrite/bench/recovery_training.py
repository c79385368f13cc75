"""One run of the recovery study: where it begins, how it is trained, what is measured on the way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.bench.fits import accuracy, small_resnet
from convrewrite.bench.recovery_setting import Entry, Run, Study
from convrewrite.finalizing import blends_of, drop_convolutions
from convrewrite.pipeline import rewrite
from convrewrite.ruleschema import Rule
from convrewrite.training import losses
from convrewrite.training.annealing import Annealer
from convrewrite.training.ema import Averaged
from convrewrite.training.groups import kinds_of, param_groups
from convrewrite.training.settings import Settings, settings_from
from convrewrite.training.solving import solve_blends
from convrewrite.training.timetable import timetable

Digits = tuple[Tensor, Tensor]

MARKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
"""Shares of the steps after which the accuracy is measured, besides step 0."""

TEST_NOISE = 20_000
"""Seed of the noise on the test images: the same for every run."""


@dataclass(frozen=True)
class Course:
    """What became of a run.

    Attributes:
        points: (step, accuracy of the averaged weights) at each mark. last: (step, accuracy of the weights themselves).
        params: parameters at the end. alone: the step from which on no blend holds a convolution any more.
    """

    points: list[tuple[int, float]]
    last: list[tuple[int, float]]
    params: int
    alone: int


def recipe(setting: Study, condition: str) -> Settings:
    """How a condition is trained: the defaults of `finetune`, with the original's outputs as a second target.

    Random attention, and a network where all is random, have the rates that are best for them and the labels alone,
    and train all from the first step on.
    """
    shared = {"steps": setting.steps, "smoothing": 0.0}
    if condition == "random":
        return settings_from({**shared, "lr": setting.random_lr, "new_first": 0.0})
    if condition == "scratch":
        return settings_from({**shared, "lr": setting.scratch_lr, "new_lr": 1.0, "new_first": 0.0})
    return settings_from({**shared, "lr": setting.lr, "imitate": 1.0, "solve": setting.calibrate})


def trained(setting: Study, digits: Digits, model: nn.Module, original: nn.Module, run: Run) -> Course:
    """Train `model` in place as the recipe of the run's condition says."""
    settings = recipe(setting, run.condition)
    table = timetable(settings, "finetune", setting.steps, blockwise=False)
    torch.manual_seed(run.seed)
    fitter = _Fitter(model, settings)
    assert table.fade is not None
    annealer = Annealer(model, table.fade, settings.schedule)
    test, marks = test_set(setting, digits), marks_of(setting.steps)
    found = [(0, accuracy(model, *test))]
    points, last = list(found), list(found)
    for step, (images, labels) in enumerate(batches(setting, digits, run.seed, setting.steps)):
        fitter.modes(new_only=table.phase(step) == "new")
        logits = model(images)
        loss = losses.cross_entropy(logits, labels, settings.smoothing)
        if settings.imitate:
            with torch.no_grad():
                wanted = original(images)
            loss = loss + settings.imitate * losses.divergence(logits, wanted, settings.temperature)
        fitter.step(loss, table.rate(step), new_only=table.phase(step) == "new")
        annealer.step()
        fitter.average.update(model, step + 1)
        if step + 1 in marks:
            points.append((step + 1, accuracy(fitter.average.model, *test)))
            last.append((step + 1, accuracy(model, *test)))
    blends = blends_of(model)
    alone = 0 if not blends else table.fade
    model = drop_convolutions(model, blends)
    return Course(points, last, sum(p.numel() for p in model.parameters()), alone)


class _Fitter:
    """Optimizer, phases and average of one run, in the few lines that a loop of one's own would have."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        groups = param_groups(
            model,
            lr=settings.lr,
            new_multiplier=settings.new_lr,
            fitted_multiplier=settings.fitted_lr,
            weight_decay=settings.weight_decay,
        )
        kinds = kinds_of(model)
        self.carried = [p for name, p in model.named_parameters() if kinds[name] == "carried"]
        names = {name.rpartition(".")[0] for name, kind in kinds.items() if kind == "carried"}
        self.norms = [m for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and path in names]
        self.whole = len(self.carried) == len(kinds)
        self.optimizer = torch.optim.AdamW(groups)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = Averaged(model, settings.ema)

    def modes(self, *, new_only: bool) -> None:
        """Train mode; while new parts alone are trained, carried norms keep their statistics."""
        self.model.train()
        if new_only and not self.whole:
            for norm in self.norms:
                norm.eval()

    def step(self, loss: Tensor, rate: float, *, new_only: bool) -> None:
        """Backward, clip, one step at `rate` times each group's rate."""
        loss.backward()  # type: ignore[no-untyped-call]
        if new_only and not self.whole:
            for parameter in self.carried:
                parameter.grad = None
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * rate
        self.optimizer.step()
        self.optimizer.zero_grad()


def begun(setting: Study, digits: Digits, original: nn.Module, run: Run, entry: Entry | None) -> nn.Module:
    """The network of a run at step 0."""
    if entry is None:
        return copy.deepcopy(original)
    if run.condition == "scratch":
        torch.manual_seed(run.seed + 1)
        original = small_resnet(setting.width)
    start = run.condition if run.condition in entry.starts else "fresh"
    images: Tensor | None = None
    if run.condition in entry.starts and not entry.insert and len(digits[0]):
        few = replace(setting, batch=setting.calibrate)
        images = next(batches(few, digits, run.seed + 2000, 1))[0]
    match = {"kernel": 3, "stride": 1, "in_channels": ">1"}
    change = {"block": entry.block, **entry.options}
    if entry.insert:
        rule = Rule(id="two", match=match, pick={"last": 2}, insert={**change, "after": "here"}, start=start)
    else:
        rule = Rule(id="all", match=match, replace=change, start=start)
    model = rewrite(
        original,
        rule,
        example=setting.shape,
        seed=run.seed,
        calibrate=images if start == "fitted" else None,
        calibrate_images=setting.calibrate,
        force=True,
    ).model
    if entry.insert and run.condition == "random":
        open_gates(model, run.seed)
    if start == "exact" and images is not None:
        solve_blends(model, images, seed=run.seed)
    return model


def open_gates(model: nn.Module, seed: int) -> None:
    """Let inserted blocks, which are the identity at first, take part: gates become 1, zero weights are drawn."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".convrewrite_" not in name or name.endswith("bias") or bool(parameter.detach().count_nonzero()):
            continue
        if parameter.ndim > 1:
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
        else:
            nn.init.ones_(parameter)


def trained_original(setting: Study, digits: Digits, seed: int) -> nn.Module:
    """The network that every run of a seed starts from: small_resnet, trained from scratch."""
    torch.manual_seed(seed)
    model = small_resnet(setting.width)
    steps = setting.original_steps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    model.train()
    for images, labels in batches(setting, digits, seed + 1000, steps):
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def batches(setting: Study, digits: Digits, seed: int, steps: int) -> Iterator[Digits]:
    """Training batches (B, 1, side, side): shifted by up to two pixels, shrunk, with fresh noise; drawn by the seed."""
    images, labels = digits[0][: setting.train], digits[1][: setting.train]
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < setting.batch:
            order += torch.randperm(len(images), generator=generator).tolist()
        index, order = order[: setting.batch], order[setting.batch :]
        down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
        yield _noisy(images[index].roll((down, right), (2, 3)), setting, generator), labels[index]


def test_set(setting: Study, digits: Digits) -> Digits:
    """The images that no run is trained on, with noise that is always the same."""
    generator = torch.Generator().manual_seed(TEST_NOISE)
    images, labels = (part[setting.train : setting.train + setting.test] for part in digits)
    return _noisy(images, setting, generator), labels


def _noisy(images: Tensor, setting: Study, generator: torch.Generator) -> Tensor:
    small = F.avg_pool2d(images, setting.shrink)
    return small + setting.noise * torch.randn(small.shape, generator=generator)


def marks_of(steps: int) -> list[int]:
    """After how many steps the accuracy is measured, besides 0."""
    return sorted({max(1, round(share * steps)) for share in MARKS})
