"""Real training on MNIST-5k: accuracy rises, and a rewritten network that was trained before is not destroyed."""

from __future__ import annotations

import pytest

import convrewrite as cr
from convrewrite.finalizing import blends_of

from .mnist import RULES, SHAPE, Digits, accuracy, original, parts

SETTINGS = {"batch_size": 64, "workers": 0, "smoothing": 0.0}


@pytest.mark.slow
def test_an_untrained_network_learns_the_digits() -> None:
    train, val = parts()
    trained = cr.finetune(
        cr.rewrite(Digits(), RULES, example=SHAPE).model,
        train,
        val=val,
        steps=40,
        lr=1e-2,
        new_lr=1.0,
        anneal=0.0,
        **SETTINGS,
    )
    measured = [row["val_accuracy"] for row in trained.history if "val_accuracy" in row]
    assert measured[0] < 0.25
    assert accuracy(trained.model) == pytest.approx(max(measured))
    assert measured[-1] > 0.3


@pytest.mark.slow
def test_distilling_drops_all_four_convolutions_of_a_trained_network_and_keeps_its_accuracy() -> None:
    first = original(2)
    before = accuracy(first)
    assert before > 0.93
    model = cr.rewrite(first, RULES, example=SHAPE).model
    assert accuracy(model) == before  # an exact start
    fresh = cr.rewrite(first, RULES, example=SHAPE, start="fresh").model
    assert accuracy(fresh) < before - 0.2  # what happens to a network whose convolutions are simply replaced
    train, val = parts()
    trained = cr.distill(model, train, val=val, epochs=3, lr=1e-3, **SETTINGS)
    assert blends_of(trained.model) == {}
    assert accuracy(trained.model) > before - 0.02
    last = [row["agreement"] for row in trained.history if "agreement" in row][-1]
    assert last > 0.95


@pytest.mark.slow
def test_fine_tuning_with_the_gates_alone_does_not_harm_a_trained_network() -> None:
    first = original(2)
    train, val = parts()
    model = cr.rewrite(first, RULES, example=SHAPE).model
    trained = cr.finetune(model, train, val=val, epochs=1, lr=3e-4, anneal=0.0, keep="last", **SETTINGS)
    assert accuracy(trained.model) > accuracy(first) - 0.02
    assert max(float(b.gate.detach().abs().max()) for b in blends_of(trained.model).values()) > 0
