"""`convrewrite bench models`: whole networks, the original against the rewritten one and against the authors'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.bench.calls import Call, compiled, forced
from convrewrite.bench.memory import peak_bytes
from convrewrite.bench.networks import NETWORKS
from convrewrite.bench.results import About, Comparison, Result, device_name
from convrewrite.bench.targets import judge
from convrewrite.bench.timing import Clock, Spread, alternate, ratios

INFERENCE, STEP = "inference", "training step"


@dataclass(frozen=True)
class Request:
    """What to measure and how; as `convrewrite.bench.blocks.Request` where the names are the same.

    Attributes:
        model: as for `convrewrite plan`. rules: a rule file or the name of a built-in one.
        start: how the edits start. "exact" keeps the replaced convolutions running beside the blocks.
        input: (channels, height, width); the model's own if None.
    """

    model: str = "resnet50"
    rules: str = "acmix"
    start: str = "fresh"
    input: tuple[int, int, int] | None = None
    batch: int = 8
    rounds: int = 5
    threads: int = 1
    device: str = "cpu"
    clock: Clock = "wall"
    compile: bool = False
    backends: tuple[str | None, ...] = (None,)
    peers: Path | None = None
    command: str = ""


@dataclass(frozen=True)
class _Entry:
    name: str
    kind: str
    mode: str
    backend: str
    calls: dict[str, Call]


def run(request: Request, progress: Callable[[str], None] = lambda name: None) -> Result:
    """Measure. Sets and restores torch's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.threads)
    left_out: list[str] = []
    try:
        comparisons = list(_measure(request, progress, left_out))
    finally:
        torch.set_num_threads(before)
    device = device_name(torch.device(request.device))
    about = About(
        request.command, device, request.threads, torch.__version__, request.batch, request.rounds, request.clock
    )
    return Result(about, tuple(comparisons), judge(comparisons), tuple(left_out))


def _measure(request: Request, progress: Callable[[str], None], left_out: list[str]) -> Iterator[Comparison]:
    original, rewritten, shape = _pair(request)
    x = torch.randn(request.batch, *shape, generator=torch.Generator().manual_seed(0)).to(request.device)
    device = torch.device(request.device)
    ours = list(_entries(request.rules, "rewritten", rewritten, x, request))
    others = [e for e in _entries("original", "original", original, x, request) if e.backend == ours[0].backend]
    others += _authors(x, request, left_out)
    subject, place = f"{request.model} with {request.rules}", "x".join(map(str, shape))
    for measure in (INFERENCE, STEP):
        progress(measure)
        calls = {str(i): entry.calls[measure] for i, entry in enumerate([*ours, *others])}
        times = alternate(calls, rounds=request.rounds, device=device, clock=request.clock)
        peaks = {key: peak_bytes(call, device) for key, call in calls.items()}
        for i, mine in enumerate(ours):
            for j, other in enumerate(others, start=len(ours)):
                if other.kind == "original" and other.mode != mine.mode:
                    continue
                a, b = str(i), str(j)
                who = subject, place, mine.mode, mine.backend
                middle = Spread.of(times[a]).median, Spread.of(times[b]).median
                yield Comparison(*who, measure, other.name, other.kind, *middle, ratios(times[a], times[b]))
                ratio = peaks[a] / max(peaks[b], 1)
                same = Spread(ratio, ratio, ratio)
                yield Comparison(*who, f"memory {measure}", other.name, other.kind, peaks[a], peaks[b], same)


def _pair(request: Request) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """(original, rewritten, shape of an image)."""
    from convrewrite.pipeline import rewrite
    from convrewrite.sources import resolve

    wanted = (1, *request.input) if request.input else None
    source = resolve(request.model, input=wanted)
    example = source.example if wanted is None else wanted
    rewritten = rewrite(source.model, request.rules, start=request.start, example=example).model
    shape = tuple(_image(example))
    return source.model.to(request.device), rewritten.to(request.device), shape


def _image(example: object) -> tuple[int, ...]:
    """(channels, height, width) of the planned input."""
    from convrewrite.pipeline import DEFAULT_SHAPE

    if isinstance(example, tuple | list) and example and isinstance(example[0], int):
        return tuple(example[1:])
    first = example[0] if isinstance(example, tuple | list) and example else example
    return tuple(first.shape[1:]) if isinstance(first, Tensor) else DEFAULT_SHAPE[1:]


def _entries(name: str, kind: str, model: nn.Module, x: Tensor, request: Request) -> Iterator[_Entry]:
    for backend in request.backends:
        label = backend or "auto"
        yield _Entry(name, kind, "eager", label, calls_of_network(model, x, backend))
        if request.compile:
            yield _Entry(name, kind, "compiled", label, calls_of_network(compiled(model), x, backend))


def _authors(x: Tensor, request: Request, left_out: list[str]) -> Iterator[_Entry]:
    for network in NETWORKS:
        if network.rules != request.rules or request.model != "resnet50":
            continue
        reason = network.absent(request.peers)
        if reason:
            left_out.append(f"{network.name}: {reason}")
            continue
        model = network.build(request.peers).to(request.device)
        yield _Entry(network.name, "peer" if network.folder else "plain", "eager", "auto", calls_of_network(model, x))


def calls_of_network(model: nn.Module, x: Tensor, backend: str | None = None) -> dict[str, Call]:
    """A forward pass in inference, and a training step: forward, cross-entropy, backward, SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    labels = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def inference() -> None:
        model.eval()
        with forced(backend), torch.no_grad():
            model(x)

    def step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with forced(backend):
            loss = F.cross_entropy(model(x), labels)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return {INFERENCE: inference, STEP: step}
