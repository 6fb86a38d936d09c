"""From a hand-written MAPPO loop to trust-region steps: both run, and few lines differ."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.modules import MultiAgentMLP

from tests.loops import mappo, matrpo
from torchrl_trpo.envs import make_env
from torchrl_trpo.groups import group_keys
from torchrl_trpo.networks import make_actor


@pytest.mark.parametrize("loop", [mappo, matrpo], ids=["mappo", "matrpo"])
def test_the_loop_trains(loop):
    env = make_env("vmas/balance", num_envs=10, max_steps=20, kwargs={}, seed=0, device=torch.device("cpu"))
    (keys,) = group_keys(env)
    actor = make_actor(env, keys, share_params=True)
    n_agents, n_obs = env.full_observation_spec_unbatched[keys.observation].shape
    critic = MultiAgentMLP(n_obs, 1, n_agents, centralized=True, share_params=True, num_cells=32, depth=1)
    critic = TensorDictModule(critic, in_keys=[keys.observation], out_keys=[keys.value])
    before = [p.detach().clone() for p in (*actor.parameters(), *critic.parameters())]
    assert len(list(loop.train(env, actor, critic))) == 4
    after = (*actor.parameters(), *critic.parameters())
    assert not any(torch.equal(new, old) for new, old in zip(after, before, strict=True))


def test_few_lines_change():
    """A changed line counts once; the docstring and blank lines do not count."""
    old, new = ([line for line in Path(loop.__file__).read_text().splitlines()[1:] if line] for loop in (mappo, matrpo))
    changed = 0
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        changed += 0 if kind == "equal" else max(j - i, m - k)
    assert changed == 9, "the README says so"
