"""HATRPO: trust-region steps agent by agent; each takes into account what the agents before it have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential, dispatch
from torch import Tensor, nn
from torchrl.modules.models.multiagent import MultiAgentNetBase
from torchrl.objectives import LossModule

from torchrl_trpo.errors import warn
from torchrl_trpo.keys import next_key
from torchrl_trpo.objectives.agent_checks import check_agents_alone
from torchrl_trpo.objectives.agent_order import AgentOrder, drawn_order
from torchrl_trpo.objectives.loss_groups import check_separate_losses
from torchrl_trpo.objectives.policy_network import resolve_trust_region
from torchrl_trpo.objectives.policy_region import PolicyTrustRegion
from torchrl_trpo.objectives.policy_rows import PolicyRows
from torchrl_trpo.objectives.policy_update import current_estimator, row_mask, trained_keys
from torchrl_trpo.objectives.trpo import TRPOLoss


class HATRPOSequentialObjective(AgentOrder, LossModule):
    r"""The sequential surrogate of HATRPO (Kuba et al. 2022, arXiv:2109.11251, algorithm 1; Zhong et al. 2024).

    Agents are solved in an order :math:`i_1, \dots, i_n`. Agent :math:`i_m` maximises, within its own trust region,

    .. math::
        L^{i_m}(\theta) = \mathbb{E}\Big[ M^m\, \frac{\pi_\theta^{i_m}(u|o)}{\pi_k^{i_m}(u|o)}\, \hat A^{i_m} \Big],
        \quad M^1 = 1, \quad M^{m+1} = M^m\, \frac{\pi_{new}^{i_m}(u|o)}{\pi_k^{i_m}(u|o)}

    which gives each update a monotonic-improvement bound for cooperative teams. Only the agent that is being solved is
    evaluated, so an update costs :math:`O(n)`, in a greedy order :math:`O(n^2)`. The bound needs one reward for the
    team: a warning says so, once, when the agents' rewards differ.

    Args:
        losses: one :class:`TRPOLoss` whose parameters are per agent, or a mapping ``{group: TRPOLoss}`` for groups with
            different spaces; every agent of every group is one step of the sequence. Agents are numbered through the
            groups in the mapping's order.

    Keyword Args:
        agent_order: ``"random"`` (drawn anew at every update from torch's generator, as the paper asks), ``"fixed"``
            (by index), ``"greedy"`` (next whoever then gains most for the same divergence, see
            :class:`~torchrl_trpo.TrustRegionUpdater`), or a sequence that names every agent index once.

    Attributes:
        actor_network: the policy; of several groups, their policies in sequence.
        critic_network: the critic; of several groups, their critics in sequence. None if a group has none.

    Raises:
        TypeError: if ``losses`` holds anything but ``TRPOLoss``.
        ValueError: if a group's agents share their policy, ``agent_order`` is not an order of the agents, or the losses
            have different process groups.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs.utils import ExplorationType, set_exploration_type
        >>> from torchrl.modules import IndependentNormal, MultiAgentMLP, NormalParamExtractor, ProbabilisticActor
        >>> from torchrl_trpo import TrustRegionUpdater
        >>> from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss
        >>> net = MultiAgentMLP(3, 4, n_agents=2, centralized=False, share_params=False, num_cells=8, depth=1)
        >>> keys = [("agents", "loc"), ("agents", "scale")]
        >>> module = Mod(torch.nn.Sequential(net, NormalParamExtractor()), [("agents", "observation")], keys)
        >>> actor = ProbabilisticActor(
        ...     module, in_keys=keys, out_keys=[("agents", "action")],
        ...     distribution_class=IndependentNormal, return_log_prob=True,
        ... )
        >>> data = TensorDict({("agents", "observation"): torch.randn(5, 7, 2, 3)}, [5, 7])
        >>> with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        ...     data = actor(data)
        >>> data["advantage"] = torch.randn(5, 7, 2, 1)
        >>> objective = HATRPOSequentialObjective(TRPOLoss(actor), agent_order=[1, 0])
        >>> stats = TrustRegionUpdater(objective, max_kl=0.01).step(data)
        >>> stats["order"]  # agent 1 was solved first
        tensor([1, 0])
    """

    _ORDERS = ("random", "fixed", "greedy")

    @dataclass
    class _AcceptedKeys:
        """No keys: the losses have theirs."""

    losses: nn.ModuleDict
    actor_network: TensorDictModuleBase
    critic_network: TensorDictModuleBase | None

    def __init__(
        self,
        losses: TRPOLoss | Mapping[str, TRPOLoss],
        *,
        agent_order: Literal["random", "fixed", "greedy"] | Sequence[int] = "random",
    ) -> None:
        super().__init__()
        self._out_keys: list[NestedKey] | None = None
        self._updates, self._warned_of_rewards = 0, False
        self._checked_keys: dict[str, list[NestedKey]] = {}  # by group, what was trained when its agents were checked
        if not isinstance(losses, (TRPOLoss, Mapping)):
            raise TypeError(f"losses: a {type(losses).__name__}. Legal: a TRPOLoss, or {{group: TRPOLoss, ...}}.")
        groups = {"agents": losses} if isinstance(losses, TRPOLoss) else dict(losses)
        if not groups:
            raise ValueError("losses is an empty mapping; legal: {group: TRPOLoss, ...} with at least one group.")
        self.losses = nn.ModuleDict(groups)
        self._agents: list[tuple[str, int]] = []
        for group, loss in groups.items():
            self._agents += [(group, agent) for agent in range(_count_agents(group, loss))]
        self._ranks = next(iter(groups.values())).ranks
        if any(loss.ranks.group is not self._ranks.group for loss in groups.values()):
            raise ValueError("process_group: the losses have different ones. Legal: the same for all of them, or None.")
        self.agent_order = agent_order
        # In __dict__, as in TorchRL's losses, so that the parameters are listed once, as those of the losses.
        self.__dict__["actor_network"] = _in_sequence([loss.actor_network for loss in groups.values()])
        self.__dict__["critic_network"] = _in_sequence([loss.critic_network for loss in groups.values()])

    @property
    def n_agents(self) -> int:
        """The number of agents, of all groups together."""
        return len(self._agents)

    def _check_rewards(self, tensordict: TensorDictBase) -> None:
        """Warns once if the agents' rewards differ; asks at updates 1, 2, 4, 8, ..., since it waits for the device."""
        self._updates += 1
        if self._warned_of_rewards or self._updates & (self._updates - 1):
            return
        rewards, masks = [], []
        for loss in self._groups.values():
            if getattr(current_estimator(loss), "team_reward", None) is not None:
                return
            reward = tensordict.get(next_key(loss.tensor_keys.reward), None)
            if reward is not None:
                mask = row_mask(loss, tensordict, reward)
                rewards.append(reward.flatten(tensordict.batch_dims))
                masks.append((torch.ones_like(reward) if mask is None else mask).flatten(tensordict.batch_dims).bool())
        if not rewards or rewards[0].is_meta:
            return
        all_rewards, counts = torch.cat(rewards, -1).nan_to_num(), torch.cat(masks, -1)  # [*B, n]
        first = all_rewards.gather(-1, counts.byte().argmax(-1, keepdim=True))  # of an agent that counts
        if not torch.allclose(torch.where(counts, all_rewards, first), first.expand_as(all_rewards)):
            self._warned_of_rewards = True
            warn(
                "The agents' rewards differ. HATRPO's guarantee that no update lowers the expected return (Kuba et al. "
                "2022, theorem 2) is for one reward that all agents share. AgentGAE and CentralCriticValueEstimator "
                "make one with team_reward='mean' or 'sum'; rewards that compete are a task for ITRPO or MATRPO.",
            )

    @property
    def _groups(self) -> dict[str, TRPOLoss]:
        return cast("dict[str, TRPOLoss]", dict(self.losses.items()))

    @property
    def in_keys(self) -> list[NestedKey]:
        """What :meth:`forward` reads."""
        return list(dict.fromkeys(key for loss in self._groups.values() for key in loss.in_keys))

    @property
    def out_keys(self) -> list[NestedKey]:
        """What :meth:`forward` returns."""
        return ["loss_objective", "kl"] if self._out_keys is None else self._out_keys

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values

    def set_keys(self, **kwargs: NestedKey | Mapping[str, NestedKey]) -> None:
        """Sets the keys of the loss, or of several groups' losses.

        Args:
            **kwargs: as for :meth:`~torchrl.objectives.LossModule.set_keys`; with several groups each a mapping
                ``{group: key}``.

        Raises:
            ValueError: if there are several groups, and not a key for each of them.
        """
        for name, keys in kwargs.items():
            if isinstance(keys, Mapping):
                given = dict(keys)
            else:
                given = {} if len(self.losses) > 1 else dict.fromkeys(self.losses, keys)
            if set(given) != set(self.losses):
                raise ValueError(
                    f"{name}: {keys!r}. The groups {list(self.losses)} have keys of their own; legal: a mapping "
                    "{group: key} of all of them, or losses[group].set_keys(...)."
                )
            for group, loss in self._groups.items():
                loss.set_keys(**{name: given[group]})

    @property
    def loss_mask_key(self) -> NestedKey | Literal["auto"] | None:
        """Which entry says what counts, as for any TorchRL loss; that of all groups' losses."""
        return next(iter(self._groups.values())).loss_mask_key

    @loss_mask_key.setter
    def loss_mask_key(self, value: NestedKey | Literal["auto"] | None) -> None:
        for loss in self._groups.values():
            loss.loss_mask_key = value

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> Self:
        """Makes the value estimators of the losses, as :meth:`TRPOLoss.make_value_estimator` does.

        Args:
            value_type: as for a loss.
            **hyperparams: as for a loss.

        Returns:
            The objective itself.
        """
        for loss in self._groups.values():
            loss.make_value_estimator(value_type, **hyperparams)
        return self

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        r"""Evaluates the sequential surrogate at the current parameters; nothing else changes.

        Agents are taken in ``agent_order``, by index when that is ``"random"`` or ``"greedy"``; ``M`` is held constant.

        Args:
            tensordict: the data, ``[*B, T]``.

        Returns:
            ``loss_objective`` (gradient): :math:`-\sum_m L^{i_m}(\theta)`; ``kl`` (log only): each agent's mean KL in
            nats from its policy at ``θ_k`` of the data, ``[n_agents]``, NaN where the data has no distribution
            parameters, or the distribution no closed form.
        """
        check_separate_losses(self._groups)
        ratios: list[Tensor] = []
        terms: list[Tensor] = []
        divergences: list[Tensor] = []
        for loss in self._groups.values():
            ratio, weighted_advantage, kl = loss.surrogate_terms(tensordict)  # [N, n], [N, n], [n]
            ratios.append(ratio)
            terms.append(weighted_advantage)
            divergences.append(kl)
        ratio, term = torch.cat(ratios, -1), torch.cat(terms, -1)
        order = list(range(self.n_agents)) if isinstance(self.agent_order, str) else list(self.agent_order)
        ratio, term = ratio[:, order], term[:, order]
        after = ratio.detach().cumprod(-1)
        factor = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], -1)  # M^1 ... M^n
        return TensorDict({"loss_objective": -(factor * ratio * term).sum(), "kl": torch.cat(divergences)})

    def first_regions(self, tensordict: TensorDictBase) -> Iterator[PolicyTrustRegion]:
        """The agents' subproblems before any of them has moved, with ``M = 1``, in the order of their indices.

        Args:
            tensordict: the data, ``[*B, T]``.

        Yields:
            One subproblem per agent, which is not to be solved.
        """
        rows = {group: loss.policy_rows(tensordict) for group, loss in self._groups.items()}
        for index in range(self.n_agents):
            yield self._region(rows, index, _first_factor(rows))

    def trust_regions(
        self, tensordict: TensorDictBase, gains: Callable[[Iterable[PolicyTrustRegion]], Tensor] | None = None
    ) -> Iterator[PolicyTrustRegion]:
        """The sequence of one update: each agent's subproblem, with the factor that those before it leave.

        Args:
            tensordict: the data, ``[*B, T]``.
            gains: for the order ``"greedy"`` alone, what each of the subproblems that are left gains, ``[n_left]``.

        Yields:
            One subproblem per agent; it must be solved and written before the next is asked for.

        Raises:
            TypeError: if the order is ``"greedy"``, and ``gains`` is missing.
        """
        if self.agent_order == "greedy" and gains is None:
            raise TypeError("gains: None. agent_order='greedy' needs it; TrustRegionUpdater has one.")
        check_separate_losses(self._groups)
        rows = {group: loss.policy_rows(tensordict) for group, loss in self._groups.items()}
        for group, loss in self._groups.items():
            if loss.trust_region == "shared" and rows[group].agent_shape.numel() > 1:
                raise ValueError(_shared_message(group))
            keys = trained_keys(loss.actor_parameters)
            if loss.trust_region == "per_agent" and self._checked_keys.get(group) != keys:
                check_agents_alone(loss.actor_network, loss.actor_parameters, rows[group])
                self._checked_keys[group] = keys
        self._check_rewards(tensordict)
        factor = _first_factor(rows)
        left = list(drawn_order(self.agent_order, self.n_agents, factor.device, self._ranks))
        while left:
            place = 0
            if self.agent_order == "greedy" and gains is not None:
                found = gains(self._region(rows, index, factor) for index in left)
                place = int(self._ranks.first_(found).argmax())  # waits for the device
            region = self._region(rows, left.pop(place), factor)
            yield region  # is solved, and written if the step is accepted
            factor = factor * region.ratio().reshape(factor.shape)  # M^{m+1}
            del region  # the next one needs the memory

    def _region(self, rows: Mapping[str, PolicyRows], index: int, factor: Tensor) -> PolicyTrustRegion:
        group, agent = self._agents[index]
        return self._groups[group].policy_region(rows[group], agent=agent, index=index, factor=factor)


def _first_factor(rows: Mapping[str, PolicyRows]) -> Tensor:
    """``M^1``, ``[N]``."""
    first = next(iter(rows.values()))
    return first.log_prob.new_ones(first.log_prob.shape[: first.row_dims].numel())


def _in_sequence(networks: Sequence[TensorDictModuleBase | None]) -> TensorDictModuleBase | None:
    if len(networks) == 1 or None in networks:
        return networks[0] if len(networks) == 1 else None
    return TensorDictSequential(*networks)


def _count_agents(group: str, loss: TRPOLoss) -> int:
    if not isinstance(loss, TRPOLoss):
        raise TypeError(f"losses must be a TRPOLoss or a mapping to TRPOLoss; {group!r} is {type(loss).__name__}.")
    if loss.trust_region == "per_agent":
        return loss.n_regions
    if resolve_trust_region(None, loss.actor_network, loss.actor_parameters)[0] == "per_agent":
        raise ValueError(
            f"the policy of group {group!r} has parameters for each agent, but its loss was made with "
            "trust_region='shared', one region for all of them. Leave trust_region out."
        )
    if any(isinstance(net, MultiAgentNetBase) and net.n_agents > 1 for net in loss.actor_network.modules()):
        raise ValueError(_shared_message(group))
    return 1  # trust_regions checks that the data has one agent


def _shared_message(group: str) -> str:
    return (
        f"HATRPO updates the agents one after the other, but agents of group {group!r} share parameters of the "
        "policy, or have them in networks that are not stacked. Give each agent its own slice: "
        "MultiAgentMLP(..., share_params=False); where their networks differ, a group with a loss of its own. For "
        "shared parameters use TRPOLoss with TrustRegionUpdater directly (MATRPO or ITRPO)."
    )
