"""What `pick` does: take some of the matching sites, in forward order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from convrewrite.ruleschema import Pick
from convrewrite.sites import Site


def pick(how: Pick, sites: Sequence[Site]) -> Iterator[tuple[str, list[Site]]]:
    """The steps of a pick in the order they are taken, each as (label, sites left).

    every and offset first, then first and last (both ends), each in every stage or block on its own
    if `per` says so; `limit` last, over all.
    """
    left = list(sites)
    per = f" per {how.per}" if how.per else ""
    if how.every > 1 or how.offset:
        label = f"every {how.every}{f' from {how.offset}' if how.offset else ''}{per}"
        left = _in_groups(left, how.per, lambda group: group[how.offset :: how.every])
        yield label, left
    if how.first is not None or how.last is not None:
        ends = [f"{word} {n}" for word, n in (("first", how.first), ("last", how.last)) if n is not None]
        left = _in_groups(left, how.per, lambda group: _ends(group, how.first or 0, how.last or 0))
        yield " and ".join(ends) + per, left
    if how.limit is not None:
        left = left[: how.limit]
        yield f"limit {how.limit}", left


def _ends(group: list[Site], first: int, last: int) -> list[Site]:
    return [site for i, site in enumerate(group) if i < first or i >= len(group) - last]


def _in_groups(sites: list[Site], per: str | None, take: Callable[[list[Site]], list[Site]]) -> list[Site]:
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        key = None if per is None else site.stage if per == "stage" else (site.stage, site.block)
        groups.setdefault(key, []).append(site)
    kept = {site.id for group in groups.values() for site in take(group)}
    return [site for site in sites if site.id in kept]
