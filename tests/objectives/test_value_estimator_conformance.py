"""What TorchRL's value estimators promise, asked of ours: options change how values are computed, not what they are."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import GRUModule, PopArtValueNorm
from torchrl.objectives.value import GAE, MultiAgentGAE, ValueEstimatorBase

from tests.cases import make_actor
from torchrl_trpo.keys import path
from torchrl_trpo.objectives import AgentGAE, CentralCriticValueEstimator, TRPOLoss

BATCH, AGENTS, OBSERVED = (2, 3), 2, 3
OBSERVATION, CENTRAL, VALUE = ("agents", "observation"), ("agents", "central"), ("agents", "state_value")
RESULTS = ("advantage", "value_target", VALUE, ("next", *VALUE))
BOTH = pytest.mark.parametrize("kind", [AgentGAE, CentralCriticValueEstimator], ids=["agents", "central"])
WITH_PARAMS = pytest.mark.parametrize("with_params", [True, False], ids=["params", "own"])


@cache
def critics():
    """A critic of each agent's observation, and one of all agents'."""
    return {
        key: TensorDictModule(
            nn.Sequential(nn.Linear(n_inputs, 3), nn.Tanh(), nn.Linear(3, 1)).double(), [key], [VALUE]
        )
        for key, n_inputs in [(OBSERVATION, OBSERVED), (CENTRAL, AGENTS * OBSERVED)]
    }


def make(kind, *, value_network=None, keys=None, **keywords):
    if kind is CentralCriticValueEstimator:
        keywords = {"observation_keys": [OBSERVATION], "central_key": CENTRAL, **keywords}
    read = CENTRAL if kind is CentralCriticValueEstimator else OBSERVATION
    network = value_network or deepcopy(critics()[read])
    estimator = kind(gamma=0.9, lmbda=0.8, value_network=network, **keywords)
    estimator.set_keys(**{"value": VALUE, **(keys or {})})
    return estimator


def make_data(batch=BATCH, team=True):
    """Rewards and ends of the team or of each agent; the next observation is the following one but at ends."""
    shared = () if team else (AGENTS,)
    data = TensorDict({OBSERVATION: torch.randn(*batch, AGENTS, OBSERVED, dtype=torch.float64)}, batch)
    done = torch.rand(*batch, *shared, 1) < 0.3
    observation = data[OBSERVATION].roll(-1, 1)
    ends = done.flatten(2).any(-1)
    ends[:, -1] = True
    data["next"] = TensorDict(
        {
            OBSERVATION: torch.where(ends[..., None, None], torch.randn_like(observation), observation),
            "reward": torch.randn(*batch, *shared, 1, dtype=torch.float64),
            "done": done,
            "terminated": done & (torch.rand(*batch, *shared, 1) < 0.5),
        },
        batch,
    )
    return data


def own_params(estimator):
    return TensorDict.from_module(estimator.value_network)


def assert_same(actual, expected):
    for key in RESULTS:
        torch.testing.assert_close(actual[key], expected[key])


# ------------------------------------------------------------------ options that must not change a number


@BOTH
@WITH_PARAMS
@pytest.mark.parametrize("deactivate_vmap", [True, False])
@pytest.mark.parametrize(
    "chunks",
    [
        {},
        {"value_chunk_size": 1},
        {"value_chunk_size": 2, "value_chunk_dim": 1},
        {"value_chunk_size": 100, "value_chunk_dim": -1},
        {"num_chunks": 2},
        {"num_chunk": 3, "value_chunk_dim": 1},
        {"num_chunks": 50, "value_chunk_dim": -2},
    ],
    ids=str,
)
def test_chunks_change_nothing(kind, chunks, deactivate_vmap, with_params):
    data = make_data()
    expected = make(kind)(data.clone())
    estimator = make(kind, deactivate_vmap=deactivate_vmap, **chunks)
    params = own_params(estimator) if with_params else None
    assert_same(estimator(data, params=params, target_params=params), expected)


@BOTH
@pytest.mark.parametrize(
    ("chunks", "error"),
    [
        ({"value_chunk_size": 0}, ValueError),
        ({"num_chunks": -1}, ValueError),
        ({"value_chunk_size": 1.5}, TypeError),
        ({"value_chunk_size": 1, "num_chunks": 1}, ValueError),
        ({"num_chunks": 1, "num_chunk": 2}, ValueError),
        ({"shifted": "yes"}, ValueError),
        ({"shifted_budget": 0}, ValueError),
        ({"value_key": "a"}, RuntimeError),
        ({"no_such_option": 1}, TypeError),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(kind, chunks, error):
    with pytest.raises(error, match="|".join([*chunks, "num_chunks"])):
        make(kind, **chunks)


@BOTH
@pytest.mark.parametrize("dim", [2, -3])
def test_a_chunk_dimension_that_is_not_there_is_refused(kind, dim):
    with pytest.raises(ValueError, match=f"value_chunk_dim={dim} is out of bounds"):
        make(kind, value_chunk_size=1, value_chunk_dim=dim)(make_data())


@BOTH
@pytest.mark.parametrize("vectorized", [True, False, None])
@pytest.mark.parametrize("team", [True, False], ids=["team", "each"])
def test_the_vectorised_form_says_the_same(kind, vectorized, team):
    data = make_data(team=team)
    expected = make(kind, vectorized=False)(data.clone())
    actual = make(kind, vectorized=vectorized)(data)
    for key in RESULTS:  # its decay is in the type of gamma
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("form", ["call", "negative", "constructor", "names"])
@WITH_PARAMS
def test_time_may_be_another_dimension(kind, form, with_params):
    data = make_data()
    expected = make(kind)(data.clone())
    data = data.transpose(0, 1).contiguous()  # [T, B]
    if form == "names":
        data.names = ["time", None]
    estimator = make(kind, time_dim=0) if form == "constructor" else make(kind)
    time_dim = {"call": 0, "negative": -2}.get(form)
    params = own_params(estimator) if with_params else None
    actual = estimator(data, params=params, target_params=params, time_dim=time_dim)
    for key in RESULTS:
        torch.testing.assert_close(actual[key].transpose(0, 1), expected[key])
    target = estimator.value_estimate(data, time_dim=time_dim)
    torch.testing.assert_close(target, actual["value_target"])


@BOTH
@pytest.mark.parametrize("budget", [1, 4])
@pytest.mark.parametrize("team", [True, False], ids=["team", "each"])
def test_shifted_values_are_the_same_where_they_are_valid(kind, budget, team):
    data = make_data(team=team)
    following = data["next"]
    following["done"][:] = following["terminated"][:] = False
    following["done"][0, 0] = True  # truncated: takes one more value
    following[OBSERVATION][:, :-1] = data[OBSERVATION][:, 1:]
    following[OBSERVATION][0, 0] = 7.0
    expected = make(kind)(data.clone())
    actual = make(kind, shifted=True, shifted_budget=budget)(data)
    valid = actual["shifted_valid"]
    assert valid.all() == (budget == 4)
    valid = valid.reshape(*valid.shape, *[1] * (4 - valid.ndim)).expand(*BATCH, AGENTS, 1)
    torch.testing.assert_close(actual[VALUE][valid], expected[VALUE][valid])
    if budget == 4:
        torch.testing.assert_close(actual["advantage"], expected["advantage"])
    assert (actual["advantage"][~valid] == 0).all()


@BOTH
def test_shifted_values_need_time_last_or_named(kind):
    """It was ignored: the values were shifted along the last dimension."""
    data = make_data().transpose(0, 1).contiguous()
    with pytest.raises(ValueError, match=r"time_dim: 0.*shifted.*last"):
        make(kind, shifted=True)(data, time_dim=0)


@BOTH
def test_shifted_values_have_one_set_of_parameters(kind):
    estimator = make(kind, shifted=True)
    params = own_params(estimator)
    with pytest.raises(ValueError, match="single call"):
        estimator(make_data(), params=params, target_params=params.clone())


# ------------------------------------------------------------------ options that change a number


@BOTH
def test_target_parameters_value_what_follows(kind):
    estimator, data = make(kind), make_data()
    params, target = own_params(estimator), own_params(estimator).apply(lambda value: value.detach() + 0.5)
    own = estimator(data.clone())
    assert_same(estimator(data.clone(), params=params), own)
    mixed = estimator(data.clone(), params=params, target_params=target)
    torch.testing.assert_close(mixed[VALUE], own[VALUE])
    other = estimator(data.clone(), params=target)
    torch.testing.assert_close(mixed["next", VALUE], other["next", VALUE])
    with pytest.raises(ValueError, match="both provided"):
        estimator(data, target_params=target)


@BOTH
@WITH_PARAMS
@pytest.mark.parametrize("differentiable", [True, False])
def test_gradients_reach_rewards_and_observations_if_asked_for(kind, differentiable, with_params):
    """Pooling cut the observations off."""
    estimator, data = make(kind, differentiable=differentiable), make_data()
    data[OBSERVATION] = observation = data[OBSERVATION].requires_grad_()
    data["next", "reward"] = reward = data["next", "reward"].requires_grad_()
    params = own_params(estimator) if with_params else None
    advantage = estimator(data, params=params, target_params=params)["advantage"]
    assert advantage.requires_grad == differentiable
    if differentiable:
        advantage.sum().backward()
        assert (observation.grad != 0).all()
        assert (reward.grad != 0).all()
        assert not any(p.grad is not None and p.grad.any() for p in estimator.value_network.parameters())


@BOTH
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("skip_existing", [True, False, None])
def test_existing_values_are_kept_if_asked_for(kind, skip_existing, normalised):
    """Values that were in the rewards' units already were denormalised again."""
    norm = PopArtValueNorm(beta=0.5).double() if normalised else None
    if norm is not None:
        norm.update(5 + 3 * torch.randn(20, 1).double())
    estimator = make(kind, value_norm=norm, skip_existing=skip_existing)
    data = make_data()
    first = estimator(data.clone())
    assert_same(estimator(first.clone()), first)
    for key in (VALUE, ("next", *VALUE)):
        first[key] = first[key] + 1
    second = estimator(first.clone())
    for key in (VALUE, ("next", *VALUE)):
        torch.testing.assert_close(second[key], first[key] if skip_existing else first[key] - 1)


@BOTH
@pytest.mark.parametrize("team", [True, False], ids=["team", "each"])
def test_averaged_advantages_are_standardised_for_each_agent(kind, team):
    data = make_data(team=team)
    raw = make(kind)(data.clone())["advantage"]
    expected = (raw - raw.mean((0, 1))) / raw.std((0, 1))
    torch.testing.assert_close(make(kind, average_gae=True)(data)["advantage"], expected)


@pytest.mark.parametrize("options", [{}, {"shifted": True}, {"group_key": "task"}], ids=str)
def test_averaged_advantages_without_agents_are_those_of_gae(options):
    """Each time step was standardised by itself: what is the agent dimension elsewhere is time here."""
    critic = TensorDictModule(nn.Linear(OBSERVED, 1).double(), ["observation"], ["state_value"])
    data, results = make_data(batch=(4, 5)), []
    for part in (data, data["next"]):
        part["observation"] = part.pop(OBSERVATION)[..., 0, :]
    data["task"] = torch.tensor([0, 0, 1, 1]).unsqueeze(-1).expand(4, 5).clone()
    for kind in (AgentGAE, GAE):
        estimator = kind(gamma=0.9, lmbda=0.8, value_network=critic, average_gae=True, **options)
        results.append(estimator(data.clone())["advantage"])
    torch.testing.assert_close(*results)


@BOTH
@pytest.mark.parametrize("groups", [True, False])
def test_masked_steps_do_not_count_in_the_average(kind, groups):
    data = make_data(batch=(4, 5))
    data["counts"] = torch.arange(5).expand(4, 5) < 3
    data["task"] = torch.tensor([0, 0, 1, 1]).unsqueeze(-1).expand(4, 5).clone()
    raw = make(kind, mask_key="counts")(data.clone())["advantage"][:, :3]
    batches = [raw[:2], raw[2:]] if groups else [raw]
    expected = [(part - part.mean((0, 1))) / part.std((0, 1), correction=int(groups)) for part in batches]
    keywords = {"group_key": "task"} if groups else {}
    actual = make(kind, mask_key="counts", average_gae=True, **keywords)(data)["advantage"][:, :3]
    torch.testing.assert_close(actual, torch.cat(expected))


@BOTH
def test_a_group_key_that_is_not_in_the_data_is_named(kind):
    estimator = make(kind, average_gae=True, group_key="task")
    assert "task" in estimator.in_keys
    with pytest.raises(KeyError, match="group_key: 'task' is not in the data"):
        estimator(make_data())


# ------------------------------------------------------------------ the same as TorchRL's estimators


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vectorized": True},
        {"vectorized": False},
        {"average_gae": True},
        {"auto_reset_env": True},
        {"differentiable": True},
        {"shifted": True},
        {"value_chunk_size": 1},
        {"deactivate_vmap": True},
        {"agent_dim": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("team", [True, False], ids=["team", "each"])
def test_advantages_are_those_of_torchrl(kind, options, team):
    data = make_data(team=team)
    data["next", "truncated"] = data["next", "done"] & ~data["next", "terminated"]
    ours = make(kind, **options)
    if kind is CentralCriticValueEstimator:
        ours.pool(data)
    theirs = make(MultiAgentGAE, value_network=ours.value_network, **options)
    expected = theirs(data.clone())
    actual = ours(data)
    for key in (*RESULTS, *(["shifted_valid"] if "shifted" in options else [])):
        torch.testing.assert_close(actual[key], expected[key])


@BOTH
def test_advantages_of_each_agent_are_those_of_gae(kind):
    data, ours = make_data(team=False), make(kind, vectorized=False)
    expected = ours(data.clone())
    theirs = GAE(gamma=0.9, lmbda=0.8, value_network=None, vectorized=False)
    theirs.set_keys(value=VALUE)
    torch.testing.assert_close(theirs(expected.select(VALUE, "next"))["advantage"], expected["advantage"])


@BOTH
def test_steps_of_several_transitions_are_discounted_as_in_torchrl(kind):
    data = make_data(team=False)
    data["steps_to_next_obs"] = torch.randint(1, 4, (*BATCH, AGENTS, 1))
    ours = make(kind, vectorized=False)
    if kind is CentralCriticValueEstimator:
        ours.pool(data)
    theirs = make(MultiAgentGAE, value_network=ours.value_network, vectorized=False)
    expected = theirs(data.clone())["advantage"]
    torch.testing.assert_close(ours(data.clone())["advantage"], expected)
    assert (ours(data.exclude("steps_to_next_obs"))["advantage"] != expected).any()


# ------------------------------------------------------------------ keys


@BOTH
@pytest.mark.parametrize("new", ["other", ("some", "other")], ids=["flat", "nested"])
@pytest.mark.parametrize("name", ["advantage", "value_target", "reward", "done", "terminated"])
def test_each_key_may_have_another_name(kind, name, new):
    data = make_data()
    expected = make(kind)(data.clone())
    if name in ("reward", "done", "terminated"):
        data.rename_key_(("next", name), ("next", *path(new)))
    estimator = make(kind, keys={name: new})
    actual = estimator(data)
    assert getattr(estimator.tensor_keys, name) == new
    for key in ("advantage", "value_target"):
        torch.testing.assert_close(actual[getattr(estimator.tensor_keys, key)], expected[key])
    if name in ("advantage", "value_target"):
        assert new in estimator.out_keys
        assert name not in actual.keys()


@BOTH
def test_the_accepted_keys_are_those_of_torchrl(kind):
    estimator = make(kind)
    assert estimator.default_keys() == ValueEstimatorBase.default_keys()
    for name in ("steps_to_next_obs", "sample_log_prob"):
        estimator.set_keys(**{name: ("a", "b")})
        assert getattr(estimator.tensor_keys, name) == ("a", "b")
    with pytest.raises(KeyError, match="no_such_key is not an accepted"):
        estimator.set_keys(no_such_key="a")
    with pytest.raises(KeyError, match="not found in value network out_keys"):
        estimator.set_keys(value="a")
    with pytest.raises(ValueError, match="cannot be None"):
        estimator.set_keys(reward=None)


@BOTH
@pytest.mark.parametrize("options", [{}, {"shifted": True}, {"team_reward": "mean"}, {"mask_key": "mask"}], ids=str)
def test_nothing_is_written_but_what_is_announced(kind, options):
    data = make_data(team="team_reward" not in options)
    data["mask"] = torch.tensor([[True, True, False]] * 2)
    data["next", OBSERVATION][0, 1] = torch.nan
    copy = data.clone()
    estimator = make(kind, **options)
    estimator(data)
    written = {"advantage", "value_target", VALUE, ("next", *VALUE)}
    written |= {CENTRAL, ("next", *CENTRAL)} if kind is CentralCriticValueEstimator else set()
    written |= {"shifted_valid"} if "shifted" in options else set()
    assert set(data.keys(True, True)) - set(copy.keys(True, True)) == written
    assert set(estimator.out_keys) <= written
    for key in copy.keys(True, True):
        assert torch.equal(torch.nan_to_num(data[key], 7.0), torch.nan_to_num(copy[key], 7.0))


@BOTH
def test_the_in_keys_are_enough(kind):
    estimator, data = make(kind), make_data()
    data["unread"] = torch.zeros(BATCH)
    assert_same(estimator(data.select(*estimator.in_keys)), estimator(data.clone()))


def test_tensors_may_be_given_by_name():
    """For data without agents; TorchRL's dispatch takes an agent dimension for one of the batch."""
    critic = TensorDictModule(nn.Linear(OBSERVED, 1).double(), ["observation"], ["state_value"])
    estimator = AgentGAE(gamma=0.9, lmbda=0.8, value_network=critic)
    tensors = {
        "observation": torch.randn(*BATCH, OBSERVED, dtype=torch.float64),
        "next_observation": torch.randn(*BATCH, OBSERVED, dtype=torch.float64),
        "next_reward": torch.randn(*BATCH, 1, dtype=torch.float64),
        "next_done": torch.rand(*BATCH, 1) < 0.3,
        "next_terminated": torch.zeros(*BATCH, 1, dtype=torch.bool),
    }
    advantage, target = estimator(**tensors)
    data = TensorDict({tuple(key.split("_")) if "_" in key else key: value for key, value in tensors.items()}, BATCH)
    estimator(data)
    torch.testing.assert_close(advantage, data["advantage"])
    torch.testing.assert_close(target, data["value_target"])


# ------------------------------------------------------------------ a module


@BOTH
def test_a_copy_and_a_state_dict_say_the_same(kind):
    data, estimator = make_data(), make(kind)
    expected = estimator(data.clone())
    twin = deepcopy(estimator)
    with torch.no_grad():
        for parameter in estimator.value_network.parameters():
            parameter += 1
    assert_same(twin(data.clone()), expected)
    assert list(estimator.state_dict()) == ["gamma", "lmbda"]  # the critic's parameters are the loss's
    assert not list(estimator.parameters())
    estimator.gamma.fill_(0.1)
    estimator.load_state_dict(twin.state_dict())
    assert estimator.gamma == twin.gamma


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_type_of_the_data(kind, dtype):
    data, estimator = make_data(), make(kind)
    expected = estimator(data.clone())
    estimator.value_network.to(dtype)
    actual = estimator(data.apply(lambda value: value.to(dtype) if value.is_floating_point() else value))
    for key in RESULTS:
        assert actual[key].dtype == dtype
        torch.testing.assert_close(actual[key].double(), expected[key], rtol=1e-4, atol=1e-5)


@BOTH
def test_the_discount_may_be_a_tensor_on_a_device(kind):
    critic = deepcopy(critics()[CENTRAL if kind is CentralCriticValueEstimator else OBSERVATION])
    keywords = (
        {"observation_keys": [OBSERVATION], "central_key": CENTRAL} if kind is CentralCriticValueEstimator else {}
    )
    gamma = torch.tensor(0.9)
    estimator = kind(gamma=gamma, lmbda=0.8, value_network=critic, device="cpu", **keywords)
    estimator.set_keys(value=VALUE)
    data = make_data()
    assert_same(estimator(data.clone()), make(kind, value_network=critic)(data.clone()))


@BOTH
@pytest.mark.parametrize("form", ["class", "instance"])
def test_a_loss_takes_either(kind, form):
    data, reference = make_data(), make(kind, keys={"advantage": ("agents", "a"), "reward": "reward"})
    expected = reference(data.clone())
    critic = reference.value_network
    loss = TRPOLoss(make_actor(n_agents=AGENTS), critic)
    loss.set_keys(value=VALUE, advantage=("agents", "a"))
    keywords = (
        {"observation_keys": [OBSERVATION], "central_key": CENTRAL} if kind is CentralCriticValueEstimator else {}
    )
    if form == "class":
        loss.make_value_estimator(kind, gamma=0.9, lmbda=0.8, value_network=critic, **keywords)
    else:
        loss.make_value_estimator(reference)
    params, target = loss.critic_network_params, loss.target_critic_network_params
    actual = loss.value_estimator(data, params=params, target_params=target)
    torch.testing.assert_close(actual["agents", "a"], expected["agents", "a"])
    torch.testing.assert_close(actual["value_target"], expected["value_target"])


# ------------------------------------------------------------------ recurrent critics


def make_recurrent(**keywords):
    critic = GRUModule(OBSERVED, 1, in_keys=["observation", "state", "is_init"], out_keys=["value", ("next", "state")])
    estimator = AgentGAE(gamma=0.9, lmbda=0.8, value_network=critic, **keywords)
    estimator.set_keys(value="value")
    data = TensorDict({"observation": torch.randn(*BATCH, OBSERVED)}, BATCH)
    data["is_init"] = torch.tensor([[True, False, False]] * 2).unsqueeze(-1)
    done = torch.zeros(*BATCH, 1, dtype=torch.bool)
    observation = torch.randn(*BATCH, OBSERVED)
    data["next"] = TensorDict({"observation": observation, "reward": torch.randn(*BATCH, 1), "done": done}, BATCH)
    return estimator, data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_chunk_size": 2, "value_chunk_dim": 1}, "value_chunk_dim: 1.*recurrent"),
        ({"num_chunks": 2, "value_chunk_dim": -1}, "value_chunk_dim: -1.*recurrent"),
        ({"time_dim": 0}, "time_dim: 0.*recurrent"),
    ],
    ids=str,
)
def test_what_would_cut_a_recurrent_critics_sequences_is_refused(options, message):
    """Each was computed, and wrong: states were carried along the last dimension of each chunk."""
    estimator, data = make_recurrent(**options)
    with pytest.raises(ValueError, match=message):
        estimator(data)


@pytest.mark.parametrize("options", [{"value_chunk_size": 1}, {"num_chunks": 2}], ids=str)
def test_a_recurrent_critic_may_be_called_by_environment(options):
    estimator, data = make_recurrent()
    chunked, _ = make_recurrent(**options)
    chunked.value_network.load_state_dict(estimator.value_network.state_dict())
    expected = estimator(data.clone())
    actual = chunked(data.clone())
    for key in ("advantage", "value", ("next", "value")):
        torch.testing.assert_close(actual[key], expected[key])
