"""How often the host reads a number from the device during one update: each is a wait on a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torchrl.modules import IndependentNormal, TanhNormal

from tests.benchmarks.problems import kept_step, policy_and_data
from tests.benchmarks.update import DEFAULT_SUBSAMPLE
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import HATRPOSequentialObjective

READ = "aten::_local_scalar_dense"
"""What ``item``, ``bool(tensor)`` and the like end in."""


def bench(repetitions: int, quick: bool) -> dict[str, float]:
    """Reads for each region, beside the tries of its line search.

    Args:
        repetitions: unused, a count does not vary.
        quick: unused.

    Returns:
        Figures by label.
    """
    results = {}
    rows = 1000  # few enough for a CPU to take them at once, as a GPU takes any number
    for name, distribution in {"Normal": IndependentNormal, "TanhNormal": TanhNormal}.items():
        for share_params in (True, False):
            loss, data = policy_and_data(share_params=share_params, rows=rows, distribution=distribution)
            objective = loss if share_params else HATRPOSequentialObjective(loss)
            updater = TrustRegionUpdater(objective, fisher_subsample=DEFAULT_SUBSAMPLE)
            update = kept_step(updater, data)
            update()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                stats = update()
            reads = sum(event.count for event in profiler.key_averages() if event.key == READ)
            tries = _tries(stats["step_fraction"], updater)
            policy = f"{'shared policy' if share_params else 'HATRPO'}, {name}"
            results |= {
                f"{policy}: reads by the host, for each region": reads / stats.numel(),
                f"{policy}: tries of the line search, for each region": float(tries.mean()),
                f"{policy}: reads / tries": reads / float(tries.sum()),
            }
    return results


def _tries(fraction: Tensor, updater: TrustRegionUpdater) -> Tensor:
    """How many steps a line search tried, from the fraction ``α^j`` that it took."""
    rejected = torch.full_like(fraction, updater.max_backtracks + 1)
    return torch.where(fraction > 0, 1 + fraction.log() / math.log(updater.backtrack_coeff), rejected).round()
