"""Fine-tune a model of transformers with its Trainer: the groups in the optimizer, the annealing as a callback."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

import convrewrite as cr

STEPS = 6


class Anneal(TrainerCallback):
    """Anneals the blends over `steps` optimizer steps. It needs no state of its own: a resumed run knows its step."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.annealer = cr.Annealer(model, steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.annealer.set(state.global_step)


def noise(count: int) -> list[dict[str, Tensor]]:
    """Pictures of noise with labels; any data set of transformers' form does."""
    return [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(i % 4)} for i in range(count)]


def main() -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], num_labels=4)
    original = ResNetForImageClassification(config)
    model = cr.rewrite(original, "acmix", example=(1, 3, 32, 32)).model
    print("class:", type(model).__name__)

    # The default optimizer would give every parameter the same rate, and decay to the gates.
    optimizer = torch.optim.AdamW(cr.param_groups(model, lr=1e-3))
    anneal = Anneal(model, STEPS // 2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder, max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no",
                disable_tqdm=True, dataloader_pin_memory=False,
            ),
            train_dataset=noise(4 * STEPS),
            optimizers=(optimizer, None),  # the schedule stays the Trainer's
            callbacks=[anneal],
        )  # fmt: skip
        steps = trainer.train().global_step
    print(f"after {steps} steps: anneal {anneal.annealer.value:.2f}")

    image = torch.randn(2, 3, 32, 32)
    blended = model.eval()(image).logits
    final = cr.finalize(model)
    print("same output, bit for bit:", torch.equal(blended, final(image).logits))


if __name__ == "__main__":
    main()
