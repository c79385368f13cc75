"""Rules of your own: from a YAML file beside this one, and the same idea as Python objects."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision

import convrewrite as cr

HERE = Path(__file__).parent


def main() -> None:
    with torch.device("meta"):  # planning needs no weights
        model = torchvision.models.resnet50()

    plan = cr.plan(model, HERE / "late_stages.yaml")
    for edit in plan.edits:
        print(f"{edit.path}: {edit.block} with {edit.options['heads']} heads, start {edit.start} ({edit.how})")

    within = cr.plan(model, HERE / "within_budget.yaml")
    totals = within.totals
    dropped = [refusal for refusal in within.refused if refusal.clause == "budget"]
    print(f"budget: {len(within.edits)} taken, {len(dropped)} dropped, the first because {dropped[0].reason}")
    print(f"budget: params +{100 * (totals.params_after / totals.params_before - 1):.1f} %")

    rule = cr.Rule(
        id="last",
        match={"role": "bottleneck_spatial", "stage": {"from_end": 1}},
        replace={"block": "acmix", "heads": "out_channels // 64"},
        start="fresh",
    )
    print("as an object:", [edit.path for edit in cr.plan(model, rule).edits])

    try:
        cr.plan(model, {"version": 1, "rules": [{"id": "x", "match": {"roel": "stem"}, "replace": {"block": "acmix"}}]})
    except cr.ConvrewriteError as error:
        print("refused:", error)


if __name__ == "__main__":
    main()
