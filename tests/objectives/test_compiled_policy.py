"""Compiled forward passes: the same update to rounding, traced once for each shape."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.cases import DISTRIBUTIONS, flat_parameters, make_actor, make_data, make_loss, make_policy
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.objectives.compiled_policy import CompiledPolicy

EAGER = {"backend": "aot_eager"}  # everything but the generated code

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler's own


def update(actor, data, *, sequential=False, steps=1, **settings):
    """Updates of a copy of a policy: its parameters after them, and the loss."""
    policy = deepcopy(actor)
    loss = make_loss(policy, entropy_bonus=False, **settings)
    objective = HATRPOSequentialObjective(loss, agent_order="fixed") if sequential else loss
    updater = TrustRegionUpdater(objective, cg_iters=4)
    for _ in range(steps):
        updater.step(data)
    return flat_parameters(policy), loss


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("normal", "shared"),
        ("normal", "per_agent"),
        *((kind, "sequential") for kind in ("normal", "tanh_normal", "masked", "composite")),
    ],
)
def test_the_result_is_the_same(kind, layout):
    assert kind in DISTRIBUTIONS
    actor = make_actor(kind, share_params=layout == "shared")
    data = make_data(actor)
    expected, _ = update(actor, data, sequential=layout == "sequential")
    parameters, _ = update(actor, data, sequential=layout == "sequential", compile_policy=EAGER)
    torch.testing.assert_close(parameters, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("sequential", [False, True], ids=["batched", "sequential"])
def test_the_result_is_the_same_by_the_default_backend(sequential):
    actor = make_actor("tanh_normal")
    data = make_data(actor)
    expected, _ = update(actor, data, sequential=sequential)
    parameters, _ = update(actor, data, sequential=sequential, compile_policy=True)
    torch.testing.assert_close(parameters, expected, rtol=1e-9, atol=1e-12)


def test_it_is_traced_once_for_each_shape(monkeypatch):
    """All agents of a sequence, all updates: one trace; in chunks of 25 of 40 rows: two."""
    traces = []
    compile_ = CompiledPolicy._compile
    monkeypatch.setattr(CompiledPolicy, "_compile", lambda self, *args: traces.append(1) or compile_(self, *args))
    actor = make_actor()
    data = make_data(actor)
    for chunk_size, expected in ((None, 1), (25, 2)):
        traces.clear()
        update(actor, data, sequential=True, steps=3, chunk_size=chunk_size, compile_policy=EAGER)
        assert len(traces) == expected


def test_copies_and_moves_compile_anew():
    actor = make_actor()
    data = make_data(actor)
    _, loss = update(actor, data, compile_policy=EAGER)
    TrustRegionUpdater(deepcopy(loss)).step(data)
    loss.to(torch.float64)
    assert not loss._compiled
    TrustRegionUpdater(loss).step(data)


class Fickle(nn.Module):
    """Does something else with large observations."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4).double()

    def forward(self, observation):
        return self.layer(observation) if observation.sum() > 0 else self.layer(-observation)


def test_a_policy_that_looks_at_values_is_refused_and_not_frozen():
    actor = make_policy(Fickle(), "normal")
    data = make_data(actor)
    TrustRegionUpdater(TRPOLoss(actor)).step(data)
    with pytest.raises(Exception, match=r"(?i)data.dependent"):
        TrustRegionUpdater(TRPOLoss(actor, compile_policy=EAGER)).step(data)
