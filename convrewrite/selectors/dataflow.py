"""Selectors on what comes before and after a convolution, and the free condition `where`."""

from __future__ import annotations

from collections.abc import Sequence

from convrewrite.errors import ConvrewriteError, RuleError
from convrewrite.expressions import MissingFactError
from convrewrite.facts import site_facts
from convrewrite.selectors.base import Context, Wanted, differs, selector
from convrewrite.selectors.wanted import Chain, Condition
from convrewrite.sites import Site


@selector("follows", Chain())
def follows(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Operations upstream, nearest first, while each has one input: relu, [relu, batch_norm]."""
    return differs("follows", site.follows, wanted, _shown(site.follows))


@selector("precedes", Chain())
def precedes(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Operations downstream, nearest first, while each has one user: batch_norm, [batch_norm, relu]."""
    return differs("precedes", site.precedes, wanted, _shown(site.precedes))


@selector("where", Condition())
def where(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Expression over the site's facts: "out_channels % vars.head_dim == 0 and area <= 28*28"."""
    try:
        fits = wanted.fits(site_facts(site, context.n_stages, context.variables))
    except MissingFactError as error:
        return str(error)
    except ConvrewriteError as error:
        raise RuleError(f"at {site.id}: {error}") from None
    return None if fits else f"not where {wanted.text}"


def _shown(kinds: Sequence[str]) -> str:
    return ", ".join(kinds[:4]) or "nothing"
