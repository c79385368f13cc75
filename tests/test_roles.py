"""Role inference against tables counted by hand from the models' source, for every torchvision family."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torchvision

from convrewrite.annotate import annotate
from convrewrite.capture import capture
from convrewrite.sites import Site

from .roles_tables import Expected, table_id, tables

TABLES = list(tables())


def _sites(name: str, kwargs: Mapping[str, Any], size: int) -> tuple[Site, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                model = torchvision.models.get_model(name, **kwargs)
        except NotImplementedError:  # RegNet computes its widths with tensors
            model = torchvision.models.get_model(name, **kwargs)
    return annotate(capture(model, (torch.empty(1, 3, size, size, device="meta"),))).sites


@pytest.mark.parametrize("table", TABLES, ids=[table_id(t[0], t[1]) for t in TABLES])
def test_every_convolution_plays_the_role_counted_by_hand(table: tuple[str, Mapping[str, Any], Expected]) -> None:
    name, kwargs, expected = table
    sites = _sites(name, kwargs, expected.input_size)
    assert len(sites) == expected.convs
    assert dict(Counter(s.role for s in sites)) == dict(expected.roles)
    stages: dict[int | None, Counter[str]] = {}
    for site in sites:
        stages.setdefault(site.stage, Counter())[site.role] += 1
    assert {k: dict(v) for k, v in stages.items()} == {k: dict(v) for k, v in expected.stages.items()}
    blocks = {s: len({x.block for x in sites if x.stage == s and x.block is not None}) for s in expected.blocks}
    assert blocks == dict(expected.blocks)
    by_path = {s.path: s for s in sites}
    found = {p: (by_path[p].role, by_path[p].stage, by_path[p].block, by_path[p].position) for p in expected.sites}
    assert found == {p: (e.role, e.stage, e.block, e.position) for p, e in expected.sites.items()}
