"""How the cost of an update grows with agents, rows and parameters."""

from __future__ import annotations

import itertools

from tests.benchmarks.problems import ROWS, kept_step, policy_and_data
from tests.benchmarks.timing import medians
from tests.benchmarks.update import DEFAULT_SUBSAMPLE, forward_backward
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import HATRPOSequentialObjective

CHUNK_SIZE = 10_000


def bench(repetitions: int, quick: bool) -> dict[str, float]:
    """Ratios along each axis, with the recipes' settings otherwise.

    Args:
        repetitions: of each task, fewer for the large ones.
        quick: whether the largest sizes are left out.

    Returns:
        Figures by label.
    """
    return {
        **_agents((2, 4, 8) if quick else (2, 4, 8, 16, 32), min(repetitions, 3)),
        **_rows(100_000 if quick else 1_000_000, min(repetitions, 2)),
        **_parameters((90, 300) if quick else (90, 300, 990), min(repetitions, 2)),
    }


def _agents(counts: tuple[int, ...], repetitions: int) -> dict[str, float]:
    """HATRPO's update at equal rows for each agent."""
    tasks = {}
    for n_agents in counts:
        loss, data = policy_and_data(n_agents, share_params=False)
        updater = TrustRegionUpdater(HATRPOSequentialObjective(loss), fisher_subsample=DEFAULT_SUBSAMPLE)
        tasks[str(n_agents)] = kept_step(updater, data)
    cost = medians(tasks, repetitions)
    times = {f"HATRPO update, {n} agents x {ROWS} rows [ms]": 1e3 * cost[str(n)] for n in counts}
    ratios = {
        f"HATRPO update, {large} agents / {small} agents": cost[str(large)] / cost[str(small)]
        for small, large in [*itertools.pairwise(counts), (4, counts[-1])]
    }
    return {**times, **ratios}


def _rows(most: int, repetitions: int) -> dict[str, float]:
    """A single agent's update, as a whole and in chunks."""
    counts = [most // 1000, most // 100, most // 10, most]
    cases = [*((count, None) for count in counts), *((count, CHUNK_SIZE) for count in counts[2:])]
    tasks = {}
    for rows, chunk_size in cases:
        loss, data = policy_and_data(1, share_params=True, rows=rows, chunk_size=chunk_size)
        updater = TrustRegionUpdater(loss, fisher_subsample=DEFAULT_SUBSAMPLE)
        tasks[_case(rows, chunk_size)] = kept_step(updater, data)
    cost = medians(tasks, repetitions)
    times = {f"update, {label} [ms]": 1e3 * seconds for label, seconds in cost.items()}
    pairs = [((small, None), (large, None)) for small, large in itertools.pairwise(counts)]
    pairs += [((counts[2], CHUNK_SIZE), (most, CHUNK_SIZE)), ((most, None), (most, CHUNK_SIZE))]
    labels = [(_case(*small), _case(*large)) for small, large in pairs]
    return {**times, **{f"update, {large} / {small}": cost[large] / cost[small] for small, large in labels}}


def _case(rows: int, chunk_size: int | None) -> str:
    return f"{rows} rows" if chunk_size is None else f"{rows} rows in chunks of {chunk_size}"


def _parameters(widths: tuple[int, ...], repetitions: int) -> dict[str, float]:
    """A single agent's update with two hidden layers of each width, against one forward and backward pass."""
    results = {}
    for width in widths:
        loss, data = policy_and_data(1, share_params=True, hidden=(width, width))
        count = sum(parameter.numel() for parameter in loss.parameters())
        tasks = {
            "unit": forward_backward(loss, loss.policy_rows(data)),
            "exact": kept_step(TrustRegionUpdater(loss), data),
            "default": kept_step(TrustRegionUpdater(loss, fisher_subsample=DEFAULT_SUBSAMPLE), data),
        }
        cost = medians(tasks, repetitions)
        results |= {
            f"{count} parameters: fwd+bwd of {ROWS} rows [ms]": 1e3 * cost["unit"],
            f"{count} parameters: update, all rows in F / fwd+bwd": cost["exact"] / cost["unit"],
            f"{count} parameters: update, 1/10 of the rows in F / fwd+bwd": cost["default"] / cost["unit"],
        }
    return results
