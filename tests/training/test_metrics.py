"""The row of an iteration in metrics.csv."""

from __future__ import annotations

import pytest
import torch

from tests.cases import GROUP, OBSERVATION, make_actor, make_data
from torchrl_trpo.distributions.divergence import entropy
from torchrl_trpo.keys import GroupKeys
from torchrl_trpo.training.metrics import Metrics


@pytest.mark.parametrize("shape", [(4, 1000, 3), (4, 1000, 1), (4, 1000, 3, 1)], ids=str)
def test_the_entropy_of_agents_that_take_turns(shape, tmp_path):
    """With every second step of a large batch, an agent's turns were never among them.

    And with one flag for the whole group, the entropy was that of three agents.
    """
    actor = make_actor("tanh_normal")
    data = make_data(actor, (4, 1000))
    counts = (torch.arange(1000) % 2 == 1).expand(4, 1000)
    data["alive"] = counts.reshape(4, 1000, *[1] * (len(shape) - 2)).expand(shape).clone()
    keys = GroupKeys(GROUP, 3, OBSERVATION, (GROUP, "reward"), "done", "terminated", None, "alive")
    metrics = Metrics(tmp_path / "metrics.csv", [], groups=[keys], policy=actor, device=None)
    all_rows = entropy(actor.build_dist_from_params(data))[counts].mean()
    torch.testing.assert_close(metrics._entropy(data).double(), all_rows, rtol=0.02, atol=0.02)
    metrics.close()
