"""Fine-tune with Lightning: groups of parameters in the module, the annealing of the blends as a callback."""

from __future__ import annotations

import warnings

import lightning
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_tensor

import convrewrite as cr

STEPS = 6


class Anneal(lightning.Callback):
    """Anneals the blends over `steps` optimizer steps. It needs no state of its own: a resumed run knows its step."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.annealer = cr.Annealer(model, steps)

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: object) -> None:
        self.annealer.set(trainer.global_step)  # optimizer steps, so it is right with accumulated gradients too


class Classifier(lightning.LightningModule):
    """A rewritten network, trained on labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(cr.param_groups(self.model, lr=1e-3))


def main() -> None:
    torch.manual_seed(0)
    data = torchvision.datasets.FakeData(
        4 * STEPS, image_size=(3, 32, 32), num_classes=4, transform=to_tensor, random_offset=1
    )
    original = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16, num_classes=4
    )
    model = cr.rewrite(original, "acmix", example=(1, 3, 32, 32)).model
    module, anneal = Classifier(model), Anneal(model, STEPS // 2)
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"), False)
    trainer = lightning.Trainer(accelerator="cpu", max_steps=STEPS, callbacks=[anneal], **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that so small a data set needs no workers
        trainer.fit(module, DataLoader(data, batch_size=4))
    print(f"after {trainer.global_step} steps: anneal {anneal.annealer.value:.2f}")

    image = torch.randn(2, 3, 32, 32)
    blended = model.eval()(image)
    final = cr.finalize(model)
    print("same output, bit for bit:", torch.equal(blended, final(image)))


if __name__ == "__main__":
    main()
