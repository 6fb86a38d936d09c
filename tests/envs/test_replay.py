"""Environments that cannot be saved are restored by acting out their episode again, to the bit."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from pettingzoo import ParallelEnv as PettingZooParallelEnv
from torch.utils._pytree import tree_leaves

from torchrl_trpo.envs import make_env
from torchrl_trpo.envs.replay import ReplayedGymEnv, ReplayedPettingZooWrapper

pytestmark = pytest.mark.filterwarnings("ignore:PettingZoo in TorchRL is tested using version")


class Walk(gymnasium.Env):
    """A random walk, moved by two discrete actions; ``unseeded``: its noise is of NumPy's global generator."""

    action_space = MultiDiscrete([3, 2])
    observation_space = Box(-np.inf, np.inf, (2,), np.float64)

    def __init__(self, unseeded=False, **unused):
        self.unseeded = unseeded

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=2)
        return self.position, {}

    def step(self, action):
        noise = np.random.normal(size=2) if self.unseeded else self.np_random.normal(size=2)  # noqa: NPY002
        self.position = self.position + action + noise
        return self.position, 1.0, False, False, {}


class Dying(PettingZooParallelEnv):
    """Two agents, which may not do what they did last; the second dies in the third step."""

    metadata = {"name": "dying"}  # noqa: RUF012
    possible_agents = ["agent_0", "agent_1"]  # noqa: RUF012
    render_mode = None

    def observation_space(self, agent):
        return gymnasium.spaces.Dict({"observation": Box(-9, 9, (3,)), "action_mask": Box(0, 1, (3,), np.int8)})

    def action_space(self, agent):
        return Discrete(3)

    def _observe(self):
        draws = self.random.normal(size=3).astype(np.float32)
        allowed = {agent: (np.arange(3) != self.last[agent]).astype(np.int8) for agent in self.agents}
        return {agent: {"observation": draws, "action_mask": allowed[agent]} for agent in self.agents}

    def reset(self, seed=None, options=None):
        self.random = np.random.default_rng(seed)
        self.agents, self.steps, self.last = list(self.possible_agents), 0, dict.fromkeys(self.possible_agents)
        return self._observe(), {agent: {} for agent in self.agents}

    def step(self, actions):
        for agent in self.agents:
            assert actions[agent] != self.last[agent], "an action that is not allowed"
            self.last[agent] = int(actions[agent])
        self.steps += 1
        if self.steps == 3:
            self.agents = ["agent_0"]
        no = dict.fromkeys(self.agents, False)
        return self._observe(), dict.fromkeys(self.agents, 1.0), no, no, {agent: {} for agent in self.agents}


def make_walk(unseeded=False):
    if "Walk-v0" not in gymnasium.registry:
        gymnasium.register("Walk-v0", Walk)
    return ReplayedGymEnv("Walk-v0", unseeded=unseeded, categorical_action_encoding=True)


def make_dying():
    groups = {"agents": Dying.possible_agents}
    return ReplayedPettingZooWrapper(Dying(), group_map=groups, use_mask=True, done_on_any=False)


def build(name, **settings):
    defaults = {"num_envs": 2, "max_steps": 7, "kwargs": {}, "seed": 0, "device": torch.device("cpu")}
    return make_env(name, **{**defaults, **settings})


def go_on(env, data, steps, seed):
    """Random steps, through resets: what was done, and where it goes on."""
    torch.manual_seed(seed)
    done = []
    for _ in range(steps):
        env.rand_action(data)
        if ("agents", "action_mask") in data.keys(True):
            allowed = data["agents", "action_mask"]
            data["agents", "action"] = (torch.rand(allowed.shape) * allowed).argmax(-1)
        step, data = env.step_and_maybe_reset(data)
        done.append(step.clone())
    return torch.stack(done, 1), data.clone()


def continue_elsewhere(name, settings, file, data, steps):
    """Restores an environment from a file and goes on."""
    env = build(name, **settings)
    env.base_env.load_state_dict(torch.load(file, weights_only=True))
    done, _ = go_on(env, data, steps, seed=1)
    env.close(raise_if_closed=False)
    return done


@pytest.fixture(scope="module")
def elsewhere():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        yield lambda *given: process.submit(continue_elsewhere, *given).result()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gym/CartPole-v1", {}),
        ("gym/Pendulum-v1", {}),
        ("gym/Acrobot-v1", {"kwargs": {"frame_skip": 2}}),
        ("pettingzoo/simple_spread_v3", {"continuous_actions": True, "state": True}),
        ("pettingzoo/simple_world_comm_v3", {"continuous_actions": False}),
        ("mamujoco/HalfCheetah", {"kwargs": {"agent_conf": "2x3"}, "state": True}),
        ("mamujoco/Walker2d", {"kwargs": {"agent_conf": "2x3"}}),
        ("custom", {"factory": "tests.envs.test_replay.make_walk"}),
        ("custom", {"factory": "tests.envs.test_replay.make_dying"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("factory", ""),
)
def test_goes_on_in_a_new_process(name, settings, elsewhere, tmp_path):
    """Saved in the midst of an episode, after others; what follows is the same bit for bit, through the next resets."""
    env = build(name, **settings)
    _, data = go_on(env, env.reset(), 12, seed=0)
    torch.save(env.base_env.state_dict(), tmp_path / "state.pt")
    there = elsewhere(name, {**settings, "seed": 7}, tmp_path / "state.pt", data, 20)
    here, _ = go_on(env, data, 20, seed=1)
    env.close(raise_if_closed=False)
    assert here["next", "done"].any(), "the next episode is part of it"
    _assert_equal(here, there)


def test_goes_on_with_a_process_for_each(tmp_path):
    """ParallelEnv once left a sign of a step done behind, and the step after gave what the buffer held."""
    serial, parallel = (build("custom", factory="tests.envs.test_replay.make_walk", parallel=p) for p in (False, True))
    _, data = go_on(serial, serial.reset(), 12, seed=0)
    go_on(parallel, parallel.reset(), 3, seed=5)
    saved = serial.base_env.state_dict()
    parallel.base_env.load_state_dict(saved)
    _assert_state_equal(saved, parallel.base_env.state_dict())
    here, data_here = go_on(serial, data, 20, seed=1)
    there, data_there = go_on(parallel, data, 20, seed=1)
    _assert_equal(here, there)
    serial.base_env.load_state_dict(parallel.base_env.state_dict())
    _assert_equal(go_on(serial, data_here, 9, seed=2)[0], go_on(parallel, data_there, 9, seed=2)[0])
    parallel.close()


def test_before_the_first_episode():
    first, second = make_walk(), make_walk()
    first.set_seed(3)
    second.load_state_dict(first.state_dict())
    assert first.state_dict()["_extra_state"]["seed"] is None
    for _ in range(2):
        assert torch.equal(first.reset()["observation"], second.reset()["observation"])


def test_the_state_is_small():
    """The seed and the actions, whatever the episode was."""
    env = build("mamujoco/HalfCheetah", kwargs={"agent_conf": "2x3"}, num_envs=1, max_steps=50)
    go_on(env, env.reset(), 30, seed=0)
    state = env.base_env.state_dict()["worker0"]["_extra_state"]
    assert [actions.shape for actions in state["actions"]] == [(30, 2, 3)]
    assert isinstance(state["seed"], int)
    env.close(raise_if_closed=False)


@pytest.mark.parametrize(
    "parallel",
    # TorchRL waits for a worker that died, twice ten seconds
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["serial", "parallel"],
)
def test_what_does_not_follow_from_its_seed_is_said(parallel, quick_processes):
    others = multiprocessing.active_children()
    env = build("custom", factory="tests.envs.test_replay.make_walk", kwargs={"unseeded": True}, parallel=parallel)
    go_on(env, env.reset(), 4, seed=0)
    state = env.base_env.state_dict()
    says = r"worker 0 \(exit code 1\)" if parallel else "the replayed episode differs: 4 steps after seed"
    with pytest.raises(RuntimeError, match=says):  # TorchRL's worker prints its own error
        env.base_env.load_state_dict(state)
    env.close(raise_if_closed=False)
    assert set(multiprocessing.active_children()) <= set(others)


def _assert_equal(here, there):
    assert set(here.keys(True, True)) == set(there.keys(True, True))
    for key in here.keys(True, True):
        assert torch.equal(here[key], there[key]), key


def _assert_state_equal(here, there):
    for mine, other in zip(tree_leaves(dict(here)), tree_leaves(dict(there)), strict=True):
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def test_actions_of_another_encoding_are_not_replayed():
    """An index was replayed as a one-hot action: always the first one."""
    index = ReplayedGymEnv("CartPole-v1", categorical_action_encoding=True, device="cpu")
    index.rollout(3)
    with pytest.raises(RuntimeError, match=r"cannot be replayed: its 'action' has shape \[\], .* \[2\]\. It was saved"):
        ReplayedGymEnv("CartPole-v1", device="cpu").load_state_dict(index.state_dict())
