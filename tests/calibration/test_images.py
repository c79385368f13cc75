"""Every way to give images, and one clear line for every wrong one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from convrewrite.calibration.images import MEAN, STD, Preparation, read_images
from convrewrite.errors import ConvrewriteError

RGB = Preparation((3, 8, 8), (0.0,) * 3, (1.0,) * 3)
GREY = Preparation((1, 8, 8), (0.0,), (1.0,))


def folder_of(tmp_path: Path, count: int, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Path:
    for i in range(count):
        colour: Any = (10 * i, 0, 255) if mode == "RGB" else 10 * i
        (tmp_path / "some").mkdir(exist_ok=True)
        Image.new(mode, size, colour).save(tmp_path / "some" / f"{i}.png")
    return tmp_path


def read(data: Any, preparation: Preparation = RGB, limit: int = 10, seed: int = 0) -> Tensor:
    images = read_images(data, preparation, limit=limit, seed=seed)
    return torch.cat([images.fit, images.held_out])


def test_a_folder_is_read_with_all_below_it_and_a_fifth_is_held_out(tmp_path: Path) -> None:
    images = read_images(folder_of(tmp_path, 10), RGB, limit=10, seed=0)
    assert (len(images.fit), len(images.held_out)) == (8, 2)
    reds = sorted(round(float(v) * 255) for v in torch.cat([images.fit, images.held_out])[:, 0, 0, 0])
    assert reds == [10 * i for i in range(10)]


def test_the_seed_draws_the_images(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 20)
    assert torch.equal(read(folder, limit=5, seed=1), read(folder, limit=5, seed=1))
    assert not torch.equal(read(folder, limit=5, seed=1), read(folder, limit=5, seed=2))


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (5, 40), (3, 3)])
def test_pictures_of_any_size_come_out_as_the_model_wants_them(tmp_path: Path, size: tuple[int, int]) -> None:
    assert read(folder_of(tmp_path, 2, size=size)).shape == (2, 3, 8, 8)


def test_grey_pictures_are_repeated_for_three_channels_and_colour_becomes_grey_for_one(tmp_path: Path) -> None:
    grey = read(folder_of(tmp_path, 3, "L"))
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert read(tmp_path, GREY).shape == (3, 1, 8, 8)


DATA: list[Callable[[Tensor], Any]] = [
    lambda x: x,
    lambda x: list(x),
    lambda x: (image for image in x),
    lambda x: DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=4),
    lambda x: TensorDataset(x, torch.zeros(len(x))),
    lambda x: [{"img": image, "label": 1} for image in x],
    lambda x: x.numpy(),
]


@pytest.mark.parametrize("give", DATA)
def test_data_sets_loaders_and_iterables_give_the_same_images(give: Callable[[Tensor], Any]) -> None:
    x = torch.rand(10, 3, 8, 8)
    got = read(give(x))
    assert sorted(got.sum((1, 2, 3)).tolist()) == pytest.approx(sorted(x.sum((1, 2, 3)).tolist()))


def test_bytes_are_normalised_and_floats_are_taken_as_they_are() -> None:
    preparation = Preparation((3, 8, 8), MEAN, STD)
    got = read(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), preparation)
    assert got[0, :, 0, 0].tolist() == pytest.approx([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)])
    assert torch.equal(read(torch.full((2, 3, 8, 8), 2.0), preparation), torch.full((2, 3, 8, 8), 2.0))


def test_a_models_own_mean_is_used_and_imagenets_otherwise() -> None:
    model, example = nn.Conv2d(3, 1, 1), (torch.zeros(1, 3, 8, 8),)
    assert Preparation.of(model, example) == Preparation((3, 8, 8), MEAN, STD)
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.1, 0.1, 0.1)}  # type: ignore[assignment]
    assert Preparation.of(model, example).mean == (0.5, 0.5, 0.5)


WRONG: list[tuple[Any, str]] = [
    ([], "there are no images"),
    (torch.rand(1, 3, 8, 8), "there is one image, two are needed"),
    (torch.rand(4, 1, 8, 8), "an image has 1 channels, the model takes 3"),
    (torch.rand(4, 3, 8, 9), "an image is 3x8x9, the model takes 3x8x8"),
    (torch.full((4, 3, 8, 8), float("nan")), "an image holds NaN or infinity"),
    (torch.ones(4, 3, 8, 8, dtype=torch.int64), "an image is of torch.int64"),
    ([{"label": 1}] * 3, "an item has no image, only label"),
    (["a", "b"], "an item is a str, not an image"),
    (7, "no images can be read from a int"),
    ({"a": 1}, "no images can be read from a dict"),
]


@pytest.mark.parametrize(("data", "line"), WRONG)
def test_wrong_data_ends_in_one_clear_line(data: Any, line: str) -> None:
    with pytest.raises(ConvrewriteError) as caught:
        read(data)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_an_empty_and_a_damaged_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConvrewriteError, match="nowhere: this is no folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(ConvrewriteError, match="there are no images; known are"):
        read(tmp_path)
    folder_of(tmp_path, 3)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ConvrewriteError, match=r"broken\.png: the image cannot be read"):
        read(tmp_path)
    whole = (tmp_path / "some" / "0.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConvrewriteError, match=r"broken\.png: the image cannot be read"):
        read(tmp_path)


def test_a_picture_cannot_become_four_channels(tmp_path: Path) -> None:
    with pytest.raises(ConvrewriteError, match="a picture has 1 or 3 channels, the model takes 4"):
        read(folder_of(tmp_path, 2), Preparation((4, 8, 8), (0.0,) * 4, (1.0,) * 4))


def test_a_model_of_two_inputs_is_refused() -> None:
    with pytest.raises(ConvrewriteError, match="the model takes 2 inputs"):
        Preparation.of(nn.Identity(), (torch.zeros(1, 3, 8, 8), torch.zeros(1, 2)))
