"""The data that flows between the steps: convolutions, sites and costs. No torch in here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Shape = tuple[int, ...]
Pair = tuple[int, int]

ROLES = (
    "stem",
    "bottleneck_spatial",
    "basic_spatial",
    "pointwise",
    "depthwise",
    "shortcut",
    "downsample",
    "se",
    "transition",
    "head",
    "other",
)
"""Every role a site can play; `docs/roles.md` defines each."""

PARTS = ("backbone", "neck", "head")
"""Every part of a network that a site can lie in; `docs/roles.md` defines each."""


@dataclass(frozen=True)
class Cost:
    """What a piece of network costs for one input of the planned size.

    Attributes:
        params: number of parameter elements.
        flops: floating point operations, 2 per multiply-add, for the whole planned batch.
        act_infer: bytes of the largest set of intermediate tensors alive at once in inference.
        act_train: bytes that training keeps for the backward pass.
    """

    params: int = 0
    flops: int = 0
    act_infer: int = 0
    act_train: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.flops + other.flops,
            max(self.act_infer, other.act_infer),
            self.act_train + other.act_train,
        )


@dataclass(frozen=True)
class ConvSpec:
    """A 2-D convolution as numbers: what a block that takes its place must honour.

    Attributes:
        padding: (left, right, top, bottom), the order of ``torch.nn.functional.pad``.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
    """

    in_channels: int
    out_channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False
    padding_mode: str = "zeros"

    def out_size(self, height: int, width: int) -> Pair:
        """Output (height, width) for an input of that size; may be <= 0 if the kernel does not fit."""
        left, right, top, bottom = self.padding
        span_h = self.dilation[0] * (self.kernel[0] - 1) + 1
        span_w = self.dilation[1] * (self.kernel[1] - 1) + 1
        return (
            (height + top + bottom - span_h) // self.stride[0] + 1,
            (width + left + right - span_w) // self.stride[1] + 1,
        )

    @property
    def params(self) -> int:
        """Number of parameter elements."""
        weight = self.out_channels * (self.in_channels // self.groups) * self.kernel[0] * self.kernel[1]
        return weight + (self.out_channels if self.bias else 0)

    def flops(self, batch: int, out_height: int, out_width: int) -> int:
        """2 x multiply-adds of the weights; the bias is not counted (the usual convention)."""
        taps = (self.in_channels // self.groups) * self.kernel[0] * self.kernel[1]
        return 2 * batch * self.out_channels * taps * out_height * out_width


@dataclass(frozen=True)
class Place:
    """Where a block is to stand: all that a block may ask before it is built.

    Attributes:
        in_shape: (N, C, H, W) of the tensor that comes in at the planned size.
        out_shape: (N, C, H, W) that must come out.
        conv: the convolution that is replaced; None where a block is inserted.
    """

    in_shape: Shape
    out_shape: Shape
    conv: ConvSpec | None = None


@dataclass(frozen=True)
class Site:
    """One call of one convolution, with every fact that rules can ask for.

    Attributes:
        path: dotted module path ("layer1.0.conv2"); of a functional convolution the path of the
            module that calls it, a colon and the node's name ("layer1.0:conv2d").
        call: this is the k-th call of that module (0-based), of `calls` in all.
        kind: "module" or "functional".
        op: "conv2d"; others ("conv1d", "conv_transpose2d", ...) are listed and never rewritten.
        module_class: class name of the module ("Conv2d"); of a rewritten site the original's class.
        part: "backbone", "neck" (what fuses feature maps of several scales) or "head"; None of what is not 2-D.
        stage: 0 for the stem, then 1, 2, ... by resolution; None if it lies on no path to the output.
        stage_from_end: 1 for the last stage.
        block: index of its block within the stage, 0-based ("layer3.0" is 0); None outside blocks.
        position: 1-based position of the convolution on its block's branch (conv1, conv2, conv3).
        inside: enclosing modules, outermost first, as (path, class name).
        follows: kinds of the operations upstream, nearest first, while each has a single input.
        precedes: kinds of the operations downstream, nearest first, while each has a single user.
        block_path: module whose output is the output of the site's block; None if there is none.
        block_entry: module whose input is the input of the site's block; None if there is none.
        stage_path: module whose output ends the site's stage; None if there is none.
        pool_tail: modules on the straight line from the convolution to the next pooling, that one included;
            () if there is no such line.
        pool_shape: of what comes out of that pooling.
        receptive_field: (height, width) in input pixels that one output pixel sees.
        rewritten: id of the edit that already stands here, "" if none.
    """

    path: str
    index: int
    conv: ConvSpec
    in_shape: Shape
    out_shape: Shape
    kind: Literal["module", "functional"] = "module"
    op: str = "conv2d"
    call: int = 0
    calls: int = 1
    module_class: str = "Conv2d"
    role: str = "other"
    part: str | None = None
    stage: int | None = None
    stage_from_end: int | None = None
    block: int | None = None
    block_from_end: int | None = None
    position: int | None = None
    inside: tuple[tuple[str, str], ...] = ()
    follows: tuple[str, ...] = ()
    precedes: tuple[str, ...] = ()
    block_path: str | None = None
    block_entry: str | None = None
    block_in_shape: Shape = ()
    block_shape: Shape = ()
    stage_path: str | None = None
    stage_shape: Shape = ()
    pool_tail: tuple[str, ...] = ()
    pool_shape: Shape = ()
    receptive_field: Pair = (0, 0)
    rewritten: str = ""
    cost: Cost = field(default_factory=Cost)

    @property
    def id(self) -> str:
        """``path``, or ``path@k`` where the module is called several times."""
        return self.path if self.calls == 1 else f"{self.path}@{self.call}"

    # The facts that rules, expressions and tables use by name.
    @property
    def kernel(self) -> Pair:
        return self.conv.kernel

    @property
    def stride(self) -> Pair:
        return self.conv.stride

    @property
    def padding(self) -> tuple[int, int, int, int]:
        return self.conv.padding

    @property
    def dilation(self) -> Pair:
        return self.conv.dilation

    @property
    def groups(self) -> int:
        return self.conv.groups

    @property
    def in_channels(self) -> int:
        return self.conv.in_channels

    @property
    def out_channels(self) -> int:
        return self.conv.out_channels

    @property
    def params(self) -> int:
        return self.cost.params

    @property
    def flops(self) -> int:
        return self.cost.flops

    def place(self) -> Place:
        """The place that a block replacing this convolution would take."""
        return Place(self.in_shape, self.out_shape, self.conv)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is its inverse."""
        return {"id": self.id, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        """The site that `to_dict` wrote."""
        known = {f.name for f in fields(cls)}
        values = {key: _tuples(value) for key, value in data.items() if key in known}
        values["conv"] = ConvSpec(**{k: _tuples(v) for k, v in data["conv"].items()})
        values["cost"] = Cost(**data["cost"])
        return cls(**values)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
