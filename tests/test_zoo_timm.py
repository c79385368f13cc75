"""One member of every timm family, and the other sources: equal copies change no bit, and a rule's laws hold."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from convrewrite.zoo.models import HUGGING_FACE, PATCHES, SEGMENTATION, TIMM, ULTRALYTICS, Entry
from convrewrite.zoo.trial import try_model

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

FEW = (
    "convnext",
    "cspnext",
    "efficientnet",
    "inception_next",
    "mobilenetv3",
    "mobilevit",
    "regnet",
    "resnet",
    "starnet",
    "vovnet",
)
"""Families that continuous integration tries: small, and of all kinds."""


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    gc.collect()


@pytest.mark.parametrize(
    "family",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.big) for name in (*TIMM, *PATCHES)],
)
def test_a_member_of_every_timm_family_is_good(family: str) -> None:
    pytest.importorskip("timm", reason="timm is missing: pip install 'convrewrite[timm]'")
    row = try_model(Entry("timm", family, f"timm:{(TIMM | PATCHES)[family]}"))
    assert row.good, row.result


@pytest.mark.big
def test_every_timm_family_with_a_spatial_convolution_is_in_the_zoo() -> None:
    timm = pytest.importorskip("timm", reason="timm is missing: pip install 'convrewrite[timm]'")
    known = {*TIMM, *PATCHES}
    without = {"gemma4_vit", "naflexvit"}  # their patches go through a linear layer
    assert known <= set(timm.list_modules())
    assert set(timm.list_modules()) - known <= without


@pytest.mark.parametrize("name", [HUGGING_FACE[0], *(pytest.param(n, marks=pytest.mark.big) for n in HUGGING_FACE[1:])])
def test_models_of_transformers_are_good(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is missing: pip install 'convrewrite[hf]'")
    row = try_model(Entry("transformers", "", f"hf:{name}"))
    assert row.good, row.result


@pytest.mark.parametrize("name", [SEGMENTATION[0], *(pytest.param(n, marks=pytest.mark.big) for n in SEGMENTATION[1:])])
def test_segmentation_models_are_good(name: str) -> None:
    reason = "segmentation-models-pytorch is missing: pip install 'convrewrite[smp]'"
    pytest.importorskip("segmentation_models_pytorch", reason=reason)
    row = try_model(Entry("smp", "", f"smp:{name}?encoder_name=resnet18"))
    assert row.good, row.result


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.big) for n in ULTRALYTICS])
def test_models_of_ultralytics_are_good(name: str) -> None:
    pytest.importorskip("ultralytics", reason="ultralytics is missing: pip install 'convrewrite[ultralytics]'")
    row = try_model(Entry("ultralytics", "", f"ultralytics:{name}"))
    assert row.good, row.result
