"""Environments by name: groups, time limits, states, seeds, normalisation, and a user's own."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from gymnasium.spaces import Dict as DictSpace
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torchrl.data import MultiCategorical as MultiCategoricalSpec
from torchrl.data import OneHot
from torchrl.envs import GymEnv, ParallelEnv, SerialEnv, Transform, VmasEnv
from torchrl.envs.libs.gym import _gym_to_torchrl_spec_transform
from torchrl.modules import IndependentNormal

from tests.environments import HARL_BREAKS
from torchrl_trpo.distributions import BoundedTanhNormal, MultiCategorical
from torchrl_trpo.envs import make_env
from torchrl_trpo.envs.normalization import observation_norm
from torchrl_trpo.envs.simulators import group_agents
from torchrl_trpo.envs.tasks import known_tasks
from torchrl_trpo.errors import SettingError
from torchrl_trpo.keys import agent_groups, group_keys
from torchrl_trpo.networks import make_actor, make_central_critic
from torchrl_trpo.networks.builders import _distribution
from torchrl_trpo.objectives import CentralCriticValueEstimator
from torchrl_trpo.training.episodes import episode_statistics, evaluate
from torchrl_trpo.training.film import film_episodes
from torchrl_trpo.training.policy import on_raw_observations

MPE = [
    "simple_v3",
    "simple_adversary_v3",
    "simple_crypto_v3",
    "simple_push_v3",
    "simple_reference_v3",
    "simple_speaker_listener_v4",
    "simple_spread_v3",
    "simple_tag_v3",
    "simple_world_comm_v3",
]

ROBOTS = {"mamujoco/HalfCheetah": {"agent_conf": "2x3"}, "mamujoco/Reacher": {"agent_conf": "2x1"}}

SCENARIOS = ["balance", "navigation", "transport", "give_way", "sampling", "discovery"]
SCENARIOS += ["simple_tag", "simple_adversary", "simple_push", "simple_crypto"]


def build(name, **settings):
    defaults = {"num_envs": 3, "max_steps": 6, "kwargs": {}, "seed": 0, "device": torch.device("cpu")}
    return make_env(name, **{**defaults, **settings})


# ------------------------------------------------------------------ groups


@pytest.mark.parametrize(
    ("spaces", "groups"),
    [
        ({"agent_0": 1, "agent_1": 1}, {"agents": ["agent_0", "agent_1"]}),
        ({"a0": 1, "a1": 1}, {"agents": ["a0", "a1"]}),
        ({"red_0": 1, "red_1": 1, "blue_0": 1}, {"red": ["red_0", "red_1"], "blue": ["blue_0"]}),
        ({"car_0": 1, "car_1": 2, "car_2": 1}, {"car_0": ["car_0", "car_2"], "car_1": ["car_1"]}),
        ({"speaker": 1, "listener": 2}, {"speaker": ["speaker"], "listener": ["listener"]}),
    ],
)
def test_one_team_and_one_kind_are_a_group(spaces, groups):
    assert group_agents(spaces) == groups


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("vmas/balance", {"agents": 3}),
        ("vmas/simple_tag", {"adversary": 3, "agent": 1}),
        ("vmas/simple_adversary", {"adversary": 1, "agent": 2}),
        ("vmas/simple_push", {"adversary": 1, "agent": 1}),
        ("vmas/simple_crypto", {"eve": 1, "bob": 1, "alice": 1}),
        ("pettingzoo/simple_spread_v3", {"agents": 3}),
        ("pettingzoo/simple_world_comm_v3", {"leadadversary": 1, "adversary": 3, "agent": 2}),
        ("mamujoco/HalfCheetah", {"agents": 2}),
        ("gym/CartPole-v1", {None: 1}),
    ],
)
def test_the_groups_of(name, groups):
    env = build(name, kwargs=ROBOTS.get(name, {}))
    assert agent_groups(env) == groups
    env.close(raise_if_closed=False)


@pytest.mark.parametrize("task", MPE)
@pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "discrete"])
def test_the_nine_particle_tasks(task, continuous):
    env = build(f"pettingzoo/{task}", num_envs=2, continuous_actions=continuous)
    groups = group_keys(env)
    data = env.rollout(7, break_when_any_done=False)
    statistics = episode_statistics(data, groups)
    rewards = torch.cat([data[("next", *keys.reward)][:, :6].sum(1) for keys in groups], 1)
    assert statistics["episode_return"] == pytest.approx(float(rewards.mean()), abs=1e-4)
    if len(groups) > 1:
        name = groups[-1].group
        own = data[("next", *groups[-1].reward)][:, :6].sum(1).mean()
        assert statistics[f"episode_return_{name}"] == pytest.approx(float(own), abs=1e-4)
    env.close(raise_if_closed=False)


def test_rewards_may_be_whole_numbers():
    """The first finished episode was an error of torch."""
    env = build("vmas/balance")
    data, key = env.rollout(6), ("next", "agents", "episode_reward")
    data[key] = torch.full_like(data[key], 3, dtype=torch.int64)
    assert episode_statistics(data, group_keys(env))["episode_return"] == 3


@pytest.mark.filterwarnings("ignore:.*are reset one by one")
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "discrete"])
def test_scenarios_of_vmas(scenario, continuous):
    env = build(f"vmas/{scenario}", continuous_actions=continuous)
    groups = group_keys(env)
    policy = TensorDictSequential(*[make_actor(env, keys, share_params=False) for keys in groups])
    data = env.rollout(7, policy, break_when_any_done=False)
    for keys in groups:
        assert data[keys.log_prob].isfinite().all()
        assert data[keys.observation].shape[:3] == (3, 7, keys.n_agents)
        assert data["next", keys.group, "episode_reward"].isfinite().all()


# ------------------------------------------------------------------ time, state, seeds


@pytest.mark.parametrize(
    "name",
    ["vmas/navigation", "pettingzoo/simple_tag_v3", *ROBOTS, "gym/CartPole-v1", "gym/Pendulum-v1"],
)
def test_time_limits_truncate(name):
    """VmasEnv reports terminated = done also when max_steps ran out; ours tells them apart, everywhere."""
    n_steps = 60 if "Reacher" in name else 5  # more than its own limit, which ended episodes earlier
    env = build(name, max_steps=n_steps, kwargs=ROBOTS.get(name, {}))
    last = env.rollout(n_steps)[:, -1]["next"]
    for keys in group_keys(env):
        assert last[keys.done].all()
        assert not last[keys.terminated].any()
    assert last["truncated"].all()
    env.close(raise_if_closed=False)


def test_the_state_of_the_environment():
    env = build("pettingzoo/simple_spread_v3", state=True)
    assert env.rollout(3)["state"].shape == (3, 3, 54)
    with pytest.raises(ValueError, match=r"state=True: 'vmas/balance' has no global state\. Legal: state=False"):
        build("vmas/balance", state=True)
    env.close(raise_if_closed=False)


@pytest.mark.parametrize("name", ["pettingzoo/simple_spread_v3", "gym/Pendulum-v1"])
def test_environments_of_a_batch_differ_and_seeds_repeat(name):
    first, again, other = (build(name, seed=seed).reset() for seed in (3, 3, 4))
    key = ("agents", "observation") if "pettingzoo" in name else "observation"
    assert not torch.equal(first[key][0], first[key][1])
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])


@pytest.mark.usefixtures("quick_processes")
def test_a_process_for_each():
    env = build("gym/Pendulum-v1", num_envs=2, parallel=True)
    assert isinstance(env.base_env, ParallelEnv)
    serial = build("gym/Pendulum-v1", num_envs=2)
    assert isinstance(serial.base_env, SerialEnv)
    assert torch.equal(env.reset()["observation"], serial.reset()["observation"])
    env.close(raise_if_closed=False)


def test_normalised_observations():
    env = build("gym/Pendulum-v1", num_envs=10, max_steps=50, normalize_observations=True)
    data = env.rollout(150, break_when_any_done=False)
    late = data["observation"][:, 100:]
    assert late.mean((0, 1)).abs().max() < 0.6
    assert (late.std((0, 1)) - 1).abs().max() < 0.5
    (keys,) = group_keys(env)
    norm = observation_norm(env)
    norm.freeze()
    before = norm.loc["observation"].clone()
    evaluate(env, make_actor(env, keys, share_params=True), max_steps=20)
    assert torch.equal(norm.loc["observation"], before), "an evaluation does not move the statistics"


@pytest.mark.parametrize("seed", range(4))
def test_what_does_not_vary_is_normalised_to_something_finite(seed):
    """The velocities at the first reset, where the variance of TorchRL's VecNormV2 is negative by rounding.

    What a policy divides by that is taken out of the environment was NaN for longer: in load_policy, and in films.
    """
    env = build("vmas/balance", num_envs=16, seed=seed, normalize_observations=True)
    raw = build("vmas/balance", num_envs=16, seed=seed).reset()
    assert env.reset()["agents", "observation"].isfinite().all()
    policy = on_raw_observations(env, make_actor(env, *group_keys(env), share_params=True))
    assert policy(raw)["agents", "action"].isfinite().all()
    assert env.rollout(3)["next", "agents", "observation"].isfinite().all()


def test_what_has_not_varied_keeps_its_scale():
    """The first visit to a state of CliffWalking was an observation of 10 000, for a loaded policy and in films."""
    env = build("gym/CliffWalking-v1", num_envs=2, normalize_observations=True)
    env.rollout(3)
    norm = observation_norm(env)
    unseen = norm.loc["observation"] == 0
    states = TensorDict({"observation": torch.eye(48)}, [48])
    normalised = norm.to_observation_norm()(states)["observation"]
    assert torch.equal(normalised[:, unseen], torch.eye(48)[:, unseen])
    assert unseen.sum() > 40


class Seen(Transform):
    """Keeps what the transforms before it give of the agents."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def _step(self, tensordict, next_tensordict):
        self.steps.append(next_tensordict["agents"].clone())
        return next_tensordict

    def _reset(self, tensordict, tensordict_reset):
        return self._step(tensordict, tensordict_reset)


def test_absent_agents_are_in_no_statistics():
    """The zeros that dead agents observe were averaged with what the others see."""
    env = build("custom", factory="tests.environments.make_copy", kwargs={"death": 0.4}, normalize_observations=True)
    norm = observation_norm(env)
    env.transform.insert(-1, seen := Seen())
    env.rollout(5)
    observations, counts = (torch.stack([step[name] for step in seen.steps]) for name in ("observation", "mask"))
    for agent in range(3):
        own = observations[:, :, agent][counts[:, :, agent]]
        torch.testing.assert_close(norm.loc["agents", "observation"][agent], own.mean(0))
        torch.testing.assert_close(norm.scale["agents", "observation"][agent], own.std(0, correction=0))
    assert not counts.all()


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("parallel", [False, True])
def test_each_observation_counts_once_in_the_statistics(offset, parallel):
    """Where an episode began, those of the others counted again; and with an offset the variance was rounded away."""
    settings = {"factory": "tests.environments.make_far", "kwargs": {"offset": offset}, "max_steps": 50}
    env = build("custom", **settings, parallel=parallel, normalize_observations=True)
    raw = build("custom", **settings)
    torch.manual_seed(0)
    env.rollout(40, break_when_any_done=False)
    torch.manual_seed(0)
    data = raw.rollout(40, break_when_any_done=False)
    began = data["is_init"].squeeze(-1)
    assert 3 < began.sum() < 20
    seen = torch.cat([data["observation"][began], data["next", "observation"].flatten(0, 1)]).double()
    norm = observation_norm(env)
    torch.testing.assert_close(norm.loc["observation"], seen.mean(0).float())
    torch.testing.assert_close(norm.scale["observation"], seen.std(0, correction=0).float())
    for each in (env, raw):
        each.close(raise_if_closed=False)


def test_statistics_that_a_policy_does_not_take_along_are_told(caplog):
    """Evaluations of a run began new ones: 101 in place of 284 on CartPole."""
    build("custom", factory="tests.environments.make_far", kwargs={"learns": True})
    assert "the factory's VecNormV2 has statistics of its own" in caplog.text


def test_one_nan_does_not_reach_the_statistics_of_observations(monkeypatch):
    env = build("gym/Pendulum-v1", normalize_observations=True)
    env.reset()
    broken = env.base_env._envs[1]

    def reset(*args, original=broken._reset, **kwargs):
        data = original(*args, **kwargs)
        return data.set("observation", data["observation"] * torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(broken, "_reset", reset)
        assert env.reset()["observation"].isnan().all(-1).tolist() == [False, True, False]
    assert env.rollout(3)["observation"].isfinite().all()


# ------------------------------------------------------------------ a team that breaks HARL


def test_agents_that_differ_are_not_padded():
    """Three agents with 17/18/19 observations and 5/6/7 actions: HARL's buffers cannot hold them."""
    env = build("custom", factory="tests.environments.make_different")
    groups = group_keys(env)
    assert [keys.group for keys in groups] == list(HARL_BREAKS)
    policy = TensorDictSequential(*[make_actor(env, keys, share_params=False) for keys in groups])
    data = env.rollout(4, policy)
    for keys, n_obs, n_actions in zip(groups, (17, 18, 19), (5, 6, 7), strict=True):
        assert data[keys.observation].shape == (3, 4, 1, n_obs)
        assert data[keys.group, "logits"].shape == (3, 4, 1, n_actions)
        critic = make_central_critic(env, keys, others_actions=True)
        estimator = CentralCriticValueEstimator(
            gamma=0.9,
            lmbda=0.8,
            value_network=critic,
            observation_keys=[other.observation for other in groups],
            action_keys=[other.action for other in groups],
            actor_network=policy,
            central_key=keys.central,
        )
        estimator.set_keys(value=keys.value, reward=keys.reward, advantage=keys.advantage)
        estimator(data)
        others = sum((5, 6, 7)) - n_actions
        assert data[keys.central].shape == (3, 4, 1, 17 + 18 + 19 + others), "the others' actions are one-hot"
        assert (data[keys.central][..., -others:].sum(-1) == 2).all()
        assert data[keys.advantage].shape == (3, 4, 1, 1)


# ------------------------------------------------------------------ where entries are


@pytest.mark.filterwarnings("ignore:The old environment creation API", "ignore:PettingZoo in TorchRL is tested")
@pytest.mark.parametrize(
    ("factory", "case", "observation", "action_mask"),
    [
        ("make_specified", "nested", ("agents", "observation", "own"), ("agents", "observation", "action_mask")),
        ("make_specified", "integers", ("agents", "observation"), None),
        ("make_specified", "flags", ("agents", "observation"), None),
        (
            "make_tictactoe",
            None,
            ("player_1", "observation", "observation"),
            ("player_1", "action_mask"),
        ),
    ],
)
def test_observations_that_lie_deeper_or_are_no_floats(factory, case, observation, action_mask):
    """PettingZoo's and VMAS's mappings ended in an IndexError, and integers in torch: mat1 and mat2, same dtype."""
    env = build("custom", factory=f"tests.environments.{factory}", kwargs={} if case is None else {"name": case})
    groups = group_keys(env)
    assert (groups[0].observation, groups[0].action_mask) == (observation, action_mask)
    policy = TensorDictSequential(*[make_actor(env, keys, share_params=False) for keys in groups])
    data = env.rollout(4, policy, break_when_any_done=False)
    assert data[observation].dtype == torch.float32
    if action_mask is not None:
        counts = data[groups[0].mask] if groups[0].mask else torch.ones_like(data[groups[0].action], dtype=torch.bool)
        allowed = data[action_mask].gather(-1, data[groups[0].action].unsqueeze(-1)).squeeze(-1)
        assert allowed[counts].all()
    critic = make_central_critic(env, groups[0])
    assert critic.module.network[0].in_features == sum(data[keys.observation][0, 0].numel() for keys in groups)
    env.close(raise_if_closed=False)


OBSERVES = r"env: group 'agents' observes "


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "two observations",
            OBSERVES + r"\[\('agents', 'observation', 'pos'\), \('agents', 'obs.*'vel'\)\]\. .*CatTensors",
        ),
        (
            "another observation",
            OBSERVES + r"\[\('agents', 'obs'\)\]\. Legal: \('agents', 'observation'\), .*RenameTran",
        ),
        ("no observation", OBSERVES + r"\[\]\. Legal: "),
        ("an index", r"\('agents', 'observation'\) is Categorical of shape \(2,\)\. Legal: \(2, F\) or "),
        ("a matrix", r"no network for the observation .* of shape \(4, 7\)\. Legal: \(F,\), or pictures .*FlattenObs"),
        ("a tiny picture", r"of shape \(3, 6, 7\)\. Legal: .* of at least 7 by 7"),
        ("other agents", r"is UnboundedContinuous of shape \(3, 5\)\. Legal: \(2, F\) or "),
        ("agents at the root", r"its actions are \['p1', 'p2'\]\. Legal: 'action' of a single agent, or \(group, 'act"),
        ("no agent dimension", r"the action of group 'p1' has shape \(\)\. Legal: \[n_agents, "),
        ("another action", r"its actions are \[\('agents', 'move'\)\]\. Legal: "),
        ("two actions", r"its actions are \[\('agents', 'action'\), \('agents', 'say'\)\]\. Legal: .*one action each"),
        ("another reward", r"no \('agents', 'reward'\), and no 'reward' of the team, but \[\('agents', 'payoff'\)\]"),
        ("a flat reward", r"its \('agents', 'reward'\) has shape \(2,\)\. Legal: \(2, 1\)\."),
        ("ends of agents alone", r"its ends are \[\('agents', 'done'\), .*Legal: with a 'done' of the whole"),
        ("a wide mask", r"\('agents', 'action_mask'\) has shape \(2, 4\), .*Legal: \(2, 3\) for discrete actions"),
        ("a number", r"BoundedContinuous \(2,\) of (?s:.*)Legal: Categorical of shape \[2\]; .* of shape \[2, A\]\. "),
        ("a matrix of numbers", r"action space UnboundedContinuous \(2, 2, 2\) of (?s:.*)Legal: "),
        ("a column of choices", r"action space Categorical \(2, 1\) of .*Legal: "),
        (
            "other choices",
            r"action space MultiCategorical \(2, 2\) of .*Legal: .*MultiCategorical \(the same for all agents\)",
        ),
        ("a mask of numbers", r"its \('agents', 'mask'\) is torch.float32 of shape \(2,\)\. Legal: torch.bool"),
    ],
)
def test_entries_elsewhere_are_named(case, message):
    """They ended in a KeyError or IndexError of whatever read them first."""

    def make():
        env = build("custom", factory="tests.environments.make_specified", kwargs={"name": case})
        return make_actor(env, *group_keys(env), share_params=True)

    with pytest.raises(SettingError, match=message):
        make()


def test_agents_that_differ_are_no_group():
    with pytest.raises(SettingError, match=r"is Stacked of shape .*-1\)\. Legal: .*that differ are groups of"):
        build("custom", factory="tests.environments.make_one_group_of_all")


class Goal(gymnasium.Env):
    """Gymnasium's convention for goals, of which a policy would have read one entry."""

    observation_space = DictSpace({"observation": Box(-1, 1, (3,)), "desired_goal": Box(-1, 1, (2,))})
    action_space = Discrete(3)

    def __init__(self):
        pass


def test_observations_of_gymnasium_that_are_several():
    gymnasium.register("Goal-v0", Goal)
    with pytest.raises(SettingError, match=r"'gym/Goal-v0' observes \['desired_goal', 'observation'\]\. .*CatTensors"):
        build("gym/Goal-v0")
    gymnasium.registry.pop("Goal-v0")
    with pytest.raises(SettingError, match=r"'observation' is Stacked of shape \(3, -1\)\. Legal: \(F,\) or "):
        build("gym/Blackjack-v1")
    with pytest.raises(
        SettingError, match=r"factory='tests\.envs\.test_make\.Goal' gave a Goal\. Legal: a torchrl EnvBase"
    ):
        build("custom", factory="tests.envs.test_make.Goal")


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gm/CartPole-v1", {}, r"env: 'gm/CartPole-v1'\. Did you mean 'gym'"),
        ("gym/CartPol-v1", {}, r"env: 'gym/CartPol-v1'\. Did you mean 'gym/CartPole-v1'"),
        ("pettingzoo/simple_spred_v3", {}, r"Did you mean 'pettingzoo/simple_spread_v3'"),
        ("pettingzoo/simple_spread_v3", {"kwargs": {"n": 3}}, r"kwargs=\{'n': 3\} of 'pettingzoo/.*'N'"),
        ("mamujoco/Halfcheetah", {}, r"Did you mean 'mamujoco/HalfCheetah'"),
        ("custom", {"factory": "tests.environments.make_nothing"}, r"factory='tests.*make_nothing' cannot be imp"),
        ("custom", {"factory": None}, r"factory=None cannot be imported"),
        (
            "custom",
            {"factory": "tests.environments.make_copy", "kwargs": {"num_envs": 5}},
            r"batch size \(5,\).*\(3,\)",
        ),
        (
            "custom",
            {"factory": "tests.environments.make_mixed", "one_group": True},
            r"one_group=True: .*'drivers', 'call",
        ),
    ],
)
def test_mistakes_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build(name, **settings)


def test_tasks_are_listed_without_importing_a_simulator(monkeypatch):
    """Only Gymnasium is imported, and only when it is asked for: its plugins register tasks."""
    with monkeypatch.context() as patch:
        patch.setattr("torchrl_trpo.envs.tasks.importlib.import_module", None)
        vmas, particles = known_tasks("vmas"), known_tasks("pettingzoo")
        assert "HalfCheetah" in known_tasks("mamujoco")
    assert sorted(vmas) == sorted(VmasEnv.available_envs)
    assert set(MPE) <= set(particles)
    assert "CartPole-v1" in known_tasks("gym")


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setattr("torchrl_trpo.envs.tasks.importlib.util.find_spec", lambda _: None)
    assert known_tasks("pettingzoo") == []
    with pytest.raises(ImportError, match=r"not installed\. Use: pip install 'torchrl-trpo\[recipes,pettingzoo\]'"):
        build("pettingzoo/simple_spread_v3")


@pytest.mark.parametrize(
    ("space", "distribution"),
    [
        (Box(-2, 3, (2,)), BoundedTanhNormal),
        (Box(-np.inf, np.inf, (2,)), IndependentNormal),
        (Discrete(4), torch.distributions.Categorical),
        (MultiDiscrete([3, 2]), MultiCategorical),
        (Box(np.array([-np.inf, -1], np.float32), np.array([np.inf, 1], np.float32)), None),
        (Box(0, np.inf, (2,)), None),
        (MultiBinary(3), None),
        (Box(-1, 1, (2, 3)), None),
    ],
    ids=str,
)
def test_the_policy_fits_the_action_space(space, distribution):
    """Half-bounded boxes once gave NaN actions, and one-hot ones a Gaussian."""
    spec = _gym_to_torchrl_spec_transform(space, categorical_action_encoding=True)
    if distribution is None:
        with pytest.raises(ValueError, match=r"(?s)no policy for the action space.*Legal: "):
            _distribution(spec, (), masked=False)
    else:
        assert _distribution(spec, (), masked=False)[0] is distribution


class Dice(gymnasium.Env):
    observation_space = Box(-1, 1, (3,))
    action_space = MultiDiscrete([2, 3])

    def __init__(self):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.zeros(3, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize(
    ("task", "observation", "action"),
    [("CartPole-v1", (4,), OneHot), ("FrozenLake-v1", (16,), OneHot), ("Dice-v0", (3,), MultiCategoricalSpec)],
)
def test_spaces_of_gymnasium_are_those_of_torchrl(task, observation, action, monkeypatch):
    """A policy that wrote an index always moved left in ``GymEnv("CartPole-v1")``, and an index was no observation."""
    monkeypatch.setitem(gymnasium.registry, "Dice-v0", gymnasium.envs.registration.EnvSpec("Dice-v0", Dice))
    env = build(f"gym/{task}")
    (keys,) = group_keys(env)
    spec = env.full_action_spec_unbatched["action"]
    assert (env.full_observation_spec_unbatched["observation"].shape, type(spec)) == (observation, action)
    if action is OneHot:
        assert spec == GymEnv(task, device="cpu").action_spec
    data = env.rollout(5, make_actor(env, keys, share_params=True), break_when_any_done=False)
    assert all(spec.is_in(each) for each in data["action"].flatten(0, 1))
    env.close(raise_if_closed=False)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Discrete(3, start=-1), r"'gym/Dice-v0' has the space Discrete\(3, start=-1\)\. Legal: start=0"),
        (MultiDiscrete([2, 3], start=[0, 1]), r"has the space MultiDiscrete\(.*Legal: start=0"),
        (DictSpace({"x": Discrete(2), "y": Discrete(3)}), r"its actions are \['x', 'y'\]"),
    ],
)
def test_actions_of_gymnasium_that_cannot_be_taken(space, message, monkeypatch):
    """TorchRL does not look at the start: the task got actions 0, 1 and 2."""
    monkeypatch.setitem(gymnasium.registry, "Dice-v0", gymnasium.envs.registration.EnvSpec("Dice-v0", Dice))
    monkeypatch.setattr(Dice, "action_space", space)
    with pytest.raises(SettingError, match=message):
        build("gym/Dice-v0")


# ------------------------------------------------------------------ films


@pytest.mark.parametrize("name", ["pettingzoo/simple_tag_v3", "gym/CartPole-v1"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_films_of_other_simulators(name, tmp_path):
    env = build(name, num_envs=4, render=True)
    policy = TensorDictSequential(*[make_actor(env, keys, share_params=True) for keys in group_keys(env)])
    assert film_episodes(env, policy, tmp_path / "film.mp4", max_steps=6).stat().st_size > 1000
    env.close(raise_if_closed=False)


def test_what_cannot_be_drawn_is_said(tmp_path):
    env = build("custom", factory="tests.environments.make_copy")
    policy = make_actor(env, *group_keys(env), share_params=True)
    assert film_episodes(env, policy, tmp_path / "film.mp4", max_steps=6) is None
