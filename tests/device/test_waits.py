"""Where the host waits for a device: not at all in a policy's forward pass, seldom in an iteration of a recipe."""

from __future__ import annotations

import shutil

import pytest
import torch
from torchrl.data import Bounded, Categorical
from torchrl.envs import Transform
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules.distributions import continuous

from tests.recipes.test_recipes import RECIPES, config
from torchrl_trpo.envs import make_env
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks.recurrent import carry_states
from torchrl_trpo.training.policy import make_policy, make_training_env
from torchrl_trpo.training.run import Run

if missing := [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]:
    pytest.skip(f"the device fake is built with {' and '.join(missing)}", allow_module_level=True)

from tests.device import fakegpu

STEPS = 10


class OtherBounds(Transform):
    """Bounds that differ between agents and dimensions; nothing is stepped with them."""

    def transform_input_spec(self, input_spec):
        spec = input_spec["full_action_spec", "agents", "action"]
        high = torch.arange(1.0, 1 + spec.shape[-2:].numel(), device=spec.device).reshape(spec.shape[-2:])
        high = high.expand(spec.shape).clone()
        input_spec["full_action_spec", "agents", "action"] = Bounded(-0.5 * high, high, device=spec.device)
        return input_spec


def balance(*transforms):
    settings = {"num_envs": 4, "max_steps": 9, "kwargs": {}, "seed": 0, "device": torch.device("fake", 0)}
    env = make_env("vmas/balance", **settings)
    for transform in transforms:
        env.append_transform(transform)
    return env


@pytest.mark.parametrize("network", ["mlp", "gru"])
@pytest.mark.parametrize("sharing", ["none", "group"])
@pytest.mark.parametrize("other", [False, True], ids=["equal", "different"])
def test_the_policy_can_be_captured(other, sharing, network, monkeypatch):
    """While a CUDA graph is captured any wait is an error; TorchRL's TanhNormal copies its bounds to the device."""
    env = balance(*[OtherBounds()] * other)
    policy = make_policy(env, group_keys(env), sharing=sharing, hidden=[8], network=network)
    carry_states(env, policy)
    data = env.reset()
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        policy(data.clone())  # a capture is warmed up
        monkeypatch.setattr(continuous, "safe_is_current_stream_capturing", lambda: True)
        with fakegpu.Recorder() as recorder:
            action = policy(data.clone())["agents", "action"]
    assert action.abs().max() > 1 if other else action.abs().max() <= 1
    assert not recorder.counts(), recorder.table()


class SomeAbsent(Transform):
    """Gives the agents of VMAS a mask: those to the left are absent."""

    def _call(self, next_tensordict):
        return next_tensordict.set(("agents", "mask"), next_tensordict["agents", "observation"][..., 0] > 0)

    def _reset(self, tensordict, tensordict_reset):
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec):
        shape = observation_spec["agents", "observation"].shape[:-1]
        observation_spec["agents", "mask"] = Categorical(2, shape, dtype=torch.bool, device=observation_spec.device)
        return observation_spec


def record_parts(monkeypatch):
    """Recorders of the parts of all iterations of a run, which ends without its evaluation.

    A part ends with a lap, the last one with the log.
    """
    recorders = []

    def begin():
        recorders.append(fakegpu.Recorder())
        recorders[-1].__enter__()

    def enter(run, original=Run.__enter__):
        original(run)
        begin()
        return run

    def lap(run, name, original=Run.lap):
        recorders[-1].__exit__()
        original(run, name)  # which waits, to measure the time
        begin()

    def log(run, *args, original=Run.log):
        original(run, *args)
        recorders[-1].__exit__()
        begin()

    def finish(run):
        recorders.pop().__exit__()
        return {}

    for name, method in {"__enter__": enter, "lap": lap, "log": log, "finish": finish}.items():
        monkeypatch.setattr(Run, name, method)
    return recorders


def waits(recorder):
    """How many there are, without VMAS's and the line search's question after each try whether it may end."""
    return sum(
        count
        for (kind, _, stack), count in recorder.events.items()
        if kind in fakegpu.WAITS
        and not recorder.owner(stack)[0].startswith(("vmas", "product:numerics/line_search.py"))
    )


@pytest.mark.parametrize(
    ("name", "masked", "update"),
    [
        ("hatrpo", False, 2),  # is the data the policy's; and after 1, 2, 4, 8, ... updates: do rewards differ
        ("hatrpo", True, 3),  # and what do agents read of each other
        ("hatrpo updater.kl_budget=team", False, 2),
        ("hatrpo updater.kl_budget=team agent_order=greedy", False, 2 + 4),  # who is next
        ("itrpo", False, 1),
        ("happo", False, 0),  # a wait for the settings of the loss only after one was written to
        ("happo", True, 5),  # which rows of each agent count, and what do agents read of each other
        ("mappo", False, 0),
    ],
)
def test_the_waits_of_an_iteration(name, masked, update, tmp_path, monkeypatch):
    """HATRPO's four agents once waited 30 times in an update, HAPPO's 153 times; each collected step waited 6 times."""

    def make(cfg, ranks):
        env = make_training_env({**cfg, "device": "fake:0"}, ranks)
        return env.append_transform(SomeAbsent()) if masked else env

    name, *overrides = name.split()
    monkeypatch.setattr(RECIPES[name], "make_training_env", make)
    recorders = record_parts(monkeypatch)
    sizes = (f"train.frames_per_batch={12 * STEPS}", f"train.total_frames={36 * STEPS}")
    RECIPES[name].train(config(name, tmp_path, "env.num_envs=12", "env.max_steps=15", *sizes, *overrides))
    # TorchRL asks twice a step for the ends of episodes, four times more where there are some, and once for NaNs.
    budget = {"collect": 2 * STEPS + 4 + 1, "values": 1, "update": update, "fit": 4, "log": 4}
    assert len(recorders) == 3 * len(budget)
    for part, recorder in zip(budget, recorders[len(budget) :], strict=False):  # of the second iteration
        assert waits(recorder) <= budget[part], f"{part}:\n{recorder.table()}"
