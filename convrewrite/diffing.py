"""Compare two models: which modules, convolutions and tensors came, went or changed. Pure data, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from convrewrite.sites import Shape, Site

if TYPE_CHECKING:
    from torch import nn

DIFF_SCHEMA = 1
Kind = Literal["added", "removed", "changed"]

_FACTS = ("op", "module_class", "role", "stage", "block", "in_shape", "out_shape", "rewritten", "calls")
_CONV_FACTS = ("kernel", "stride", "padding", "dilation", "groups", "bias", "padding_mode")
_COSTS = ("params", "flops", "act_infer", "act_train")


@dataclass(frozen=True)
class ModelView:
    """What a comparison needs to know of one model.

    Attributes:
        name: how the reader knows it ("torchvision:resnet50", a folder).
        sites: its convolutions in order of execution.
        tensors: (shape, dtype) of every entry of the state dict ("torch.float32").
        modules: class name of every module by dotted path, the root under "".
        params: parameter elements, a shared one counted once; None if not known.
        measured: of its training here, on held-out images and of the weights that were kept: "step", "val_loss",
            "val_accuracy", "agreement"; {} if there was none.
    """

    name: str
    sites: tuple[Site, ...]
    tensors: Mapping[str, tuple[Shape, str]]
    modules: Mapping[str, str]
    params: int | None = None
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleChange:
    """A module that is in one model only, or is of another class: class names, "" where there is none."""

    path: str
    kind: Kind
    before: str
    after: str


@dataclass(frozen=True)
class SiteChange:
    """A convolution that is in one model only or differs; `facts` are (name, before, after) of what differs."""

    id: str
    kind: Kind
    before: Site | None
    after: Site | None
    facts: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class TensorChange:
    """A state-dict entry that is in one model only or has another shape or dtype; None where there is none."""

    key: str
    kind: Kind
    before: tuple[Shape, str] | None
    after: tuple[Shape, str] | None


@dataclass(frozen=True)
class Diff:
    """All that differs between two models, in the order of the second (what was removed stands where it stood)."""

    before: ModelView
    after: ModelView
    modules: tuple[ModuleChange, ...]
    sites: tuple[SiteChange, ...]
    tensors: tuple[TensorChange, ...]

    @property
    def same(self) -> bool:
        """True if the two models have the same modules, convolutions and tensors (values are not compared)."""
        return not (self.modules or self.sites or self.tensors)

    @property
    def outermost(self) -> tuple[ModuleChange, ...]:
        """The module changes that do not lie inside another one."""
        changed = {m.path for m in self.modules}
        return tuple(m for m in self.modules if not any(p in changed for p in _parents(m.path)))

    def inside(self, path: str) -> int:
        """How many module changes lie inside the module at `path`."""
        return sum(path in _parents(m.path) for m in self.modules)

    def totals(self) -> dict[str, dict[str, int | None]]:
        """For "before" and "after": params, flops and number of convolutions, elements and number of tensors."""
        return {"before": _totals(self.before), "after": _totals(self.after)}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, documented in ``docs/report.md``."""
        return {
            "schema": DIFF_SCHEMA,
            "same": self.same,
            "before": self.before.name,
            "after": self.after.name,
            "totals": self.totals(),
            "measured": {"before": dict(self.before.measured), "after": dict(self.after.measured)},
            "modules": [asdict(m) for m in self.modules],
            "sites": [_site_dict(s) for s in self.sites],
            "tensors": [
                {"key": t.key, "kind": t.kind, "before": _tensor_dict(t.before), "after": _tensor_dict(t.after)}
                for t in self.tensors
            ],
        }


def view_of(
    model: nn.Module, sites: Sequence[Site], name: str, measured: Mapping[str, float] | None = None
) -> ModelView:
    """The view of `model`, whose convolutions are `sites`. Reads shapes only; works on the meta device.

    Args:
        name: how the reader knows the model.
        measured: what its training measured last.
    """
    return ModelView(
        name=name,
        sites=tuple(sites),
        tensors={
            key: (tuple(value.shape), str(value.dtype))
            for key, value in model.state_dict().items()
            if hasattr(value, "shape")  # get_extra_state() may put anything there
        },
        modules={path: type(module).__name__ for path, module in model.named_modules()},
        params=sum(p.numel() for p in model.parameters()),
        measured=measured or {},
    )


def diff(a: ModelView, b: ModelView) -> Diff:
    """What differs in `b` from `a`. Modules and tensors are matched by name, convolutions by id."""
    sites_a, sites_b = {s.id: s for s in a.sites}, {s.id: s for s in b.sites}
    modules = [
        ModuleChange(path, _kind(path, a.modules, b.modules), a.modules.get(path, ""), b.modules.get(path, ""))
        for path in merged(list(a.modules), list(b.modules))
        if a.modules.get(path) != b.modules.get(path)
    ]
    tensors = [
        TensorChange(key, _kind(key, a.tensors, b.tensors), a.tensors.get(key), b.tensors.get(key))
        for key in merged(list(a.tensors), list(b.tensors))
        if a.tensors.get(key) != b.tensors.get(key)
    ]
    sites = [_site_change(i, sites_a.get(i), sites_b.get(i)) for i in merged(list(sites_a), list(sites_b))]
    return Diff(a, b, tuple(modules), tuple(s for s in sites if s is not None), tuple(tensors))


def merged(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The names of both lists, each once, in the order of `after`; a removed one follows what it followed."""
    present = set(after)
    follows: dict[str, list[str]] = {}
    anchor = ""
    for name in before:
        if name in present:
            anchor = name
        else:
            follows.setdefault(anchor, []).append(name)
    order = list(follows.get("", [])) if "" not in present else []
    for name in after:
        order.append(name)
        order.extend(follows.get(name, []))
    return order


def _site_change(site_id: str, before: Site | None, after: Site | None) -> SiteChange | None:
    if before is None or after is None:
        return SiteChange(site_id, "added" if before is None else "removed", before, after, ())
    facts = [(name, getattr(before, name), getattr(after, name)) for name in _FACTS]
    facts += [(name, getattr(before.conv, name), getattr(after.conv, name)) for name in _CONV_FACTS]
    facts += [(name, getattr(before.cost, name), getattr(after.cost, name)) for name in _COSTS]
    changed = tuple((name, _show(old), _show(new)) for name, old, new in facts if old != new)
    return SiteChange(site_id, "changed", before, after, changed) if changed else None


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(str(v) for v in value)
    return "none" if value is None or value == "" else str(value)


def _kind(key: str, before: Mapping[str, object], after: Mapping[str, object]) -> Kind:
    if key not in before:
        return "added"
    return "changed" if key in after else "removed"


def _parents(path: str) -> Iterable[str]:
    """The modules around the one at `path`, without the root: a root of another class hides nothing."""
    parts = path.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


def _totals(view: ModelView) -> dict[str, int | None]:
    return {
        "params": view.params,
        "flops": sum(s.flops for s in view.sites),
        "convs": len(view.sites),
        "elements": sum(_numel(shape) for shape, _ in view.tensors.values()),
        "tensors": len(view.tensors),
    }


def _numel(shape: Shape) -> int:
    product = 1
    for dim in shape:
        product *= dim
    return product


def _site_dict(change: SiteChange) -> dict[str, Any]:
    return {
        "id": change.id,
        "kind": change.kind,
        "before": change.before.to_dict() if change.before else None,
        "after": change.after.to_dict() if change.after else None,
        "facts": [{"name": name, "before": old, "after": new} for name, old, new in change.facts],
    }


def _tensor_dict(signature: tuple[Shape, str] | None) -> dict[str, Any] | None:
    return {"shape": list(signature[0]), "dtype": signature[1]} if signature else None
