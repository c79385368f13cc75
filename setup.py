"""Builds the optional native CPU kernel; everything else of the build is in pyproject.toml."""

from __future__ import annotations

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = "convrewrite/kernels/native/local_attention.c"
FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]  # none that breaks NaN
OPENMP = ["-fopenmp"]
"""For the compiler alone, not for the linker: the kernel uses the OpenMP that torch has loaded."""


class Build(build_ext):
    """Compiles a plain shared library, with OpenMP where the compiler knows it; failing is allowed."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            self.warn("no native kernel: it needs a compiler with gcc's vector extensions")
            return
        try:
            ext.extra_compile_args = FLAGS + OPENMP
            super().build_extension(ext)
        except Exception:
            ext.extra_compile_args = FLAGS
            super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols or [])  # no PyInit: ctypes loads it, Python does not import it


kernel = Extension(
    "convrewrite.kernels.native._local_attention",
    sources=[SOURCE],
    depends=[f"convrewrite/kernels/native/{name}_body.h" for name in ("local_attention", "outlook")],
    optional=True,
)
setup(ext_modules=[kernel], cmdclass={"build_ext": Build})
