"""Selectors: one small function per key of a `match`, each saying why a site does not fit.

To add one, decorate a function in any module of this package (see `selector` in `base.py`).
"""

from __future__ import annotations

from convrewrite.selectors.base import SELECTORS, Context, Selector, Wanted, selector

__all__ = ["SELECTORS", "Context", "Selector", "Wanted", "selector"]
