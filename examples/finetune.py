"""Fine-tune from an exact start: anneal from the convolutions to the blocks, then drop the convolutions."""

from __future__ import annotations

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_tensor

import convrewrite as cr
from convrewrite.blocks.blend import Blend

STEPS = 6


def finalized(model: nn.Module) -> nn.Module:
    """The model with every blend replaced by its block, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Blend):
            model.set_submodule(path, module.finalize())
    return model


def main() -> None:
    torch.manual_seed(0)
    data = torchvision.datasets.FakeData(
        4 * STEPS, image_size=(3, 32, 32), num_classes=4, transform=to_tensor, random_offset=1
    )
    original = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16, num_classes=4
    )
    model, report = cr.rewrite(original, "acmix", example=(1, 3, 32, 32))
    print("drift at start:", max(drift.max_relative for drift in report.drift))

    blends = [module for module in model.modules() if isinstance(module, Blend)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for step, (images, labels) in enumerate(DataLoader(data, batch_size=4), start=1):
        for blend in blends:
            blend.anneal.fill_(step / STEPS)  # 0: the convolution alone; 1: the block alone
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: anneal {step / STEPS:.2f}, loss {loss.item():.3f}")

    image = torch.randn(2, 3, 32, 32)
    blended = model.eval()(image)
    params = sum(p.numel() for p in model.parameters())
    final = finalized(model)
    print(f"finalized: params {params:,} => {sum(p.numel() for p in final.parameters()):,}")
    print("same output, bit for bit:", torch.equal(blended, final(image)))


if __name__ == "__main__":
    main()
