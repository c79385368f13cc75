"""Compare a model with what a rewrite made of it."""

from __future__ import annotations

import torchvision

import convrewrite as cr
from convrewrite.diffing import view_of
from convrewrite.report import render_diff


def main() -> None:
    shape = (1, 3, 32, 32)
    before = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16)
    after = cr.rewrite(before, "acmix", start="fresh", example=shape).model
    views = [
        view_of(model, cr.inspect(model, example=shape), name)
        for model, name in ((before, "small resnet"), (after, "small resnet, acmix"))
    ]
    difference = cr.diff(*views)
    print("modules that changed:", " ".join(change.path for change in difference.outermost))
    print(render_diff(difference, "text"))


if __name__ == "__main__":
    main()
