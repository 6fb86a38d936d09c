"""The order in which a sequential update takes the agents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch

from torchrl_trpo.arguments import plain_number
from torchrl_trpo.parallel.ranks import ALONE, Ranks


class AgentOrder:
    """The order of agents that are taken one after the other."""

    _ORDERS: ClassVar[tuple[str, ...]] = ("random", "fixed")

    @property
    @abstractmethod
    def n_agents(self) -> int:
        """The number of agents, of all groups together."""

    @property
    def agent_order(self) -> str | tuple[int, ...]:
        """The order of the agents, or the name of one that is not fixed; can be assigned."""
        return self._agent_order

    @agent_order.setter
    def agent_order(self, order: str | Sequence[int]) -> None:
        n_agents = self.n_agents
        if isinstance(order, str) and order in self._ORDERS:
            self._agent_order = order if order != "fixed" else tuple(range(n_agents))
            return
        indices = [plain_number(index) for index in order] if isinstance(order, Iterable) else []
        if any(type(index) is not int for index in indices) or sorted(indices) != list(range(n_agents)):
            raise ValueError(
                f"agent_order: {order!r}. Legal: {', '.join(map(repr, self._ORDERS))}, or a sequence that names each "
                f"of the {n_agents} agents 0 to {n_agents - 1} once."
            )
        self._agent_order = tuple(indices)


def drawn_order(order: str | Sequence[int], n_agents: int, device: torch.device, ranks: Ranks = ALONE) -> Sequence[int]:
    """The agents in the order of one update; a random one is drawn from torch's generator, for all ranks by the first.

    ``device`` is where the ranks exchange it.
    """
    if order != "random":
        return range(n_agents) if isinstance(order, str) else order
    drawn = torch.randperm(n_agents)
    return (drawn if ranks.size == 1 else ranks.first_(drawn.to(device))).tolist()
