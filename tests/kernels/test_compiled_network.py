"""A rewritten ResNet-50 under ``torch.compile``: whole, and within the recompile limit while the batch changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convrewrite as cr

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LIMIT = 8
"""torch's own recompile limit; importing timm.optim sets it to a million."""


class Graphs:
    """A compiler that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


def compiled(model: nn.Module, graphs: Graphs, *batches: int) -> list[Tensor]:
    """Outputs of a compiled model for batches of these sizes; an error where it would fall back to eager."""
    whole = torch.compile(model, fullgraph=True, backend=graphs)
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        torch._dynamo.config.patch(recompile_limit=LIMIT, fail_on_recompile_limit_hit=True, error_on_recompile=False),
    ):
        warnings.simplefilter("ignore")
        return [whole(torch.ones(batch, 3, 64, 64)) for batch in batches]


@pytest.mark.parametrize("rules", ["acmix", "sasa"])
def test_a_rewritten_resnet50_is_one_graph_and_one_more_for_all_other_batches(rules: str) -> None:
    torch.manual_seed(0)
    model = cr.rewrite(torchvision.models.resnet50(), rules, start="fresh", example=(2, 3, 64, 64)).model.eval()
    graphs = Graphs()
    outputs = compiled(model, graphs, 2, 3, 5)
    assert graphs.count == 2  # for the first size, and for any size
    with torch.no_grad():
        torch.testing.assert_close(outputs[2], model(torch.ones(5, 3, 64, 64)))


class ByBatch(nn.Module):
    """Looks at the size of its batch, so that every size is a program of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x + len([None for _ in range(x.shape[0])])


def test_a_model_that_compiles_again_for_every_batch_is_an_error() -> None:
    as_left_by_another = torch._dynamo.config.patch(recompile_limit=10**6)
    with as_left_by_another, pytest.raises(Exception, match="recompile"):
        compiled(ByBatch(), Graphs(), *range(2, LIMIT + 6))
