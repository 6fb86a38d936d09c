"""Resets of a compiled VMAS environment: those of VMAS, whatever is changed, seeded or copied."""

import copy

import pytest
import torch
from tensordict import TensorDict
from vmas.simulator.core import Agent, World
from vmas.simulator.scenario import BaseScenario

from tests.cases import needs_compiler
from torchrl_trpo.envs import BatchedResetVmasEnv, CompiledVmasEnv

pytestmark = needs_compiler
N = 6
OBSERVATION = ("agents", "observation")


class Spawn(BaseScenario):
    """An agent that begins at a distance of 1, times what is set in several places."""

    def make_world(self, batch_dim, device, **kwargs):
        world = World(batch_dim, device)
        world.add_agent(Agent(name="agent_0"))
        self.number, self.settings = 1.0, {"scale": 1.0}
        self.of_all, self.of_each = torch.ones(()), torch.ones(batch_dim, 1)
        return world

    def reset_world_at(self, env_index=None):
        each = self.of_each if env_index is None else self.of_each[env_index]
        direction = torch.nn.functional.normalize(torch.randn(*each.shape[:-1], 2), dim=-1)
        distance = self.number * self.settings["scale"] * self.of_all * each
        self.world.agents[0].set_pos(direction * distance, env_index)

    def reward(self, agent):
        return agent.state.pos[:, 0]

    def observation(self, agent):
        return torch.cat([agent.state.pos, agent.state.vel], -1)


def distances_after_resets(env, ended=2):
    """Of an environment that is reset three times alone."""
    only = (torch.arange(N) == ended).unsqueeze(-1)
    resets = [env.reset(TensorDict({"_reset": only}, [N])) for _ in range(3)]
    return torch.stack([data[OBSERVATION][ended, 0, :2].norm() for data in resets])


@pytest.mark.parametrize("changed", ["attribute", "dict", "tensor of all", "tensor of each"])
@pytest.mark.parametrize("loaded", [False, True])
def test_what_a_reset_reads_may_be_changed(changed, loaded):
    """As in a curriculum. Environments from before the change took the place of those that ended."""
    env = CompiledVmasEnv(Spawn(), num_envs=N, seed=0)
    assert env.pool is not None
    env.rollout(2)
    if loaded:
        state = env.state_dict()
        env = CompiledVmasEnv(Spawn(), num_envs=N, seed=1)
        env.load_state_dict(state)
    torch.testing.assert_close(distances_after_resets(env), torch.ones(3))
    scenario = env._env.scenario
    if changed == "attribute":
        scenario.number = 3.0
    elif changed == "dict":
        scenario.settings["scale"] = 3.0
    else:
        (scenario.of_all if changed == "tensor of all" else scenario.of_each).fill_(3.0)
    torch.testing.assert_close(distances_after_resets(env), torch.full((3,), 3.0))
    assert env.why_not_compiled is None


class Levels(Spawn):
    """Environments that begin farther to the right once they have arrived, and forget then that they have."""

    def make_world(self, batch_dim, device, **kwargs):
        world = super().make_world(batch_dim, device, **kwargs)
        self.level, self.has_arrived = torch.zeros(batch_dim), torch.zeros(batch_dim, dtype=torch.bool)
        return world

    def reset_world_at(self, env_index=None):
        rows = slice(None) if env_index is None else env_index
        self.level[rows] += self.has_arrived[rows]
        self.has_arrived[rows] = False
        self.world.agents[0].set_pos(self.level[rows].unsqueeze(-1) + torch.zeros(2), env_index)


def test_a_reset_may_read_what_it_writes():
    """No environment arrived while the resets were compared, so that they were all alike."""
    observed = []
    for cls in (CompiledVmasEnv, BatchedResetVmasEnv):
        env = cls(Levels(), num_envs=N, seed=0)
        env.rollout(2)
        env._env.scenario.has_arrived[2] = True
        observed.append(env.reset(TensorDict({"_reset": (torch.arange(N) == 2).unsqueeze(-1)}, [N]))[OBSERVATION])
    torch.testing.assert_close(*observed)
    assert observed[0][2, 0, 0] == 1.0


def rollout(env, steps=12):
    torch.manual_seed(1)
    return env.rollout(steps, break_when_any_done=False)[OBSERVATION]


def test_a_seed_decides_the_resets_that_follow():
    """Those that waited had been drawn before."""
    env = CompiledVmasEnv("simple", num_envs=N, seed=0, max_steps=5)
    first, again = (rollout(env) for _ in range(2) if env.set_seed(3))
    assert torch.equal(first, again)
    theirs = BatchedResetVmasEnv("simple", num_envs=N, seed=0, max_steps=5)
    theirs.set_seed(3)
    torch.testing.assert_close(first[:, :5], rollout(theirs)[:, :5])  # later resets are drawn together


def test_a_copy_goes_on_by_itself():
    """It computed in the memory of the original."""
    env = CompiledVmasEnv("simple", num_envs=N, seed=0, max_steps=5)
    rollout(env, 7)
    twin = copy.deepcopy(env)
    expected = rollout(env)
    env._env.agents[0].state.pos.fill_(0.5)
    env.rollout(3)
    assert torch.equal(rollout(twin), expected)
    assert twin.why_not_compiled is None
