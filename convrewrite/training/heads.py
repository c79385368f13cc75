"""The classifier of a model: how many classes it has, and which module it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convrewrite.data import DataError
from convrewrite.training.losses import logits_of


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor) -> tuple[int, str | None]:
    """(number of classes, path of the last linear layer or convolution of that width: it computes them).

    Args:
        images: (N, C, H, W) that the model takes; its mode and buffers stay as they are.

    Raises:
        DataError: the model does not take the images or returns no (N, classes).
    """
    called: list[tuple[str, int]] = []
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            note = (path, width)
            handles.append(module.register_forward_hook(lambda *_, note=note: called.append(note)))
    modes = {module: module.training for module in model.modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        model.eval()
        classes = logits_of(model(images.to(device))).shape[1]
    except (RuntimeError, ValueError, IndexError) as error:
        shape, line = tuple(images.shape), str(error).strip().splitlines()[0][:120]
        raise DataError(f"the model does not take images {shape}: {line}", fix="--image-size") from None
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return classes, next((path for path, width in reversed(called) if width == classes), None)
