"""`finetune` and `distill`: from a rewritten model and images to a trained model, and a folder if one is asked for."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from convrewrite import provenance
from convrewrite.atomic import write_text
from convrewrite.data import DataError, Images, open_images
from convrewrite.data.batches import Prepared, check_enough, drawn, measured
from convrewrite.data.transforms import Form, augmentations, form_of, transform_for
from convrewrite.errors import ConvrewriteError, StoreError
from convrewrite.finalizing import blends_of, drop_convolutions, put_head
from convrewrite.identity import identity
from convrewrite.migrating import revert
from convrewrite.store import check_target, load, save
from convrewrite.training import checkpoints
from convrewrite.training.groups import kinds_of
from convrewrite.training.heads import outputs_of
from convrewrite.training.history import SUMMARY, Row, csv_text, write_csv, write_curves
from convrewrite.training.loop import Loop, Task, score_of
from convrewrite.training.settings import Purpose, Settings, settings_from
from convrewrite.training.solving import (
    LEAST,
    Beginnings,
    beginnings,
    is_solved,
    mark_solved,
    solve_blends,
    untouched,
)
from convrewrite.training.student import apart_of, pairs_of, teacher_of
from convrewrite.training.timetable import timetable

BEGUN = "blocks.json"
"""In a run's own folder: how its blocks began, for `SUMMARY` when it ends, which a resumed run cannot know."""

_NEEDED = ("accelerate", "tensorboard", "matplotlib")


class Trained(NamedTuple):
    """What `finetune` and `distill` return.

    Attributes:
        model: in eval mode, with the kept weights; finalized if the blocks have taken over.
        history: the rows of the log, oldest first: step, epoch, phase, loss, lr, anneal, gate, and where it was
            measured val_loss, val_accuracy, agreement.
    """

    model: nn.Module
    history: tuple[Row, ...]


@dataclass(frozen=True)
class _Request:
    """The arguments of `finetune` and `distill`."""

    purpose: Purpose
    model: nn.Module | str | Path
    data: Any
    val: Any
    teacher: nn.Module | str | None
    teacher_weights: str | None
    out: Path | None
    settings: Settings
    resume: bool
    overwrite: bool
    download: bool
    watch: Callable[[Row], None] | None
    bar: bool
    say: Callable[[str], None] | None = None
    original: bool = False

    @property
    def folder(self) -> Path | None:
        """For checkpoints and logs, beside the result."""
        return None if self.out is None else self.out.with_name(f"{self.out.name}.training")


def finetune(
    model: nn.Module | str | Path,
    data: Any,
    *,
    val: Any = None,
    teacher: nn.Module | str | None = None,
    teacher_weights: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    download: bool = False,
    watch: Callable[[Row], None] | None = None,
    bar: bool = False,
    say: Callable[[str], None] | None = None,
    original: bool = False,
    **settings: Any,
) -> Trained:
    """Train a rewritten model on labelled images; the model given is left as it is.

    Args:
        model: what `rewrite` returned or `load` read, or the saved folder.
        data, val: see `convrewrite.data.open_images`.
        teacher: the original, for ``imitate`` and ``features``; by default it is taken out of the untrained model.
        teacher_weights: for a teacher given by name, as ``--weights`` of the other commands.
        out: folder for the result, as `save` writes it, with history.csv, curves.png and training.json. Checkpoints
            and TensorBoard's files go to ``OUT.training`` beside it.
        resume: go on with the run whose checkpoint lies there.
        overwrite: replace a result and a run that lie there. download: let torchvision download data.
        watch: called with every row of the log. bar: progress on standard error.
        say: called with lines on how the blocks beside convolutions begin: solved and how well, or untrained and why.
        original: train what the model was rewritten from instead, from the same weights and with the same settings: the
            control to compare with. It is `teacher` if given, else taken out of the model, which must still hold it.
        settings: fields of `convrewrite.training.settings.Settings`.

    Raises:
        ConvrewriteError: one line, for whatever does not fit.
    """
    chosen, place = _as_launched(settings_from(settings)), None if out is None else Path(out)
    flags = {"resume": resume, "overwrite": overwrite, "download": download}
    asked = _Request(
        "finetune", model, data, val, teacher, teacher_weights, place, chosen, **flags, watch=watch, bar=bar, say=say
    )
    return _run(replace(asked, original=original))


def distill(
    model: nn.Module | str | Path,
    data: Any,
    *,
    val: Any = None,
    teacher: nn.Module | str | None = None,
    teacher_weights: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    download: bool = False,
    watch: Callable[[Row], None] | None = None,
    bar: bool = False,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> Trained:
    """Train a rewritten model to give the original's outputs; labels are not needed, and not trained on.

    First each block imitates its convolution, then the whole network the original's logits. Arguments, result
    and errors as for `finetune`.
    """
    chosen, place = _as_launched(settings_from(settings)), None if out is None else Path(out)
    flags = {"resume": resume, "overwrite": overwrite, "download": download}
    asked = _Request(
        "distill", model, data, val, teacher, teacher_weights, place, chosen, **flags, watch=watch, bar=bar, say=say
    )
    return _run(asked)


def _run(request: _Request) -> Trained:
    _check_installed()
    settings, folder = request.settings, request.folder
    model = _original(request) if request.original else _own_copy(request.model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if request.out is not None and folder is not None:
        finished = (request.out / SUMMARY).is_file()
        check_target(request.out, overwrite=request.overwrite or (request.resume and finished))
        if not request.resume and not request.overwrite:
            checkpoints.refuse_begun(folder / "last")
    images = open_images(
        request.data, request.val, fraction=settings.val_fraction, seed=settings.seed, download=request.download
    )
    form = form_of(model, image_size=settings.image_size, normalize=settings.normalize)
    train, val = _prepared(images, form, settings)
    classes, teacher = _fit_outputs(request, model, images, val)
    accelerator = _accelerator(settings)
    check_enough(len(train), settings.batch_size, accelerator.num_processes, images.name)
    pairs = {} if teacher is None else pairs_of(model, teacher)
    per_epoch = len(train) // (settings.batch_size * accelerator.num_processes)
    run = _identity_of_run(request, model, teacher, images, accelerator.num_processes)
    begun = _solve(request, model, images, form)
    apart = apart_of(model, pairs)
    if all(kind == "carried" for kind in kinds_of(model).values()):
        settings = settings.model_copy(update={"new_first": 0.0})  # nothing is new
    table = timetable(settings, request.purpose, per_epoch, blockwise=bool(apart))
    if accelerator.is_main_process and folder is not None:
        _make(folder, begin=not request.resume)
        checkpoints.clear_leftovers(folder)
        checkpoints.clear_leftovers(folder.parent, request.out.name if request.out is not None else "")
        if not request.resume:
            write_text(folder / BEGUN, json.dumps(None if begun is None else begun.to_data(), indent=1) + "\n")
    accelerator.wait_for_everyone()
    if begun is not None and request.say is not None and accelerator.is_main_process:
        for line in begun.lines(table.taken_over):
            request.say(line)
    task = Task(
        purpose=request.purpose,
        settings=settings,
        model=model,
        teacher=teacher,
        pairs=pairs,
        apart=apart,
        train=train,
        val=val,
        classes=classes,
        table=table,
        folder=folder,
        run=run,
        watch=request.watch,
        bar=request.bar,
    )
    with _deterministic(settings):
        loop = Loop(task, accelerator, resume=request.resume)
        standing = loop.run()
    final = _finished(model, standing.step).to(device)
    if accelerator.is_main_process and request.out is not None and folder is not None:
        _write(request, final, tuple(standing.history), folder, run)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return Trained(final, tuple(standing.history))


def _check_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConvrewriteError(f"training needs {', '.join(missing)}", fix="pip install 'convrewrite[train]'")


def _as_launched(settings: Settings) -> Settings:
    """`settings` with ``shard`` if accelerate was launched with FSDP, which is done here and not by accelerate."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    chosen = settings.model_copy(update={"shard": True}) if launched else settings
    if chosen.shard:
        for name, value in (("theseus", True), ("mixed_precision", "fp16")):
            if getattr(chosen, name) == value:
                what = f"setting '{name}' is {value!r}: not with FSDP"
                raise ConvrewriteError(what, fix="change it, or launch one whole model in each process")
    return chosen


def _own_copy(model: nn.Module | str | Path) -> nn.Module:
    if not isinstance(model, nn.Module):
        return load(model)
    if provenance.of(model) is None:
        fix = "give what rewrite() returned, or a folder that 'convrewrite apply' wrote"
        raise ConvrewriteError("the model was not rewritten by convrewrite", where=type(model).__name__, fix=fix)
    return copy.deepcopy(getattr(model, "_orig_mod", model))


def _prepared(images: Images, form: Form, settings: Settings) -> tuple[Prepared, Prepared]:
    augment = augmentations(settings.augment)
    train = Prepared(images.train, transform_for(form, augment), seed=settings.seed, name=images.name)
    val = Prepared(images.val, transform_for(form, frozenset()), seed=settings.seed, name=f"{images.name} (measured)")
    return train, val


def _original(request: _Request) -> nn.Module:
    """What the model was rewritten from, as a model whose plan has no edits."""
    model = _own_copy(request.model)
    note = provenance.of(model)
    assert note is not None
    if request.teacher is not None:
        plain = _given_teacher(request.teacher, request.teacher_weights)
    else:
        try:
            plain = revert(model).model
        except ConvrewriteError as error:
            fix = "name the original with --teacher MODEL and --teacher-weights FILE"
            raise ConvrewriteError(
                f"the original is not in this model: {error.what}", where=error.where, fix=fix
            ) from None
    totals = replace(
        note.plan.totals, params_after=note.plan.totals.params_before, flops_after=note.plan.totals.flops_before
    )
    nothing = replace(note.plan, rules=(), edits=(), refused=(), funnels=(), notes=(), totals=totals)
    since = provenance.Since(head=note.since.head if request.teacher is None else None)
    provenance.attach(plain, plan=nothing, identity=note.identity, source=note.source, since=since)
    return plain


def _given_teacher(teacher: nn.Module | str, weights: str | None) -> nn.Module:
    if isinstance(teacher, nn.Module):
        return copy.deepcopy(teacher)
    from convrewrite.sources import resolve

    return resolve(teacher, weights=weights).model


def _solve(request: _Request, model: nn.Module, images: Images, form: Form) -> Beginnings | None:
    """Solve the blocks beside their convolutions, unless images are few; None if they were trained or solved before."""
    settings, note, blends = request.settings, provenance.of(model), blends_of(model)
    if not blends or not settings.anneal or note is None or note.since.steps:
        return None
    if any(not untouched(blend) or is_solved(blend) for blend in blends.values()):
        return None
    few = len(images.train) < LEAST
    if request.resume:
        if settings.solve and not few:
            mark_solved(model)  # a checkpoint will bring the values
        return None
    if not settings.solve or few:
        reason = f"{len(images.train)} images to train on, solving needs {LEAST}" if settings.solve else "--solve 0"
        return beginnings(model, None, reason)
    plain = Prepared(images.train, transform_for(form, frozenset()), seed=settings.seed, name=images.name)
    found = solve_blends(model, drawn(plain, settings.solve, settings.seed), seed=settings.seed)
    return beginnings(model, found, None)


def _fit_outputs(request: _Request, model: nn.Module, images: Images, val: Prepared) -> tuple[int, nn.Module | None]:
    """(classes of the model, the teacher), after exchanging the head if the images need it and the user allows it."""
    settings = request.settings
    batch = next(measured(val, batch=2, rank=0, world=1, workers=0)).images
    classes, path = outputs_of(model, batch)
    teacher = _teacher(request, model)
    wanted = images.count
    if request.purpose == "finetune" and not images.labelled:
        raise DataError(
            "the images have no labels", where=images.name, fix="put each class into its own folder, or use distill"
        )
    if request.purpose == "finetune" and wanted is not None and wanted != classes:
        if settings.num_classes == "keep":
            what = f"the data has {wanted} classes, the model {classes}"
            raise DataError(what, where=images.name, fix="--num-classes auto gives the model a new head")
        if path is None:
            raise DataError(f"no layer of {classes} outputs was found to exchange", where=type(model).__name__)
        put_head(model, path, wanted, seed=settings.seed)
        classes = wanted
    if request.purpose == "finetune" and wanted is None and settings.num_classes == "auto":
        raise DataError("the data does not say how many classes it has", where=images.name, fix="give it 'classes'")
    if teacher is not None and (outputs := outputs_of(teacher, batch)[0]) != classes:
        fix = "an original of other classes cannot be imitated"
        raise DataError(f"the original has {outputs} classes, the model {classes}", where=images.name, fix=fix)
    return classes, teacher


def _teacher(request: _Request, model: nn.Module) -> nn.Module | None:
    settings = request.settings
    if request.purpose == "finetune" and not settings.imitate and not settings.features:
        return None
    if request.teacher is None or request.original:
        return teacher_of(model)
    given = _given_teacher(request.teacher, request.teacher_weights)
    return given.eval().requires_grad_(requires_grad=False)


def _accelerator(settings: Settings) -> Any:
    """Hugging Face's Accelerator for these settings and for however the process was launched."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    known = AcceleratorState._shared_state
    if known and known.get("_mixed_precision") != settings.mixed_precision:
        AcceleratorState._reset_state()  # an earlier run in this process had another precision
    # Parameters outside the current phase's loss take no part in a step.
    several = DistributedDataParallelKwargs(find_unused_parameters=True)
    fsdp = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        accelerator = Accelerator(
            cpu=settings.device == "cpu", mixed_precision=settings.mixed_precision, kwargs_handlers=[several]
        )
    except (ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise ConvrewriteError(f"accelerate cannot start: {line}", fix="see --mixed-precision and --device") from None
    finally:
        if fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = fsdp
    kinds = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if accelerator.distributed_type not in kinds:
        name = accelerator.distributed_type.value
        raise ConvrewriteError(f"accelerate was launched with {name}", fix="launch it with DDP or FSDP")
    return accelerator


def _identity_of_run(
    request: _Request, model: nn.Module, teacher: nn.Module | None, images: Images, processes: int
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from."""
    note = provenance.of(model)
    assert note is not None
    return {
        "purpose": request.purpose,
        "plan": note.plan.hash,
        "model": identity(model),
        "weights": checkpoints.digest_of(model),
        "teacher": None if teacher is None else checkpoints.digest_of(teacher),
        "data": f"{images.name}: {len(images.train)} and {len(images.val)} images",
        "processes": processes,
        "settings": request.settings.comparable(),
    }


def _make(folder: Path, *, begin: bool) -> None:
    import shutil

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("last", "best", "tensorboard") if begin else ():
            shutil.rmtree(folder / name, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"cannot write: {error.strerror or error}", where=str(folder)) from error


@contextmanager
def _deterministic(settings: Settings) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(settings.deterministic or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _finished(model: nn.Module, steps: int) -> nn.Module:
    """The model as it is handed back: eval mode, no trace of the training, finalized if the blocks have taken over."""
    model._compiled_call_impl = None
    blends = blends_of(model)
    for blend in blends.values():
        blend.draws = False
    if all(float(blend.anneal) == 1.0 for blend in blends.values()):
        model = drop_convolutions(model, blends)
    note = provenance.of(model)
    assert note is not None
    provenance.note_since(model, replace(note.since, steps=note.since.steps + steps))
    return model.eval()


def _write(request: _Request, model: nn.Module, history: tuple[Row, ...], folder: Path, run: dict[str, Any]) -> None:
    """The result as a saved folder, with its history."""
    assert request.out is not None
    write_csv(history, folder / "history.csv")
    write_curves(history, folder / "curves.png")
    measured = _measured(history)
    best = max(measured, key=lambda row: score_of(row, request.purpose))
    kept = best if request.settings.keep == "best" else measured[-1]
    known = {"run": run, "steps": history[-1]["step"], "measured": measured, "kept": kept}
    begun = folder / BEGUN
    if begun.is_file() and (blocks := json.loads(begun.read_text(encoding="utf-8"))) is not None:
        known["blocks"] = blocks
    summary = json.dumps(known, indent=1)
    curves = (folder / "curves.png").read_bytes()
    extras: dict[str, Callable[[Path], object]] = {
        "history.csv": lambda path: path.write_text(csv_text(history), encoding="utf-8"),
        "curves.png": lambda path: path.write_bytes(curves),
        SUMMARY: lambda path: path.write_text(summary + "\n", encoding="utf-8"),
    }
    save(model, request.out, overwrite=True, extras=extras)


def _measured(history: tuple[Row, ...]) -> list[Row]:
    return [row for row in history if "val_loss" in row]
