"""Finds and loads the compiled kernel, and describes its C interface to ctypes."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

NAME = "_local_attention"
FOLDER = Path(__file__).parent
LOG = logging.getLogger("convrewrite")

Pair = ctypes.c_int64 * 2
Strides = ctypes.c_int64 * 5
STRIDES = ("q_at", "k_at", "v_at", "out_at", "grad_at", "grad_q_at", "grad_k_at", "grad_v_at")
POINTERS = (
    *("q", "k", "v", "rows", "columns", "bias", "out", "lse", "grad"),
    *("grad_q", "grad_k", "grad_v", "grad_rows", "grad_columns", "grad_bias"),
)
FUNCTIONS = ("local_attention_forward", "local_attention_backward", "outlook_forward", "outlook_backward")
SIZES = ("batch", "heads", "width", "value_width", "query_rows", "query_columns", "key_rows", "key_columns")


class Arguments(ctypes.Structure):
    """`arguments` of local_attention.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, Pair) for name in ("window", "stride", "dilation", "first")),
        *((name, ctypes.c_int64) for name in ("border", "threads", "is_double")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, Strides) for name in STRIDES),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None (and one log line, at the first call) where there is none that works."""
    try:
        return load(_file())
    except OSError as error:
        LOG.info("no native CPU kernel, local attention runs as ATen operations: %s", error)
        return None


def load(file: Path) -> ctypes.CDLL:
    """The library in `file`.

    Raises:
        OSError: it is not there, cannot be loaded, or has another interface than this module.
    """
    if not file.is_file():
        raise OSError(f"{file} is not there (it is made at install, where a C compiler is)")
    _openmp()
    found = ctypes.CDLL(str(file))
    found.local_attention_size.restype = ctypes.c_int64
    if found.local_attention_size() != ctypes.sizeof(Arguments) or not all(hasattr(found, name) for name in FUNCTIONS):
        raise OSError(f"{file} is of another version; install again")
    for name in FUNCTIONS:
        getattr(found, name).argtypes = (ctypes.POINTER(Arguments), ctypes.c_int)
    return found


def _file() -> Path:
    """Where the build puts the library: beside this file, with one of this Python's suffixes."""
    candidates = [FOLDER / (NAME + suffix) for suffix in EXTENSION_SUFFIXES]
    return next((file for file in candidates if file.is_file()), candidates[0])


def _openmp() -> None:
    """Makes torch's own OpenMP visible to the kernel, which is linked against none: one pool of threads, not two."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*"))
    for name in (*map(str, own), "libgomp.so.1"):
        try:
            ctypes.CDLL(name, mode=os.RTLD_GLOBAL | os.RTLD_NOW)
        except OSError:
            continue
        return
