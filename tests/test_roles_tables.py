"""The expected-role tables agree with themselves and with what torchvision itself says about its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convrewrite.sites import ROLES
from tests.roles_tables import Expected, families, table_id, tables

torch = pytest.importorskip("torch")
models = pytest.importorskip("torchvision.models")

TABLES = list(tables())
CASES = [pytest.param(*case, id=table_id(case[0], case[1])) for case in TABLES]
COMPLETE = [pytest.param(*case, id=table_id(case[0], case[1])) for case in TABLES if case[2].complete]

# torchvision's other classification models are transformers, whose few convolutions cut patches.
NOT_CNNS = {"vision_transformer", "swin_transformer", "maxvit"}


def build(name: str, kwargs: dict[str, Any]) -> Any:
    """The model on the meta device: no memory, no random numbers."""
    if name.startswith("regnet"):  # its builder reads numbers from tensors, so only the network itself may be meta
        builder, regnet = models.get_model_builder(name), models.regnet._regnet
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models.regnet, "_regnet", lambda *args, **options: on_meta(regnet, *args, **options))
            return builder(weights=None, **kwargs)
    return on_meta(models.get_model, name, weights=None, **kwargs)


def on_meta(make: Any, *args: Any, **options: Any) -> Any:
    with torch.device("meta"):
        return make(*args, **options)


def convs_of(model: Any) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}


def is_depthwise(conv: Any) -> bool:
    return bool(conv.groups == conv.in_channels > 1 and max(conv.kernel_size) > 1)


def is_plain_spatial(conv: Any) -> bool:
    return max(conv.kernel_size) > 1 and not is_depthwise(conv)


# What a module's own numbers say about each role; head, stem and other may be anything.
NUMBERS: dict[str, Callable[[Any], bool]] = {
    "bottleneck_spatial": is_plain_spatial,
    "basic_spatial": is_plain_spatial,
    "depthwise": is_depthwise,
    "pointwise": lambda conv: conv.kernel_size == (1, 1) and conv.stride == (1, 1),
    "shortcut": lambda conv: conv.kernel_size == (1, 1) and conv.stride == (1, 1),
    "downsample": lambda conv: max(conv.stride) > 1,
    "se": lambda conv: conv.kernel_size == (1, 1) and conv.bias is not None,
    "transition": lambda conv: conv.stride == (1, 1),
}


def test_every_family_of_torchvision_cnns_has_tables() -> None:
    builders = (models.get_model_builder(name) for name in models.list_models(module=models))
    modules = {builder.__module__.rsplit(".", 1)[1] for builder in builders}
    assert set(families()) == modules - NOT_CNNS
    assert {expected.family for _, _, expected in TABLES} == set(families())


@pytest.mark.parametrize(("name", "kwargs", "expected"), CASES)
def test_counts_of_a_table_add_up(name: str, kwargs: dict[str, Any], expected: Expected) -> None:
    total: Counter[str] = Counter()
    for counts in expected.stages.values():
        total.update(counts)
    assert total == Counter(expected.roles)
    assert sum(expected.roles.values()) == expected.convs
    assert set(expected.roles) <= set(ROLES)
    assert list(expected.stages) == list(range(len(expected.stages)))
    assert set(expected.stages[0]) == {"stem"}
    assert all("stem" not in counts for stage, counts in expected.stages.items() if stage > 0)
    assert set(expected.sizes) == set(expected.stages) - {0}
    assert list(expected.sizes.values()) == sorted(set(expected.sizes.values()), reverse=True)


@pytest.mark.parametrize(("name", "kwargs", "expected"), CASES)
def test_sites_of_a_table_fit_its_counts(name: str, kwargs: dict[str, Any], expected: Expected) -> None:
    assert len(expected.sites) >= min(8, expected.convs)
    listed = Counter((site.stage, site.role) for site in expected.sites.values())
    counted = Counter({(stage, role): n for stage, roles in expected.stages.items() for role, n in roles.items()})
    assert listed <= counted
    assert {role for _, role in listed} == set(expected.roles)
    if expected.complete:
        assert listed == counted
    for path, site in expected.sites.items():
        if site.block is None:
            assert site.position is None, path
        else:
            assert 0 <= site.block < expected.blocks[site.stage], path
            assert (site.position is None) == (site.role == "se"), path
    assert all(expected.sites[path].role == "head" for path in expected.train_only)


def test_one_model_of_each_family_is_listed_whole() -> None:
    assert {expected.family for _, _, expected in TABLES if expected.complete} == set(families())


@pytest.mark.parametrize(("name", "kwargs", "expected"), CASES)
def test_table_agrees_with_the_modules_of_torchvision(name: str, kwargs: dict[str, Any], expected: Expected) -> None:
    model = build(name, kwargs)
    convs = convs_of(model)
    assert len(convs) == expected.convs
    assert set(expected.sites) <= set(convs)
    for path, site in expected.sites.items():
        fits = NUMBERS.get(site.role)
        assert fits is None or fits(convs[path]), (path, site)
    gates = sum(type(m).__name__ == "SqueezeExcitation" for m in model.modules())
    assert expected.roles.get("se", 0) == 2 * gates
    assert expected.roles.get("depthwise", 0) == sum(map(is_depthwise, convs.values()))


@pytest.mark.parametrize(("name", "kwargs", "expected"), COMPLETE)
def test_a_stage_has_the_size_that_torchvision_computes(name: str, kwargs: dict[str, Any], expected: Expected) -> None:
    model = build(name, kwargs).eval()
    heights: dict[str, int] = {}
    for path, conv in convs_of(model).items():
        conv.register_forward_hook(lambda module, args, out, path=path: heights.update({path: out.shape[-2]}))
    model(torch.empty(1, 3, expected.input_size, expected.input_size, device="meta"))
    assert set(expected.sites) - set(heights) == set(expected.train_only)
    deepest: dict[tuple[int, int], tuple[int, str]] = {}  # of each block: its size is the block's
    for path, site in expected.in_eval().sites.items():
        if site.block is not None and site.position is not None:
            block = (site.stage, site.block)
            deepest[block] = max(deepest.get(block, (0, "")), (site.position, path))
        elif site.role not in ("stem", "se"):
            assert heights[path] == expected.sizes[site.stage], path
    assert {block: heights[path] for block, (_, path) in deepest.items()} == {
        (stage, index): expected.sizes[stage] for stage, count in expected.blocks.items() for index in range(count)
    }


def test_leaving_out_what_only_training_runs_gives_the_model_built_without_it() -> None:
    by_id = {table_id(name, kwargs): expected for name, kwargs, expected in TABLES}
    for name in ("googlenet", "inception_v3"):
        whole, without = by_id[name].in_eval(), by_id[f"{name}-aux_logits=False"]
        assert (whole.convs, whole.roles, whole.stages) == (without.convs, without.roles, without.stages)
        assert without.sites.items() <= whole.sites.items()


def test_the_counts_that_the_documentation_prints_are_those_of_the_tables() -> None:
    page = (Path(__file__).parents[1] / "docs" / "roles.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split("|") for line in page.split("## Counts")[1].splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip(" `") for cell in line] for line in lines]
    by_name = {name: expected for name, _, expected in reversed(TABLES)}
    assert len(rows) > len(families())
    for row in rows:
        expected = by_name[row[0]]
        shown = dict(zip(header[3:], row[3:] + [""] * (len(header) - len(row)), strict=True))
        assert (int(row[1]), row[2].split()) == (expected.convs, [str(n) for n in expected.blocks.values()]), row[0]
        assert {role: int(n) for role, n in shown.items() if n} == expected.roles, row[0]


def test_the_documentation_defines_every_role() -> None:
    page = (Path(__file__).parents[1] / "docs" / "roles.md").read_text(encoding="utf-8")
    defined = [line.split("`")[1] for line in page.split("## Stages")[0].splitlines() if line[:3].strip("| ").isdigit()]
    assert sorted(defined) == sorted(ROLES)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("family: x\nsource: x.py\ninput: 224\nmodels: []\nmodel: []\n", "unknown keys \\['model'\\]"),
        ("family: x\ninput: 224\nmodels: []\n", "missing keys \\['source'\\]"),
        ("family: x\nfamily: y\nsource: x.py\ninput: 224\nmodels: []\n", "line 2: the key 'family' is given twice"),
    ],
)
def test_a_table_file_with_a_wrong_key_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        list(tables(tmp_path))
