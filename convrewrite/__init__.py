"""convrewrite: a compiler for existing CNNs. The public names are lazy, so that importing this costs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from convrewrite.blocks.base import Block, BlockOptions, register_block
    from convrewrite.blocks.local import set_backend
    from convrewrite.diffing import Diff
    from convrewrite.errors import ConvrewriteError
    from convrewrite.finalizing import finalize
    from convrewrite.fusing import fuse
    from convrewrite.migrating import migrate, revert
    from convrewrite.pipeline import Pass, diff, inspect, plan, rewrite
    from convrewrite.plans import Edit, Plan, Refusal
    from convrewrite.reports import Report
    from convrewrite.rulefile import load_rules
    from convrewrite.ruleschema import Rule, RuleFile
    from convrewrite.sites import ConvSpec, Cost, Place, Site
    from convrewrite.store import load, save
    from convrewrite.training.annealing import Annealer
    from convrewrite.training.groups import TrainableSummary, param_groups, trainable_summary
    from convrewrite.training.run import Trained, distill, finetune
    from convrewrite.training.solving import solve_blends

# Public name -> the module it lives in. No submodule may have the name of a public function: importing
# the submodule would put it in the function's place.
_HOME = {
    "Annealer": "training.annealing",
    "Block": "blocks.base",
    "BlockOptions": "blocks.base",
    "ConvSpec": "sites",
    "ConvrewriteError": "errors",
    "Cost": "sites",
    "Diff": "diffing",
    "Edit": "plans",
    "Pass": "pipeline",
    "Place": "sites",
    "Plan": "plans",
    "Refusal": "plans",
    "Report": "reports",
    "Rule": "ruleschema",
    "RuleFile": "ruleschema",
    "Site": "sites",
    "TrainableSummary": "training.groups",
    "Trained": "training.run",
    "diff": "pipeline",
    "distill": "training.run",
    "finalize": "finalizing",
    "fuse": "fusing",
    "finetune": "training.run",
    "inspect": "pipeline",
    "load": "store",
    "load_rules": "rulefile",
    "migrate": "migrating",
    "param_groups": "training.groups",
    "plan": "pipeline",
    "register_block": "blocks.base",
    "revert": "migrating",
    "rewrite": "pipeline",
    "save": "store",
    "set_backend": "blocks.local",
    "solve_blends": "training.solving",
    "trainable_summary": "training.groups",
}

__all__ = [
    "Annealer",
    "Block",
    "BlockOptions",
    "ConvSpec",
    "ConvrewriteError",
    "Cost",
    "Diff",
    "Edit",
    "Pass",
    "Place",
    "Plan",
    "Refusal",
    "Report",
    "Rule",
    "RuleFile",
    "Site",
    "TrainableSummary",
    "Trained",
    "__version__",
    "diff",
    "distill",
    "finalize",
    "finetune",
    "fuse",
    "inspect",
    "load",
    "load_rules",
    "migrate",
    "param_groups",
    "plan",
    "register_block",
    "revert",
    "rewrite",
    "save",
    "set_backend",
    "solve_blends",
    "trainable_summary",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
