"""A pass of your own between ours: freeze what came from the original before the laws look at the result."""

from __future__ import annotations

import torchvision

import convrewrite as cr
from convrewrite.pipeline import Work


def freeze_carried(work: Work) -> None:
    """Only what the blocks brought along stays trainable."""
    assert work.edited is not None
    carried = {tensor.name for tensor in work.tensors if tensor.fate == "carried"}
    for name, parameter in work.edited.model.named_parameters():
        parameter.requires_grad_(name not in carried)
    work.notes.append(f"{len(carried)} tensors of the original are frozen")


def main() -> None:
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16)
    freeze = cr.Pass("freeze", freeze_carried, requires=("edited", "tensors"), after="transfer")
    new, report = cr.rewrite(model, "acmix", example=(1, 3, 32, 32), passes=[freeze])
    print("passes:", " ".join(report.timings))
    print("note:", report.notes[0])
    trainable = sum(p.numel() for p in new.parameters() if p.requires_grad)
    print(f"trainable: {trainable:,} of {sum(p.numel() for p in new.parameters()):,}")
    print("original still trainable:", all(p.requires_grad for p in model.parameters()))


if __name__ == "__main__":
    main()
