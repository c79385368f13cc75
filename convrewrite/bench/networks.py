"""Whole networks to compare rewritten ones with: those of authors, from a user's checkouts, and textbook forms."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

from torch import nn

from convrewrite.bench.baselines import load
from convrewrite.bench.plain import UnfoldSASA


@dataclass(frozen=True)
class Network:
    """A ResNet-50 of the authors (or the nearest public code), for 1000 classes.

    Attributes:
        rules: name of the rule file whose rewrite it corresponds to.
        folder: under --peers; "" if it needs none, then it is written here as textbooks have it.
    """

    rules: str
    name: str
    folder: str
    build: Callable[[Path | None], nn.Module]

    def absent(self, peers: Path | None) -> str | None:
        """Why it cannot be measured here, or None."""
        found = not self.folder or (peers is not None and (peers / self.folder).is_dir())
        return None if found else f"no folder {self.folder} under --peers"


def _acmix(peers: Path | None) -> nn.Module:
    """Changed: torchvision's removed `models.utils`, of which it imports a download helper, is there again."""
    assert peers is not None  # Network.absent() said so
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


def _sasa(peers: Path | None) -> nn.Module:
    """The network with the convolutional stem. Its projections are grouped by head, unlike the paper's."""
    assert peers is not None  # Network.absent() said so
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


def _unfold_sasa(peers: Path | None) -> nn.Module:
    """torchvision's, every 3 x 3 convolution of a bottleneck one `UnfoldSASA`, pooled where that had a stride."""
    from torchvision.models import resnet50
    from torchvision.models.resnet import Bottleneck

    network: nn.Module = resnet50()
    for block in [module for module in network.modules() if isinstance(module, Bottleneck)]:
        old = block.conv2
        attention: nn.Module = UnfoldSASA(old.out_channels)
        pooled = nn.Sequential(attention, nn.AvgPool2d(old.stride[0], ceil_mode=True))
        block.conv2 = attention if old.stride[0] == 1 else pooled
    return network


NETWORKS = (
    Network("acmix", "LeapLabTHU/ACmix", "ACmix", _acmix),
    Network("sasa", "MerHS/SASA-pytorch", "SASA-pytorch", _sasa),
    Network("sasa", "unfold", "", _unfold_sasa),
)
