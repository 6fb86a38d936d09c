"""One HATRPO iteration on balance, as the recipe does it: what each part costs, and which operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDict
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.sampling import STEPS, our_env
from tests.benchmarks.timing import medians
from tests.benchmarks.update import DEFAULT_SUBSAMPLE
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor, make_central_critic
from torchrl_trpo.objectives import CentralCriticValueEstimator, HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.training.collector import make_collector
from torchrl_trpo.training.critic_fit import fit_critic


def bench(repetitions: int, quick: bool) -> dict[str, float]:
    """The split of an iteration, and the ten operations that cost most.

    Args:
        repetitions: of each part, fewer for the larger batch.
        quick: whether the larger number of environments is left out.

    Returns:
        Figures by label.
    """
    small = _parts(60)
    results = _split(60, small, repetitions)
    if not quick:
        results |= _split(600, _parts(600), min(repetitions, 3))
    return {**results, **_top_costs(small)}


def _parts(num_envs: int) -> dict[str, Callable[[], object]]:
    """The parts of the recipe's loop, to be called in turn."""
    env = our_env(num_envs)
    (keys,) = group_keys(env)
    actor, critic = make_actor(env, keys, share_params=False), make_central_critic(env, keys)
    loss = TRPOLoss(actor, critic, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
    loss.set_keys(**keys.loss_keys)
    loss.make_value_estimator(
        CentralCriticValueEstimator,
        gamma=0.95,
        lmbda=0.9,
        value_network=critic,
        observation_keys=[keys.observation],
        central_key=keys.central,
    )
    updater = TrustRegionUpdater(HATRPOSequentialObjective(loss), fisher_subsample=DEFAULT_SUBSAMPLE)
    optimizer = torch.optim.Adam(loss.critic_network_params.flatten_keys().values(), lr=1e-3)
    collector = iter(make_collector(env, actor, frames_per_batch=num_envs * STEPS, total_frames=-1))
    state: dict[str, TensorDict] = {}
    return {
        "sampling": lambda: state.update(data=next(collector)),
        "advantages": lambda: loss.value_estimator(state["data"]),
        "policy update": lambda: updater.step(state["data"]),
        "critic fit": lambda: fit_critic(loss, optimizer, state["data"], epochs=5, minibatch_size=300),
    }


def _split(num_envs: int, parts: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    cost = medians(parts, repetitions)
    total = sum(cost.values())
    shares = {f"{num_envs} environments: {part} [% of time]": 100 * cost[part] / total for part in parts}
    return {
        f"{num_envs} environments: one iteration [frames/s]": num_envs * STEPS / total,
        **shares,
        f"{num_envs} environments: policy update / sampling": cost["policy update"] / cost["sampling"],
    }


def _top_costs(parts: Mapping[str, Callable[[], object]], count: int = 10) -> dict[str, float]:
    """The operations with the largest share of one iteration's CPU time, their children's time excluded."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for part in parts.values():
            part()
    events = sorted(profiler.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    return {
        f"60 environments: {event.key}, {event.count} calls [% of CPU time]": 100 * event.self_cpu_time_total / total
        for event in events[:count]
    }
