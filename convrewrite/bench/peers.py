"""Published implementations, loaded from checkouts that the user has, or from timm. None of their code is in here.

Each is used as it is, with the smallest change that lets it run where we measure; each change is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.bench.baselines import baseline, load, whole_logits
from convrewrite.bench.plain import aa_widths


def _in(peers: Path | None, path: str) -> Any:
    assert peers is not None  # Baseline.absent() said so
    return load(peers / path)


@baseline("acmix", name="LeapLabTHU/ACmix", folder="ACmix")
def acmix(channels: int, side: int, peers: Path | None) -> nn.Module:
    module: nn.Module = _in(peers, "ACmix/ResNet/test_bottleneck.py").ACmix(channels, channels)
    return module


@baseline(
    "aa_conv",
    name="leaderj1001/Attention-Augmented-Conv2d",
    folder="Attention-Augmented-Conv2d",
    needs=whole_logits(8),
)
def aa_conv(channels: int, side: int, peers: Path | None) -> nn.Module:
    """The variant "in paper", the paper's listing. Changed: q, a view of a split, is not scaled in place."""
    file = "Attention-Augmented-Conv2d/in_paper_attention_augmented_conv/attention_augmented_conv.py"
    theirs = _in(peers, file).AugmentedConv

    class Repaired(theirs):  # type: ignore[misc, valid-type]
        def compute_flat_qkv(self, x: Tensor, dk: int, dv: int, heads: int) -> tuple[Tensor, ...]:
            q, k, v = (self.split_heads_2d(t, heads) for t in self.qkv_conv(x).split([dk, dk, dv], 1))
            q = q * (dk // heads) ** -0.5
            return q.flatten(3), k.flatten(3), v.flatten(3), q, k, v

    keys, values = aa_widths(channels)
    return Repaired(channels, channels, 3, keys, values, 8, relative=True)


@baseline("sasa", name="leaderj1001/Stand-Alone-Self-Attention", folder="Stand-Alone-Self-Attention")
def sasa(channels: int, side: int, peers: Path | None) -> nn.Module:
    """Not the paper's function: its logits are never summed over channels."""
    theirs = _in(peers, "Stand-Alone-Self-Attention/attention.py").AttentionConv
    module: nn.Module = theirs(channels, channels, 7, padding=3, groups=8)
    return module


@baseline("sasa", name="MerHS/SASA-pytorch", folder="SASA-pytorch")
def sasa_grouped(channels: int, side: int, peers: Path | None) -> nn.Module:
    """Not the same function: its projections are grouped by head, an eighth of the paper's parameters."""
    theirs = _in(peers, "SASA-pytorch/model/sa_layer.py").SelfAttentionConv2d
    module: nn.Module = theirs(channels, channels, 7, padding=3, groups=8, bias=False)
    return module


@baseline("criss_cross", name="speedinghzl/CCNet", folder="CCNet")
def criss_cross(channels: int, side: int, peers: Path | None) -> nn.Module:
    """Changed: the diagonal of -inf is made where x is, not by `.cuda()`, and expanded instead of repeated."""
    module: Any = _in(peers, "CCNet/cc_attention/functions.py").CrissCrossAttention(channels)
    module.INF = lambda b, h, w: torch.full((h,), -torch.inf, device=module.gamma.device).diag().expand(b * w, h, h)
    result: nn.Module = module
    return result


@baseline("position_attention", name="junfu1115/DANet", folder="DANet")
def position_attention(channels: int, side: int, peers: Path | None) -> nn.Module:
    module: nn.Module = _in(peers, "DANet/encoding/nn/da_att.py").PAM_Module(channels)
    return module


@baseline("channel_attention", name="junfu1115/DANet", folder="DANet")
def channel_attention(channels: int, side: int, peers: Path | None) -> nn.Module:
    module: nn.Module = _in(peers, "DANet/encoding/nn/da_att.py").CAM_Module(channels)
    return module


def _non_local(pairwise: str, channels: int, peers: Path | None) -> nn.Module:
    file = f"Non-local_pytorch/lib/non_local_{pairwise}.py"
    module: nn.Module = _in(peers, file).NONLocalBlock2D(channels, sub_sample=False)
    return module


def _pairs_of_features(batch: int, channels: int, side: int) -> int:
    """Bytes of the concatenation of theta and phi for all pairs, and of the two it is made of."""
    return 2 * batch * channels * side**4 * 4


@baseline("non_local/embedded_gaussian", name="AlexHex7/Non-local_pytorch", folder="Non-local_pytorch")
def embedded_gaussian(channels: int, side: int, peers: Path | None) -> nn.Module:
    return _non_local("embedded_gaussian", channels, peers)


@baseline("non_local/gaussian", name="AlexHex7/Non-local_pytorch", folder="Non-local_pytorch")
def gaussian(channels: int, side: int, peers: Path | None) -> nn.Module:
    return _non_local("gaussian", channels, peers)


@baseline("non_local/dot_product", name="AlexHex7/Non-local_pytorch", folder="Non-local_pytorch")
def dot_product(channels: int, side: int, peers: Path | None) -> nn.Module:
    return _non_local("dot_product", channels, peers)


@baseline(
    "non_local/concatenation", name="AlexHex7/Non-local_pytorch", folder="Non-local_pytorch", needs=_pairs_of_features
)
def concatenation(channels: int, side: int, peers: Path | None) -> nn.Module:
    return _non_local("concatenation", channels, peers)


class _ChannelsLast(nn.Module):
    """A layer on (B, H, W, C) given and giving (B, C, H, W) maps that lie in memory as it wants them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return result


@baseline("outlook", name="timm")
def outlook(channels: int, side: int, peers: Path | None) -> nn.Module:
    """Its layer wants (B, H, W, C): it is given a permuted view."""
    from timm.models.volo import OutlookAttention

    return _ChannelsLast(OutlookAttention(channels, max(1, channels // 32)))


@baseline("mhsa", name="timm", needs=whole_logits(4))
def mhsa(channels: int, side: int, peers: Path | None) -> nn.Module:
    from timm.layers.bottleneck_attn import BottleneckAttn

    module: nn.Module = BottleneckAttn(channels, channels, feat_size=(side, side), num_heads=4, qk_ratio=1.0)
    return module
