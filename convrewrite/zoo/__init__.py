"""The zoo: the whole pipeline tried on many models, with a table of what came out."""

from __future__ import annotations

from convrewrite.zoo.models import GROUPS, Entry
from convrewrite.zoo.rows import Row
from convrewrite.zoo.run import read, run
from convrewrite.zoo.table import markdown

__all__ = ["GROUPS", "Entry", "Row", "markdown", "read", "run"]
