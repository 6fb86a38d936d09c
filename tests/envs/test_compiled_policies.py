"""Policies in compiled rollouts that are more than a function of their data and parameters."""

import random

import numpy as np
import pytest
import torch
from tensordict.nn import ProbabilisticTensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import FrameSkipTransform
from torchrl.modules import TanhNormal

from tests.envs.test_compiled_collector import KEY, check, collect, make, pytestmark  # noqa: F401
from torchrl_trpo.envs import CompiledCollector

SETTINGS = {"track_traj_ids": False, "trust_policy": True}
ACTION, MEMORY = ("agents", "action"), ("agents", "memory")
NOT_COMPILED = pytest.mark.filterwarnings(
    "ignore:The policy is called at each step", "ignore:Rollouts are not compiled"
)


class Plain:
    """An object that is no module."""

    def __init__(self):
        self.calls, self.gain, self.offset = 0, 1.0, torch.zeros(2)


class Wrapped(nn.Module):
    """A policy, and something that is done to its actions."""

    def __init__(self, actor, change):
        super().__init__()
        self.actor, self.change, self.calls, self.log = actor, change, 0, []
        self.plain, self.made = Plain(), None
        self.expanded = torch.ones(1).expand(2)  # no copy can be written into it
        self.register_buffer("scale", torch.ones(()))

    def forward(self, data):
        return self.change(self, self.actor(data))


class Scaled(Wrapped):
    """It reads a number of a buffer, before random numbers are drawn."""

    def forward(self, data):
        scale = float(self.scale)
        return self.change(self, self.actor(data), scale)


def brakes(policy, data):
    speed = data[KEY].numpy()[..., 2:4]
    return data.set(ACTION, torch.from_numpy(0.5 * (abs(speed) < 0.2).astype("float32")))


def is_random(policy, data):
    return data.set(ACTION, data[ACTION] * (1.0 if random.random() < 0.5 else -1.0))


def is_noisy(policy, data):
    return data.set(ACTION, data[ACTION] * float(np.random.rand()))  # noqa: NPY002


def is_scaled(policy, data, scale):
    return data.set(ACTION, data[ACTION] * scale)


def keeps_a_log(policy, data):
    policy.log.append(0)
    return data.set(ACTION, data[ACTION] * (0.5 if len(policy.log) % 3 else 1.0))


def begins_slowly(policy, data):
    policy.calls += 1
    return data.set(ACTION, data[ACTION] * (0.0 if policy.calls <= 12 else 1.0))


def counts_in_an_object(policy, data):
    policy.plain.calls += 1
    return data.set(ACTION, data[ACTION] * (0.0 if policy.plain.calls <= 12 else 1.0))


def advances_a_buffer(policy, data):
    policy.scale = policy.scale * 0.9
    return data.set(ACTION, data[ACTION] * policy.scale)


def is_offset(policy, data):
    return data.set(ACTION, data[ACTION] * 0.5 + policy.plain.offset)


def keeps_what_it_made(policy, data):
    policy.made = policy.scale.tanh() if policy.made is None else policy.made
    return data.set(ACTION, data[ACTION] * policy.made)


def remembers(policy, data):
    memory = data.get(MEMORY, torch.zeros_like(data[ACTION]))
    return data.set(ACTION, data[ACTION] * (1 - memory)).set(MEMORY, memory + 0.05)


@NOT_COMPILED
@pytest.mark.parametrize(
    "change",
    [
        *(brakes, is_random, is_noisy, is_scaled, keeps_a_log, begins_slowly, remembers),
        *(counts_in_an_object, advances_a_buffer, is_offset, keeps_what_it_made),
    ],
)
def test_what_is_not_computed_with_tensors_is_no_constant(change):
    """What it did at the first step, it did at all."""

    def seeded(collector, number):
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002
        collector.policy.scale.fill_(1 / (1 + number))
        collector.policy.plain.offset += 0.1 * number
        collector.policy.made = None

    kind = Scaled if change is is_scaled else Wrapped
    check(seeded, n_batches=2, wrap=lambda actor: kind(actor, change), **SETTINGS)


@NOT_COMPILED
def test_the_parameters_of_a_function_are_read():
    """They were those of the first batch."""

    def train(collector, number):
        with torch.no_grad():
            for parameter in actors[collector.policy].parameters():
                parameter.add_(0.1 * number)

    def wrap(actor):
        def function(data):
            return actor(data)

        actors[function] = actor
        return function

    actors = {}
    check(train, wrap=wrap, **SETTINGS)


@pytest.mark.parametrize("changed", ["hook", "bounds", "activation", "object", "tie"])
def test_a_policy_that_has_changed_is_compiled_anew(changed):
    def change(collector, number):
        policy = collector.policy
        if number == 0:
            return
        if changed == "hook":
            policy.register_forward_hook(lambda module, inputs, data: data.set(ACTION, 0.5 * data[ACTION]))
        if changed == "object":
            policy.plain.gain = 0.5
        if changed == "tie":
            policy.last.weight = nn.Parameter(0.5 * policy.first.weight.detach())
        for module in policy.modules():
            if changed == "bounds" and isinstance(module, ProbabilisticTensorDictModule):
                module.distribution_kwargs["high"] = 0.5 * torch.ones(2)
            if changed == "activation" and hasattr(module, "activation"):
                module.activation = torch.relu

    class Activated(nn.Module):
        def __init__(self, actor):
            super().__init__()
            self.actor, self.activation, self.plain = actor, torch.tanh, Plain()
            self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)
            self.last.weight = self.first.weight

        def forward(self, data):
            action = self.activation(self.last(self.first(self.actor(data)[ACTION])))
            return data.set(ACTION, 0.5 * self.plain.gain * action)

    wrap = (lambda actor: actor) if changed in {"hook", "bounds"} else Activated
    ours, _ = check(change, wrap=wrap, **SETTINGS)
    assert ours.why_not_compiled is ours._fused.why_policy_not_compiled is None


@pytest.mark.parametrize("bounds", [{}, {"low": -torch.ones(2), "high": torch.ones(2)}], ids=["default", "tensors"])
def test_torchrls_squashed_normal_is_compiled(bounds):
    """Its default bounds ended in an error, and others were compared at each step, outside of the compiled code."""

    def wrap(actor):
        for module in actor.modules():
            if isinstance(module, ProbabilisticTensorDictModule):
                module.distribution_class, module.distribution_kwargs = TanhNormal, dict(bounds)
        return actor

    ours, _ = check(wrap=wrap, scenario="simple", **SETTINGS)
    assert ours.why_not_compiled is ours._fused.why_policy_not_compiled is None
    assert {m.distribution_class for m in ours.policy.modules() if hasattr(m, "distribution_class")} == {TanhNormal}


@NOT_COMPILED
def test_a_transform_that_takes_several_steps():
    """The simulator took one, whose reward counted twice."""
    ours, _ = check(transforms=[lambda: FrameSkipTransform(2)], **SETTINGS)
    assert "several steps" in ours.why_not_compiled


@NOT_COMPILED
def test_compiling_leaves_the_policys_statistics_alone():
    """It counted calls on data that is not the policy's."""

    class Counting(nn.Module):
        def __init__(self, actor):
            super().__init__()
            self.actor = actor
            self.register_buffer("calls", torch.zeros(()))
            self.norm = nn.BatchNorm1d(2)

        def forward(self, data):
            self.calls += 1
            self.norm(data[KEY][..., 0])
            return self.actor(data)

    theirs, ours = (make(collector, wrap=Counting, **SETTINGS) for collector in (Collector, CompiledCollector))
    assert theirs.policy.calls == ours.policy.calls
    assert torch.equal(theirs.policy.norm.running_var, ours.policy.norm.running_var)


def test_a_rollout_that_was_interrupted_is_followed_by_a_reset(monkeypatch):
    """The first step after it led from the state before the interrupted rollout to one of its middle."""
    ours = make(CompiledCollector, **SETTINGS, limit=100)
    collect(ours, 1)
    own = ours._fused._many_steps.take

    def interrupted(n_steps, *arguments):
        own(4, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(ours._fused._many_steps, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours.rollout()
    monkeypatch.undo()
    batch = ours.rollout()
    assert (batch["step_count"][:, 0] == 0).all()
    position, velocity = batch[KEY][..., :2], batch["next", *KEY][..., 2:4]
    torch.testing.assert_close(batch["next", *KEY][..., :2], position + 0.1 * velocity)


class Hash(nn.Module):
    """A policy that computes with whole numbers that single precision does not have."""

    def __init__(self, actor):
        super().__init__()
        self.actor = actor

    def forward(self, data):
        hashed = (data["step_count"] * 3_000_001) % 7
        data = self.actor(data)
        return data.set(ACTION, 0 * data[ACTION] + (hashed / 14).unsqueeze(-1))


def test_a_step_whose_numbers_are_too_large_is_torchrls():
    """The policy acted by what compiled code had made of them."""
    check(wrap=Hash, limit=50, n_batches=3, **SETTINGS)


def test_a_hook_before_a_batch_is_heeded_in_it():
    """What it changed was noticed one batch later."""

    def with_hook(collector, **settings):
        made = make(collector, limit=100, **settings)
        made.pre_collect_hook = lambda: setattr(
            made.env.transform[1], "max_steps", made.env.transform[1].max_steps // 4
        )
        return made

    ours, theirs = (collect(with_hook(collector, **SETTINGS), 3) for collector in (CompiledCollector, Collector))
    for batch, other in zip(ours, theirs, strict=True):
        assert torch.equal(batch["next", "step_count"], other["next", "step_count"])


def test_what_only_looks_like_a_lock():
    """Attributes that answer to any name, as those of a mapping of settings, were an error."""

    class Settings(dict):
        __getattr__ = dict.__getitem__

    class Configured(Hash):
        def __init__(self, actor):
            super().__init__(actor)
            self.settings = Settings(gain=1.0)

        def forward(self, data):
            return self.actor(data)

    check(wrap=Configured, **SETTINGS)
