"""Policies like the recipes', batches of their actions, and updates that can be repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MultiAgentMLP, NormalParamExtractor, ProbabilisticActor

from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.distributions import BoundedTanhNormal
from torchrl_trpo.objectives import TRPOLoss

N_AGENTS, ROWS, N_OBS, N_ACT = 4, 6000, 16, 2
"""Agents, rows (environment steps) and sizes of ``vmas/balance`` in the recipes."""


def policy_and_data(
    n_agents: int = N_AGENTS,
    *,
    share_params: bool,
    rows: int = ROWS,
    hidden: Sequence[int] = (128, 128),
    distribution: type[torch.distributions.Distribution] = BoundedTanhNormal,
    **loss_settings: Any,
) -> tuple[TRPOLoss, TensorDict]:
    """A policy with its loss, and a batch of its actions with random advantages.

    Args:
        n_agents: the number of agents.

    Keyword Args:
        share_params: whether they share one network.
        rows: the number of environment steps.
        hidden: the sizes of the hidden layers.
        distribution: of the actions, from a mean and a standard deviation; a ``BoundedTanhNormal`` gets the bounds.
        **loss_settings: keywords of ``TRPOLoss``.

    Returns:
        The loss and the batch, ``[rows / 100, 100]``.
    """
    net = MultiAgentMLP(
        N_OBS,
        2 * N_ACT,
        n_agents=n_agents,
        centralized=False,
        share_params=share_params,
        num_cells=list(hidden),
        depth=len(hidden),
        activation_class=nn.Tanh,
    )
    bounds = {"low": -1.0, "high": 1.0}
    keys = [("agents", "loc"), ("agents", "scale")]
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(net, NormalParamExtractor()), in_keys=[("agents", "observation")], out_keys=keys
        ),
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=distribution,
        distribution_kwargs=bounds if distribution is BoundedTanhNormal else {},
        return_log_prob=True,
    )
    batch_size = [rows // 100, 100]
    data = TensorDict({("agents", "observation"): torch.randn(*batch_size, n_agents, N_OBS)}, batch_size)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        actor(data)
    data["advantage"] = torch.randn(*batch_size, n_agents, 1)
    return TRPOLoss(actor, entropy_bonus=False, **loss_settings), data


def kept(parameters: Iterable[Tensor], update: Callable[[], object]) -> Callable[[], Any]:
    """An update that can be repeated: what it writes is taken back.

    Args:
        parameters: what it writes.
        update: the update.

    Returns:
        The update, always from the same parameters.
    """
    live = [value.data for value in parameters]
    start = [value.clone() for value in live]

    def task() -> object:
        result = update()
        for value, old in zip(live, start, strict=True):
            value.copy_(old)
        return result

    return task


def kept_step(updater: TrustRegionUpdater, data: TensorDictBase) -> Callable[[], Any]:
    """A step of an updater that can be repeated.

    Args:
        updater: the updater.
        data: the batch.

    Returns:
        The step; it returns the updater's statistics.
    """
    return kept(updater.objective.parameters(), lambda: updater.step(data))
