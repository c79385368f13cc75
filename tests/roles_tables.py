"""Reads the expected role of every convolution of the torchvision models from `cases/roles/*.yaml`. No torch in here.

The tables were worked out from the models' source, not from what convrewrite prints, so that they can judge it.
`docs/roles.md` defines the roles, stages, blocks and positions that they use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "cases" / "roles"

_FILE_KEYS = {"family", "source", "input", "models"}
_MODEL_KEYS = {"model", "kwargs", "convs", "roles", "stages", "blocks", "sizes", "train_only", "sites"}
_MODEL_OPTIONAL = {"kwargs", "train_only"}
_SITE_KEYS = {"role", "stage", "block", "position"}
_SITE_OPTIONAL = {"block", "position"}


@dataclass(frozen=True)
class ExpectedSite:
    """What one convolution must be found to be; `block` and `position` are None outside blocks."""

    role: str
    stage: int
    block: int | None = None
    position: int | None = None


@dataclass(frozen=True)
class Expected:
    """What must be found in one model.

    Attributes:
        input_size: height and width of the input in pixels.
        convs: number of Conv2d modules, those of auxiliary classifiers included.
        roles: role -> number of convolutions.
        stages: stage -> role -> number of convolutions.
        blocks: stage -> number of blocks; empty for plain chains.
        sizes: stage -> height of what its blocks put out, in pixels (plain chains: of its convolutions' output).
        train_only: paths that run in training mode only (auxiliary classifiers); counted in all of the above.
        sites: path -> what stands there; all convolutions for one model of each family, samples for the others.
    """

    family: str
    input_size: int
    convs: int
    roles: Mapping[str, int]
    stages: Mapping[int, Mapping[str, int]]
    blocks: Mapping[int, int]
    sizes: Mapping[int, int]
    sites: Mapping[str, ExpectedSite]
    train_only: tuple[str, ...] = ()
    by_stage: Mapping[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_stage", {stage: sum(roles.values()) for stage, roles in self.stages.items()})

    @property
    def complete(self) -> bool:
        """Whether `sites` lists every convolution of the model."""
        return len(self.sites) == self.convs

    def in_eval(self) -> Expected:
        """The same without what runs in training mode only."""
        roles = dict(self.roles)
        stages = {stage: dict(counts) for stage, counts in self.stages.items()}
        for path in self.train_only:
            gone = self.sites[path]
            for counts in (roles, stages[gone.stage]):
                counts[gone.role] -= 1
                if not counts[gone.role]:
                    del counts[gone.role]
        sites = {path: site for path, site in self.sites.items() if path not in self.train_only}
        convs = self.convs - len(self.train_only)
        return Expected(self.family, self.input_size, convs, roles, stages, self.blocks, self.sizes, sites)


def families(folder: Path = FOLDER) -> list[str]:
    """Names of the families that have a file, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def tables(folder: Path = FOLDER) -> Iterator[tuple[str, dict[str, Any], Expected]]:
    """Yield (torchvision model name, keyword arguments for its builder, what must be found), family by family.

    Raises:
        ValueError: a key is missing, unknown or given twice.
    """
    for family in families(folder):
        yield from _read(folder / f"{family}.yaml")


def table_id(name: str, kwargs: Mapping[str, Any]) -> str:
    """A short name for one entry: the model's, with the arguments that change its layout."""
    shown = [f"{key}={value}" for key, value in kwargs.items() if key != "init_weights"]
    return "-".join([name, *shown])


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any], Expected]]:
    document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    _check_keys(document, _FILE_KEYS, set(), path.name)
    for entry in document["models"]:
        where = f"{path.name}: {entry.get('model', 'an entry without a name')}"
        _check_keys(entry, _MODEL_KEYS, _MODEL_OPTIONAL, where)
        sites = {}
        for site_path, facts in entry["sites"].items():
            _check_keys(facts, _SITE_KEYS, _SITE_OPTIONAL, f"{where}: {site_path}")
            sites[site_path] = ExpectedSite(**facts)
        expected = Expected(
            family=document["family"],
            input_size=document["input"],
            convs=entry["convs"],
            roles=entry["roles"],
            stages=entry["stages"],
            blocks=entry["blocks"],
            sizes=entry["sizes"],
            sites=sites,
            train_only=tuple(entry.get("train_only", ())),
        )
        yield entry["model"], dict(entry.get("kwargs", {})), expected


def _check_keys(given: Mapping[str, Any], known: set[str], optional: set[str], where: str) -> None:
    unknown, missing = set(given) - known, known - optional - set(given)
    if unknown or missing:
        raise ValueError(f"{where}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here that is an error."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in result:
            raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
