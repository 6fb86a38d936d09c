"""Networks in one precision while torch's default is another, and networks in half precision."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import PopArtValueNorm
from torchrl.objectives import ClipPPOLoss

from tests.cases import (
    ACTION,
    GROUP,
    LOG_PROB,
    MASK,
    OBSERVATION,
    OLD_DATA,
    REWARD,
    VALUE,
    dense_fisher,
    make_actor,
    make_data,
    make_loss,
    make_policy,
    region_mean,
    textbook_kl,
)
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import (
    CentralCriticValueEstimator,
    HAPPOUpdater,
    HATRPOSequentialObjective,
    TRPOLoss,
)
from torchrl_trpo.objectives.policy_network import distribution_keys
from torchrl_trpo.training.critic_fit import fit_critic


@pytest.fixture(params=[(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=["wide", "narrow"])
def dtype(request):
    """Sets torch's default, and gives the other one, for the networks.

    Yields:
        The networks' type.
    """
    default, networks = request.param
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    yield networks
    torch.set_default_dtype(before)


def collect(actor, dtype, batch=(5, 8)):
    """A batch of a policy, all floating-point entries in one type."""
    data = make_data(make_actor("masked") if MASK in actor.in_keys else make_actor(), batch)
    data = data.select(*actor.in_keys, strict=False)
    data = data.apply(lambda value: value.to(dtype) if value.is_floating_point() else value)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        actor(data)
    data["advantage"] = torch.randn(*batch, 3, 1, dtype=dtype)
    return data


def floating(values):
    return {value.dtype for value in values if value.is_floating_point()}


@OLD_DATA
@pytest.mark.parametrize("kind", ["normal", "tanh_normal", "masked", "multi_categorical", "composite"])
def test_no_update_takes_the_default_type(dtype, kind):
    """A try of the line search had parameters of torch's default type, which the network could not multiply with."""
    actor = make_actor(kind).to(dtype)
    data = collect(actor, dtype)
    loss = make_loss(actor, entropy_coeff=0.01, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
    assert floating(loss(data).values(True, True)) == {dtype}
    for objective in (loss, HATRPOSequentialObjective(loss)):
        assert floating(objective(data).values(True, True)) == {dtype}
        stats = TrustRegionUpdater(objective, fisher_subsample=0.5).step(data)
        assert stats["accepted"].all()
        assert floating(stats.values()) == {dtype}
    if kind != "composite":
        clipping = ClipPPOLoss(actor, entropy_coeff=0.01)
        clipping.set_keys(action=ACTION, sample_log_prob=LOG_PROB)
        stats = HAPPOUpdater(clipping, minibatch_size=20).step(data)
        assert stats["accepted"].all()
        assert floating(stats.values()) == {dtype}
    assert floating(actor.parameters()) == {dtype}


@OLD_DATA
@pytest.mark.parametrize("central", [False, True])
def test_no_part_of_a_loop_takes_the_default_type(dtype, central):
    """Values, advantages, the policy's step and the critic's fit, with PopArt."""
    actor = make_actor().to(dtype)
    read, size = ((GROUP, "central"), 3 * 3 + 2 * 2 + 3) if central else (OBSERVATION, 3)
    critic = nn.Sequential(nn.Linear(size, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    critic, norm = TensorDictModule(critic, [read], [VALUE]), PopArtValueNorm().to(dtype)
    loss = TRPOLoss(actor, critic, value_norm=norm, clip_value=0.2)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, value=VALUE, reward=REWARD)
    settings = {"gamma": 0.9, "lmbda": 0.9, "team_reward": "mean", "value_norm": norm}
    if central:
        settings |= {"value_network": critic, "central_key": read, "observation_keys": [OBSERVATION]}
        settings |= {"action_keys": [ACTION], "actor_network": actor, "agent_one_hot": True}
        loss.make_value_estimator(CentralCriticValueEstimator, **settings)
    else:
        loss.make_value_estimator(**settings)
    data = collect(actor, dtype)
    done = torch.rand(5, 8, 1) < 0.2
    group = {name: torch.randn(5, 8, 3, n, dtype=dtype) for name, n in [("observation", 3), ("reward", 1)]}
    data["next"] = TensorDict({GROUP: TensorDict(group, [5, 8, 3]), "done": done, "terminated": done}, [5, 8])
    optimizer = torch.optim.Adam(critic.parameters())
    for _ in range(2):
        with torch.no_grad():
            params, target_params = loss.critic_network_params, loss.target_critic_network_params
            loss.value_estimator(data, params=params, target_params=target_params)
        assert TrustRegionUpdater(loss).step(data)["accepted"].all()
        fit_critic(loss, optimizer, data, epochs=1, minibatch_size=20)
    loss(data)["loss_critic"].backward()
    assert floating(data.values(True, True)) == {dtype}
    assert floating([*loss.parameters(), *norm.buffers()]) == {dtype}


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "tanh_normal", "categorical"])
def test_a_policy_in_half_precision_takes_the_step_that_it_reports(kind, half):
    """The divergence of each row was rounded to half precision, and their mean was 5 % too small."""
    torch.manual_seed(0)
    actor = make_actor(kind, hidden=16).to(half)
    data = collect(actor, half, (60, 20))
    before = deepcopy(actor)
    stats = TrustRegionUpdater(make_loss(actor)).step(data)
    assert stats["accepted"].all()
    assert floating(actor.parameters()) == {half}
    old, new = (outputs_in_double(policy, data) for policy in (before, actor))
    torch.testing.assert_close(stats["kl"].double(), region_mean(textbook_kl(old, new), True), rtol=2e-3, atol=0)


class Mixed(nn.Module):
    """A network whose first layer has another type than its second one."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = nn.Linear(3, 8, dtype=first), nn.Linear(8, 4, dtype=second)

    def forward(self, observation):
        hidden = self.first(observation.to(self.first.weight.dtype)).tanh()
        return self.second(hidden.to(self.second.weight.dtype))


@pytest.mark.parametrize(
    ("first", "second", "rtol"),
    [(torch.float32, torch.float64, 1e-5), (torch.float64, torch.float32, 1e-5), (torch.bfloat16, torch.float32, 0.02)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_policy_of_two_types(first, second, rtol):
    """A product with the Fisher matrix could not multiply them; and what rounding leaves is no change by others."""
    actor = make_policy(Mixed(first, second), "normal")
    updater = TrustRegionUpdater(TRPOLoss(actor))
    for _ in range(2):
        data, before = make_data(actor, batch=(20, 8)), deepcopy(actor)
        fisher = dense_fisher(deepcopy(actor).double(), data, per_agent=False)[0]
        (region,) = updater.objective.trust_regions(data)
        vector = torch.randn_like(region.parameters)
        error = region.fisher_product()(vector).double() - vector.double() @ fisher
        assert error.norm() < rtol * (vector.double() @ fisher).norm()
        stats = updater.step(data)
        assert stats["accepted"].all()
        kl = textbook_kl(*(outputs_in_double(policy, data) for policy in (before, actor))).mean()
        torch.testing.assert_close(stats["kl"][0].double(), kl, rtol=2e-3, atol=0)


def test_half_precision_whose_sum_is_out_of_range_is_finite():
    """A NaN or an infinity was said to be in the data."""
    actor = make_policy(Mixed(torch.float32, torch.float32), "normal")
    data = make_data(actor).select(OBSERVATION, "advantage")
    data[OBSERVATION] = 3e4 * data[OBSERVATION].sign().half()
    assert data[OBSERVATION].sum(-1).isinf().any()
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        actor(data)
    assert TrustRegionUpdater(TRPOLoss(actor)).step(data)["accepted"].all()


@torch.no_grad()
def outputs_in_double(policy, data):
    """The distribution that a network in half precision outputs, computed with further in double precision."""
    parameters = policy.get_dist_params(data.select(OBSERVATION)).select(*distribution_keys(policy))
    return policy.build_dist_from_params(parameters.apply(torch.Tensor.double))
