"""The errors a user can meet: each is one line that says what happened, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConvrewriteError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what happened, without a trailing full stop.
        where: ``file:line`` or a module path.
        fix: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        line = f"{where}: {what}" if where else what
        super().__init__(f"{line}; {fix}" if fix else line)


class SourceError(ConvrewriteError):
    """A model, its weights or its input could not be obtained."""


class CaptureError(ConvrewriteError):
    """A model could not be traced or its shapes could not be computed."""


class RuleError(ConvrewriteError):
    """A rule file is wrong. Several errors of one file come as one error, a line each."""


class PlanError(ConvrewriteError):
    """A plan cannot be made, or does not fit the model it is applied to."""


class EditError(ConvrewriteError):
    """An edit could not be carried out. The user's model is untouched."""


class LawError(ConvrewriteError):
    """The rewritten model broke a law of `verify`."""


class BackendError(ConvrewriteError):
    """No backend of that name, or it cannot do what it was asked to."""


class StoreError(ConvrewriteError):
    """A saved folder could not be written or read."""


def closest(name: str, known: Iterable[str]) -> str | None:
    """``did you mean 'x'?`` for the known name nearest to `name`, or None."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean '{found[0]}'?" if found else None
