"""What the central critic sees, and the advantages that come of it."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import PopArtValueNorm
from torchrl.objectives.value import MultiAgentGAE

from tests.cases import (
    ACTION,
    GROUP,
    LOG_PROB,
    MASK,
    OBSERVATION,
    OLD_DATA,
    REWARD,
    VALUE,
    bits,
    make_actor,
    make_data,
    same_bits,
)
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import CentralCriticValueEstimator, HATRPOSequentialObjective, TRPOLoss

CENTRAL = ("agents", "central")
GAMMA, LMBDA = 0.9, 0.8


def make_critic(n_inputs):
    net = nn.Sequential(nn.Linear(n_inputs, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return TensorDictModule(net, in_keys=[CENTRAL], out_keys=[VALUE])


def make_estimator(n_inputs=9, **keywords):
    keywords.setdefault("observation_keys", [OBSERVATION])
    critic = keywords.pop("value_network", None) or make_critic(n_inputs)
    estimator = CentralCriticValueEstimator(
        gamma=torch.tensor(GAMMA, dtype=torch.float64),
        lmbda=torch.tensor(LMBDA, dtype=torch.float64),
        value_network=critic,
        central_key=keywords.pop("central_key", CENTRAL),
        **keywords,
    )
    estimator.set_keys(value=VALUE)
    return estimator


def rollout(actor=None, batch=(4, 6), team=True):
    """A batch of three agents with one terminated and one truncated step."""
    data = make_data(actor or make_actor(), batch=batch).exclude("advantage")
    n = data[OBSERVATION].shape[-2]
    following = make_data(make_actor(), batch=batch).select(OBSERVATION)
    following[OBSERVATION][:, :-1] = data[OBSERVATION][:, 1:]
    data["next"] = following
    shape = (*batch, 1) if team else (*batch, n, 1)
    data["next", "reward"] = torch.randn(shape, dtype=torch.float64)
    data["next", "terminated"] = torch.zeros(*batch, 1, dtype=torch.bool)
    data["next", "terminated"][0, 2] = True
    data["next", "done"] = data["next", "terminated"].clone()
    data["next", "done"][1, 3] = True
    return data


def test_advantages_against_the_recursion_by_hand():
    """GAE: δ_t = r_t + γ V(s_{t+1}) (1 − terminated) − V(s_t), A_t = δ_t + γλ (1 − done) A_{t+1}.

    The terminated step is not bootstrapped, the truncated one is; the team's reward goes to each agent.
    """
    data, estimator = rollout(), make_estimator(vectorized=False)  # the vectorised form decays in float32
    estimator(data)
    reward, done, terminated = (data["next", key].squeeze(-1) for key in ("reward", "done", "terminated"))
    joint, next_joint = data[OBSERVATION].flatten(-2), data["next", OBSERVATION].flatten(-2)
    value, next_value = (estimator.value_network.module(x).squeeze(-1) for x in (joint, next_joint))
    expected = torch.zeros(4, 6, dtype=torch.float64)
    running = torch.zeros(4, dtype=torch.float64)
    for t in reversed(range(6)):
        delta = reward[:, t] + GAMMA * next_value[:, t] * ~terminated[:, t] - value[:, t]
        running = delta + GAMMA * LMBDA * ~done[:, t] * running
        expected[:, t] = running
    for agent in range(3):
        torch.testing.assert_close(data["advantage"][..., agent, 0], expected)
        torch.testing.assert_close(data["value_target"][..., agent, 0], expected + value)


def test_time_limits_are_bootstrapped_and_ends_are_not():
    """CleanRL and most merge the two, and VmasEnv reports time limits as terminations."""
    data, estimator = rollout(), make_estimator()
    merged = data.clone()
    merged["next", "terminated"] = data["next", "done"].clone()
    difference = estimator(data)["advantage"] - estimator(merged)["advantage"]
    bootstrap = GAMMA * data["next", VALUE][1, 3]
    torch.testing.assert_close(difference[1, 3], bootstrap)
    assert (difference[0] == 0).all()
    assert bootstrap.abs().min() > 1e-3


def test_what_is_pooled():
    data = rollout()
    data["state"] = torch.randn(4, 6, 5, dtype=torch.float64)
    data["next", "state"] = torch.randn(4, 6, 5, dtype=torch.float64)
    estimator = make_estimator(5 + 9 + 3, state_key="state", agent_one_hot=True)
    estimator.pool(data)
    for part in (data, data["next"]):
        central = part[CENTRAL]
        assert central.shape == (4, 6, 3, 17)
        for agent in range(3):
            torch.testing.assert_close(central[..., agent, :5], part["state"])
            torch.testing.assert_close(central[..., agent, 5:14], part[OBSERVATION].flatten(-2))
        torch.testing.assert_close(central[..., 14:], torch.eye(3).double().expand(4, 6, 3, 3))


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
def test_pooling_turns_no_gradients_on(differentiable, enabled):
    """It did so inside of the caller's no_grad."""
    data, estimator = rollout(), make_estimator(differentiable=differentiable)
    for part in (data, data["next"]):
        part[OBSERVATION].requires_grad_()
    with torch.set_grad_enabled(enabled):
        estimator.pool(data)
        assert torch.is_grad_enabled() == enabled
    for part in (data, data["next"]):
        assert part[CENTRAL].requires_grad == (differentiable and enabled)


@pytest.mark.parametrize(
    ("observation", "central"),
    [(OBSERVATION, CENTRAL), (("agents", "sensors", "pos"), CENTRAL), (("agents", "sensors", "pos"), "central")],
    ids=["group", "nested", "root"],
)
def test_an_agents_value_does_not_depend_on_its_own_action(observation, central):
    actor = make_actor()
    data = rollout(actor)
    data[observation] = data[OBSERVATION].clone()
    data[("next", *observation)] = data["next"][OBSERVATION].clone()
    critic = make_critic(13)
    critic.in_keys = [central]
    estimator = make_estimator(
        value_network=critic,
        observation_keys=[observation],
        central_key=central,
        action_keys=[ACTION],
        actor_network=actor,
    )
    estimator(data)
    values = data[VALUE].clone()
    data[ACTION][..., 1, :] += 1.0
    estimator(data)
    changed = (data[VALUE] != values).squeeze(-1)
    assert not changed[..., 1].any()
    assert changed[..., [0, 2]].all()


def test_the_others_actions_are_those_of_the_same_step():
    """MARLlib takes the actions of t also for the bootstrap value at t+1."""
    actor = make_actor()
    data = rollout(actor)
    estimator = make_estimator(9 + 4, action_keys=[ACTION], actor_network=actor)
    estimator.pool(data)
    action, others = data[ACTION], data["next", CENTRAL][..., 9:]
    for agent in range(3):
        rest = [i for i in range(3) if i != agent]
        torch.testing.assert_close(data[CENTRAL][..., agent, 9:], action[..., rest, :].flatten(-2))
        goes_on = ~data["next", "done"].squeeze(-1)[:, :-1]
        expected = action[:, 1:, rest].flatten(-2)
        torch.testing.assert_close(others[:, :-1, agent][goes_on], expected[goes_on])
    # Where the rollout or an episode ends they are drawn from the policy: not what another step did.
    assert (others[:, -1] != data[CENTRAL][:, 0, :, 9:]).all()
    assert (others[1, 3] != data[CENTRAL][1, 4, :, 9:]).all()


def two_groups(observation, critics_group):
    """Callers, and drivers whose observations no critic reads; both have actions of one number."""
    callers = {"callers": {"observation": observation}}
    data = TensorDict({**callers, "next": callers}, [4, 6])
    data["next", "done"] = torch.zeros(4, 6, 1, dtype=torch.bool)
    policy = TensorDictSequential(
        *(
            TensorDictModule(
                lambda seen: torch.rand(*seen.shape[:-1], 1), [("callers", "observation")], [(group, "action")]
            )
            for group in ("drivers", "callers")
        )
    )
    central = (critics_group, "central")
    keys = {"observation_keys": [("callers", "observation")], "action_keys": [*policy.out_keys], "central_key": central}
    critic = TensorDictModule(nn.LazyLinear(1), [central], [VALUE])
    return policy(data), make_estimator(value_network=critic, actor_network=policy, n_agents=2, **keys)


def test_an_agents_own_action_is_not_in_it_if_its_group_is_not_observed():
    """The callers' were left out in the place of the drivers', and the baseline was no baseline."""
    data, estimator = two_groups(torch.randn(4, 6, 2, 3), "drivers")
    before = estimator.pool(data)["drivers", "central"].clone()
    data["drivers", "action"][..., 0, :] += 1
    changed = (estimator.pool(data)["drivers", "central"] != before).any(-1)
    assert not changed[..., 0].any()
    assert changed[..., 1].all()


def test_actions_are_whole_beside_observations_that_are_whole_numbers():
    """The actions were cut to whole numbers."""
    data, estimator = two_groups(torch.randint(0, 5, (4, 6, 2, 3)), "callers")
    pooled = estimator.pool(data)["callers", "central"]
    torch.testing.assert_close(pooled[..., 0, -1], data["callers", "action"][..., 1, 0])


def test_an_episode_may_end_where_no_action_is_allowed():
    actor = make_actor("masked")
    data = rollout(actor)
    data["next", MASK] = ~data["next", "done"].unsqueeze(-1).expand(4, 6, 3, 4)
    make_estimator(9, action_keys=[ACTION], actor_network=actor).pool(data)
    assert data["next", CENTRAL].isfinite().all()


def test_team_rewards():
    data = rollout(team=False)
    mean, total, own = (
        make_estimator(value_network=critic, team_reward=kind)(data.clone())
        for critic in [make_critic(9)]
        for kind in ("mean", "sum", None)
    )
    reward = data["next", "reward"].clone()
    data["next", "reward"] = reward.mean(-2, keepdim=True).expand_as(reward)
    torch.testing.assert_close(mean["value_target"][..., :1, :].expand(4, 6, 3, 1), mean["value_target"])
    assert (own["value_target"].std(-2) > 0).any()
    delta = (total["value_target"] - mean["value_target"])[0, 2]  # a terminated step: the reward alone
    torch.testing.assert_close(delta, 2 / 3 * reward[0, 2].sum().expand(3, 1))


def test_a_normalised_critic_is_denormalised():
    """Targets and advantages live in the rewards' units, the critic in normalised ones."""
    norm = PopArtValueNorm(shape=1, beta=0.5).double()
    norm.update(5 + 3 * torch.randn(1000, 1, dtype=torch.float64))
    data, critic = rollout(), make_critic(9)
    estimator = make_estimator(value_network=critic, value_norm=norm)
    estimator(data)
    value, next_value = (norm.denormalize(critic.module(part[CENTRAL])) for part in (data, data["next"]))
    torch.testing.assert_close(data[VALUE], value)
    bootstrapped = data["next", "reward"][1, 3] + GAMMA * next_value[1, 3] - value[1, 3]  # a truncated step
    torch.testing.assert_close(data["advantage"][1, 3], bootstrapped)
    loss = TRPOLoss(make_actor(), critic, value_norm=norm, loss_critic_type="l2")
    loss.set_keys(value=VALUE)
    loss.make_value_estimator(estimator)
    distance = loss.loss_critic(data.clone())[0]
    torch.testing.assert_close(distance, (norm.normalize(data["value_target"]) - norm.normalize(data[VALUE])) ** 2)


def test_with_the_same_values_it_is_multi_agent_gae():
    data = rollout(team=False)
    make_estimator(vectorized=False)(data)
    plain = data.select("next", VALUE)
    gae = MultiAgentGAE(gamma=GAMMA, lmbda=LMBDA, value_network=None, vectorized=False)
    gae.set_keys(value=VALUE)
    torch.testing.assert_close(gae(plain)["advantage"], data["advantage"])


def test_value_estimate_is_the_target():
    data, estimator = rollout(), make_estimator()
    target = estimator.value_estimate(data.clone())
    torch.testing.assert_close(target, estimator(data)["value_target"])


@OLD_DATA
def test_in_a_loss():
    """make_value_estimator, the critic's loss on the pooled input, and a step from it."""
    actor, critic = make_actor(), make_critic(9)
    data = rollout(actor, team=False)
    data.rename_key_(("next", "reward"), ("next", *REWARD))
    loss = TRPOLoss(actor, critic)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    loss.make_value_estimator(
        CentralCriticValueEstimator,
        gamma=0.99,
        lmbda=0.95,
        value_network=critic,
        observation_keys=[OBSERVATION],
        central_key=CENTRAL,
        team_reward="mean",
    )
    loss.value_estimator(data, params=loss.critic_network_params, target_params=loss.target_critic_network_params)
    loss.loss_critic(data)[0].mean().backward()
    assert all(p.grad is not None for p in loss.critic_network_params.values(True, True))
    assert TrustRegionUpdater(HATRPOSequentialObjective(loss)).step(data)["accepted"].all()
    assert TrustRegionUpdater(loss).step(data.exclude("advantage", "value_target"))["accepted"].any()


def test_agents_of_other_groups_are_pooled_too():
    data = rollout()
    for part in (data, data["next"]):
        part["cars", "observation"] = torch.randn(4, 6, 2, 4, dtype=torch.float64)
    estimator = make_estimator(9 + 8, observation_keys=[("cars", "observation"), OBSERVATION])
    estimator.pool(data)
    central = data[CENTRAL]
    assert central.shape == (4, 6, 3, 17)
    torch.testing.assert_close(central[..., 0, :8], data["cars", "observation"].flatten(-2))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"observation_keys": []}, r"observation_keys is empty.*\('agents', 'observation'\)"),
        ({"action_keys": [ACTION]}, r"action_keys need actor_network"),
        ({"team_reward": "average"}, r"team_reward: 'average'.*'mean', 'sum'"),
    ],
)
def test_bad_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        make_estimator(**keywords)


def test_missing_entries():
    data = rollout()
    with pytest.raises(KeyError, match=r"scal.*is not in the data.*Did you mean"):
        make_estimator(state_key=("agents", "scal"))(data)
    data["flat"] = data["next", "flat"] = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"flat.*\(4, 6\).*n_agents"):
        make_estimator(observation_keys=["flat"])(data)


def test_a_wrong_reward_key_is_named():
    estimator = make_estimator()
    estimator.set_keys(reward=("agents", "rewards"))
    with pytest.raises(KeyError, match=r"next.*agents.*rewards.*is not in the data.*next.*reward"):
        estimator(rollout())


def test_in_keys_name_what_is_read():
    estimator = make_estimator(state_key="state")
    assert {OBSERVATION, ("next", *OBSERVATION), "state", ("next", "state")} <= set(estimator.in_keys)
    assert CENTRAL not in estimator.in_keys


def test_groups_within_a_group_are_refused():
    """An agent saw other agents' actions in place of those of the other team."""
    with pytest.raises(ValueError, match=r"central_key.*within another.*RenameTransform"):
        make_estimator(central_key=("teams", "red", "central"))


def test_a_critic_that_does_not_read_what_is_pooled_is_refused():
    """The README's drop-in, then its central critic with the same network: the pooled entry was ignored."""
    critic = TensorDictModule(torch.nn.Linear(3, 1), in_keys=[OBSERVATION], out_keys=[VALUE])
    with pytest.raises(ValueError, match=r"central_key: \('agents', 'central'\) is not read by value_network"):
        make_estimator(value_network=critic)


@pytest.mark.parametrize("form", [OBSERVATION, [OBSERVATION], (OBSERVATION,)], ids=["key", "list", "tuple"])
def test_a_tuple_of_strings_is_one_nested_key(form):
    """``observation_keys=("agents", "observation")`` once was read as two keys."""
    actor = make_actor()
    estimator = make_estimator(
        9 + 4,
        observation_keys=form,
        action_keys=ACTION,
        actor_network=actor,
        other_mask_keys=(GROUP, "mask"),
        reward_keys=REWARD,
    )
    assert estimator.observation_keys == [OBSERVATION]
    assert estimator.action_keys == [ACTION]
    assert estimator.other_mask_keys == [(GROUP, "mask")]
    assert estimator.reward_keys == [REWARD]
    assert make_estimator(observation_keys="state", n_agents=3).observation_keys == ["state"]


def test_an_estimator_with_another_network_than_the_losss_critic_is_refused():
    """loss_critic would train one network, and the advantages come from the other."""
    loss = TRPOLoss(make_actor(), make_critic(9))
    settings = {"gamma": 0.99, "lmbda": 0.95, "observation_keys": OBSERVATION, "central_key": CENTRAL}
    with pytest.raises(ValueError, match="value_network is another network"):
        loss.make_value_estimator(CentralCriticValueEstimator, value_network=make_critic(9), **settings)


@pytest.mark.parametrize("share_params", [True, False])
def test_the_networks_of_a_copied_loss_are_those_that_it_trains(share_params):
    """Its estimator evaluated a critic, and drew the others' actions from a policy, that no longer learned."""
    actor, critic = make_actor(share_params=share_params), make_critic(9 + 4)
    loss = TRPOLoss(actor, critic)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, value=VALUE)
    loss.make_value_estimator(make_estimator(value_network=critic, action_keys=[ACTION], actor_network=actor))
    before, copied, data = bits(loss), deepcopy(loss), rollout(actor)
    TrustRegionUpdater(copied).step(copied.value_estimator(data.clone()))
    copied.critic_network_params.data.add_(1.0)
    assert same_bits(loss, before)
    for network in (copied.actor_network, copied.value_estimator.actor_network):
        assert same_bits(network, list(copied.actor_network_params.parameters()))
        assert not same_bits(network, bits(actor))
    for network in (copied.critic_network, copied.value_estimator.value_network):
        assert same_bits(network, [parameter + 1.0 for parameter in critic.parameters()])
