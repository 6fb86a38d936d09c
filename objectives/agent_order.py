"""The order in which a sequential update takes the agents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from torchrl_trpo.arguments import plain_number
from torchrl_trpo.parallel.ranks import ALONE, Ranks


class AgentOrder:
    """The order of agents that are taken one after the other."""

    @property
    @abstractmethod
    def n_agents(self) -> int:
        """The number of agents, of all groups together."""

    @property
    def agent_order(self) -> Literal["random"] | tuple[int, ...]:
        """The order of the agents, or ``"random"``; can be assigned."""
        return self._agent_order

    @agent_order.setter
    def agent_order(self, order: Literal["random", "fixed"] | Sequence[int]) -> None:
        self._agent_order = checked_order(order, self.n_agents)


def checked_order(
    order: Literal["random", "fixed"] | Sequence[int], n_agents: int
) -> Literal["random"] | tuple[int, ...]:
    """``agent_order`` as ``"random"`` or the agents' indices in their order; anything else raises ValueError."""
    if isinstance(order, str) and order in {"random", "fixed"}:
        return "random" if order == "random" else tuple(range(n_agents))
    indices = [plain_number(index) for index in order] if isinstance(order, Iterable) else []
    if any(type(index) is not int for index in indices) or sorted(indices) != list(range(n_agents)):
        raise ValueError(
            f"agent_order: {order!r}. Legal: 'random', 'fixed', or a sequence that names each of the "
            f"{n_agents} agents 0 to {n_agents - 1} once."
        )
    return tuple(indices)


def drawn_order(
    order: Literal["random"] | tuple[int, ...], n_agents: int, device: torch.device, ranks: Ranks = ALONE
) -> Sequence[int]:
    """The agents in the order of one update; a random one is drawn from torch's generator, for all ranks by the first.

    ``device`` is where the ranks exchange it.
    """
    if order != "random":
        return order
    drawn = torch.randperm(n_agents)
    return (drawn if ranks.size == 1 else ranks.first_(drawn.to(device))).tolist()
