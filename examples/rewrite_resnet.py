"""Rewrite a torchvision ResNet in Python: look, plan, rewrite, read the report."""

from __future__ import annotations

import torch
import torchvision

import convrewrite as cr
from convrewrite.report import render_plan, why


def main() -> None:
    # One bottleneck a stage and random weights keep this quick; resnet50(weights="DEFAULT") goes the same way.
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1]).eval()
    shape = (1, 3, 64, 64)

    sites = cr.inspect(model, example=shape)
    print(f"{len(sites)} convolutions, roles {sorted({site.role for site in sites})}")

    plan = cr.plan(model, "acmix", example=shape, name="small resnet")
    print(render_plan(plan, "text"))
    print(why(plan, sites, "layer1.0.conv1"))

    new, report = cr.rewrite(model, plan)  # does what the plan says; `model` itself is untouched
    image = torch.randn(2, 3, 64, 64)
    print("laws held:", report.ok)
    print("same output, bit for bit:", torch.equal(model(image), new(image)))


if __name__ == "__main__":
    main()
