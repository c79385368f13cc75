"""Backbone, neck and head of detectors and segmentation models, against tables counted by hand from their source."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import convrewrite as cr
from convrewrite.sites import PARTS, Site
from convrewrite.sources import resolve

from .nets import Bottleneck, Residual
from .parts_tables import TABLES, Dense
from .roles_tables import families


def double(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1), nn.ReLU()
    )


class UNet(nn.Module):
    """Ronneberger et al. 2015 in small: double convolutions, max pooling, transposed convolutions, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([double(3, 8), double(8, 16), double(16, 32)])
        self.ups = nn.ModuleList([nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)])
        self.merge = nn.ModuleList([double(32, 16), double(16, 8)])
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, merge, skip in zip(self.ups, self.merge, reversed(skips[:-1]), strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.out(x)


class ResUNet(nn.Module):
    """Residual encoder and decoder, upsampling by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.down1, self.down2 = Bottleneck(8), Bottleneck(8, stride=2)
        self.fuse, self.up = nn.Conv2d(16, 8, 1), Bottleneck(8)
        self.last, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down1(self.stem(x))
        x = F.interpolate(self.down2(high), scale_factor=2)
        x = self.up(self.fuse(torch.cat([x, high], 1)))
        return self.out(self.last(F.interpolate(x, scale_factor=2)))


NETS = {"UNET": UNet, "RESUNET": ResUNet}


def sites_of(table: Dense) -> tuple[Site, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if table.model in NETS:
            return cr.inspect(NETS[table.model](), example=(1, 3, table.size, table.size))
        if ":" in table.model:
            source = table.model.partition(":")[0]
            pytest.importorskip({"smp": "segmentation_models_pytorch"}.get(source, source))
            return cr.inspect(resolve(table.model, meta=True).model, example=(1, 3, table.size, table.size))
        options = {} if table.model.startswith("raft") else {"weights_backbone": None}
        with torch.device("meta"):
            model = torchvision.models.get_model(table.model, weights=None, **options)
        return cr.inspect(model, example=(1, 3, table.size, table.size))


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.model)
def test_every_convolution_lies_in_the_part_counted_by_hand(table: Dense) -> None:
    sites = [s for s in sites_of(table) if s.call == 0]
    flat = [s for s in sites if s.op == "conv2d"]
    assert dict(Counter((s.part, s.role, s.stage) for s in flat)) == dict(table.counts)
    assert dict(Counter(s.op for s in sites if s.op != "conv2d")) == dict(table.other)
    found = {s.path: (s.part, s.role, s.stage) for s in flat if s.path in table.sites}
    assert found == dict(table.sites)


def test_a_classifier_is_all_backbone_but_for_its_head() -> None:
    assert {s.part for s in cr.inspect(Residual(), example=(1, 3, 12, 12))} == {"backbone"}
    parts = {s.part for s in cr.inspect(torchvision.models.squeezenet1_0(), example=(1, 3, 64, 64)) if s.role == "head"}
    assert parts == {"head"}


def test_a_rule_selects_by_part() -> None:
    rule = {"id": "a", "match": {"part": "neck", "kernel": 3}, "replace": {"block": "acmix", "heads": 2, "window": 3}}
    plan = cr.plan(UNet(), {"version": 1, "name": "n", "rules": [rule]}, example=(1, 3, 32, 32))
    assert [e.path for e in plan.edits] == ["merge.0.0", "merge.0.2", "merge.1.0", "merge.1.2"]
    reasons = {r.site.path: r.reason for r in plan.refused}
    assert reasons["down.0.0"] == "part backbone, wanted neck"


def test_the_tables_of_roles_and_parts_cover_25_families() -> None:
    assert len({*families(), *(t.family for t in TABLES)}) >= 25
    assert {part for t in TABLES for part, _, _ in t.counts} == set(PARTS)
