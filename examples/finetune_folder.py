"""Distil and then fine-tune a saved folder, with the functions behind the two commands of these names."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torchvision

import convrewrite as cr

DATA = "torchvision:FakeData?size=24&num_classes=4"  # any of imagefolder:PATH, torchvision:NAME, hf:NAME
SETTINGS = {"batch_size": 8, "workers": 0, "augment": "flip"}


def network() -> torchvision.models.ResNet:
    """The original; a torchvision or timm model by name needs no such function."""
    torch.manual_seed(0)
    return torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=8, num_classes=4
    )


def main() -> None:
    model, report = cr.rewrite(network(), "acmix", example=(1, 3, 32, 32))
    with tempfile.TemporaryDirectory() as place:
        start, near, final = (Path(place) / name for name in ("start", "distilled", "finetuned"))
        cr.save(model, start, report=report)

        # No labels: the original is inside the untrained model, and is what it is trained towards.
        distilled = cr.distill(cr.load(start, base=network), DATA, out=near, epochs=2, **SETTINGS)
        for row in distilled.history:
            if "agreement" in row:
                print(f"{row['phase']}: anneal {row['anneal']:.2f}, agreement {row['agreement']:.2f}")

        # The convolutions are gone now; labels from here on.
        tuned = cr.finetune(distilled.model, DATA, out=final, steps=4, **SETTINGS)
        print("files:", " ".join(sorted(path.name for path in final.iterdir())))
        again = cr.load(final, base=network)
    image = torch.randn(2, 3, 32, 32)
    print("same output, bit for bit:", torch.equal(tuned.model(image), again(image)))


if __name__ == "__main__":
    main()
