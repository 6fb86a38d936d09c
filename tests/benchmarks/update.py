"""Fisher products and whole updates, against one forward and backward pass of the surrogate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.benchmarks.problems import N_AGENTS, ROWS, kept_step, policy_and_data
from tests.benchmarks.timing import medians
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import HATRPOSequentialObjective, PolicyRows, TRPOLoss

DEFAULT_SUBSAMPLE = 0.1
"""``fisher_subsample`` in the recipes."""


def bench(repetitions: int, quick: bool) -> dict[str, float]:
    """Costs for a shared policy and for a policy each.

    Args:
        repetitions: of each task.
        quick: unused, this is quick.

    Returns:
        Figures by label.
    """
    return {**_shared(repetitions), **_per_agent(repetitions)}


def forward_backward(loss: TRPOLoss, rows: PolicyRows, **region: int) -> Callable[[], object]:
    """One forward and backward pass of the surrogate.

    Args:
        loss: the policy's loss.
        rows: the batch.
        **region: keywords of ``policy_region``.

    Returns:
        The task.
    """
    return lambda: loss.policy_region(rows, **region).gradient()


def fisher_product(loss: TRPOLoss, rows: PolicyRows, **region: int) -> Callable[[], object]:
    """One product with the Fisher matrix on all rows, once its graph is built.

    Args:
        loss: the policy's loss.
        rows: the batch.
        **region: keywords of ``policy_region``.

    Returns:
        The task.
    """
    problem = loss.policy_region(rows, **region)
    product, vector = problem.fisher_product(), torch.randn_like(problem.parameters)
    return lambda: product(vector)


def _shared(repetitions: int) -> dict[str, float]:
    loss, data = policy_and_data(share_params=True)
    rows = loss.policy_rows(data)
    cost = medians(
        {
            "unit": forward_backward(loss, rows),
            "fisher": fisher_product(loss, rows),
            "exact": kept_step(TrustRegionUpdater(loss), data),
            "default": kept_step(TrustRegionUpdater(loss, fisher_subsample=DEFAULT_SUBSAMPLE), data),
        },
        repetitions,
    )
    return _figures("shared policy", cost)


def _per_agent(repetitions: int) -> dict[str, float]:
    loss, data = policy_and_data(share_params=False)
    rows = loss.policy_rows(data)
    hatrpo = HATRPOSequentialObjective(loss)
    cost = medians(
        {
            "unit": forward_backward(loss, rows),
            "fisher": fisher_product(loss, rows),
            "exact": kept_step(TrustRegionUpdater(loss), data),
            "default": kept_step(TrustRegionUpdater(loss, fisher_subsample=DEFAULT_SUBSAMPLE), data),
            "hatrpo_exact": kept_step(TrustRegionUpdater(hatrpo), data),
            "hatrpo": kept_step(TrustRegionUpdater(hatrpo, fisher_subsample=DEFAULT_SUBSAMPLE), data),
            "one_unit": forward_backward(loss, rows, agent=0),
            "one_fisher": fisher_product(loss, rows, agent=0),
        },
        repetitions,
    )
    one = cost.pop("one_fisher") / cost.pop("one_unit")
    return {**_figures("a policy each", cost), "a policy each: Fisher product / fwd+bwd, of one agent": one}


def _figures(policy: str, cost: dict[str, float]) -> dict[str, float]:
    labels = {
        "fisher": "Fisher product",
        "exact": "update, all rows in F",
        "default": "update, 1/10 of the rows in F",
        "hatrpo_exact": "HATRPO update, all rows in F",
        "hatrpo": "HATRPO update, 1/10 of the rows in F",
    }
    unit = cost.pop("unit")
    ratios = {f"{policy}: {labels[task]} / fwd+bwd": seconds / unit for task, seconds in cost.items()}
    return {f"{policy}: fwd+bwd, {N_AGENTS} agents x {ROWS} rows [ms]": 1e3 * unit, **ratios}
