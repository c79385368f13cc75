"""Ultralytics' networks: built from the package's files, rewritten, and trained and used through its own API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import convrewrite as cr
from convrewrite.errors import SourceError
from convrewrite.sources import rebuild, recognise, resolve
from convrewrite.sources.base import Request
from convrewrite.stands import stand_of

ultralytics = pytest.importorskip(
    "ultralytics", reason="ultralytics is missing: pip install 'convrewrite[ultralytics]'"
)

pytestmark = pytest.mark.filterwarnings("ignore")

PARTS = ("backbone", "neck", "head")
ONE_OF_EACH_PART = {
    "version": 1,
    "name": "parts",
    "rules": [
        {
            "id": part,
            "match": {"part": part, "kernel": 3, "groups": 1, "stride": 1},
            "pick": {"first": 1} if part == "head" else {"last": 1},
            "replace": {"block": "acmix", "heads": 2, "window": 3},
        }
        for part in PARTS
    ],
}


@pytest.fixture(scope="module")
def yolo() -> nn.Module:
    return resolve("ultralytics:yolov8n?nc=2").model


def test_a_name_with_a_size_letter_builds_what_the_package_builds(yolo: nn.Module) -> None:
    theirs = ultralytics.YOLO("yolov8n.yaml").model
    ours = resolve("ultralytics:yolov8n.yaml", meta=True).model
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert yolo.yaml["nc"] == 2  # type: ignore[index]


def test_every_convolution_of_a_yolo_is_a_site_and_c2f_bottlenecks_are_blocks(yolo: nn.Module) -> None:
    sites = cr.inspect(yolo, example=(1, 3, 64, 64))
    convs = [name for name, module in yolo.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(site.path for site in sites) == sorted(convs)
    inner = [site for site in sites if site.path == "model.2.m.0.cv2.conv"]
    assert [site.block is not None for site in inner] == [True]


def test_a_yolo_is_recognised_by_its_own_yaml(yolo: nn.Module) -> None:
    from convrewrite.identity import identity

    found = recognise(yolo, identity(yolo))
    assert found is not None and identity(rebuild(found)) == identity(yolo)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("ultralytics:yolov8", None),
        ("ultralytics:yolv8n", "ultralytics has no model 'yolv8n'; did you mean 'yolov8n'"),
        ("ultralytics:yolo11n.pt", "a pickled model, which is not loaded; save YOLO\\(file\\).model.state_dict\\(\\)"),
    ],
)
def test_names_of_ultralytics_are_checked(spec: str, says: str | None) -> None:
    if says is None:
        assert resolve(spec, meta=True).model is not None
    else:
        with pytest.raises(SourceError, match=says):
            resolve(spec)


def test_pickled_weights_are_not_asked_for() -> None:
    from convrewrite.sources.base import SOURCES

    with pytest.raises(SourceError, match="pickled model"):
        SOURCES.get("ultralytics").recipe("yolov8n", Request(weights="DEFAULT"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images of 64 pixels with a box each, in the package's own layout."""
    image: Any = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for number in range(4):
            image.new("RGB", (64, 64), (60 * number, 90, 120)).save(tmp_path / "images" / split / f"{number}.png")
            (tmp_path / "labels" / split / f"{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.4 0.4\n")
    config = tmp_path / "data.yaml"
    config.write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: {{0: a, 1: b}}\n")
    return config


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "bottleneck"), [("yolov8n", "model.21.m.0.cv2.conv"), ("yolo11n", "model.22.m.0.m.1.cv2.conv")]
)
def test_a_yolo_rewritten_in_every_part_trains_and_predicts_through_its_own_api(
    name: str, bottleneck: str, data: Path
) -> None:
    from convrewrite.sources.yolo import keep_blocks, trainer_for

    original = resolve(f"ultralytics:{name}?nc=2").model
    model, report = cr.rewrite(original, ONE_OF_EACH_PART, example=(2, 3, 64, 64))
    assert report.ok and type(model) is type(original)
    edits = {edit.site.part: edit.path for edit in report.plan.edits}
    assert tuple(edits) == PARTS and edits["neck"] == bottleneck  # of a C2f, and of a C3k2 with a C3k in it
    user = ultralytics.YOLO(f"{name}.yaml", verbose=False)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    user.train(
        trainer=trainer_for(model), data=str(data), epochs=1, imgsz=64, batch=2, workers=0, device="cpu", plots=False,
        project=str(data.parent / "runs"), optimizer="SGD", lr0=0.1, warmup_epochs=0, amp=False, verbose=False,
    )  # fmt: skip
    trained = user.model
    assert sum(stand_of(module) is not None for module in trained.modules()) == len(PARTS)
    after = trained.float().state_dict()
    assert before.keys() <= after.keys()
    for path in edits.values():
        assert not torch.equal(after[f"{path}.gate"], before[f"{path}.gate"]), path
    user.model = keep_blocks(trained)
    found = user.predict(torch.rand(1, 3, 64, 64), imgsz=64, device="cpu", verbose=False, save=False)
    assert len(found) == 1 and found[0].boxes is not None
