"""Images from every source, in an order that the seed fixes; what cannot be used ends in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convrewrite.data import open_images
from convrewrite.data.batches import Batch, Order, Prepared, batches, measured
from convrewrite.data.transforms import Form, as_tensor, augmentations, form_of, transform_for
from convrewrite.errors import ConvrewriteError
from convrewrite.randomness import seeded

from .tiny import Unreadable, images, picture, rewritten

FORM = Form(3, (12, 12), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def _open(data: Any, val: Any = None) -> Any:
    return open_images(data, val, fraction=0.25, seed=0)


def _write(path: Path, color: Any = (255, 0, 0), mode: str = "RGB", size: tuple[int, int] = (16, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def _prepared(dataset: Any, *, augment: str = "none") -> Prepared:
    return Prepared(dataset, transform_for(FORM, augmentations(augment)), seed=0, name="data")


def _all(dataset: Any) -> list[Batch]:
    return list(measured(_prepared(dataset), batch=4, rank=0, world=1, workers=0))


# --- sources


def test_a_folder_with_train_and_val_has_sorted_classes_and_both_parts(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 1)):
        for name in ("cat", "ant"):
            for number in range(count):
                _write(tmp_path / part / name / f"{number}.png")
    found = _open(f"imagefolder:{tmp_path}")
    assert found.classes == ("ant", "cat")
    assert (len(found.train), len(found.val)) == (6, 2)
    assert [found.train[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]


def test_a_folder_without_val_is_split_the_same_way_every_time(tmp_path: Path) -> None:
    for number in range(8):
        _write(tmp_path / "ab"[number % 2] / f"{number}.png", (number, 0, 0))
    splits = [_open(f"imagefolder:{tmp_path}") for _ in range(2)]
    assert {(len(s.train), len(s.val)) for s in splits} == {(6, 2)}
    reds = [[s.val[i][0].getpixel((0, 0))[0] for i in range(2)] for s in splits]
    assert reds[0] == reds[1]
    trained = {splits[0].train[i][0].getpixel((0, 0))[0] for i in range(6)}
    assert trained | set(reds[0]) == set(range(8))
    assert not trained & set(reds[0])


def test_images_without_classes_have_no_labels(tmp_path: Path) -> None:
    for number in range(4):
        _write(tmp_path / f"{number}.jpg")
    found = _open(f"imagefolder:{tmp_path}")
    assert not found.labelled
    assert found.count is None
    assert found.train[0][1] == -1


def test_torchvision_by_name_with_options() -> None:
    found = _open("torchvision:FakeData?size=12&num_classes=3")
    assert found.count == 3
    assert (len(found.train), len(found.val)) == (9, 3)


def test_hugging_face_s_rows_from_a_local_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"img": [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(6)], "label": [0, 1] * 3}
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": whole, "test": whole.select(range(2))}).save_to_disk(str(tmp_path / "hf"))
    found = _open(f"hf:{tmp_path / 'hf'}")
    assert found.classes == ("x", "y")
    assert (len(found.train), len(found.val)) == (6, 2)
    image, label = found.train[3]
    assert (image.getpixel((0, 0))[0], label) == (3, 1)


def test_a_python_data_set_says_its_classes_in_several_ways() -> None:
    assert _open(images(10)).count == 5
    assert _open(Unreadable(picture())).classes == ("a", "b", "c", "d", "e")
    assert _open([(picture(), 0)] * 4).count is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: f"imagefolder:{p}/nowhere", r"nowhere: there is no such folder; write imagefolder:PATH$"),
        (lambda p: f"imagefolder:{p}", r": there are no images; put \.jpg, \.jpeg, \.png files there$"),
        (lambda p: "imagefoldr:x", r"is no source of images; did you mean 'imagefolder'\?"),
        (lambda p: "images", r"'images' is no source of images; write imagefolder:PATH"),
        (lambda p: "torchvision:MINST", r"torchvision has no data set 'MINST'; did you mean '\w*MNIST'\?$"),
        (lambda p: f"torchvision:MNIST:{p}", r"torchvision:MNIST: not found in '.*'; name the folder.*--download$"),
        (lambda p: "torchvision:FakeData?sise=3", r"no option 'sise'; did you mean 'size'\?$"),
        (lambda p: 3, r"a int is no data set"),
        (lambda p: [], r"there are no images to train on$"),
        (lambda p: [(picture(), 0)], r"one image cannot be both trained and measured on; give more"),
    ],
)
def test_what_is_no_source_of_images_is_one_line(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(ConvrewriteError, match=message) as error:
        _open(make(tmp_path))
    assert "\n" not in str(error.value)


def test_classes_that_differ_between_the_parts_are_one_line(tmp_path: Path) -> None:
    _write(tmp_path / "train" / "a" / "1.png")
    _write(tmp_path / "val" / "b" / "1.png")
    with pytest.raises(ConvrewriteError, match="class 'a' is only in one of train and val"):
        _open(f"imagefolder:{tmp_path}")
    with pytest.raises(ConvrewriteError, match="5 classes to train on, 3 to measure on"):
        _open(images(), "torchvision:FakeData?size=4&num_classes=3")


# --- images


def test_grey_pictures_get_three_equal_channels_and_coloured_ones_become_grey() -> None:
    grey = as_tensor(Image.new("L", (4, 4), 100), 3)
    assert grey.shape == (3, 4, 4)
    assert grey.unique().tolist() == [100]
    assert as_tensor(Image.new("RGB", (4, 4), (100, 100, 100)), 1).shape == (1, 4, 4)
    assert as_tensor(torch.zeros(1, 4, 4), 3).shape == (3, 4, 4)
    assert as_tensor(np.zeros((4, 5), np.uint8), 3).shape == (3, 4, 5)


def test_pictures_are_resized_and_normalised_and_float_tensors_are_taken_as_they_are() -> None:
    transform = transform_for(FORM, frozenset())
    done = transform(Image.new("RGB", (40, 20), (255, 0, 51)))
    assert done.shape == (3, 12, 12)
    torch.testing.assert_close(done[:, 0, 0], torch.tensor([2.0, -2.0, -1.2]))  # (1, 0, 0.2) less 0.5 over 0.25
    given = torch.randn(3, 7, 9)
    assert torch.equal(transform(given), given)


@pytest.mark.parametrize(
    ("strange", "label", "message"),
    [
        (picture(float("nan")), 0, "data, image 3: the image holds NaN or infinite values"),
        (torch.zeros(2, 12, 12), 0, "data, image 3: an image has 2 channels, the model takes 3"),
        (torch.zeros(3, 9, 9), 0, "float tensors of several sizes"),
        (np.zeros((4, 4, 3)), 0, "an array of float64"),
        ("x.png", 0, "a str is no image"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), 0, "a tensor of torch.int64 is no image"),
        (picture(), "cat", "the label 'cat' is no class number"),
        (ValueError("bad\nfile"), 0, "data, image 3: ValueError: bad$"),
    ],
)
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_that_cannot_be_used_is_one_line_that_names_it(
    strange: Any, label: Any, message: str, workers: int
) -> None:
    with pytest.raises(ConvrewriteError, match=message) as error:
        list(measured(_prepared(Unreadable(strange, label)), batch=4, rank=0, world=1, workers=workers))
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_image_is_one_line_with_its_path(tmp_path: Path) -> None:
    for number in range(3):
        _write(tmp_path / "a" / f"{number}.png")
    (tmp_path / "a" / "1.png").write_bytes(b"not an image")
    with pytest.raises(ConvrewriteError, match=r"a/1\.png: not a readable image"):
        _all(_open(f"imagefolder:{tmp_path}", f"imagefolder:{tmp_path}").val)


def test_the_form_of_a_model_comes_from_its_plan_and_its_source() -> None:
    model = rewritten()
    form = form_of(model, image_size=None, normalize="auto")
    assert (form.channels, form.size) == (3, (12, 12))
    assert form.mean == (0.485, 0.456, 0.406)  # ImageNet's
    assert form_of(model, image_size=20, normalize="half").mean == (0.5,) * 3
    assert form_of(model, image_size=20, normalize="none").size == (20, 20)
    with pytest.raises(ConvrewriteError, match="unknown augmentation 'flop'; did you mean 'flip'"):
        augmentations("crop,flop")


# --- order


def test_every_epoch_is_a_new_permutation_and_the_same_in_every_run() -> None:
    keys = [key for batch in Order(10, 5, 0, 0, 4) for key in batch]
    first, second = keys[:10], keys[10:]
    assert sorted(index for _, index in first) == sorted(index for _, index in second) == list(range(10))
    assert [i for _, i in first] != [i for _, i in second]
    assert {epoch for epoch, _ in first} == {0}
    assert keys == [key for batch in Order(10, 5, 0, 0, 4) for key in batch]
    assert keys != [key for batch in Order(10, 5, 1, 0, 4) for key in batch]


def test_an_order_that_begins_later_goes_on_with_the_same_batches() -> None:
    whole = list(Order(11, 3, 0, 0, 7))
    assert list(Order(11, 3, 0, 4, 7)) == whole[4:]
    assert len(Order(11, 3, 0, 4, 7)) == 3


def test_two_processes_together_see_what_one_with_the_doubled_batch_sees() -> None:
    one = list(Order(20, 4, 0, 0, 5))
    parts = [list(Order(20, 2, 0, 0, 5, rank, 2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == one


def test_a_sample_draws_the_same_whatever_was_drawn_before_and_leaves_the_caller_s_numbers_alone() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    data = _prepared([(noise, 0)] * 4, augment="crop,flip,randaugment")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one: Any = data[0, 2]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    other: Any = data[0, 2]
    assert torch.equal(one[0], other[0])
    later: Any = data[1, 2]
    assert not torch.equal(one[0], later[0])


@pytest.mark.slow
def test_reading_in_other_processes_gives_the_same_batches() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    data = _prepared([(noise, 0)] * 8, augment="crop,flip,randaugment")
    found = [list(batches(data, Order(8, 4, 0, 0, 4), workers=workers)) for workers in (0, 2)]
    assert all(torch.equal(a.images, b.images) for a, b in zip(*found, strict=True))


def test_seeding_restores_all_three_generators() -> None:
    import random

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with seeded("x"):
        inside = (random.random(), np.random.rand(), torch.rand(()).item())
    after = (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert after == (random.random(), np.random.rand(), torch.rand(()).item())
    with seeded("x"):
        assert inside == (random.random(), np.random.rand(), torch.rand(()).item())
