"""One HATRPO iteration on balance, as the recipe does it: what each part costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDict

from tests.benchmarks.sampling import STEPS, our_env
from tests.benchmarks.timing import medians
from tests.benchmarks.update import DEFAULT_SUBSAMPLE
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor, make_central_critic
from torchrl_trpo.objectives import CentralCriticValueEstimator, HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.training.collector import make_collector
from torchrl_trpo.training.critic_fit import critic_optimizer, fit_critic


def bench(repetitions: int, quick: bool) -> dict[str, float]:
    """The split of an iteration, compiled and not.

    Args:
        repetitions: of each part, fewer for the larger batch.
        quick: whether the larger number of environments is left out.

    Returns:
        Figures by label.
    """
    results = {}
    for num_envs in (60,) if quick else (60, 600):
        for compiled in (False, True):
            repeated = repetitions if num_envs < 100 else min(repetitions, 3)
            cost = medians(_parts(num_envs, compiled), repeated)
            total = sum(cost.values())
            name = f"{num_envs} environments, {'compiled' if compiled else 'as PyTorch runs it'}"
            results[f"{name}: one iteration [frames/s]"] = num_envs * STEPS / total
            results |= {f"{name}: {part} [% of time]": 100 * seconds / total for part, seconds in cost.items()}
    return results


def _parts(num_envs: int, compiled: bool) -> dict[str, Callable[[], object]]:
    """The parts of the recipe's loop, to be called in turn."""
    env = our_env(num_envs, compiled)
    (keys,) = group_keys(env)
    actor, critic = make_actor(env, keys, share_params=False), make_central_critic(env, keys)
    settings = {"normalize_advantage": True, "normalize_advantage_exclude_dims": (-2,), "compiled": compiled}
    loss = TRPOLoss(actor, critic, **settings)
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
    optimizer = critic_optimizer([loss], lr=1e-3)
    collector = iter(make_collector(env, actor, frames_per_batch=num_envs * STEPS, total_frames=-1))
    state: dict[str, TensorDict] = {}
    fit: Any = {"epochs": 5, "minibatch_size": 300, "compiled": compiled}
    return {
        "sampling": lambda: state.update(data=next(collector)),
        "advantages": lambda: loss.value_estimator(state["data"]),
        "policy update": lambda: updater.step(state["data"]),
        "critic fit": lambda: fit_critic(loss, optimizer, state["data"], **fit),
    }
