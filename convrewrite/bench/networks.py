"""Whole networks that authors published, to compare rewritten networks with; built from a user's checkouts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

from torch import nn

from convrewrite.bench.baselines import load


@dataclass(frozen=True)
class Network:
    """A ResNet-50 of the authors (or the nearest public code), for 1000 classes.

    Attributes:
        rules: name of the rule file whose rewrite it corresponds to. folder: under --peers.
    """

    rules: str
    name: str
    folder: str
    build: Callable[[Path], nn.Module]


def _acmix(peers: Path) -> nn.Module:
    """Changed: torchvision's removed `models.utils`, of which it imports a download helper, is there again."""
    missing = ModuleType("torchvision.models.utils")
    missing.load_state_dict_from_url = None  # type: ignore[attr-defined]
    before = sys.modules.get(missing.__name__)
    sys.modules[missing.__name__] = missing
    try:
        network: nn.Module = load(peers / "ACmix/ResNet/ResNet_ImageNet.py").ACmix_ResNet(layers=[3, 4, 6, 3])
    finally:
        del sys.modules[missing.__name__]
        if before is not None:
            sys.modules[missing.__name__] = before
    return network


def _sasa(peers: Path) -> nn.Module:
    """The network with the convolutional stem. Its projections are grouped by head, unlike the paper's."""
    folder = peers / "SASA-pytorch"
    sys.path.insert(0, str(folder))
    try:
        network_code = importlib.import_module("model.sa_resnet")  # it imports its neighbours by relative names
        network: nn.Module = network_code.get_model(SimpleNamespace(arch="cstem_sa_resnet50", width=224))
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "model"]:
            del sys.modules[name]
    return network


NETWORKS = (
    Network("acmix", "LeapLabTHU/ACmix", "ACmix", _acmix),
    Network("sasa", "MerHS/SASA-pytorch", "SASA-pytorch", _sasa),
)
