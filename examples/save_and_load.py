"""Save a rewritten model as a folder and load it again: weights and a recipe, nothing pickled."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torchvision

import convrewrite as cr


def network() -> torchvision.models.ResNet:
    """The original; loading builds it again."""
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16)


def main() -> None:
    new, report = cr.rewrite(network(), "acmix", example=(1, 3, 32, 32))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "small-acmix"
        cr.save(new, folder, report=report)
        print("files:", " ".join(sorted(path.name for path in folder.iterdir())))
        # A torchvision or timm model by name needs no base; this one was made by hand.
        again = cr.load(folder, base=network)
    image = torch.randn(2, 3, 32, 32)
    print("same output, bit for bit:", torch.equal(new.eval()(image), again.eval()(image)))


if __name__ == "__main__":
    main()
