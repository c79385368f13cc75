"""Fine-tune in a loop of your own: groups of parameters, the way from convolutions to blocks, and the end."""

from __future__ import annotations

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_tensor

import convrewrite as cr

STEPS = 6


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
    print(cr.trainable_summary(model))

    # New blocks learn ten times as fast; gates, biases, norms and relative tables do not decay.
    optimizer = torch.optim.AdamW(cr.param_groups(model, lr=1e-3))
    annealer = cr.Annealer(model, steps=STEPS)
    model.train()
    for step, (images, labels) in enumerate(DataLoader(data, batch_size=4), start=1):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        annealer.step()  # 0: the convolution alone; 1: the block alone
        print(f"step {step}: anneal {annealer.value:.2f}, loss {loss.item():.3f}")

    image = torch.randn(2, 3, 32, 32)
    blended = model.eval()(image)
    params = sum(p.numel() for p in model.parameters())
    final = cr.finalize(model)
    print(f"finalized: params {params:,} => {sum(p.numel() for p in final.parameters()):,}")
    print("same output, bit for bit:", torch.equal(blended, final(image)))


if __name__ == "__main__":
    main()
