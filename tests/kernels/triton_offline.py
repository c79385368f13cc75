"""Compiles the Triton kernels for sm_90, which needs no GPU, and prints what ptxas says of them as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convrewrite.kernels import triton_kernels, triton_local

TARGET = GPUTarget("cuda", 90, 32)
WIDTHS = (4, 8, 16, 32, 64, 128)
KERNELS = ("forward_kernel", "query_kernel", "key_kernel")
FLOATS = {"lse", "delta", "partial"}
TENSORS = {"q", "k", "v", "rows", "columns", "bias", "out", "grad", "dq", "dk", "dv"}


def numbers(kernel: Any, width: int, dtype: str) -> dict[str, int]:
    """Registers a thread and bytes spilled, of a kernel at 56 x 56 with 8 heads of so many channels, window 7."""
    q = torch.empty(1, 56, 56, 8, width, device="meta")
    tables = triton_local._tables(q, q, None, q)
    problem = triton_local._Problem.of((7, 7), 1.0, (1, 1), (1, 1), (0, 0), "reflect")
    tile = triton_local._tile(q, width, q.shape[1:3])
    constants = {**triton_local._constants(problem, q, q, tile, tables), "WP": 8, "ACC": tl.float32}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    constants |= {name: 1 for name in kernel.arg_names if re.fullmatch(r"[qkvgo]d|d[qkv]d", name)}
    kinds = {name: kind(name, constants, dtype) for name in kernel.arg_names}
    strides = r"[qkvgo][byx]|d[qkv][byx]" if width < 16 else r"[qkvgo][byxh]|d[qkv][byxh]"  # multiples of 16
    aligned = [i for i, name in enumerate(kernel.arg_names) if kinds[name][0] == "*" or re.fullmatch(strides, name)]
    source = ASTSource(kernel, kinds, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": triton_local.WARPS, "enable_fp_fusion": True}
    return usage(triton.compile(source, target=TARGET, options=options).asm["cubin"])


def kind(name: str, constants: dict[str, Any], dtype: str) -> str:
    """Type of a kernel's argument."""
    if name in constants:
        return "constexpr"
    if name in FLOATS:
        return "*fp32"
    if name in TENSORS:
        return f"*{dtype}"
    return "fp32" if name == "scale" else "i32"


def usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return {"registers": int(found[1]), "spilled": int(found[2])}


if __name__ == "__main__":
    result = {
        f"{name} {width} {dtype}": numbers(getattr(triton_kernels, name), width, dtype)
        for name in KERNELS
        for width in WIDTHS
        for dtype in ("bf16", "fp32")
    }
    json.dump(result, sys.stdout)
