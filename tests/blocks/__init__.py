"""Tests of the blocks, and what they share: one tolerance per dtype."""

from __future__ import annotations

from typing import Any

import torch

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}
GRADIENT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
"""Of gradients in float64."""

EXPORT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
"""Of another runtime (onnxruntime) in float32."""
