"""Updates in chunks: the same result to rounding, and no more rows at a time than asked for."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from tests.cases import DISTRIBUTIONS, OBSERVATION, flat_parameters, make_actor, make_data, make_loss, single_data
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss

N_ROWS = 40


def update(actor, data, chunk_size, *, sequential=False, mask_key=None, **settings):
    """One update of a copy of a policy: its parameters after it, and the statistics."""
    actor = deepcopy(actor)
    loss = make_loss(actor, chunk_size=chunk_size, entropy_bonus=False)
    if mask_key is not None:
        loss.loss_mask_key = mask_key
    objective = HATRPOSequentialObjective(loss) if sequential else loss
    torch.manual_seed(0)
    stats = TrustRegionUpdater(objective, **settings).step(data)
    return flat_parameters(actor), stats


@pytest.mark.parametrize(("kind", "chunk_size"), [*((kind, 7) for kind in DISTRIBUTIONS), ("normal", N_ROWS)])
@pytest.mark.parametrize("layout", ["shared", "per_agent", "sequential"])
def test_the_result_is_the_same(kind, layout, chunk_size):
    actor = make_actor(kind, share_params=layout == "shared")
    data = make_data(actor)
    for subsample in (1.0, 0.4):
        # More steps of conjugate gradient would magnify the rounding.
        settings = {"sequential": layout == "sequential", "fisher_subsample": subsample, "cg_iters": 4}
        expected, stats = update(actor, data, None, **settings)
        parameters, chunked = update(actor, data, chunk_size, **settings)
        torch.testing.assert_close(parameters, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(chunked.to_dict(), stats.to_dict(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("share_params", [True, False], ids=["shared", "per_agent"])
def test_masked_rows_count_as_little_in_chunks(share_params):
    actor = make_actor(share_params=share_params)
    data = make_data(actor)
    data["mask"] = torch.rand(5, 8, 3, 1) < 0.5
    expected, _ = update(actor, data, None, mask_key="mask", fisher_subsample=0.4)
    parameters, _ = update(actor, data, 3, mask_key="mask", fisher_subsample=0.4)
    torch.testing.assert_close(parameters, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sequential", [False, True], ids=["batched", "sequential"])
@pytest.mark.parametrize("subsample", [1.0, 0.5])
def test_no_more_rows_at_a_time(sequential, subsample):
    actor = make_actor()
    data = make_data(actor)
    seen = []
    loss = TRPOLoss(actor, chunk_size=7, entropy_bonus=False)
    for module in loss.actor_network.modules():
        if isinstance(module, torch.nn.Tanh):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-2].numel()))
    TrustRegionUpdater(HATRPOSequentialObjective(loss) if sequential else loss, fisher_subsample=subsample).step(data)
    assert seen
    assert max(seen) <= 7


def test_without_chunks_gradient_and_fisher_matrix_share_a_forward_pass():
    """One pass at θ_k, one for each try; a Fisher matrix on other rows needs a pass over those."""
    actor = make_actor()
    passes = []
    actor.module[0].register_forward_hook(lambda *_: passes.append(1))
    updater = TrustRegionUpdater(TRPOLoss(actor, functional=False, entropy_bonus=False))
    updater.step(make_data(actor))  # looks at the policy
    for subsample, expected in ((1.0, 1), (0.5, 2)):
        data = make_data(actor)
        passes.clear()
        updater.fisher_subsample = subsample
        stats = updater.step(data)
        tries = 1 + (stats["step_fraction"].log() / math.log(0.8)).round().int().max()
        assert len(passes) == expected + tries


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_scalar_actions_of_one_agent_are_taken_in_chunks(chunk_size):
    """Those of CartPole as ``Categorical`` has them, [N], stayed whole beside each chunk of observations."""
    net = nn.Linear(3, 4).double()
    actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        out_keys=["action"],
        distribution_class=Categorical,
        return_log_prob=True,
    )
    data = single_data(actor)
    data["advantage"] = torch.randn(5, 8, 1, dtype=torch.float64)
    expected, actual = (TRPOLoss(actor, chunk_size=size, entropy_bonus=False) for size in (None, chunk_size))
    expected, actual = (TrustRegionUpdater(deepcopy(loss)).step(data) for loss in (expected, actual))
    assert expected["accepted"]
    for name in ("kl", "improvement", "grad_norm", "ESS"):
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("chunk_size", [0, -3, 2.5, "many"])
def test_sizes_that_cannot_be(chunk_size):
    with pytest.raises(ValueError, match=r"chunk_size.*whole number"):
        TRPOLoss(make_actor(), chunk_size=chunk_size)


def test_the_batch_is_left_as_it_was():
    actor = make_actor()
    data = make_data(actor)
    before = data.clone()
    update(actor, data, 7, sequential=True)
    assert (data[OBSERVATION] == before[OBSERVATION]).all()
    assert set(data.keys(True, True)) == set(before.keys(True, True))
