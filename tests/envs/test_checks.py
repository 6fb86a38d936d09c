"""Environments that break their specs are refused, and numbers of a batch that are not finite are found."""

from __future__ import annotations

import multiprocessing
import random

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, StepCounter, TransformedEnv

from tests.environments import Copy
from torchrl_trpo.envs import BatchedResetVmasEnv, make_env
from torchrl_trpo.envs.checks import EnvironmentFault, find_non_finite
from torchrl_trpo.errors import SettingError
from torchrl_trpo.keys import group_keys


class Faulty(EnvBase):
    """Two agents, and something wrong with what they observe or earn."""

    def __init__(self, fault, batch=()):
        super().__init__(batch_size=batch)
        self.fault = fault
        agents = {"observation": Bounded(-1, 1, (2, 3)), "action_mask": Categorical(2, (2, 4), dtype=torch.bool)}
        self.observation_spec = Composite({"agents": Composite(agents, shape=(2,))}).expand(*batch)
        self.action_spec = Composite({"agents": Composite({"action": Categorical(4, (2,))}, shape=(2,))}).expand(*batch)
        self.reward_spec = Composite({"reward": Unbounded((1,))}).expand(*batch)
        self.done_spec = Composite({"done": Categorical(2, (1,), dtype=torch.bool)}).expand(*batch)

    def _reset(self, tensordict):
        data = self.observation_spec.zero()
        data["agents", "action_mask"][..., 0, 2] = True  # the second agent may do nothing at all
        return data

    def _step(self, tensordict):
        assert (tensordict["agents", "action"][..., 0] == 2).all(), "an action that is not allowed"
        data = self._reset(None).update(self.full_reward_spec.zero()).update(self.full_done_spec.zero())
        observation = data["agents", "observation"]
        if self.fault == "dtype":
            data["agents", "observation"] = observation.double()
        if self.fault == "bounds":
            observation += 2
        if self.fault == "no mask":
            del data["agents", "action_mask"]
        if self.fault == "error":
            raise ZeroDivisionError("division by zero")
        return data

    def _set_seed(self, seed):
        torch.manual_seed(seed)


def make_faulty(fault, num_envs, batched=False, transformed=False):
    env = Faulty(fault, (num_envs,) if batched else ())
    return TransformedEnv(env, StepCounter()) if transformed else env


def build(name, **settings):
    defaults = {"num_envs": 3, "max_steps": 4, "kwargs": {}, "seed": 0, "device": torch.device("cpu")}
    return make_env(name, **{**defaults, **settings})


# ------------------------------------------------------------------ specs


FACTORY = "tests.envs.test_checks.make_faulty"
FAULTS = {
    "dtype": "AssertionError: .*torch.float64",
    "bounds": "AssertionError: spec check failed .* spec obs",
    "no mask": r"AssertionError: .*keys_in_fake_not_in_real=\{.*action_mask",
    "error": "ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
def test_an_environment_that_breaks_its_specs_is_not_made(fault, batched):
    message = rf"(?s)^env: 'custom' fails TorchRL's check_env_specs, .*{FAULTS[fault]}.*\. Legal: entries with"
    with pytest.raises(EnvironmentFault, match=message):
        build("custom", factory=FACTORY, kwargs={"fault": fault, "batched": batched})


@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("transformed", [False, True], ids=["plain", "transformed"])
def test_the_check_takes_legal_actions_and_leaves_the_generators(batched, transformed, capfd):
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    kwargs = {"fault": "", "batched": batched, "transformed": transformed}
    build("custom", factory=FACTORY, kwargs=kwargs, num_envs=2)
    assert random.getstate() == before[2]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert "check_env_specs succeeded" not in "".join(capfd.readouterr())


def test_a_run_ends_when_a_worker_dies(quick_processes):
    """``close`` raised because of the dead worker, so that a run did not say how to continue it."""
    env = build("gym/Pendulum-v1", num_envs=2, parallel=True)
    env.reset()
    worker = multiprocessing.active_children()[0]
    worker.kill()
    worker.join()
    with pytest.raises(RuntimeError, match=r"worker \d \(exit code -9\)"):
        env.rollout(1)
    env.close()
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="closed environment"):
        env.base_env.close()


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
        ("mamujoco/HalfCheetah", {"agent_conf": "7x9"}, r"cannot be made with kwargs=.*UNKNOWN partitioning"),
        ("mamujoco/HalfCheetah", {}, r"'mamujoco/HalfCheetah': missing a required argument: 'agent_conf'\. Legal: 'ag"),
        ("gym/CartPole-v1", {"pole": 1}, r"cannot be made with kwargs=\{'pole': 1\}: TypeError: .*'pole'"),
        ("pettingzoo/simple_spread_v3", {"N": "3"}, r"cannot be made with kwargs=\{'N': '3'\}: TypeError"),
        (
            "custom",
            {"kinds": 1},
            r"kwargs=\{'kinds': 1\} of 'custom': got an unexpected.* Did you mean 'kind'\? Legal: 'kind', 'death'\.",
        ),
    ],
)
def test_what_a_simulator_refuses_names_the_settings(name, kwargs, message):
    factory = "tests.environments.make_copy" if name == "custom" else None
    with pytest.raises(ValueError, match=message) as caught:
        build(name, kwargs=kwargs, factory=factory)
    assert caught.value.__cause__ is not None


def make_six(num_envs, device, seed):
    if num_envs != 6:
        raise ValueError("only six")
    return BatchedResetVmasEnv("balance", num_envs, device=device, seed=seed)


def test_a_factory_that_fails_is_named():
    """A run's film needs four environments; a factory of six raised after the training, and no summary was written."""
    factory = "tests.envs.test_checks.make_six"
    with pytest.raises(SettingError, match=r"'custom' cannot be made with kwargs=\{\}: ValueError: only six"):
        build("custom", num_envs=4, factory=factory)


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


class Unseeded(Copy):
    """Draws other observations each time, whatever the seed."""

    def _set_seed(self, seed):
        self.generator = torch.Generator()
        self.generator.seed()


def make_unseeded(num_envs):
    return Unseeded({"agents": (2, 3, ("discrete", 3))}, num_envs)


@pytest.mark.parametrize("factory", ["tests.envs.test_checks.make_unseeded", "tests.environments.make_copy"])
def test_a_seed_that_is_not_heeded_is_told(factory, caplog):
    make_env("custom", factory=factory, num_envs=4, max_steps=5, kwargs={}, seed=3, device=torch.device("cpu"))
    told = "Two resets of the environment with seed 3 differ in ('agents', 'observation')" in caplog.text
    assert told == factory.endswith("unseeded")
