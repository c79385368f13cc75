"""`convrewrite fuse`: a model for inference, measured against what it was, and exported."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from convrewrite.cli.common import clean_errors, model_options, source_of

from convrewrite.errors import ConvrewriteError

if TYPE_CHECKING:
    from convrewrite.fusing import Fused

WRITERS = (".onnx", ".pt2")
LARGEST = 1e-3
"""Relative difference of the outputs from which on it is no rounding."""

_BECAME = {
    "convolution": "{} x {}: a convolution again",
    "identity": "{} x {}: gate 0, taken out",
    "block": "{} x {}: the block alone",
    "sum": "{} x {}: convolution and block, their shares in the weights",
    "folded": "{} x {}: what depends on weights alone done beforehand",
}


@click.command(name="fuse")
@click.argument("model")
@model_options
@click.option("--out", metavar="FILE", type=click.Path(dir_okay=False), help="Write it: .onnx, or .pt2 (torch.export).")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@click.option("--rounds", type=click.IntRange(0), default=9, show_default=True, help="Timings to take; 0 for none.")
@click.option("--force", is_flag=True, help="Write it even if its output differs by more than rounding.")
@clean_errors
def command(
    model: str,
    weights: str | None,
    input_shape: str | None,
    num_classes: int | None,
    seed: int,
    out: str | None,
    overwrite: bool,
    rounds: int,
    force: bool,
) -> None:
    """Fuse MODEL (as for inspect; a saved folder, say) for inference: what that changes, and how much faster it is.

    Batch norms go into what is before them, blends that are decided into what they decided for, and what depends on
    weights alone is computed beforehand. The result is not saved as a folder, which stays trainable: in Python,
    convrewrite.fuse(convrewrite.load(DIR)) gives it.
    """
    _check(out, overwrite=overwrite)
    from convrewrite.fusing import fuse_model

    source = source_of(model, weights, input_shape, num_classes, seed, meta=False)
    original = source.model.eval()
    example = _example(original, source.example)
    fused = fuse_model(original, example=example)
    _tell(fused)
    gap = _difference(original, fused.model, example)
    click.echo("output: cannot be compared" if gap is None else f"output: differs by {gap:.2g} of its largest value")
    if gap is not None and not gap <= LARGEST and not force:
        what = f"the output differs by {gap:.2g} of its largest value, more than rounding"
        raise ConvrewriteError(what, where=source.name, fix="look at it in Python; --force writes it all the same")
    if rounds:
        _time(original, fused.model, example, rounds)
    if out:
        _write(fused.model, example, Path(out))
        click.echo(f"wrote {out}", err=True)


def _check(out: str | None, *, overwrite: bool) -> None:
    """Before anything is built."""
    if out is None:
        return
    if Path(out).suffix.lower() not in WRITERS:
        fix = "a folder is what 'apply' writes; fuse it after loading"
        raise ConvrewriteError(f"a fused model is written as {' or '.join(WRITERS)}", where=out, fix=fix)
    if Path(out).exists() and not overwrite:
        raise ConvrewriteError("the file is there already", where=out, fix="name another, or --overwrite")


def _example(model: Any, shape: Any) -> tuple[Any, ...]:
    """Noise of the model's input shape, with as many images as were asked for."""
    import torch

    from convrewrite.pipeline import example_of, real_example

    blank = example_of(model, shape)
    if len(blank) == 1 and isinstance(blank[0], torch.Tensor):
        like = next(model.parameters(), torch.empty(0))
        return (torch.randn(blank[0].shape, generator=torch.Generator().manual_seed(0)).to(like),)
    return real_example(model, blank)


def _tell(fused: Fused) -> None:
    norms = [f for f in fused.fusions if f.norm]
    into = sum(1 for f in norms if not f.became)
    parts = [f"{into} into convolutions"] if into else []
    parts += [f"{len(norms) - into} into what was rewritten"] if len(norms) > into else []
    parts += [f"{len(fused.norms_left)} left"] if fused.norms_left else []
    click.echo(f"batch norms: {', '.join(parts) or 'none'}")
    for (name, became), number in Counter((f.name, f.became) for f in fused.fusions if f.became).items():
        click.echo(_BECAME[became].format(number, name))


def _difference(original: Any, fused: Any, example: tuple[Any, ...]) -> float | None:
    """Of the outputs, relative to the largest value; None where they have no equal form (boxes of a detector)."""
    import torch

    from convrewrite.sources.examples import tensors_in

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = [list(tensors_in(model(*example))) for model in (original, fused)]
    worst = 0.0
    for want, got in zip(*outputs, strict=False):
        if want.shape != got.shape or len(outputs[0]) != len(outputs[1]):
            return None
        if want.is_floating_point() and want.numel():
            gap = float((got.double() - want.double()).abs().max())
            worst = max(worst, gap / (float(want.double().abs().max()) or 1.0))
    return worst if outputs[0] else None


def _time(original: Any, fused: Any, example: tuple[Any, ...], rounds: int) -> None:
    import statistics

    import torch

    from convrewrite.bench.timing import alternate, ratios
    from convrewrite.sources.examples import shape_of

    with torch.inference_mode():
        calls = {"before": lambda: original(*example), "after": lambda: fused(*example)}
        seconds = alternate(calls, rounds=rounds, device=torch.device("cpu"))
    before, after = (1e3 * statistics.median(seconds[name]) for name in ("before", "after"))
    ratio = ratios(seconds["after"], seconds["before"])
    where = f"{'x'.join(map(str, shape_of(example)))}, eager, threads: {torch.get_num_threads()}"
    spread = f"{ratio.median:.2f} x (half of the pairs within {ratio.low:.2f} to {ratio.high:.2f})"
    click.echo(f"time: {before:.1f} ms => {after:.1f} ms, {spread}; {where}, {rounds} rounds in turn")


def _write(model: Any, example: tuple[Any, ...], path: Path) -> None:
    import secrets

    from convrewrite import emitting

    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".onnx":
            emitting.write_onnx(model, example, temporary)
        else:
            import torch

            torch.export.save(emitting.emit(model, "exported", example), temporary)
        temporary.replace(path)
    except OSError as error:
        raise ConvrewriteError(f"cannot be written: {error.strerror or error}", where=str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
