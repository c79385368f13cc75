"""`convrewrite bench blocks`: every block at every shape against a 3 x 3 convolution and against other code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from convrewrite.bench import peers as _peers  # noqa: F401  # adds its baselines
from convrewrite.bench import plain as _plain  # noqa: F401
from convrewrite.bench.baselines import BASELINES, Baseline
from convrewrite.bench.calls import Call, calls_of, compiled
from convrewrite.bench.contenders import Contender, Shape, contenders
from convrewrite.bench.memory import peak_bytes
from convrewrite.bench.results import CONV, About, Comparison, Result, device_name
from convrewrite.bench.targets import judge
from convrewrite.bench.timing import Clock, Spread, alternate, ratios

SHAPES = (Shape(64, 56), Shape(128, 28), Shape(256, 14), Shape(512, 7))


@dataclass(frozen=True)
class Request:
    """What to measure and how.

    Attributes:
        names: of blocks or variants; all if empty. backends: None stands for the package's own choice.
        compile, compile_others: also measure the block, and the baselines, under `torch.compile`.
        peers: folder of checkouts, by repository name. command: what the user typed, for the record.
    """

    names: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] = SHAPES
    batch: int = 8
    rounds: int = 9
    threads: int = 1
    device: str = "cpu"
    clock: Clock = "wall"
    compile: bool = False
    compile_others: bool = False
    backends: tuple[str | None, ...] = (None,)
    peers: Path | None = None
    command: str = ""

    def about(self) -> About:
        return About(
            self.command,
            device_name(torch.device(self.device)),
            self.threads,
            torch.__version__,
            self.batch,
            self.rounds,
            self.clock,
        )


@dataclass(frozen=True)
class _Entry:
    """One module in the rounds: who it is and its two calls."""

    name: str
    kind: str
    mode: str
    backend: str
    calls: dict[str, Call]


def run(request: Request, progress: Callable[[str], None] = lambda name: None) -> Result:
    """Measure. Sets and restores torch's number of threads; the models and inputs are random, seeded."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.threads)
    comparisons: list[Comparison] = []
    left_out: list[str] = []
    try:
        for shape in request.shapes:
            for contender in contenders(request.names):
                progress(f"{contender.name} {shape}")
                comparisons += _contest(contender, shape, request, left_out)
    finally:
        torch.set_num_threads(before)
    return Result(request.about(), tuple(comparisons), judge(comparisons), tuple(left_out))


def _contest(contender: Contender, shape: Shape, request: Request, left_out: list[str]) -> list[Comparison]:
    refusal = contender.refuses(shape, request.batch)
    if refusal:
        left_out.append(f"{contender.name} {shape}: {refusal}")
        return []
    torch.manual_seed(0)
    x = torch.randn(request.batch, shape.channels, shape.side, shape.side, device=request.device)
    ours = list(_ours(contender, shape, x, request))
    others = list(_others(contender, shape, x, request, left_out))
    device = torch.device(request.device)
    found: list[Comparison] = []
    for measure in ours[0].calls:
        entries = {str(i): entry for i, entry in enumerate([*ours, *others])}
        calls = {key: entry.calls[measure] for key, entry in entries.items()}
        times = alternate(calls, rounds=request.rounds, device=device, clock=request.clock)
        peaks = {key: peak_bytes(call, device) for key, call in calls.items()}
        for i, entry in enumerate(ours):
            for j, other in enumerate(others, start=len(ours)):
                who = contender.name, str(shape), entry.mode, entry.backend
                against = measure, other.name, other.kind
                found.append(_timed(who, against, times[str(i)], times[str(j)]))
                found.append(_peaked(who, against, peaks[str(i)], peaks[str(j)]))
    return found


def _timed(
    who: tuple[str, str, str, str], against: tuple[str, str, str], ours: list[float], theirs: list[float]
) -> Comparison:
    spread = ratios(ours, theirs)
    return Comparison(*who, *against, Spread.of(ours).median, Spread.of(theirs).median, spread)


def _peaked(who: tuple[str, str, str, str], against: tuple[str, str, str], ours: int, theirs: int) -> Comparison:
    measure, name, kind = against
    ratio = ours / max(theirs, 1)
    return Comparison(*who, f"memory {measure}", name, kind, ours, theirs, Spread(ratio, ratio, ratio))


def _ours(contender: Contender, shape: Shape, x: Tensor, request: Request) -> Iterator[_Entry]:
    for backend in request.backends:
        label = backend or "auto"
        block = contender.build(shape, request.batch).to(request.device)
        yield _Entry(contender.name, "ours", "eager", label, calls_of(block, x, backend))
        if request.compile:
            yield _Entry(contender.name, "ours", "compiled", label, calls_of(compiled(block), x, backend))


def _others(contender: Contender, shape: Shape, x: Tensor, request: Request, left_out: list[str]) -> Iterator[_Entry]:
    channels, side = shape.channels, shape.side
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(request.device)
    yield _Entry(CONV, CONV, "eager", "auto", calls_of(conv, x))
    for other in _baselines(contender):
        reason = other.absent(request.peers, request.batch, channels, side)
        if reason:
            left_out.append(f"{contender.name} {shape} against {other.name}: {reason}")
            continue
        module = other.build(channels, side, request.peers).to(request.device)
        yield _Entry(other.name, other.kind, "eager", "auto", calls_of(module, x))
        if request.compile_others:
            whole = calls_of(torch.compile(module, dynamic=False), x)  # type: ignore[arg-type]
            yield _Entry(f"{other.name}, compiled", other.kind, "compiled", "auto", whole)


def _baselines(contender: Contender) -> Sequence[Baseline]:
    return [other for other in BASELINES if other.subject == contender.name]
