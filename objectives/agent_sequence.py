"""Updates agent by agent: whose turn it is, and what those before have changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from torchrl_trpo.arguments import plain_number
from torchrl_trpo.parallel.ranks import ALONE, Ranks


class AgentTurn:
    r"""One agent's turn in a sequential update.

    Attributes:
        agent: the agent's index.
        factor: :math:`M^m`, what the turns before have made of each row, ``[N]``: the agent's advantages are multiplied
            with it.
    """

    def __init__(self, agent: int, factor: Tensor) -> None:
        self.agent = agent
        self.factor = factor
        self._ratio: Tensor | None = None

    def finish(self, ratio: Tensor) -> None:
        """Ends the turn.

        Args:
            ratio: ``π_new(u|o) / π_k(u|o)`` of the agent's actions after its update, ``[N]`` or ``[N, 1]``.
        """
        self._ratio = ratio.detach().reshape(self.factor.shape)


class AgentSequence:
    r"""The sequence of HATRPO and HAPPO, whatever updates an agent (Kuba et al. 2022, arXiv:2109.11251).

    Agents are updated one after the other in an order :math:`i_1, \dots, i_n`. Agent :math:`i_m` sees advantages that
    are multiplied with what the agents before it have changed,

    .. math::
        M^1 = 1, \quad M^{m+1} = M^m\, \frac{\pi_{new}^{i_m}(u|o)}{\pi_k^{i_m}(u|o)}

    Args:
        n_agents: the number of agents.

    Keyword Args:
        agent_order: ``"random"`` (drawn anew at every update from torch's generator, as the paper asks), ``"fixed"``
            (by index), or a sequence that names every agent index once.
        ranks: the processes that update together: all take the first one's order. Default: this one alone.

    Raises:
        ValueError: if ``agent_order`` is not an order of the agents.

    Examples:
        >>> import torch
        >>> from torchrl_trpo.objectives import AgentSequence
        >>> for turn in AgentSequence(2, agent_order=[1, 0]).turns(torch.ones(3)):
        ...     print(turn.agent, turn.factor.tolist())
        ...     turn.finish(torch.tensor([1.0, 1.5, 0.5]))  # after the agent's update
        1 [1.0, 1.0, 1.0]
        0 [1.0, 1.5, 0.5]
    """

    def __init__(
        self,
        n_agents: int,
        *,
        agent_order: Literal["random", "fixed"] | Sequence[int] = "random",
        ranks: Ranks = ALONE,
    ) -> None:
        self.n_agents = n_agents
        self.agent_order = agent_order
        self._ranks = ranks

    @property
    def agent_order(self) -> Literal["random"] | tuple[int, ...]:
        """The order of the agents, or ``"random"``; can be assigned."""
        return self._agent_order

    @agent_order.setter
    def agent_order(self, order: Literal["random", "fixed"] | Sequence[int]) -> None:
        self._agent_order: Literal["random"] | tuple[int, ...]
        if isinstance(order, str) and order in {"random", "fixed"}:
            self._agent_order = "random" if order == "random" else tuple(range(self.n_agents))
            return
        indices = [plain_number(index) for index in order] if isinstance(order, Iterable) else []
        if any(type(index) is not int for index in indices) or sorted(indices) != list(range(self.n_agents)):
            raise ValueError(
                f"agent_order: {order!r}. Legal: 'random', 'fixed', or a sequence that names each of the "
                f"{self.n_agents} agents 0 to {self.n_agents - 1} once."
            )
        self._agent_order = tuple(indices)

    def turns(self, ones: Tensor) -> Iterator[AgentTurn]:
        """The turns of one update, in its order.

        Args:
            ones: the factor of the first agent, ``[N]``: a one for each row.

        Yields:
            A turn; :meth:`AgentTurn.finish` must be called before the next one.

        Raises:
            RuntimeError: if it was not.
        """
        factor = ones
        for agent in self._draw(ones.device):
            turn = AgentTurn(agent, factor)
            yield turn
            if turn._ratio is None:
                raise RuntimeError(
                    f"the turn of agent {agent} was not finished: call turn.finish(ratio) after its update."
                )
            factor = factor * turn._ratio

    def _draw(self, device: torch.device) -> Sequence[int]:
        if self.agent_order != "random":
            return self.agent_order
        order = torch.randperm(self.n_agents)
        return (order if self._ranks.size == 1 else self._ranks.first_(order.to(device))).tolist()
