"""The recipes' collector."""

from __future__ import annotations

import pytest
import torch

from torchrl_trpo.config.validation import in_terms_of_settings
from torchrl_trpo.envs import make_env
from torchrl_trpo.errors import SettingError
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor
from torchrl_trpo.training.collector import make_collector


def collect(frames_per_batch=40, total_frames=80, **settings):
    torch.manual_seed(0)
    env = make_env("vmas/balance", num_envs=4, max_steps=8, kwargs={"n_agents": 2}, seed=0, device=torch.device("cpu"))
    (keys,) = group_keys(env)
    policy = make_actor(env, keys, share_params=False)
    collector = make_collector(env, policy, frames_per_batch=frames_per_batch, total_frames=total_frames, **settings)
    return [batch.clone() for batch in collector], keys


def test_batches_follow_each_other():
    """Two batches of 10 steps: time limits at 8 and 16 are truncations, and the second begins where the first ended."""
    (first, second), keys = collect()
    assert first.batch_size == second.batch_size == (4, 10)
    assert "collector" not in first.keys()
    truncated = torch.cat([first["next", "truncated"], second["next", "truncated"]], 1)
    assert truncated.sum(1).min() >= 2
    going_on = ~first["next", "done"][:, -1].squeeze(-1)
    assert (first[("next", *keys.observation)][:, -1] == second[keys.observation][:, 0])[going_on].all()


def test_the_data_can_enter_a_graph():
    (first, _), keys = collect()
    assert not first[keys.observation].is_inference()
    assert not first[keys.log_prob].requires_grad


def test_cuda_graphs_need_a_gpu():
    with pytest.raises(SettingError, match=r"^cudagraph_policy=True needs .*CUDA device, got cpu\.") as refused:
        collect(cudagraph_policy=True)
    message = in_terms_of_settings(str(refused.value))
    assert message.startswith("collector.cudagraph_policy=true needs ")
    assert message.endswith("Legal: collector.cudagraph_policy=false.")
