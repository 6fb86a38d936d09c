"""Faults of environments are named: which one, when, which entry; and where numbers are not finite."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal

import pytest
import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, StepCounter, TransformedEnv

from torchrl_trpo.envs import make_env
from torchrl_trpo.envs.checks import EnvironmentFault, find_non_finite
from torchrl_trpo.keys import group_keys


class Faulty(EnvBase):
    """Two agents; a positive action makes it go wrong, in that step or in the reset after it."""

    def __init__(self, fault, batch=()):
        super().__init__(batch_size=batch)
        self.fault, self.broken = fault, False

        def group(name, size):
            return Composite(
                {"agents": Composite({name: Unbounded((*batch, 2, size))}, shape=(*batch, 2))}, shape=batch
            )

        self.observation_spec, self.action_spec = group("observation", 3), group("action", 1)
        self.reward_spec = group("reward", 1)
        self.done_spec = Composite({"done": Categorical(2, (*batch, 1), dtype=torch.bool)}, shape=batch)

    def _observe(self):
        observation = torch.zeros(*self.batch_size, 2, 3)
        if self.broken and self.fault == "shape":
            observation = observation[..., :1]
        if self.broken and self.fault == "dtype":
            observation = observation.double()
        return TensorDict({"agents": TensorDict({"observation": observation}, (*self.batch_size, 2))}, self.batch_size)

    def _reset(self, tensordict):
        if self.broken and self.fault == "reset":
            raise ValueError("no more episodes")
        return self._observe()

    def _step(self, tensordict):
        self.broken = bool((tensordict["agents", "action"] > 0).any())
        if self.broken and self.fault == "step":
            raise ZeroDivisionError("division by zero")
        if self.broken and self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        data = self._observe()
        if not (self.broken and self.fault == "no reward"):
            data["agents", "reward"] = torch.zeros(*self.batch_size, 2, 1)
        if self.broken and self.fault == "no group":
            del data["agents"]
        data["done"] = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        return data

    def _set_seed(self, seed):
        pass


def make_faulty(fault, num_envs, batched=False, transformed=False):
    env = Faulty(fault, (num_envs,) if batched else ())
    return TransformedEnv(env, StepCounter()) if transformed else env


def build(name, **settings):
    defaults = {"num_envs": 3, "max_steps": 4, "kwargs": {}, "seed": 0, "device": torch.device("cpu")}
    return make_env(name, **{**defaults, **settings})


def break_the_second(env):
    """Four steps, of which the third makes the second environment go wrong, and a reset."""
    data = env.reset()
    for step in range(1, 5):
        action = torch.zeros(env.batch_size[0], 2, 1)
        action[1] = float(step == 3)
        _, data = env.step_and_maybe_reset(data.set(("agents", "action"), action))


# ------------------------------------------------------------------ environments

FAULTS = {
    "step": (r"step 3: its step raised ZeroDivisionError: division by zero$", 3, None),
    "reset": (r"step 3: its reset raised ValueError: no more episodes$", 3, None),
    "shape": (r"step 3: its step gave float32 \[2, 1\] for .*its spec says float32 \[2, 3\]", 3, "observation"),
    "dtype": (r"step 3: its step gave float64 \[2, 3\] for .*its spec says float32 \[2, 3\]", 3, "observation"),
    "no reward": (r"step 3: its step gave nothing for \('agents', 'reward'\), its spec says float32", 3, "reward"),
    "no group": (r"step 3: its step gave nothing for \('agents', 'observation'\)", 3, "observation"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("transformed", [False, True], ids=["plain", "transformed"])
def test_one_after_the_other(fault, transformed):
    """A wrong shape was once broadcast into the batch, and a wrong dtype cast."""
    message, step, entry = FAULTS[fault]
    settings = {"max_steps": 3} if fault == "reset" else {}
    env = build(
        "custom",
        factory="tests.envs.test_checks.make_faulty",
        kwargs={"fault": fault, "transformed": transformed},
        **settings,
    )
    assert env.base_env._single_task, "TorchRL looks at one of them for the specs"
    with pytest.raises(EnvironmentFault, match="^Environment 1 of 3, " + message) as caught:
        break_the_second(env)
    error = caught.value
    assert (error.env_index, error.step, error.key) == (1, step, entry and ("agents", entry))
    assert type(error.__cause__) is {"step": ZeroDivisionError, "reset": ValueError}.get(fault, type(None))


@pytest.mark.parametrize("fault", FAULTS)
def test_all_at_once(fault):
    message, step, entry = FAULTS[fault]
    settings = {"max_steps": 3} if fault == "reset" else {}
    env = build(
        "custom", factory="tests.envs.test_checks.make_faulty", kwargs={"fault": fault, "batched": True}, **settings
    )
    with pytest.raises(EnvironmentFault, match="^All 3 environments, " + message.replace("[2", "[3, 2")) as caught:
        break_the_second(env)
    assert (caught.value.env_index, caught.value.step, caught.value.key) == (None, step, entry and ("agents", entry))


def test_vmas(monkeypatch):
    env = build("vmas/balance")
    data = env.reset()

    def fail(agent):
        raise FloatingPointError("overflow")

    monkeypatch.setattr(env.base_env._env.scenario, "reward", fail)
    with pytest.raises(
        EnvironmentFault, match=r"^All 3 environments, step 1: its step raised FloatingPointError: over"
    ):
        env.step(env.rand_action(data))


@pytest.mark.parametrize(
    ("fault", "message", "cause"),
    [
        ("step", FAULTS["step"][0], "ZeroDivisionError"),
        (
            "killed",
            r"step 3: its process was ended by SIGKILL\. The system does so when memory is short",
            "worker 1 dead",
        ),
    ],
)
def test_a_process_for_each(fault, message, cause, quick_processes):
    """The main process knew only that a worker was dead; and no process may be left."""
    env = build(
        "custom", factory="tests.envs.test_checks.make_faulty", kwargs={"fault": fault}, num_envs=2, parallel=True
    )
    with pytest.raises(EnvironmentFault, match="^Environment 1 of 2, " + message) as caught:
        break_the_second(env)
    assert (caught.value.env_index, caught.value.step) == (1, 3)
    assert cause in str(caught.value.__cause__)
    assert not multiprocessing.active_children()
    env.close(raise_if_closed=False)


def test_a_process_that_is_killed_meanwhile(quick_processes):
    """An error that is no environment's leaves the processes as they are."""
    env = build("custom", factory="tests.envs.test_checks.make_faulty", kwargs={"fault": ""}, num_envs=2, parallel=True)
    data = env.reset()
    with pytest.raises(RuntimeError, match="shape"):
        env.step(data.set(("agents", "action"), torch.zeros(2, 2, 9)))
    worker = env.base_env._workers[1]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert len(multiprocessing.active_children()) == 1
    with pytest.raises(EnvironmentFault, match=r"^Environment 1 of 2, step 1: its process was ended by SIGKILL"):
        env.base_env.state_dict()
    assert not multiprocessing.active_children()


def test_a_guarded_environment_is_copied():
    env = build("custom", factory="tests.envs.test_checks.make_faulty", kwargs={"fault": "step", "batched": True})
    other = copy.deepcopy(env)
    with pytest.raises(EnvironmentFault, match="step 3"):
        break_the_second(other)
    assert env.base_env._guard.step == 0, "a copy counts for itself"
    assert isinstance(env.base_env, Faulty)


# ------------------------------------------------------------------ numbers


def collect(**kwargs):
    env = build("custom", factory="tests.environments.make_copy", kwargs={"kind": "continuous", **kwargs})
    data = env.rollout(5, break_when_any_done=False)
    data["agents", "action_log_prob"] = torch.zeros(3, 5, 3)
    return data, group_keys(env)


@pytest.mark.parametrize(
    "key",
    [
        ("agents", "observation"),
        ("agents", "action"),
        ("agents", "action_log_prob"),
        ("next", "agents", "reward"),
        ("next", "agents", "observation"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_the_first_that_is_not_finite(key, value):
    data, groups = collect()
    assert find_non_finite(data, groups) is None
    data[key][2, 3, 1] = value
    data[key][0, 4] = value
    numbers = data[key][0, 0].numel() // 3
    assert find_non_finite(data, groups) == (2, 3, key, numbers * 4)


def test_the_step_comes_first_and_then_the_environment():
    data, groups = collect()
    data["agents", "observation"][0, 2, 0, 0] = torch.nan
    data["next", "agents", "reward"][1, 1] = torch.nan
    data["agents", "action"][2, 1, 0, 0] = torch.nan
    assert find_non_finite(data, groups)[:3] == (1, 1, ("next", "agents", "reward"))


def test_absent_agents_do_not_count():
    data, groups = collect(death=0.3)
    absent = ~data["agents", "mask"]
    assert absent.any()
    assert not absent.all()
    for name in ("observation", "action", "action_log_prob"):
        data["agents", name][absent] = torch.nan
    data["next", "agents", "reward"][absent] = torch.nan
    data["next", "agents", "observation"][~data["next", "agents", "mask"]] = torch.nan
    assert find_non_finite(data, groups) is None
    died = data["agents", "mask"] & ~data["next", "agents", "mask"]
    env_index, step, agent = died.nonzero()[0].tolist()
    data["next", "agents", "reward"][env_index, step, agent] = torch.nan
    assert find_non_finite(data, groups) == (env_index, step, ("next", "agents", "reward"), 1), "of its last step"


def test_one_read_where_all_is_finite():
    class Reads(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.n += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    data, groups = collect(death=0.3)
    with Reads() as reads:
        find_non_finite(data, groups)
    assert reads.n == 1


# ------------------------------------------------------------------ construction


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vmas/balance", {"n_agents": 1}, r"'vmas/balance' cannot be .*\{'n_agents': 1\}: AssertionError: assert self"),
        ("mamujoco/HalfCheetah", {"agent_conf": "7x9"}, r"cannot be made with env\.kwargs=.*UNKNOWN partitioning"),
        ("mamujoco/HalfCheetah", {}, r"'mamujoco/HalfCheetah': missing a required argument: 'agent_conf'\. Legal: ag"),
        ("gym/CartPole-v1", {"pole": 1}, r"cannot be made with env\.kwargs=\{'pole': 1\}: TypeError: .*'pole'"),
        ("pettingzoo/simple_spread_v3", {"N": "3"}, r"cannot be made with env\.kwargs=\{'N': '3'\}: TypeError"),
        ("custom", {"kinds": 1}, r"env\.kwargs=\{'kinds': 1\} of 'custom': got an unexpected.* Legal: kind, death\."),
    ],
)
def test_what_a_simulator_refuses_names_the_settings(name, kwargs, message):
    factory = "tests.environments.make_copy" if name == "custom" else None
    with pytest.raises(ValueError, match=message) as caught:
        build(name, kwargs=kwargs, factory=factory)
    assert caught.value.__cause__ is not None


def test_a_mistake_of_this_package_is_no_setting(monkeypatch):
    monkeypatch.setattr("torchrl_trpo.envs.vmas.tensors_in", None)
    with pytest.raises(TypeError, match="not callable"):
        build("vmas/balance")


def test_the_state_is_single_precision():
    """MuJoCo's is double, which a critic could not read."""
    env = build("mamujoco/HalfCheetah", kwargs={"agent_conf": "2x3"}, state=True)
    assert env.observation_spec["state"].dtype == torch.float32
    assert env.rollout(2)["next", "state"].dtype == torch.float32
    env.close(raise_if_closed=False)
