"""Compiled VMAS on a device that is not the CPU, with CUDA's kernels emulated: against VMAS there."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.envs.test_compiled import assert_same
from tests.kernels import emulated_gpu
from torchrl_trpo.envs import BatchedResetVmasEnv, CompiledVmasEnv
from torchrl_trpo.kernels import cuda

if missing := [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]:
    pytest.skip(f"the device fake is built with {' and '.join(missing)}", allow_module_level=True)

from tests.device import fakegpu

N = 6


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(cuda, "load", emulated_gpu.load)


def waits(recorder):
    return sum(recorder.counts().values())


def test_it_gives_what_vmas_gives_and_waits_once():
    """A step asks whether its guards hold; resets of some ask which, and the states of both are the same then."""
    settings = {"num_envs": N, "device": "fake:0", "seed": 0, "max_steps": 30}
    ours = CompiledVmasEnv("simple_spread", **settings)
    theirs = BatchedResetVmasEnv("simple_spread", **settings)
    assert ours.why_not_compiled is None
    assert ours.pool is not None
    data = theirs.reset()
    assert_same(ours.reset().cpu(), data.cpu())
    for _ in range(6):
        data = theirs.rand_action(data)
        result = theirs.step(data.clone())["next"]
        with fakegpu.Recorder() as recorder:
            own = ours._take_step(ours._actions(data))
        assert own["agents"]["observation"].device.type == "fake"
        assert_same(ours._wrap(own).cpu(), result.cpu())
        data = result.exclude("reward")
    assert waits(recorder) == 1, recorder.table()
    ended = torch.tensor([True, False, True, False, False, False], device="fake:0").unsqueeze(-1)
    before = [agent.state.pos.clone() for agent in ours._env.agents]
    ours.reset(data.clone().set("_reset", ended))
    for agent, position in zip(ours._env.agents, before, strict=True):
        changed = (agent.state.pos != position).any(-1).cpu()
        assert torch.equal(changed, ended.squeeze(-1).cpu())
