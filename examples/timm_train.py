"""A rewritten model under a name of timm's, so that timm's own train script builds, anneals and trains it.

    PYTHONPATH=examples python train.py --device-modules timm_train --model resnet14t_acmix --pretrained \
        --model-kwargs anneal_steps=20000 --data-dir photos --opt adamw --lr 1e-4 --weight-decay 0.05

``--device-modules`` makes train.py import this file; nothing in train.py is changed. It has one rate for all
parameters; `main` shows timm's optimizer with convrewrite's groups. After the training,
``timm.create_model("resnet14t_acmix", checkpoint_path=...)`` and `convrewrite.finalize`.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

import convrewrite as cr

STEPS = 6


@timm.models.register_model
def resnet14t_acmix(pretrained: bool = False, anneal_steps: int = 0, **options: Any) -> nn.Module:  # noqa: FBT001, FBT002
    """ResNet-14 with ACmix in its 3x3, beside the convolutions until `anneal_steps` batches were trained on."""
    original = timm.create_model("resnet14t", pretrained=pretrained, **options)
    model = cr.rewrite(original, "acmix", example=(1, 3, 64, 64)).model
    if anneal_steps:
        _anneal(model, anneal_steps)
    kept = {n for g in cr.param_groups(model) if g["name"].endswith("no decay") for n in g["names"]}
    model.no_weight_decay = lambda: kept  # timm's optimizers ask for it
    return model


def _anneal(model: nn.Module, steps: int) -> None:
    """Step an annealer with every batch in train mode; a copy of the model in eval mode leaves it alone."""
    annealer = cr.Annealer(model, steps)

    def step(module: nn.Module, args: Any, output: Any) -> None:
        if module.training:
            annealer.step()

    model.register_forward_hook(step)


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet14t_acmix", num_classes=4, anneal_steps=STEPS // 2)

    optimizer = create_optimizer_v2(cr.param_groups(model, lr=1e-4), opt="adamw")
    schedule = CosineLRScheduler(optimizer, t_initial=STEPS, warmup_t=1, t_in_epochs=False)
    average = ModelEmaV3(model, decay=0.999, use_warmup=True)
    for step in range(STEPS):
        images, labels = torch.randn(2, 3, 64, 64), torch.tensor([step % 4, 0])
        loss = nn.functional.cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step_update(step + 1)
        average.update(model, step=step)
    rates = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    print("decay:", ", ".join(f"{name} {value}" for name, value in sorted(rates.items())))

    image = torch.randn(1, 3, 64, 64)
    blended = model.eval()(image)
    final = cr.finalize(model)
    print("same output, bit for bit:", torch.equal(blended, final(image)))


if __name__ == "__main__":
    main()
