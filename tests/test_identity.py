"""The identity sees the architecture and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from convrewrite.identity import identity, state_signature

from .nets import NETS, Aliased, Plain, Residual


@pytest.mark.parametrize("name", NETS)
def test_two_builds_of_one_architecture_share_it(name: str) -> None:
    torch.manual_seed(1)
    one = NETS[name]()
    torch.manual_seed(2)
    assert identity(one) == identity(NETS[name]()) == identity(copy.deepcopy(one))


def test_different_architectures_differ() -> None:
    assert len({identity(make()) for make in NETS.values()}) == len(NETS)


def _train(model: nn.Module) -> None:
    model.train()


def _meta(model: nn.Module) -> None:
    model.to("meta")


def _new_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()


def _freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


def _hook(model: nn.Module) -> None:
    model.register_forward_hook(lambda *_: None)


def _private(model: nn.Module) -> None:
    model._cache = 3  # type: ignore[assignment]


@pytest.mark.parametrize("change", [_train, _meta, _new_weights, _freeze, _hook, _private])
def test_it_does_not_see(change: Callable[[nn.Module], None]) -> None:
    model = Residual().eval()
    before = identity(model)
    change(model)
    assert identity(model) == before


def _attribute(model: Residual) -> None:
    model.num_classes = 6


def _dropout(model: Residual) -> None:
    model.drop.p = 0.25


def _epsilon(model: Residual) -> None:
    model.layer1[0].bn1.eps = 1e-3


def _type_of_number(model: Residual) -> None:
    model.num_classes = 5.0  # type: ignore[assignment]


def _activation(model: Residual) -> None:
    model.layer1[0].relu = nn.GELU()


def _half(model: Residual) -> None:
    model.half()


def _stride(model: Residual) -> None:
    model.stem.stride = (2, 2)


def _buffer(model: Residual) -> None:
    model.register_buffer("mean", torch.zeros(3))


def _same_module_twice(model: Residual) -> None:
    model.layer1[1].relu = model.layer1[0].relu


CHANGES = [_attribute, _dropout, _epsilon, _type_of_number, _activation, _half, _stride, _buffer, _same_module_twice]


@pytest.mark.parametrize("change", CHANGES)
def test_it_sees(change: Callable[[Residual], None]) -> None:
    model = Residual()
    before = identity(model)
    change(model)
    assert identity(model) != before


def test_it_sees_the_class_and_not_where_the_class_lives() -> None:
    class Other(Plain):
        pass

    Other.__qualname__ = "Plain"
    assert identity(Other()) == identity(Plain())
    Other.__qualname__ = "Other"
    assert identity(Other()) != identity(Plain())


def test_it_sees_a_shared_module() -> None:
    model = Aliased()
    shared = identity(model)
    model.second = copy.deepcopy(model.first)
    assert identity(model) != shared


def test_a_head_that_was_removed_equals_one_that_never_was() -> None:
    # torchvision's pretrained GoogLeNet is built with the extra heads and then loses them.
    with torch.device("meta"):
        never = torchvision.models.GoogLeNet(aux_logits=False, init_weights=False)
        removed = torchvision.models.GoogLeNet(aux_logits=True, init_weights=False)
    removed.aux_logits, removed.aux1, removed.aux2 = False, None, None
    assert identity(never) == identity(removed)


def test_the_state_signature_has_shape_and_dtype_of_every_tensor() -> None:
    assert state_signature(nn.BatchNorm2d(4)) == {
        "weight": [[4], "torch.float32"],
        "bias": [[4], "torch.float32"],
        "running_mean": [[4], "torch.float32"],
        "running_var": [[4], "torch.float32"],
        "num_batches_tracked": [[], "torch.int64"],
    }
