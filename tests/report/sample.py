"""Hand-made data for the report tests: ResNet-50 after He et al. (2016, table 1), in torchvision's layout.

Channels, repetitions and sizes are the paper's; torchvision puts the stride on the 3x3. Nothing here calls
code of convrewrite but the constructors of its data types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from convrewrite.diffing import ModelView
from convrewrite.plans import Edit, Funnel, Plan, Refusal, Totals
from convrewrite.reports import Drift, LawResult, Report, TensorFate
from convrewrite.sites import ConvSpec, Cost, Site

REPEATS = (3, 4, 6, 3)
WIDTHS = (64, 128, 256, 512)
SIZES = (56, 28, 14, 7)
RULE = "acmix/bottleneck-3x3"
INSERT_RULE = "tail/non-local"
Golden = Callable[[str, str], None]
LAWS = ("shape", "start", "kept", "alive", "modes", "stable", "portable")
# Published figures of torchvision's resnet50: parameters, of which BatchNorm 53,120 and the classifier 2,049,000.
PARAMS = 25_557_032


def conv_site(
    path: str,
    index: int,
    channels: tuple[int, int],
    kernel: int,
    sizes: tuple[int, int],
    *,
    groups: int = 1,
    **facts: Any,
) -> Site:
    """A square convolution with "same" padding; its stride is what the sizes say."""
    stride = sizes[0] // sizes[1]
    spec = ConvSpec(*channels, (kernel, kernel), (stride, stride), (kernel // 2,) * 4, groups=groups)
    params = channels[1] * channels[0] // groups * kernel * kernel
    area = sizes[1] * sizes[1]
    cost = Cost(params, 2 * params * area, 4 * channels[1] * area, 4 * channels[0] * sizes[0] * sizes[0])
    return Site(
        path,
        index,
        spec,
        (1, channels[0], sizes[0], sizes[0]),
        (1, channels[1], sizes[1], sizes[1]),
        cost=cost,
        **facts,
    )


def resnet50_sites() -> tuple[Site, ...]:
    """The 53 convolutions in order of execution."""
    sites = [
        conv_site("conv1", 0, (3, 64), 7, (224, 112), role="stem", stage=0, stage_from_end=5, receptive_field=(7, 7))
    ]
    channels, field, jump = 64, 11, 4
    for stage, (repeats, width, size) in enumerate(zip(REPEATS, WIDTHS, SIZES, strict=True), 1):
        for block in range(repeats):
            before = size if stage == 1 or block else 2 * size
            path = f"layer{stage}.{block}"
            facts: dict[str, Any] = {
                "stage": stage,
                "stage_from_end": 5 - stage,
                "block": block,
                "block_from_end": repeats - block,
                "block_path": path,
                "block_entry": path,
                "block_in_shape": (1, channels, before, before),
                "block_shape": (1, 4 * width, size, size),
                "stage_path": f"layer{stage}",
                "stage_shape": (1, 4 * width, size, size),
                "inside": (("", "ResNet"), (f"layer{stage}", "Sequential"), (path, "Bottleneck")),
            }
            ends = (before, before), (before, size), (size, size)
            shapes = (channels, width), (width, width), (width, 4 * width)
            for position, (kernel, ins_outs, sizes) in enumerate(zip((1, 3, 1), shapes, ends, strict=True), 1):
                field += (kernel - 1) * jump
                jump *= sizes[0] // sizes[1]
                role = "bottleneck_spatial" if kernel == 3 else "pointwise"
                sites.append(
                    conv_site(
                        f"{path}.conv{position}",
                        len(sites),
                        ins_outs,
                        kernel,
                        sizes,
                        role=role,
                        position=position,
                        receptive_field=(field, field),
                        follows=("relu", "batch_norm"),
                        precedes=("batch_norm",),
                        **facts,
                    )
                )
            if block == 0:
                sites.append(
                    conv_site(
                        f"{path}.downsample.0",
                        len(sites),
                        (channels, 4 * width),
                        1,
                        (before, size),
                        role="shortcut",
                        position=1,
                        receptive_field=(field - 2, field - 2),
                        **facts,
                    )
                )
            channels = 4 * width
    return tuple(sites)


def acmix_cost(site: Site) -> Cost:
    """The convolution kept, beside ACmix with 4 heads and window 7 (Pan et al. 2022, eq. 5 to 9), roughly."""
    c, area, heads = site.out_channels, site.out_shape[2] * site.out_shape[3], 4
    depth = c // heads
    block = 3 * (c * c + c) + 3 * heads * 9 + c * 81 + c + 3 * depth + 2
    flops = 2 * area * (3 * c * c + 27 * heads * depth + 9 * c + 2 * 49 * c)
    return Cost(site.params + block, site.flops + flops, site.cost.act_infer * 4, site.cost.act_train * 6)


def acmix_edit(site: Site) -> Edit:
    """The replacement of one 3x3 by ACmix, blended in."""
    options = {"window": 7, "heads": 4, "form": "ordered"}
    return Edit(
        site.id,
        site,
        RULE,
        "replace",
        "",
        site.path,
        "acmix",
        options,
        "exact",
        "blend",
        (site.id,),
        site.in_shape,
        site.out_shape,
        site.cost,
        acmix_cost(site),
    )


def plan() -> Plan:
    """16 replacements, one insertion at the end of stage 3, refusals with and without near misses."""
    sites = resnet50_sites()
    replaced = [s for s in sites if s.kernel == (3, 3)]
    edits = [acmix_edit(s) for s in replaced]
    last = next(s for s in sites if s.path == "layer3.5.conv3")
    added = Cost(1_050_624, 2 * 196 * 1_048_576 + 4 * 196 * 196 * 512, 602_112, 1_806_336)
    edits.append(
        Edit(
            "layer3.5.conv3 after stage",
            last,
            INSERT_RULE,
            "insert",
            "after",
            "layer3",
            "non_local",
            {"channels": 512, "pool": 1},
            "exact",
            "zero gate",
            (last.id,),
            last.stage_shape,
            last.stage_shape,
            Cost(),
            added,
        )
    )
    totals = Totals(
        PARAMS,
        PARAMS + sum(e.after.params - e.before.params for e in edits),
        sum(s.flops for s in sites) + 2 * 2_048_000,
        sum(s.flops for s in sites) + 2 * 2_048_000 + sum(e.after.flops - e.before.flops for e in edits),
        len(sites),
    )
    return Plan(
        model="torchvision:resnet50",
        fingerprint="5f0c" * 16,
        rules=(
            {"name": "acmix", "rules": [{"id": "bottleneck-3x3"}]},
            {"name": "tail", "rules": [{"id": "non-local"}]},
        ),
        input_shape=(1, 3, 224, 224),
        seed=0,
        edits=tuple(edits),
        refused=(*_spatial_refusals(sites), *_tail_refusals(sites, last)),
        funnels=(
            Funnel(RULE, (("convs", 53), ("role bottleneck_spatial", 16), ("kernel 3", 16), ("groups 1", 16)), 16),
            Funnel(INSERT_RULE, (("convs", 53), ("stage_from_end 2", 19), ("position 3", 6), ("pick last", 1)), 1),
        ),
        totals=totals,
        versions={"convrewrite": "0.1.0", "python": "3.11.2", "torch": "2.15.0"},
    )


def _spatial_refusals(sites: tuple[Site, ...]) -> list[Refusal]:
    """The rule looks at the role first, so every other site fails it, and the kernel too."""
    return [
        Refusal(s, RULE, "role", f"role {s.role}, wanted bottleneck_spatial", 2)
        for s in sites
        if s.role != "bottleneck_spatial"
    ]


def _tail_refusals(sites: tuple[Site, ...], last: Site) -> list[Refusal]:
    refused = []
    for s in sites:
        if s.id == last.id:
            continue
        wrong_stage, wrong_position = s.stage_from_end != 2, s.position != 3
        if wrong_stage:
            reason = f"stage_from_end {s.stage_from_end}, wanted 2"
            refused.append(Refusal(s, INSERT_RULE, "stage_from_end", reason, 1 + wrong_position))
        elif wrong_position:
            refused.append(Refusal(s, INSERT_RULE, "position", f"position {s.position}, wanted 3", 1))
        else:
            refused.append(Refusal(s, INSERT_RULE, "pick", "pick takes the last of 6"))
    return refused


def empty_plan() -> Plan:
    """The rule on ResNeXt-like sites: everything matches but the groups."""
    spatial = [s for s in resnet50_sites() if s.kernel == (3, 3)]
    grouped = [replace(s, conv=replace(s.conv, groups=32)) for s in spatial]
    steps = (("convs", 53), ("role bottleneck_spatial", 16), ("kernel 3", 16), ("groups 1", 0))
    refused = tuple(Refusal(s, RULE, "groups", "groups 32, wanted 1", 1) for s in grouped)
    return replace(
        plan(),
        model="torchvision:resnext50_32x4d",
        edits=(),
        refused=refused,
        funnels=(Funnel(RULE, steps, 0),),
        totals=Totals(25_028_904, 25_028_904, 8_460_000_000, 8_460_000_000, 53),
    )


def report(made: Plan | None = None) -> Report:
    """All laws held but one skipped."""
    made = made or plan()
    laws = [LawResult(law, "held", f"{law} is as it was") for law in LAWS]
    laws[1] = LawResult("start", "held", "largest relative drift 3.1e-07, allowed 1e-05", 3.1e-7)
    laws[6] = LawResult("portable", "skipped", "the model is on the meta device")
    return Report(
        plan=made,
        sites=resnet50_sites(),
        tensors=tuple(_fates(made)),
        laws=tuple(laws),
        drift=(Drift("eval", 3.1e-7, 1.0, 1.0), Drift("train", 4.4e-7, 0.9999999)),
        timings={"capture": 0.412, "annotate": 0.93, "match": 0.004, "rewrite": 1.5, "verify": 6.25},
    )


def broken_report() -> Report:
    """The start law broken, emitted all the same."""
    good = report()
    laws = list(good.laws)
    laws[1] = LawResult("start", "broken", "largest relative drift 0.12, allowed 1e-05", 0.12)
    return replace(
        good, laws=tuple(laws), forced=True, drift=(Drift("eval", 0.12, 0.981, 0.5), Drift("train", float("nan"), 0.0))
    )


def _fates(made: Plan) -> list[TensorFate]:
    fates = [TensorFate("bn1.weight", "bn1.weight", "carried", 64, 8.0, True)]
    replaced = {e.path: e for e in made.edits if e.action == "replace"}
    for site in resnet50_sites():
        key = f"{site.path}.weight"
        if site.path not in replaced:
            fates.append(TensorFate(key, key, "carried", site.params, site.params**0.5 / 8, True))
            continue
        edit = replaced[site.path]
        fates.append(
            TensorFate(f"{site.path}.conv.weight", key, "carried", site.params, site.params**0.5 / 8, True, edit.id)
        )
        extra = edit.after.params - edit.before.params
        fates.append(TensorFate(f"{site.path}.block.weight", "", "new", extra, extra**0.5 / 16, True, edit.id))
    fates.append(TensorFate("fc.weight", "fc.weight", "absorbed", 2_048_000, 32.0, True))
    fates.append(TensorFate("", "fc.bias", "dropped", 1000, 0.5, True))
    return fates


def wide_sites(count: int = 300) -> tuple[Site, ...]:
    """`count` convolutions in inverted residual blocks (1x1, depthwise 3x3, two SE, 1x1) of six stages."""
    sites: list[Site] = []
    for index in range(count):
        stage, step = 1 + index * 6 // count, index % 5
        role = ("pointwise", "depthwise", "se", "se", "pointwise")[step]
        width, size = 32 * stage, 112 >> (stage - 1)
        here = 1 if role == "se" else max(size, 1)
        block = index // 5
        path = f"features.{stage}.{block}.block.{step}"
        groups = width if role == "depthwise" else 1
        sites.append(
            conv_site(
                path,
                index,
                (width, width),
                3 if step == 1 else 1,
                (here, here),
                groups=groups,
                role=role,
                stage=stage,
                stage_from_end=7 - stage,
                block=block,
                block_path=f"features.{stage}.{block}",
            )
        )
    return tuple(sites)


def wide_report() -> Report:
    """A plan that changes every depthwise convolution of the wide model."""
    sites = wide_sites()
    edits = tuple(
        replace(acmix_edit(s), rule="wide/depthwise", block="stand_alone_self_attention", start="fresh", how="paper")
        for s in sites
        if s.role == "depthwise"
    )
    refused = tuple(
        Refusal(s, "wide/depthwise", "role", f"role {s.role}, wanted depthwise", 1)
        for s in sites
        if s.role != "depthwise"
    )
    funnels = (Funnel("wide/depthwise", (("convs", len(sites)), ("role depthwise", len(edits))), len(edits)),)
    made = replace(
        plan(),
        model="package.module:WideNet",
        rules=({"name": "wide"},),
        edits=edits,
        refused=refused,
        funnels=funnels,
        totals=Totals(1_000_000, 1_400_000, 900_000_000, 1_500_000_000, len(sites)),
    )
    return replace(report(made), sites=sites)


HOSTILE = '<script>alert("1")</script>|`x`\n\x1b[31m&'


def hostile_report() -> Report:
    """A model whose module, rule and block names try to break out of every format."""
    site = replace(resnet50_sites()[0], path=HOSTILE, module_class=HOSTILE, block_path=HOSTILE, block=0)
    edit = replace(acmix_edit(site), block=HOSTILE, options={"mode": HOSTILE}, how=HOSTILE, rule=f"{HOSTILE}/r")
    made = replace(
        plan(),
        model=HOSTILE,
        edits=(edit,),
        refused=(Refusal(site, f"{HOSTILE}/s", "name", HOSTILE),),
        rules=({"name": HOSTILE},),
        notes=(HOSTILE,),
        funnels=(Funnel(f"{HOSTILE}/r", ((HOSTILE, 1),), 1),),
        versions={HOSTILE: HOSTILE},
    )
    laws = (LawResult("start", "broken", HOSTILE),)
    return replace(report(made), sites=(site,), laws=laws, notes=(HOSTILE,), timings={HOSTILE: 1.0})


def views() -> tuple[ModelView, ModelView]:
    """ResNet-50 before and after two of its 3x3 became ACmix beside the convolution, and a classifier of 10."""
    sites = resnet50_sites()
    tensors: dict[str, tuple[tuple[int, ...], str]] = {
        f"{s.path}.weight": ((s.out_channels, s.in_channels, *s.kernel), "torch.float32") for s in sites
    }
    tensors["fc.weight"] = ((1000, 2048), "torch.float32")
    modules = {"": "ResNet"} | {s.path: "Conv2d" for s in sites} | {"fc": "Linear"}
    before = ModelView("torchvision:resnet50", sites, tensors, modules, PARAMS)
    changed = {s.path: s for s in sites if s.path in ("layer4.1.conv2", "layer4.2.conv2")}
    new_tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    new_modules: dict[str, str] = {}
    new_sites = []
    for key, signature in tensors.items():
        path = key.rpartition(".")[0]
        if path in changed:
            new_tensors[f"{path}.conv.weight"] = signature
            new_tensors[f"{path}.block.query.weight"] = ((512, 512, 1, 1), "torch.float32")
        else:
            new_tensors[key] = signature
    new_tensors["fc.weight"] = ((10, 2048), "torch.float32")
    for path, name in modules.items():
        new_modules[path] = "Blend" if path in changed else name
        if path in changed:
            new_modules |= {f"{path}.conv": "Conv2d", f"{path}.block": "ACmix", f"{path}.block.query": "Conv2d"}
    for site in sites:
        path = site.path
        new_sites.append(replace(site, rewritten=path, cost=acmix_cost(site)) if path in changed else site)
    return before, ModelView("out/", tuple(new_sites), new_tensors, new_modules, PARAMS + 2_000_000)
