"""Masks, team rewards and normalised values in the advantage estimation."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.collectors.utils import split_trajectories
from torchrl.modules import MultiAgentMLP, PopArtValueNorm, RunningValueNorm
from torchrl.modules.models.cross_group_critic import CrossCriticGroupSpec, CrossGroupCritic
from torchrl.objectives.value import GAE, MultiAgentGAE

from tests.cases import (
    ACTION,
    GROUP,
    LOG_PROB,
    OBSERVATION,
    OLD_DATA,
    REWARD,
    VALUE,
    make_actor,
    make_data,
    make_single,
)
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import AgentGAE, CentralCriticValueEstimator, HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.objectives.popart import update_value_norm
from torchrl_trpo.training.critic_fit import fit_critic

GAMMA, LMBDA = 0.9, 0.8
CENTRAL = (GROUP, "central")
NEXT = ("next", *OBSERVATION)


def make_critic(n_agents=3, share_params=True):
    net = MultiAgentMLP(3, 1, n_agents=n_agents, centralized=False, share_params=share_params, num_cells=[4], depth=1)
    return TensorDictModule(net.double(), in_keys=[OBSERVATION], out_keys=[VALUE])


def rollout(actor=None, batch=(4, 6)):
    data = make_data(make_actor() if actor is None else actor, batch).exclude("advantage")
    following = TensorDict({GROUP: TensorDict({}, [*batch, 3])}, batch)
    following[OBSERVATION] = torch.randn(*batch, 3, 3, dtype=torch.float64)
    following[REWARD] = torch.randn(*batch, 3, 1, dtype=torch.float64)
    following["done"] = torch.rand(*batch, 1) < 0.2
    following["terminated"] = following["done"] & (torch.rand(*batch, 1) < 0.5)
    return data.set("next", following)


def make_gae(critic, **keywords):
    gae = AgentGAE(gamma=GAMMA, lmbda=LMBDA, value_network=critic, **keywords)
    gae.set_keys(value=VALUE, reward=REWARD)
    return gae


@pytest.mark.parametrize("wrong", [{"gamma": 95}, {"gamma": -0.5}, {"lmbda": 1.5}, {"lmbda": torch.nan}])
def test_a_discount_that_is_none_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"{name}: .*\. Legal: from 0 to 1"):
        AgentGAE(**{"gamma": GAMMA, "lmbda": LMBDA, **wrong}, value_network=make_critic())


def test_a_mask_for_the_estimator_alone_is_refused():
    """The loss put its own in the place of it, and padded steps were in the advantages and in the policy's step."""
    actor = make_actor()
    data = rollout(actor)
    data["alive"] = torch.rand(4, 6) < 0.7
    loss = TRPOLoss(actor, make_critic())
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA, mask_key="alive")
    with pytest.raises(ValueError, match=r"loss_mask_key='auto', and its value estimator reads \['alive'\]"):
        TrustRegionUpdater(loss).step(data)
    loss.loss_mask_key = "alive"
    TrustRegionUpdater(loss).step(data)


@pytest.mark.parametrize("head", [nn.Linear(1, 2), nn.Flatten(-2)], ids=["two numbers", "no last dimension"])
def test_a_critic_that_writes_no_number_for_each_agent_is_refused(head):
    critic = make_critic()
    critic.module = nn.Sequential(critic.module, head.double())
    with pytest.raises(
        ValueError, match=r"value: the critic writes .*'state_value'\) of shape \(4, 6, .*\), with data"
    ):
        make_gae(critic)(rollout())


def test_the_advantages_of_one_trajectory_do_not_leak_into_another():
    """A batch of several environments that was flattened before: its advantages were wrong by three deviations."""
    critic, data = make_critic(), rollout()
    ends = data["next", "done"].squeeze(-1)
    assert not ends[:, -1].all()
    starts = torch.cat([torch.ones(4, 1), ends[:, :-1].float()], 1)
    data["collector", "traj_ids"] = starts.flatten().cumsum(0).reshape(4, 6).long()
    expected = make_gae(critic)(data.clone())["advantage"]
    with pytest.raises(
        ValueError, match=r"traj_ids'\): the trajectory changes along time.* Legal: the batch as it was"
    ):
        make_gae(critic)(data.reshape(-1))
    padded = make_gae(critic)(split_trajectories(data, done_key="done", trajectory_key=("collector", "traj_ids")))
    torch.testing.assert_close(padded["advantage"][padded["collector", "mask"]], expected.flatten(0, 1))
    one_step = AgentGAE(gamma=GAMMA, lmbda=0, value_network=critic)
    one_step.set_keys(value=VALUE, reward=REWARD)
    one_step(data.reshape(-1))


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize("junk", [torch.nan, 1e6])
def test_padding_reaches_no_advantage(junk):
    """A padded step is no step: the one before it ends its sequence, and is bootstrapped."""
    critic, data = make_critic(), rollout()
    padded = torch.cat([data, data[:, :2].clone()], 1)
    for key in (OBSERVATION, ("next", *OBSERVATION), ("next", *REWARD)):
        padded[key][:, 6:] = junk
    padded["mask"] = (torch.arange(8) < 6).expand(4, 8).clone()
    padded["next", "done"][:, 6:] = padded["next", "terminated"][:, 6:] = False
    expected = make_gae(critic)(data.clone())
    actual = make_gae(critic, mask_key="mask")(padded)
    for key in ("advantage", "value_target", VALUE):
        torch.testing.assert_close(actual[key][:, :6], expected[key])
    assert not actual["mask"][:, 6:].any()
    assert (padded["next", "done"][:, 5] == data["next", "done"][:, 5]).all(), "the data is not changed"


def test_the_padding_of_split_trajectories_is_found():
    """Losses of TorchRL look for it by themselves, and their value estimators did not know of it."""
    critic, data = make_critic(), rollout()
    data["collector", "mask"] = (torch.arange(6) < 4).expand(4, 6).clone()
    expected = make_gae(critic, mask_key=("collector", "mask"))(data.clone())["advantage"]
    assert torch.equal(make_gae(critic)(data.clone())["advantage"], expected)
    data[("next", *REWARD)][:, 4:] = 1e3
    assert torch.equal(make_gae(critic)(data)["advantage"][:, :4], expected[:, :4])


@pytest.mark.parametrize("told", [False, True])
def test_what_follows_the_last_step_that_counts(told):
    """Where the data says that no agent counts next, nothing is to come; truncated steps are bootstrapped as ever."""
    critic, data = make_critic(), rollout()
    data["next", "done"][:] = data["next", "terminated"][:] = False
    data["next", "done"][:, 3] = told
    expected = data.clone()[:, :4]
    expected["next", "done"][:, 3] = True
    expected["next", "terminated"][:, 3] = not told
    data["mask"] = (torch.arange(6) < 4).expand(4, 6).clone()
    data["next", "mask"] = (torch.arange(1, 7) < 4).expand(4, 6).clone()
    actual = make_gae(critic, mask_key="mask")(data)["advantage"]
    torch.testing.assert_close(actual[:, :4], make_gae(critic)(expected)["advantage"])


def test_a_group_of_one_agent_keeps_its_sequence_in_games_by_turns():
    """It is paid for its move when the other has moved, which was taken for padding of its group."""
    data = TensorDict({}, [4, 6])
    turn = (torch.arange(6) % 2 == 0).expand(4, 6).unsqueeze(-1)
    following = data["next"] = TensorDict({"done": torch.zeros(4, 6, 1, dtype=torch.bool)}, [4, 6])
    for group, mask in (("white", turn), ("black", ~turn)):
        data[group, "mask"], following[group, "mask"] = mask.clone(), (~mask).clone()
        data[group, "observation"], following[group, "observation"] = torch.randn(2, 4, 6, 1, 3).double()
        following[group, "reward"] = torch.randn(4, 6, 1, 1, dtype=torch.float64)
    critic = TensorDictModule(nn.Linear(3, 1).double(), [("white", "observation")], [("white", "state_value")])
    advantages = []
    for masks in ({}, {"mask_key": ("white", "mask"), "other_mask_keys": [("white", "mask"), ("black", "mask")]}):
        gae = AgentGAE(gamma=GAMMA, lmbda=LMBDA, value_network=critic, **masks)
        gae.set_keys(value=("white", "state_value"), reward=("white", "reward"))
        advantages.append(gae(data.clone())["advantage"])
    torch.testing.assert_close(advantages[1], advantages[0])
    with pytest.raises(KeyError, match=r"other_mask_keys: \('black', 'mask'\) is not in the data"):
        gae(data.exclude(("black", "mask")))


@pytest.mark.parametrize("reward", [1e9, 3e38])
@pytest.mark.parametrize("keywords", [{}, {"group_key": "task"}], ids=["together", "by task"])
def test_a_masked_reward_moves_no_averaged_advantage(reward, keywords):
    """It was averaged with the others first, which left them nearly zero, or NaN."""
    critic, data = make_critic().float(), rollout()
    data = data.apply(lambda value: value.float() if value.is_floating_point() else value)
    data["mask"] = (torch.arange(6) < 4).expand(4, 6).clone()
    data["task"] = torch.tensor([0, 0, 1, 1]).unsqueeze(-1).expand(4, 6).clone()
    gae = make_gae(critic, mask_key="mask", average_gae=True, **keywords)
    expected = gae(data.clone())["advantage"]
    data[("next", *REWARD)][:, 4:] = reward
    actual = gae(data)["advantage"]
    assert expected[:, :4].std() > 0.9
    assert torch.equal(actual, expected)
    assert gae.average_gae


def test_a_dead_agent_spoils_no_other():
    """What a dead agent observes and earns may be anything; its own flags end its sequence, the others go on."""
    critic, data = make_critic(), rollout()
    dead_from = 3
    done = data["next", "done"].unsqueeze(-2).expand(4, 6, 3, 1).clone()
    done[:, dead_from - 1 :, 1] = True
    data["next", GROUP, "done"], data["next", GROUP, "terminated"] = done, done.clone()
    data["mask"] = torch.ones(4, 6, 3, dtype=torch.bool)
    data["mask"][:, dead_from:, 1] = False
    broken = data.clone()
    for key in (OBSERVATION, ("next", *OBSERVATION), ("next", *REWARD)):
        broken[key][:, dead_from:, 1] = torch.nan
    results = []
    for batch in (data, broken):
        gae = AgentGAE(gamma=GAMMA, lmbda=LMBDA, value_network=critic, mask_key="mask")
        gae.set_keys(value=VALUE, reward=REWARD, done=(GROUP, "done"), terminated=(GROUP, "terminated"))
        results.append(gae(batch)["advantage"])
    assert results[1].isfinite().all()
    alive = data["mask"].unsqueeze(-1)
    torch.testing.assert_close(results[1][alive], results[0][alive])
    by_hand = data[("next", *REWARD)][:, dead_from - 1, 1] - data[VALUE][:, dead_from - 1, 1]
    torch.testing.assert_close(results[0][:, dead_from - 1, 1], by_hand)


def test_the_loss_tells_its_mask():
    loss = TRPOLoss(make_actor(), make_critic())
    loss.set_keys(value=VALUE)
    loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA)
    loss.loss_mask_key = "alive"
    assert loss.value_estimator.mask_keys == ("alive",)
    loss.loss_mask_key = "auto"
    assert loss.value_estimator.mask_keys == (("collector", "mask"),)


@pytest.mark.parametrize("sequential", [True, False], ids=["hatrpo", "independent"])
def test_masked_rows_count_nowhere_from_data_to_critic(sequential):
    """Advantages, their normalisation, KL, Fisher, surrogate, factor, entropy and critic: as if they were not there."""
    actor, critic = make_actor(), make_critic()
    data = rollout(actor)
    data[("next", *REWARD)] = data[("next", *REWARD)].mean(2, keepdim=True).expand(4, 6, 3, 1).clone()
    padded = torch.cat([data, data[:, :3].apply(lambda x: x * torch.nan if x.is_floating_point() else x)], 1)
    padded["counts"] = (torch.arange(9) < 6).expand(4, 9).clone()
    results = []
    for batch in (data, padded):
        twin, twin_critic = make_actor(), make_critic()
        twin.load_state_dict(actor.state_dict())
        twin_critic.load_state_dict(critic.state_dict())
        normalised = {"normalize_advantage": True, "normalize_advantage_exclude_dims": (-2,)}
        loss = TRPOLoss(twin, twin_critic, entropy_coeff=0.1, **normalised)
        loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
        loss.loss_mask_key = "counts" if batch is padded else None
        with torch.no_grad():
            loss.value_estimator(
                batch, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        objective = HATRPOSequentialObjective(loss, agent_order="fixed") if sequential else loss
        stats = TrustRegionUpdater(objective).step(batch)
        optimizer = torch.optim.SGD(loss.critic_network_params.flatten_keys().values(), lr=0.1)
        torch.manual_seed(1)
        fit = fit_critic(loss, optimizer, batch, epochs=1, minibatch_size=1000)
        assert fit["dropped"] == 0
        parameters = [p.detach() for p in (*twin.parameters(), *twin_critic.parameters())]
        results.append([stats["kl"], stats["improvement"], fit["loss_critic"], fit["explained_variance"], *parameters])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_dead_agents_rows_stay_in_the_fit_of_the_others():
    actor, critic = make_actor(), make_critic()
    data = rollout(actor)
    data["alive"] = torch.rand(4, 6, 3) < 0.7
    data[OBSERVATION][~data["alive"]] = torch.nan
    loss = TRPOLoss(actor, critic, loss_critic_type="l2")
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    loss.loss_mask_key = "alive"
    with torch.no_grad():
        loss.value_estimator(data, params=loss.critic_network_params, target_params=loss.target_critic_network_params)
    target, value = (data[key].squeeze(-1)[data["alive"]] for key in ("value_target", VALUE))
    explained = 1 - (target - value).var() / target.var()
    optimizer = torch.optim.SGD(loss.critic_network_params.flatten_keys().values(), lr=0.1)
    fit = fit_critic(loss, optimizer, data, epochs=1, minibatch_size=1000)
    assert fit["dropped"] == 0
    assert fit["loss_critic"] == pytest.approx(float((target - value).square().mean()))
    assert fit["explained_variance"] == pytest.approx(float(explained))


@pytest.mark.parametrize("sizes", [{"epochs": 0}, {"minibatch_size": 0}, {"minibatch_size": 2.5}], ids=str)
def test_sizes_of_a_fit_that_cannot_be(sizes):
    """No epoch ended in a division by zero, and a minibatch without rows in torch."""
    loss = TRPOLoss(make_actor(), make_critic())
    optimizer = torch.optim.SGD(loss.critic_network_params.flatten_keys().values())
    name, value = next(iter(sizes.items()))
    with pytest.raises(ValueError, match=rf"^{name}: {value}\. Legal: a whole number of at least 1\."):
        fit_critic(loss, optimizer, rollout(make_actor()), **{"epochs": 1, "minibatch_size": 100, **sizes})


def test_dead_agents_of_another_group_spoil_no_pool():
    data = rollout()
    for part in (data, data["next"]):
        part["cars"] = TensorDict({"observation": torch.randn(4, 6, 2, 5, dtype=torch.float64)}, [4, 6, 2])
    data["cars", "mask"] = torch.rand(4, 6, 2) < 0.5
    for part in (data, data["next"]):
        part["cars", "observation"][~data["cars", "mask"]] = torch.nan
    critic = TensorDictModule(nn.Linear(3 * 3 + 2 * 5, 1).double(), in_keys=[CENTRAL], out_keys=[VALUE])
    estimator = CentralCriticValueEstimator(
        gamma=GAMMA,
        lmbda=LMBDA,
        value_network=critic,
        central_key=CENTRAL,
        observation_keys=[OBSERVATION, ("cars", "observation")],
        other_mask_keys=[("cars", "mask")],
    )
    estimator.set_keys(value=VALUE, reward=REWARD)
    assert estimator(data)["advantage"].isfinite().all()


@pytest.mark.parametrize("own", [True, False], ids=["the loss's", "another"])
def test_normalised_values_keep_their_meaning_when_the_statistics_move(own):
    """With an estimator outside of the loss, the loss took the critic for one of raw values: they grew without end."""
    actor, critic, norm = make_actor(), make_critic(), PopArtValueNorm(beta=0.5).double()
    data = rollout(actor)
    loss = TRPOLoss(actor, critic, value_norm=norm)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    if own:
        gae = loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA, value_norm=norm).value_estimator
    else:
        gae = make_gae(critic, value_norm=norm)
    loss.loss_critic(gae(data.clone()))  # the first statistics, of values that are raw until then
    data["next", *REWARD] *= 10
    data = gae(data)
    before = norm.denormalize(critic(data.clone())[VALUE])
    distance = loss.loss_critic(data)[0]
    torch.testing.assert_close(norm.denormalize(critic(data.clone())[VALUE]), before)
    error = norm.normalize(data["value_target"]) - norm.normalize(before)
    torch.testing.assert_close(distance, nn.functional.smooth_l1_loss(error, 0 * error, reduction="none"))


def test_a_default_estimator_changes_nothing_for_one_outside_of_the_loss():
    """To read loss.value_estimator, as TrustRegionStepper does, was enough for values to grow without end."""
    actor, critic, norm = make_actor(), make_critic(), PopArtValueNorm(beta=0.5).double()
    loss = TRPOLoss(actor, critic, value_norm=norm)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    make_gae(critic, value_norm=norm)
    assert loss.value_estimator.value_norm is norm
    assert loss.corrects_critic
    loss.make_value_estimator(gamma=0.5, lmbda=LMBDA)  # as a schedule of the discount does
    assert loss.value_estimator.value_norm is norm
    with pytest.raises(ValueError, match=r"value_norm: the critic outputs normalised values, .* Legal: AgentGAE"):
        loss.make_value_estimator("GAE", gamma=GAMMA, lmbda=LMBDA)
    loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA, value_norm=None)
    assert not loss.corrects_critic


@pytest.mark.parametrize("norm_type", [PopArtValueNorm, RunningValueNorm])
def test_a_loss_whose_first_state_is_loaded_begins_again(norm_type):
    """The critic was corrected from statistics that had become empty."""
    actor, critic, norm = make_actor(), make_critic(), norm_type().double()
    loss = TRPOLoss(actor, critic, value_norm=norm)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    gae = loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA, value_norm=norm).value_estimator
    data, first = rollout(actor), deepcopy(loss.state_dict())

    def distances():
        return [loss.loss_critic(gae(data.clone()))[0].detach() for _ in range(3)]

    before = distances()
    loss.load_state_dict(first)
    for new, old in zip(distances(), before, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_a_batch_without_a_row_that_counts_leaves_the_critic_alone():
    """The statistics of no targets are NaN, and would have stayed so."""
    actor, critic, norm = make_actor(), make_critic(), PopArtValueNorm(beta=0.5).double()
    data = rollout(actor)
    loss = TRPOLoss(actor, critic, value_norm=norm)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA, value_norm=norm)
    loss.loss_mask_key = "alive"
    data["value_target"] = torch.randn(4, 6, 3, 1, dtype=torch.float64)
    data["alive"] = torch.ones(4, 6, 3, dtype=torch.bool)
    loss.loss_critic(data)
    data["alive"][:] = False
    loss.loss_critic(data)
    data["alive"][:] = True
    data["value_target"][0, 0] = torch.nan
    loss.loss_critic(data)
    assert all(buffer.isfinite().all() for buffer in norm.buffers())
    assert all(parameter.isfinite().all() for parameter in critic.parameters())


def test_shifted_values_keep_what_is_valid():
    data = rollout()
    data["next", "done"][:, 2] = True
    data["next", "terminated"][:, 2] = False
    theirs = MultiAgentGAE(gamma=GAMMA, lmbda=LMBDA, value_network=make_critic(), shifted=True)
    theirs.set_keys(value=VALUE, reward=REWARD)
    gae = make_gae(theirs.value_network, shifted=True)
    expected, actual = theirs(data.clone()), gae(data.clone())
    assert not expected["shifted_valid"].all()
    assert torch.equal(actual["shifted_valid"], expected["shifted_valid"])
    torch.testing.assert_close(actual["advantage"], expected["advantage"])


# ------------------------------------------------------------------ rewards of a team of groups


@pytest.mark.parametrize("team_reward", ["mean", "sum"])
def test_one_reward_for_all_groups(team_reward):
    data, critic = rollout(), make_critic()
    data["next", "cars", "reward"] = torch.randn(4, 6, 2, 1, dtype=torch.float64)
    keys = [REWARD, ("cars", "reward")]
    actual = make_gae(critic, team_reward=team_reward, reward_keys=keys)(data.clone())["advantage"]
    pooled = torch.cat([data[("next", *REWARD)], data["next", "cars", "reward"]], 2)
    team = getattr(pooled, team_reward)(2, keepdim=True)
    data[("next", *REWARD)] = team.expand(4, 6, 3, 1).clone()
    torch.testing.assert_close(actual, make_gae(critic)(data)["advantage"])


def test_a_reward_of_the_team_counts_once():
    data = rollout()
    data["next", "reward"] = torch.randn(4, 6, 1, dtype=torch.float64)
    results = []
    for keywords in ({}, {"team_reward": "sum", "reward_keys": ["reward", "reward"]}):
        gae = AgentGAE(gamma=GAMMA, lmbda=LMBDA, value_network=make_critic(), **keywords)
        gae.value_network.load_state_dict({k: torch.ones_like(v) for k, v in gae.value_network.state_dict().items()})
        gae.set_keys(value=VALUE)
        results.append(gae(data.clone())["advantage"])
    torch.testing.assert_close(*results)


def test_rewards_of_agents_that_do_not_count_may_differ():
    actor, critic = make_actor(), make_critic()
    data = rollout(actor)
    data["next", *REWARD] = data["next", *REWARD][..., :1, :].repeat(1, 1, 3, 1)
    data[GROUP, "alive"] = torch.rand(4, 6, 3) < 0.7
    data["next", *REWARD][~data[GROUP, "alive"]] = 0
    loss = TRPOLoss(actor, critic)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    loss.loss_mask_key = (GROUP, "alive")
    TrustRegionUpdater(HATRPOSequentialObjective(loss)).step(data)  # warnings are errors here


@OLD_DATA
def test_hatrpo_warns_once_when_rewards_differ():
    actor, critic = make_actor(), make_critic()
    data = rollout(actor)
    loss = TRPOLoss(actor, critic)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    updater = TrustRegionUpdater(HATRPOSequentialObjective(loss))
    with pytest.warns(UserWarning, match=r"rewards differ.*theorem 2.*team_reward='mean' or 'sum'.*ITRPO or MATRPO"):
        updater.step(data)
    updater.step(data)  # once: warnings are errors here


def test_a_team_reward_is_no_reason_to_warn():
    actor, critic = make_actor(), make_critic()
    data = rollout(actor)
    loss = TRPOLoss(actor, critic)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA, team_reward="mean")
    TrustRegionUpdater(HATRPOSequentialObjective(loss)).step(data)


# ------------------------------------------------------------------ PopArt


@pytest.mark.parametrize("last", [nn.Softplus(), nn.Tanh()])
def test_a_critic_whose_layer_of_one_output_is_not_its_last(last):
    """It was corrected, and the values moved with the statistics."""
    norm = PopArtValueNorm(beta=0.5).double()
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), last).double()
    loss = TRPOLoss(actor := make_actor(), TensorDictModule(net, [OBSERVATION], [VALUE]), value_norm=norm)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA, value_norm=norm)
    data = loss.value_estimator(rollout(actor))
    loss.loss_critic(data)
    data["value_target"] += 5
    with pytest.raises(ValueError, match=r"value_norm: .*its values changed by up to .*not what outputs them"):
        loss.loss_critic(data)


@pytest.mark.parametrize("in_loss", [None, PopArtValueNorm()])
def test_an_estimator_with_another_value_norm_is_refused(in_loss):
    """Values were denormalised with statistics that nothing moved."""
    loss = TRPOLoss(make_actor(), make_critic(), value_norm=in_loss)
    loss.set_keys(value=VALUE)
    with pytest.raises(ValueError, match=r"value_norm: the value estimator has another one than the loss"):
        loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA, value_norm=PopArtValueNorm())


def test_groups_do_not_share_a_value_norm():
    """When it moved for one group, the values of the other's critic changed."""
    norm, losses = PopArtValueNorm().double(), {}
    for group in ("cars", "trucks"):
        critic = TensorDictModule(nn.Linear(3, 1).double(), [OBSERVATION], [(group, "value")])
        losses[group] = TRPOLoss(make_actor(), critic, value_norm=norm)
        own = {key: (group, key) for key in ("advantage", "value", "value_target")}
        losses[group].set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, **own)
        losses[group].make_value_estimator(gamma=GAMMA, lmbda=LMBDA, value_norm=norm)
    data = rollout(losses["cars"].actor_network)
    with pytest.raises(ValueError, match=r"value_norm: groups 'cars' and 'trucks' share one.*: one for each group"):
        TrustRegionUpdater(HATRPOSequentialObjective(losses)).step(data)


@pytest.mark.parametrize("norm", [PopArtValueNorm, RunningValueNorm])
@pytest.mark.parametrize("share_params", [True, False], ids=["shared", "per_agent"])
def test_outputs_survive_a_change_of_statistics(norm, share_params):
    critic, norm = make_critic(share_params=share_params), norm().double()
    data = rollout()
    norm.update(torch.randn(50, 1).double())
    for step in range(4):
        before = norm.denormalize(critic(data.clone())[VALUE]).detach()
        update_value_norm(norm, 100 * step + 7 * torch.randn(50, 1).double(), TensorDict.from_module(critic))
        torch.testing.assert_close(norm.denormalize(critic(data.clone())[VALUE]), before)


def test_targets_are_fitted_in_normalised_space():
    """The critic's outputs are of order 1 whatever the rewards, and its values in the rewards' units."""
    actor, critic, norm = make_actor(), make_critic(), PopArtValueNorm(beta=0.9).double()
    data = rollout(actor)
    data[("next", *REWARD)] = 5000 + 1000 * data[OBSERVATION][..., :1]
    data["next", "done"][:] = data["next", "terminated"][:] = True
    loss = TRPOLoss(actor, critic, value_norm=norm)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA, value_norm=norm)
    optimizer = torch.optim.Adam(loss.critic_network_params.flatten_keys().values(), lr=3e-2)
    for _ in range(60):
        with torch.no_grad():
            loss.value_estimator(
                data, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        fit_critic(loss, optimizer, data, epochs=5, minibatch_size=100)
    outputs = critic(data.clone())[VALUE]
    assert outputs.abs().mean() < 3
    assert (norm.denormalize(outputs) - data["value_target"]).abs().mean() < 0.3 * data["value_target"].std()
    assert 4000 < data[VALUE].mean() < 6000


def test_masked_targets_move_no_statistics():
    actor, critic, norm = make_actor(), make_critic(), PopArtValueNorm(beta=0.5).double()
    data = rollout(actor)
    loss = TRPOLoss(actor, critic, value_norm=norm)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA, value_norm=norm)
    loss.loss_mask_key = "alive"
    data["value_target"] = torch.randn(4, 6, 3, 1, dtype=torch.float64)
    data["alive"] = torch.rand(4, 6, 3) < 0.5
    data["value_target"][~data["alive"]] = 1e9
    loss.loss_critic(data)
    torch.testing.assert_close(norm.denormalize(torch.zeros(1).double())[0], data["value_target"][data["alive"]].mean())


@pytest.mark.parametrize("layer", [nn.Linear(3, 1, bias=False), nn.Conv2d(3, 4, 1), nn.Conv1d(1, 4, 3)], ids=str)
def test_a_critic_without_one_last_layer(layer):
    net = TensorDictModule(nn.Sequential(layer).double(), in_keys=[OBSERVATION], out_keys=[VALUE])
    norm = PopArtValueNorm().double()
    norm.update(torch.ones(3, 1).double())
    with pytest.raises(ValueError, match=r"value_norm: .*one linear layer of one output, with a bias; this one has 0"):
        update_value_norm(norm, torch.zeros(3, 1).double(), TensorDict.from_module(net))


# ------------------------------------------------------------------ critics of the user


def test_torchrls_cross_group_critic():
    """One critic over two groups of different size, each group's loss with its own value."""
    actor = make_actor()
    data = rollout(actor)
    for part in (data, data["next"]):
        part["cars"] = TensorDict({"observation": torch.randn(4, 6, 2, 5, dtype=torch.float64)}, [4, 6, 2])
    data["next", "cars", "reward"] = torch.randn(4, 6, 2, 1, dtype=torch.float64)
    specs = {
        GROUP: CrossCriticGroupSpec(3, 3, OBSERVATION, VALUE),
        "cars": CrossCriticGroupSpec(5, 2, ("cars", "observation"), ("cars", "state_value")),
    }
    critic = CrossGroupCritic(specs, d_model=4, trunk_depth=1, trunk_cells=8).double()
    loss = TRPOLoss(actor, critic)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA)
    assert TrustRegionUpdater(loss).step(data)["accepted"].all()
    with torch.no_grad():
        loss.value_estimator(data, params=loss.critic_network_params, target_params=loss.target_critic_network_params)
    optimizer = torch.optim.Adam(loss.critic_network_params.flatten_keys().values(), lr=1e-2)
    first = fit_critic(loss, optimizer, data, epochs=1, minibatch_size=8)["loss_critic"]
    assert fit_critic(loss, optimizer, data, epochs=40, minibatch_size=8)["loss_critic"] < first
    cars = AgentGAE(gamma=GAMMA, lmbda=LMBDA, value_network=critic)
    cars.set_keys(value=("cars", "state_value"), reward=("cars", "reward"), advantage=("cars", "advantage"))
    assert cars(data)["cars", "advantage"].shape == (4, 6, 2, 1)


def test_the_environments_state_alone():
    data = rollout()
    for part in (data, data["next"]):
        part["state"] = torch.randn(4, 6, 5, dtype=torch.float64)
    net = nn.Linear(5, 1).double()
    critic = TensorDictModule(net, in_keys=[CENTRAL], out_keys=[VALUE])
    settings = {"gamma": GAMMA, "lmbda": LMBDA, "value_network": critic, "central_key": CENTRAL}
    estimator = CentralCriticValueEstimator(**settings, observation_keys=[], state_key="state", n_agents=3)
    estimator.set_keys(value=VALUE, reward=REWARD)
    estimator(data)
    torch.testing.assert_close(data[VALUE][..., 2, :], net(data["state"]))
    torch.testing.assert_close(data[("next", *VALUE)][..., 0, :], net(data["next", "state"]))
    with pytest.raises(ValueError, match=r"state_key alone.*n_agents"):
        CentralCriticValueEstimator(**settings, observation_keys=[], state_key="state")


def test_any_sequence_of_modules_may_be_the_critic():
    features = (GROUP, "features")
    first = TensorDictModule(nn.Linear(3, 4).double(), in_keys=[OBSERVATION], out_keys=[features])
    last = TensorDictModule(nn.Linear(4, 1).double(), in_keys=[features], out_keys=[VALUE])
    data = rollout()
    make_gae(TensorDictSequential(first, last))(data)
    torch.testing.assert_close(data[VALUE], last.module(first.module(data[OBSERVATION])))


class LargestCopy(TorchDispatchMode):
    """The bytes of the largest floating-point tensor that does not share memory with the data."""

    def __init__(self, data):
        super().__init__()
        self.known = {value.untyped_storage().data_ptr() for value in data.values(True, True)}
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                storage = output.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.nbytes = max(self.nbytes, storage.nbytes())
        return outputs


def test_the_fit_never_copies_the_whole_batch():
    critic = TensorDictModule(nn.Linear(64, 1), in_keys=["observation"], out_keys=["state_value"])
    actor, _ = make_single()
    loss = TRPOLoss(actor, critic)
    shapes = {"observation": (30, 20, 64), "state_value": (30, 20, 1), "value_target": (30, 20, 1)}
    data = TensorDict({name: torch.randn(shape) for name, shape in shapes.items()}, batch_size=(30, 20))
    optimizer = torch.optim.Adam(list(loss.critic_network_params.flatten_keys().values()), lr=1e-3)
    with LargestCopy(data) as copies:
        fit_critic(loss, optimizer, data, epochs=2, minibatch_size=60)
    assert copies.nbytes == data["observation"].numel() * 4 / 10


# ------------------------------------------------------------------ values at t and t+1


@pytest.mark.parametrize("time_dim", [0, 1])
def test_what_the_next_step_sees_is_evaluated_once(time_dim):
    critic, data = make_critic(), rollout(batch=(5, 5))
    before, after = (data[key].transpose(0, 1) if time_dim == 0 else data[key] for key in (OBSERVATION, NEXT))
    jumps = torch.rand(5, 5) < 0.3  # also where no flag says so
    jumps[:, -1] = True
    after.copy_(torch.where(jumps[..., None, None], after, before.roll(-1, 1)))
    rows = []
    critic.register_forward_hook(lambda module, arguments, result: rows.append(result.numel()))
    gae = make_gae(critic, time_dim=time_dim)
    gae(data)
    assert sum(rows) == 25 + jumps.sum() + 4, "each observation once, and a few to compare"
    for key, observation in ((VALUE, OBSERVATION), (("next", *VALUE), NEXT)):
        torch.testing.assert_close(data[key], critic.module(data[observation]))


class Sequences(nn.Module):
    """A critic ``[*B, T, F]`` that looks along ``T``, or at the other rows."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.net, self.norm = kind, nn.Linear(3, 1).double(), nn.BatchNorm1d(3).double()

    def forward(self, observation):
        if self.kind == "rows":
            return self.net(self.norm(observation.reshape(-1, 3)).reshape(observation.shape))
        if self.kind == "random":
            return self.net(nn.functional.dropout(observation, 1e-9))
        return self.net(observation).cumsum(-2)


@pytest.mark.parametrize("kind", ["rows", "time", "random"])
def test_a_critic_that_looks_at_other_rows_sees_all_of_them(kind):
    """V(o_{t+1}) was evaluated where an episode ends alone, among other rows than at t."""
    data = rollout().exclude(GROUP, ("next", GROUP))
    data["observation"], data["next", "observation"] = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    data["next", "observation"][:, :-1] = data["observation"][:, 1:]
    data["next", "reward"] = torch.randn(4, 6, 1, dtype=torch.float64)
    critic = TensorDictModule(Sequences(kind), ["observation"], ["state_value"])
    theirs = GAE(gamma=GAMMA, lmbda=LMBDA, value_network=deepcopy(critic), deactivate_vmap=True)(data.clone())
    ours = AgentGAE(gamma=GAMMA, lmbda=LMBDA, value_network=critic)(data)
    torch.testing.assert_close(ours["next", "state_value"], theirs["next", "state_value"])


def test_a_terminated_key_that_is_not_in_the_data_is_named():
    """``done`` stood in for it, and time limits were not bootstrapped."""
    gae = make_gae(make_critic())
    gae.set_keys(terminated="terminatd")
    with pytest.raises(KeyError, match=r"'terminatd'.*Did you mean .*'terminated'"):
        gae(rollout())


def test_parameters_at_the_next_step_may_be_others():
    critic, data = make_critic(), rollout()
    data[NEXT][:, :-1] = data[OBSERVATION][:, 1:]
    own = TensorDict.from_module(critic).data
    zero = own.apply(torch.zeros_like)
    gae = make_gae(critic)
    for params, target in ((own, zero), (zero, own)):
        result = gae(data.clone(), params=params, target_params=target)
        assert (result[VALUE] != 0).any() == (params is own)
        assert (result["next", *VALUE] != 0).any() == (target is own)
