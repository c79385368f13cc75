"""What the recovery study runs: blocks with their options and starts, sizes, steps and rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A block with options, and those starts of it that keep the weights.

    Attributes:
        insert: whether it is put after convolutions, not in their place. label: its name, if not the block's.
    """

    block: str
    options: Mapping[str, Any] = field(default_factory=dict)
    starts: tuple[str, ...] = ("fitted",)
    insert: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        """What its rows are called."""
        return self.label or self.block


_BOTH = ("exact", "fitted")
_AUGMENTED = {"heads": 2, "upsilon": 0.25, "min_key_dim": 8}
ENTRIES = (
    Entry("acmix", {"heads": 4, "window": 3}, _BOTH),
    Entry("non_local", {}, ("exact",), insert=True),
    Entry("criss_cross", {}, ("exact",), insert=True),
    Entry("dual_attention", {}, ("exact",), insert=True),
    Entry("aa_conv", {**_AUGMENTED, "form": "residual"}, ("exact",), label="aa_conv_residual"),
    Entry("aa_conv", {**_AUGMENTED, "outputs": "chosen"}, _BOTH),
    Entry("sasa", {"heads": 4, "window": 3, "projection": True, "offset_bias": True}, _BOTH),
    Entry("sasa", {"heads": 8, "window": 3, "projection": True, "offset_bias": True}, _BOTH, label="sasa_8_heads"),
    Entry("sasa_wide", {}, ("exact",)),
    Entry("gpsa", {}, ("exact",)),
    Entry("gpsa", {"background": True}, ("exact",), label="gpsa_background"),
    Entry("mhsa", {"heads": 4}, ("exact",)),
    Entry("outlook", {"heads": 4}, _BOTH),
    Entry("outlook_wide", {}, ("exact",)),
)
"""A window of 3 sees what the convolution saw."""


@dataclass(frozen=True)
class Study:
    """What is run; rows of different studies are not mixed.

    Attributes:
        steps: of every run. original_steps: of the training of the original that all runs of a seed begin with.
        train, test: images to train on, and others to test on, of the 5,000. shrink: an image is averaged over squares
            of this side, and becomes 28 // shrink pixels wide. noise: deviation of the noise on every image.
        width: channels of the network's first stage; the others have two and four times as many.
        lr: of what is carried, in convrewrite's recipe. random_lr: the same beside random attention. scratch_lr: of
            everything, where everything is random.
        calibrate: images that blocks are solved on.
    """

    steps: int = 150
    original_steps: int = 1000
    train: int = 2000
    test: int = 1000
    batch: int = 32
    shrink: int = 3
    noise: float = 0.15
    width: int = 8
    lr: float = 3e-4
    random_lr: float = 3e-3
    scratch_lr: float = 1e-2
    calibrate: int = 128

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of an image of the digits."""
        return (1, 1, 28 // self.shrink, 28 // self.shrink)


@dataclass(frozen=True)
class Run:
    """One line of the results: a block ("" for the original), how it started, a seed."""

    block: str
    condition: str
    seed: int
