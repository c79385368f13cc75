"""The training loop, on Hugging Face accelerate: phases, annealing, measuring, checkpoints.

Everything but the tensors is a function of the step: order of images, augmentation, dropout, rates, annealing.
So a run that was killed and goes on from a checkpoint ends with the weights of one that was not, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from convrewrite.data.batches import Batch, Order, Prepared, batches, measured
from convrewrite.errors import ConvrewriteError
from convrewrite.randomness import seeded
from convrewrite.training import checkpoints, losses
from convrewrite.training.annealing import Annealer
from convrewrite.training.checkpoints import Parts, Standing
from convrewrite.training.ema import Averaged
from convrewrite.training.groups import kinds_of, param_groups
from convrewrite.training.history import Board, Row, write_csv
from convrewrite.training.measuring import measure
from convrewrite.training.settings import Purpose, Settings
from convrewrite.training.sharding import WholeState, gather, spread, whole
from convrewrite.training.student import Student, watched
from convrewrite.training.timetable import Timetable


@dataclass(frozen=True)
class Task:
    """What is trained, on what, against what.

    Attributes:
        model: trained in place; the caller's own copy.
        teacher: the original, or None. pairs: sites at which it is compared (see `student.pairs_of`).
        apart: those of them whose blocks are trained block by block.
        folder: for checkpoints and logs; None keeps nothing on disk.
        run: what makes this run the one it is, for its checkpoints.
        watch: called with every row of the log. bar: show a progress bar.
    """

    purpose: Purpose
    settings: Settings
    model: nn.Module
    teacher: nn.Module | None
    pairs: dict[str, nn.Module]
    apart: tuple[str, ...]
    train: Prepared
    val: Prepared
    classes: int
    table: Timetable
    folder: Path | None
    run: dict[str, Any]
    watch: Callable[[Row], None] | None = None
    bar: bool = False


class Loop:
    """One run of a `Task`."""

    def __init__(self, task: Task, accelerator: Any, *, resume: bool) -> None:
        self.task, self.accelerator, self.settings = task, accelerator, task.settings
        self.first = accelerator.is_main_process
        settings = task.settings
        self.spread = settings.shard and accelerator.num_processes > 1
        task.model.to(accelerator.device)
        if settings.channels_last and not self.spread:
            task.model.to(memory_format=torch.channels_last)
        self.teacher = None if task.teacher is None else task.teacher.to(accelerator.device).eval()
        self.model = copy.deepcopy(task.model) if self.spread else task.model
        self.kinds = kinds_of(self.model)
        self.average = Averaged(self.model, settings.ema) if settings.ema else None
        table = task.table
        self.annealer: Annealer | None = None
        if table.fade is not None:
            self.annealer = Annealer(
                self.model, table.fade, settings.schedule, delay=table.blocks_end, theseus=settings.theseus
            )
        self.at = Standing()
        self.best_state: dict[str, Tensor] | None = None
        if self.spread:
            self._begin_spread(resume=resume)
        else:
            self._begin(resume=resume)
        self.mix = losses.mixer(settings, task.classes)
        self.board: Board | None = None
        if task.folder is not None and self.first:
            self.board = Board(task.folder / "tensorboard", self.at.step)

    def _begin(self, *, resume: bool) -> None:
        """A whole model in each process."""
        accelerator, task = self.accelerator, self.task
        self.optimizer = accelerator.prepare(_optimizer(self.model, self.settings))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]  # before a checkpoint's take their place
        average = None if self.average is None else self.average.model
        self.parts = Parts(self.model, average, self.optimizer, accelerator.scaler)
        if resume and task.folder is not None:
            self.at = checkpoints.read(task.folder / "last", self.parts, task.run)
        if self.settings.compile:
            self.model.compile()
        self.student = accelerator.prepare(Student(self.model, task.pairs, task.apart))

    def _begin_spread(self, *, resume: bool) -> None:
        """A part of the model in each process; checkpoints are of the whole."""
        accelerator, task, device = self.accelerator, self.task, self._device()
        average = None if self.average is None else self.average.model
        self.state = WholeState()
        if resume and task.folder is not None:
            read = Parts(self.model, average, self.state)
            self.at = checkpoints.read(task.folder / "last", read, task.run)
        whole_average = None if average is None else copy.deepcopy(average)
        self.student = Student(self.model, task.pairs, task.apart)
        spread(self.student, device, apart=bool(task.apart))
        if average is not None:
            spread(average, device, apart=True)
        self.optimizer = accelerator.prepare(_optimizer(self.model, self.settings))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]  # before a checkpoint's take their place
        self.state.attach(self.optimizer)
        self.parts = Parts(task.model, whole_average, self.state)
        if self.settings.compile:
            self.model.compile()

    def run(self) -> Standing:
        """Train to the end; the model of the task then has the weights that are kept."""
        try:
            self._train()
        finally:
            if self.board is not None:
                self.board.close()
        self._keep()
        return self.at

    def _train(self) -> None:
        table, at = self.task.table, self.at
        if at.step == 0 and not at.history:
            self._log({"step": 0, "epoch": 0.0, "phase": table.phase(0), **self._state(), **self._measured()})
            self._rank(at.history[-1])
        phase = ""
        every = self.settings.checkpoint_every
        source = self._batches()
        with self._bar() as bar:
            while at.step < table.total and not at.stopped:
                if phase != table.phase(at.step):
                    phase = table.phase(at.step)
                    self._set_modes(phase)
                with seeded(self.settings.seed, "step", self.accelerator.process_index, at.step, device=self._device()):
                    row = self._step(source, phase)
                at.step += 1
                ends = table.measures(at.step)
                if ends:
                    row |= self._measured()
                if ends or at.step % max(table.total // 1000, 1) == 0:
                    self._log(row)
                if ends:
                    self._rank(row)
                    self._set_modes(phase)
                if ends or (every is not None and at.step % every == 0):
                    self._save()
                bar.update()
                bar.set_postfix_str(f"{phase} loss {row['loss']:.3g}")

    def _step(self, source: Iterator[Batch], phase: str) -> Row:
        """One optimizer step over `accumulate` batches."""
        settings, accelerator = self.settings, self.accelerator
        total = torch.zeros((), device=accelerator.device)
        for number in range(settings.accumulate):
            last = number + 1 == settings.accumulate
            with contextlib.nullcontext() if last else accelerator.no_sync(self.student):
                loss = self._loss(next(source), phase) / settings.accumulate
                accelerator.backward(loss)
            total += loss.detach()
        total = accelerator.reduce(total, "mean")
        if not losses.finite(total):
            what = f"the loss is not finite at step {self.at.step + 1}"
            raise ConvrewriteError(what, where=phase, fix="lower --lr or --new-lr, or train without mixed precision")
        trained = self._drop_gradients(phase)
        if settings.clip and trained:
            accelerator.clip_grad_norm_(trained, settings.clip)
        rate = self.task.table.rate(self.at.step)
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.annealer is not None:
            self.annealer.set(self.at.step + 1)
        if self.average is not None:
            self.average.update(self.model, self.at.step + 1)
        epoch = round((self.at.step + 1) / self.task.table.per_epoch, 4)
        return {
            "step": self.at.step + 1,
            "epoch": epoch,
            "phase": phase,
            "loss": float(total),
            "lr": settings.lr * rate,
            **self._state(),
        }

    def _loss(self, batch: Batch, phase: str) -> Tensor:
        settings, task = self.settings, self.task
        images, labels = batch.images.to(self.accelerator.device), batch.labels.to(self.accelerator.device)
        if task.purpose == "finetune":
            losses.check_labels(batch.labels, batch.indices, task.classes, task.train.name)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        if settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if phase == "blocks":
            error: Tensor = self._run_student(images, blockwise=True)[0]
            return error
        wants_sites = bool(settings.features) and bool(task.pairs)
        logits, sites = self._run_student(images, sites=wants_sites)
        loss = torch.zeros((), device=logits.device)
        if task.purpose == "finetune":
            loss = loss + losses.cross_entropy(logits, labels, settings.smoothing)
        weight = 1.0 if task.purpose == "distill" else settings.imitate
        if self.teacher is not None and (weight or wants_sites):
            with torch.no_grad(), self.accelerator.autocast(), watched(task.pairs if wants_sites else {}) as seen:
                old = losses.logits_of(self.teacher(images))
            loss = loss + weight * losses.divergence(logits, old, settings.temperature)
            errors = [losses.relative_error(output, seen[path][1]) for path, output in sites.items()]
            if errors:
                loss = loss + settings.features * torch.stack(errors).mean()
        return loss

    def _run_student(self, images: Tensor, *, blockwise: bool = False, sites: bool = False) -> Any:
        if not self.spread:
            return self.student(images, blockwise, sites)
        from accelerate.utils import convert_to_fp32

        with self.accelerator.autocast():  # as accelerate does around what it prepares
            return convert_to_fp32(self.student(images, blockwise, sites))

    def _drop_gradients(self, phase: str) -> list[nn.Parameter]:
        """Leave gradients to what this phase trains; returns those parameters.

        Not by ``requires_grad``: what keeps several processes in step counts the parameters once.
        """
        trained = []
        for name, parameter in self.model.named_parameters():
            if phase != "all" and self.kinds[name] == "carried":
                parameter.grad = None
            elif parameter.grad is not None:
                trained.append(parameter)
        return trained

    def _set_modes(self, phase: str) -> None:
        """Train mode; while only new parts are trained, carried norms keep their statistics."""
        self.student.train()
        if phase == "all":
            return
        for path, module in self.model.named_modules():
            kind = self.kinds.get(f"{path}.weight" if path else "weight", "carried")
            if isinstance(module, _NormBase) and kind == "carried":
                module.eval()

    def _batches(self) -> Iterator[Batch]:
        settings, accelerator, task = self.settings, self.accelerator, self.task
        start, end = self.at.step * settings.accumulate, task.table.total * settings.accumulate
        order = Order(
            len(task.train), settings.batch_size, settings.seed, start, end,
            accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
        return batches(task.train, order, workers=settings.workers)

    def _measured(self) -> Row:
        accelerator, settings = self.accelerator, self.settings
        shown = measured(
            self.task.val,
            batch=settings.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=settings.workers,
        )
        return measure(self._shown(), shown, accelerator, teacher=self.teacher, temperature=settings.temperature)

    def _shown(self) -> nn.Module:
        """The model whose quality counts: the averaged one, if there is one. Every process has to ask."""
        if not self.spread:
            return self.model if self.average is None else self.average.model
        if self.average is None or self.parts.average is None:
            gather(self.model, self.task.model)
            return self.task.model
        gather(self.average.model, self.parts.average)
        return self.parts.average

    def _state(self) -> Row:
        """How far the blends are: anneal, and the mean of |gate|; a model without blends has none of the two."""
        blends = self.annealer.blends if self.annealer is not None else ()
        if not blends or self.annealer is None:
            return {}
        gates = torch.cat([whole(blend.gate.detach()).flatten().float() for blend in blends])
        return {"anneal": self.annealer.value, "gate": float(gates.abs().mean())}

    def _rank(self, row: Row) -> None:
        """Keep the weights if this is the best epoch, and stop when the agreement has ceased to rise.

        An epoch in which the convolutions take less part is always better: it is nearer to what is wanted.
        """
        at, settings, table = self.at, self.settings, self.task.table
        annealed, score = row.get("anneal", 1.0), score_of(row, self.task.purpose)
        if not at.best or score > tuple(at.best):
            at.best, at.waited = score, 0
            if settings.keep == "best":
                self._keep_best()
        elif annealed == 1.0 and row["phase"] == "all" and row["step"] > table.new_end:
            at.waited += 1
            at.stopped = self.task.purpose == "distill" and 0 < settings.patience <= at.waited

    def _keep_best(self) -> None:
        shown = self._shown()
        if self.task.folder is None:
            self.best_state = copy.deepcopy(shown.state_dict())
        elif self.first:
            checkpoints.write_best(self.task.folder / "best", shown)

    def _keep(self) -> None:
        """Put the weights that are to be kept into the model."""
        self.accelerator.wait_for_everyone()
        model, folder = self.task.model, self.task.folder
        if self.settings.keep == "last":
            model.load_state_dict(self._shown().state_dict())
        elif folder is not None:
            checkpoints.read_best(folder / "best", model)
        elif self.best_state is not None:
            model.load_state_dict(self.best_state)

    def _save(self) -> None:
        if self.task.folder is not None and self.spread:
            self._shown()
            gather(self.model, self.task.model)
            self.state.gather()
        if self.task.folder is not None and self.first:
            checkpoints.write(self.task.folder / "last", self.parts, self.at, self.task.run)
            write_csv(self.at.history, self.task.folder / "history.csv")
        self.accelerator.wait_for_everyone()

    def _log(self, row: Row) -> None:
        self.at.history.append(row)
        if self.first and self.board is not None:
            self.board.add(row)
        if self.first and self.task.watch is not None:
            self.task.watch(row)

    def _device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def _bar(self) -> Any:
        from tqdm import tqdm

        hidden = None if self.task.bar and self.first else True  # None: shown on a terminal
        return tqdm(total=self.task.table.total, initial=self.at.step, disable=hidden, unit="step", leave=False)


def score_of(row: Row, purpose: Purpose) -> tuple[float, float, float]:
    """What makes the weights of one measurement better than those of another: a larger tuple; of equals the first."""
    name = "agreement" if purpose == "distill" or "val_accuracy" not in row else "val_accuracy"
    return row.get("anneal", 1.0), row.get(name, 0.0), -row["val_loss"]


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    groups = param_groups(
        model,
        lr=settings.lr,
        new_multiplier=settings.new_lr,
        fitted_multiplier=settings.fitted_lr,
        weight_decay=settings.weight_decay,
    )
    if not groups:
        raise ConvrewriteError("every parameter of the model is frozen", fix="set requires_grad on some")
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.AdamW(groups)
