"""`convrewrite apply`: rewrite, verify, report, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from convrewrite.cli.common import (
    Progress,
    check_rules,
    check_writable,
    clean_errors,
    format_option,
    hint_rules,
    model_options,
    put,
    rule_options,
    settings_of,
    source_of,
)

from convrewrite.errors import ConvrewriteError, RuleError

KINDS = ("module", "graph", "compiled", "exported", "onnx")
DTYPES = ("float32", "float64", "bfloat16", "float16")


@click.command(name="apply")
@click.argument("model")
@rule_options
@click.option("--plan", "plan_file", metavar="FILE", type=click.Path(dir_okay=False), help="Do what this plan says.")
@model_options
@format_option
@click.option("--out", metavar="DIR", help="Folder for the model, its recipe, the plan and the reports.")
@click.option("--overwrite", is_flag=True, help="Replace DIR if it exists.")
@click.option(
    "--emit", "kind", type=click.Choice(KINDS), default="module", show_default=True, help="Also in this form."
)
@click.option("--compile", "compile_", is_flag=True, help="Check that compiling meets no new graph break.")
@click.option("--device", default="cpu", show_default=True, help="Where to check and emit.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of the model and its blocks."
)
@click.option("--channels-last", is_flag=True, help="Memory format of the emitted model.")
@click.option("--force", is_flag=True, help="Emit even if a law is broken or a fit is above --max-nmse.")
@click.option("--calibrate", metavar="DIR", help="Folder of images, without labels, to fit the fitted edits on.")
@click.option(
    "--calibrate-images", type=click.IntRange(2), default=256, show_default=True, help="Use at most so many of them."
)
@click.option(
    "--max-nmse", type=click.FloatRange(0), metavar="X", help="Refuse fits with a larger error (NMSE); see --force."
)
@click.option("--verbose", "-v", is_flag=True, help="Untouched sites, near misses, seconds per pass.")
@clean_errors
def command(
    model: str,
    rules: tuple[str, ...],
    start: str | None,
    settings: tuple[str, ...],
    plan_file: str | None,
    weights: str | None,
    input_shape: str | None,
    num_classes: int | None,
    seed: int,
    format_: str,
    out: str | None,
    overwrite: bool,
    kind: str,
    compile_: bool,
    device: str,
    dtype: str,
    channels_last: bool,
    force: bool,
    calibrate: str | None,
    calibrate_images: int,
    max_nmse: float | None,
    verbose: bool,
) -> None:
    """Rewrite MODEL by rules or by a saved plan, check the seven laws, print the report, and save it with --out."""
    if bool(rules) == bool(plan_file):
        raise click.UsageError("give either --rules FILE or --plan FILE")
    if plan_file and (settings or start):
        raise click.UsageError("a plan is fixed: --set and --start go with --rules")
    if kind != "module" and not out:
        raise click.UsageError(f"--emit {kind} needs --out DIR")
    overrides = settings_of(settings)
    check_rules(rules)
    from convrewrite.pipeline import REWRITING, example_of, real_example, rewrite
    from convrewrite.report import render
    from convrewrite.store import check_target, save

    if out:
        check_target(out, overwrite=overwrite)
        check_writable(out)
    given = _plan(plan_file) if plan_file else list(rules)
    if plan_file and input_shape is None:
        input_shape = _shape_of(given)
    source = source_of(model, weights, input_shape, num_classes, seed, meta=False)
    prepared = _placed(source.model, device, dtype, channels_last)
    progress = Progress(len(REWRITING))
    try:
        done = rewrite(
            prepared,
            given,
            start=start,
            example=source.example,
            seed=seed,
            overrides=overrides,
            force=force,
            name=source.name,
            source=source.recipe,
            watch=progress,
            calibrate=calibrate,
            calibrate_images=calibrate_images,
            max_nmse=max_nmse,
        )
    except RuleError as error:
        hint_rules(model, error)
        raise
    finally:
        progress.close()
    example = real_example(done.model, example_of(done.model, source.example))
    if compile_ or kind == "compiled":
        _check_compile(source.model, done.model, example)
    put(render(done.report, format_, verbose=verbose), None)
    if out:
        extras = _extras(done.model, kind, example)
        save(done.model, out, report=done.report, overwrite=overwrite, extras=extras)
        click.echo(f"wrote {out}", err=True)
        if source.weights is None and (source.recipe or {}).get("kind") in ("torchvision", "timm"):
            click.echo("note: the weights are random; --weights DEFAULT or a file gives trained ones", err=True)


def _plan(path: str) -> Any:
    from convrewrite.plans import Plan

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConvrewriteError(f"cannot be read: {error.strerror or error}", where=path) from None
    except UnicodeDecodeError:
        raise ConvrewriteError("not a plan: no UTF-8 text", where=path, fix="write one with plan --out") from None
    return Plan.from_json(text, where=path)


def _shape_of(plan: Any) -> str | None:
    """The input a plan was made for, as --input takes it."""
    return "x".join(map(str, plan.input_shape)) if len(plan.input_shape) == 4 else None


def _placed(model: Any, device: str, dtype: str, channels_last: bool) -> Any:
    import torch

    try:
        model = model.to(device=torch.device(device), dtype=getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:
        where = _device(device)
        if where is None or where.type not in ("cpu", *_accelerators()):
            fix = f"this machine has {', '.join(('cpu', *_accelerators()))}"
            raise ConvrewriteError(f"device '{device}' cannot be used", where="--device", fix=fix) from None
        raise ConvrewriteError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from None
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _device(name: str) -> Any:
    import torch

    try:
        return torch.device(name)
    except RuntimeError:
        return None


def _accelerators() -> list[str]:
    """Kinds of devices besides the processor that torch can use here."""
    import torch

    found = [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()]
    return [*found, *(["mps"] if torch.backends.mps.is_available() else [])]


def _check_compile(original: Any, rewritten: Any, example: tuple[Any, ...]) -> None:
    from convrewrite.emitting import graph_breaks

    found = graph_breaks(original, rewritten, example)
    if found.after > found.before:
        reason = found.reasons[0] if found.reasons else "unknown"
        raise ConvrewriteError(f"the rewrite adds {found.after - found.before} graph breaks: {reason}", where="compile")
    click.echo(f"compile: {found.after} graph breaks, {found.before} before", err=True)


def _extras(model: Any, kind: str, example: tuple[Any, ...]) -> dict[str, Any]:
    """File name -> function that writes it into the folder."""
    from convrewrite import emitting

    if kind == "graph":
        code = emitting.emit(model, "graph", example).code
        return {"graph.txt": lambda path: path.write_text(code, encoding="utf-8")}
    if kind == "exported":
        import torch

        program = emitting.emit(model, "exported", example)
        return {"model.pt2": lambda path: torch.export.save(program, path)}
    if kind == "onnx":
        return {"model.onnx": lambda path: emitting.write_onnx(model, example, path)}
    return {}
