"""Randomness as a function of where training stands: the same step draws the same numbers in every run.

No generator's state has to be stored: what a step, a sample or an initialisation draws depends on the
seed and its own number alone, not on what was drawn before.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def number_from(*parts: object) -> int:
    """A number in [0, 2^63) that depends on `parts` alone."""
    text = ":".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(*parts: object, device: torch.device | None = None) -> Iterator[None]:
    """Python's, numpy's and torch's global generators seeded from `parts`, and as they were afterwards.

    Args:
        device: an accelerator whose generator is seeded too.
    """
    number = number_from(*parts)
    devices = [device] if device is not None and device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        random.seed(number)
        np.random.seed(number % 2**32)
        torch.default_generator.manual_seed(number)
        if devices:
            torch.cuda.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
