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

LAST_BOTTLENECKS = {
    "version": 1,
    "name": "c2f",
    "rules": [
        {
            "id": "late",
            "match": {"name": "model.8.m.0.cv2.conv"},
            "replace": {"block": "outlook", "window": 3},
        }
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
def test_a_rewritten_yolo_trains_and_predicts_through_its_own_api(yolo: nn.Module, data: Path) -> None:
    from convrewrite.sources.yolo import keep_blocks, trainer_for

    model, report = cr.rewrite(yolo, LAST_BOTTLENECKS, example=(2, 3, 64, 64))
    assert report.ok and type(model) is type(yolo)
    user = ultralytics.YOLO("yolov8n.yaml", verbose=False)
    before = {key: t.clone() for key, t in model.state_dict().items() if key.startswith("model.8.m.0.cv2.conv.")}
    user.train(
        trainer=trainer_for(model), data=str(data), epochs=1, imgsz=64, batch=2, workers=0, device="cpu", plots=False,
        project=str(data.parent / "runs"), optimizer="SGD", lr0=0.1, warmup_epochs=0, amp=False, verbose=False,
    )  # fmt: skip
    trained = user.model
    assert sum(stand_of(module) is not None for module in trained.modules()) == 1
    after = trained.float().state_dict()
    assert before.keys() <= after.keys() and any(not torch.equal(after[key], t) for key, t in before.items())
    user.model = keep_blocks(trained)
    found = user.predict(torch.rand(1, 3, 64, 64), imgsz=64, device="cpu", verbose=False, save=False)
    assert len(found) == 1 and found[0].boxes is not None
