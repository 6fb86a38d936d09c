"""Whose random numbers are whose: each environment has its own, and the global generators are the run's alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from torchrl_trpo.envs import BatchedResetVmasEnv
from torchrl_trpo.seeding import untouched_generators

FAKE = "fake:0"
ENDED = torch.tensor([True, False, True])


def make(seed=0, device=FAKE, **kwargs):
    return BatchedResetVmasEnv("navigation", num_envs=3, seed=seed, device=device, **kwargs)


def use(env):
    """Steps, resets of some environments and of all: what it observes, as one tensor."""
    env.reset()
    observed = []
    for _ in range(2):
        zeros = env.full_action_spec.zero()
        observed.append(env.step(zeros)["next"])
        done = {name: ENDED.to(env.device).unsqueeze(-1) for name in ["_reset", *env.full_done_spec.keys()]}
        observed.append(env.reset(TensorDict(done, [3], device=env.device)))
        observed.append(env.reset())
    return torch.stack([data["agents", "observation"] for data in observed]).cpu()


def global_states():
    host = [
        torch.get_rng_state(),
        torch.from_numpy(np.random.get_state()[1].astype(np.int64)),  # noqa: NPY002
        torch.get_device_module("fake").get_rng_state(),
    ]
    return [*host, torch.tensor(random.getstate()[1])]


@pytest.mark.parametrize("device", [FAKE, "cpu"])
def test_environments_leave_the_global_generators_alone(device):
    """The seed of an environment, also of one on the CPU, was that of the device's generator: of all exploration."""
    torch.manual_seed(5)
    before = global_states()
    env = make(seed=3, device=device)
    use(env)
    env.set_seed(4)
    env.load_state_dict(env.state_dict())
    use(env)
    assert all(map(torch.equal, global_states(), before))


def test_an_environment_has_random_numbers_of_its_own():
    """A second one, exploration or a global seed changed what the first one drew."""
    env, alone = make(), make(seed=1)
    for each in (env, alone):
        each.set_seed(7)
    expected = use(alone)
    torch.manual_seed(1)
    torch.rand(100, device=FAKE)
    use(make(seed=9))
    assert torch.equal(use(env), expected)
    env.set_seed(8)
    assert not torch.equal(use(env), expected)


def test_environments_without_a_seed_differ():
    one, other = make(seed=None), make(seed=None)
    assert not torch.equal(use(one), use(other))


def test_a_saved_environment_draws_what_it_would_have_drawn():
    env, other = make(), make(seed=1)
    use(env)
    state = env.state_dict()
    expected = use(env)
    torch.manual_seed(2)
    other.load_state_dict(state)
    assert torch.equal(use(other), expected)


def test_a_state_of_another_kind_of_device_leaves_the_seed():
    """The states of their generators are no states of each other's."""
    on_cpu, on_device, fresh = make(device="cpu"), make(seed=1), make(seed=1)
    on_device.load_state_dict(on_cpu.state_dict())
    assert torch.equal(use(on_device), use(fresh))
    on_cpu.load_state_dict(on_device.state_dict())
    assert use(on_cpu).isfinite().all()


def test_global_generators_are_put_back():
    """Also that of a device which TorchRL does not know: evaluations changed what a run explored."""
    before = global_states()
    with untouched_generators(3):
        torch.rand(3, device=FAKE)
    assert all(map(torch.equal, global_states(), before))
