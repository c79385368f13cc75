"""Every setting of a training run, once: the command line, the functions and the checkpoints are made from this."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from convrewrite.errors import ConvrewriteError, closest

Purpose = Literal["finetune", "distill"]


class Settings(BaseModel):
    """A run of `finetune` or `distill`. Shares are of all optimizer steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(5, ge=1, description="Passes over the training images.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps, instead of whole epochs.")
    batch_size: int = Field(32, ge=1, description="Images of one process in one forward pass.")
    accumulate: int = Field(1, ge=1, description="Batches whose gradients make one optimizer step.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="SGD has momentum 0.9.")
    lr: float = Field(1e-4, gt=0, description="Learning rate of carried parameters.")
    new_lr: float = Field(10.0, ge=0, description="Times that rate for new parameters.")
    fitted_lr: float = Field(1.0, ge=0, description="Times that rate for blocks that hold the convolution.")
    weight_decay: float = Field(0.05, ge=0, description="Not of gates, biases, norms, relative tables.")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of steps with rising rate; then cosine.")
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    solve: int = Field(256, ge=0, description="Images on which blocks are solved from the convolution beside; 0: not.")
    blocks_first: float = Field(0.2, ge=0, lt=1, description="Distill: share of steps that train block by block.")
    new_first: float = Field(0.1, ge=0, lt=1, description="Share of steps that train the new parts alone.")
    anneal: float = Field(0.5, ge=0, le=1, description="Share of steps until the blocks have taken over; 0: never.")
    schedule: Literal["linear", "cosine"] = Field("linear", description="How they take over.")
    theseus: bool = Field(default=False, description="Draw conv or block at random while they do.")
    smoothing: float = Field(0.1, ge=0, lt=1, description="Label smoothing.")
    mixup: float = Field(0.0, ge=0, description="Alpha of mixup; 0 is off.")
    cutmix: float = Field(0.0, ge=0, description="Alpha of CutMix; 0 is off.")
    imitate: float = Field(0.0, ge=0, description="Finetune: weight of the divergence from the original.")
    temperature: float = Field(2.0, gt=0, description="Of that divergence.")
    features: float = Field(0.0, ge=0, description="Weight of the distance of features at the changed sites.")
    ema: float = Field(0.999, ge=0, lt=1, description="Decay of the averaged weights that are kept; 0 is off.")
    patience: int = Field(3, ge=0, description="Distill: stop after so many epochs without better agreement; 0: never.")
    keep: Literal["best", "last"] = Field("best", description="Which epoch's weights are the result.")
    num_classes: Literal["keep", "auto"] = Field("keep", description="auto: a new head if the data needs one.")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="Share of the images to measure on, if no others.")
    augment: str = Field("crop,flip", description="Of crop, flip, randaugment; or none.")
    image_size: int | None = Field(None, ge=1, description="Side of the square input; the plan's by default.")
    normalize: Literal["auto", "imagenet", "half", "none"] = Field("auto", description="Mean and deviation of images.")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="Of the forward pass.")
    channels_last: bool = Field(default=False, description="Memory format.")
    compile: bool = Field(default=False, description="Through torch.compile.")
    shard: bool = Field(
        default=False, description="Spread parameters, gradients and optimizer state over the processes (FSDP)."
    )
    deterministic: bool = Field(default=False, description="Only deterministic kernels (GPU; the CPU's are).")
    device: Literal["auto", "cpu"] = Field("auto", description="auto: the accelerator, if there is one.")
    workers: int | None = Field(None, ge=0, description="Processes that read images; by the machine if left out.")
    seed: int = Field(0, ge=0, description="Of order, augmentation, dropout and split.")
    checkpoint_every: int | None = Field(None, ge=1, description="Steps; every epoch by default.")

    def comparable(self) -> dict[str, Any]:
        """What must be the same for a run to go on as if it had never been interrupted."""
        return {k: v for k, v in self.model_dump().items() if k not in ("workers", "checkpoint_every", "device")}


def settings_from(options: dict[str, Any]) -> Settings:
    """Settings from keyword arguments; what is left out has its default.

    Raises:
        ConvrewriteError: a name is unknown or a value is out of range.
    """
    for name in options:
        if name not in Settings.model_fields:
            fix = closest(name, Settings.model_fields) or "see convrewrite finetune --help"
            raise ConvrewriteError(f"unknown setting '{name}'", fix=fix)
    try:
        return Settings(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        message = first["msg"][0].lower() + first["msg"][1:]
        raise ConvrewriteError(f"setting '{name}' is {options[name]!r}: {message}") from None
