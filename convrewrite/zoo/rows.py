"""What the zoo finds out about one model: plain data, one JSON line each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from convrewrite.errors import ConvrewriteError


@dataclass(frozen=True)
class Row:
    """One model of the zoo.

    Attributes:
        input: shape of the input; None where none could be made.
        convs: ``nn.Conv2d`` modules, subclasses included, and functional convolutions that are sites.
        unseen: of these, paths that are no site.
        out_of_scope: kind -> number of 1-D, 3-D and transposed convolutions.
        roles: role -> number of sites.
        copied: convolutions replaced by an equal copy. refused: path -> why one was not.
        identical: True if those copies changed no bit in eval and train mode and no state-dict key.
        rules: built-in rule file -> number of edits in its plan, for those that have any.
        applied: the rule file that was applied. laws: law -> held, broken or skipped, on its result.
        broken: what the first broken law says.
        none: why no rule fits, one line.
        error: what went wrong, one line; "" if nothing did.
        seconds: step -> seconds.
    """

    spec: str
    group: str
    family: str = ""
    input: tuple[int, ...] | None = None
    params: int = 0
    convs: int = 0
    unseen: tuple[str, ...] = ()
    out_of_scope: Mapping[str, int] = field(default_factory=dict)
    roles: Mapping[str, int] = field(default_factory=dict)
    copied: int = 0
    refused: Mapping[str, str] = field(default_factory=dict)
    identical: bool = False
    rules: Mapping[str, int] = field(default_factory=dict)
    applied: str = ""
    laws: Mapping[str, str] = field(default_factory=dict)
    broken: str = ""
    none: str = ""
    error: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """True if every convolution is a site and copied without a trace, and a rule's laws hold or none fits."""
        fits = bool(self.applied) and "broken" not in self.laws.values()
        return not self.error and not self.unseen and self.identical and (fits or bool(self.none))

    @property
    def result(self) -> str:
        """One line: "good", or what is not."""
        if self.error:
            return self.error
        if self.unseen:
            return f"{len(self.unseen)} of {self.convs} convolutions are no site ({self.unseen[0]})"
        if not self.identical:
            return "equal copies changed the output or the state-dict keys"
        broken = [law for law, status in self.laws.items() if status == "broken"]
        if broken:
            return f"{self.applied} breaks {', '.join(broken)}" + (f" ({self.broken})" if self.broken else "")
        return "good"

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(line: str) -> Row:
        """The row of one line.

        Raises:
            ConvrewriteError: the line was not written by `to_json` of this version.
        """
        try:
            data: dict[str, Any] = json.loads(line)
            data["input"] = tuple(data["input"]) if data["input"] is not None else None
            data["unseen"] = tuple(data["unseen"])
            return Row(**data)
        except (ValueError, TypeError, KeyError) as error:
            raise ConvrewriteError(f"this is no row of the zoo ({error})", fix="start with a new file") from None
