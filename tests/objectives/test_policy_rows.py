"""Which entries of a batch have an agent dimension, decided by the group of the agents."""

import pytest
import torch
from tensordict import TensorDict

from torchrl_trpo.objectives.policy_rows import flatten_rows
from torchrl_trpo.parallel.ranks import ALONE

B, T, AGENTS = 4, 5, 3


def make_rows(inputs, mask=None, *, group="agents"):
    ones = torch.ones(B, T, AGENTS, 1)
    settings = {"group": group, "per_agent": True, "ranks": ALONE}
    return flatten_rows(inputs, action=ones, log_prob=ones, advantage=ones, mask=mask, **settings)


@pytest.mark.parametrize("group_size", [[B, T], [B, T, AGENTS]], ids=["without the agents", "with the agents"])
def test_entries_of_the_group_are_one_per_agent(group_size):
    """Whatever the batch size of the group's TensorDict; a flag of each agent was taken for a state."""
    mask = torch.ones(B, T, AGENTS, 1, dtype=torch.bool)
    mask[0, 0, 1] = False
    agents = {"observation": torch.randn(B, T, AGENTS, 2), "speed": torch.randn(B, T, AGENTS)}
    for name in agents:
        agents[name][0, 0, 1] = torch.nan
    inputs = TensorDict({"agents": TensorDict(agents, group_size), "state": torch.randn(B, T, AGENTS)}, [B, T])
    rows = make_rows(inputs, mask)
    assert rows.advantage.isfinite().all(), "what is masked was cleared for the masked agent alone"
    assert (rows.inputs["agents", "speed"][0] != 0).tolist() == [True, False, True]
    own = rows.of_agent(2)
    assert own.inputs["agents"].batch_size == torch.Size([B * T, *[1] * (len(group_size) - 2)])
    torch.testing.assert_close(own.inputs["agents", "speed"], rows.inputs["agents", "speed"][:, 2:])
    torch.testing.assert_close(own.inputs["agents", "observation"], rows.inputs["agents", "observation"][:, 2:])
    assert own.inputs["state"].shape == (B * T, AGENTS), "a state at the root is of all agents"
    assert rows.inputs["agents", "speed"].shape == (B * T, AGENTS), "the rows of all agents are as before"


def test_entries_of_other_agents_are_not_sliced():
    """A policy may read another team's observations; as many agents there were taken for its own."""
    both = {
        name: TensorDict({"observation": torch.randn(B, T, AGENTS, 2)}, [B, T, AGENTS]) for name in ("agents", "foes")
    }
    own = make_rows(TensorDict(both, [B, T])).of_agent(0)
    assert own.inputs["agents", "observation"].shape == (B * T, 1, 2)
    assert own.inputs["foes", "observation"].shape == (B * T, AGENTS, 2)
