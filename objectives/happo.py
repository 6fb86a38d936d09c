"""HAPPO: clipped minibatch steps agent by agent; each takes into account what the agents before it have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.modules.models.multiagent import MultiAgentNetBase
from torchrl.objectives import ClipPPOLoss

from torchrl_trpo.objectives.agent_checks import check_agents_alone, check_stacked_agents
from torchrl_trpo.objectives.agent_order import AgentOrder, drawn_order
from torchrl_trpo.objectives.clipped import ClippedUpdater
from torchrl_trpo.objectives.loss_groups import check_separate_losses
from torchrl_trpo.objectives.policy_member import Member
from torchrl_trpo.objectives.policy_network import resolve_trust_region
from torchrl_trpo.objectives.policy_rows import PolicyRows
from torchrl_trpo.objectives.policy_update import actor_parameters, trained_keys


class HAPPOUpdater(AgentOrder, ClippedUpdater):
    r"""Updates agent by agent with TorchRL's ``ClipPPOLoss`` (HAPPO, Kuba et al. 2022, arXiv:2109.11251, algorithm 2).

    Agents are updated in an order :math:`i_1, \dots, i_n`. Agent :math:`i_m` takes some epochs of Adam steps on

    .. math::
        \mathbb{E}\big[ \min\big( r\, M^m \hat A^{i_m},\ \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon)\,
        M^m \hat A^{i_m} \big) \big] + c_H\, \mathbb{E}[H(\pi_\theta^{i_m})],
        \quad r = \frac{\pi_\theta^{i_m}(u|o)}{\pi_k^{i_m}(u|o)},
        \quad M^1 = 1, \quad M^{m+1} = M^m\, \frac{\pi_{new}^{i_m}(u|o)}{\pi_k^{i_m}(u|o)}

    Only the agent whose turn it is is evaluated, so that an update
    costs :math:`O(n)`. Each agent has an optimiser of its own: no momentum moves another agent.

    Clipping, entropy, keys and masks are the loss's, as they are at the time of a step. Advantages are normalised over
    the whole batch, not over minibatches, if the loss has ``normalize_advantage``. The critic is trained beside it, as
    in any PPO. Settings are plain attributes: change them between steps for a schedule (``updater.lr = 1e-4``).

    Args:
        losses: one ``ClipPPOLoss`` (or ``MAPPOLoss``) on a policy whose parameters are stacked per agent, as
            ``MultiAgentMLP(share_params=False)`` keeps them; or a mapping ``{group: ClipPPOLoss}`` for groups with
            different spaces. Agents are numbered through the groups in the mapping's order.

    Keyword Args:
        lr: Adam's learning rate. Default: 5e-4.
        epochs: each agent's passes over the batch. Default: 5.
        minibatch_size: rows (environment steps) per gradient step, of all processes together; of a recurrent policy, as
            many whole sequences as have these steps. Default: 1000.
        max_grad_norm: the gradient's largest Euclidean norm; a longer one is shortened to it. Default: 10.
        agent_order: ``"random"`` (drawn anew at every update from torch's generator, as the paper asks), ``"fixed"``
            (by index), or a sequence that names every agent index once.
        compiled: as for :class:`ClippedUpdater`. Default: False.
        process_group: the processes of ``torch.distributed`` that update together, each with rows of its own, as for
            :class:`TRPOLoss`: they begin with the first one's parameters and take the steps of one process with all
            rows. Default: this process alone.

    Raises:
        TypeError: if ``losses`` holds anything but ``ClipPPOLoss``, or a setting is not a number.
        ValueError: if a group's agents share their policy, ``agent_order`` is not an order of the agents, or a setting
            is outside its range.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs.utils import ExplorationType, set_exploration_type
        >>> from torchrl.modules import IndependentNormal, MultiAgentMLP, NormalParamExtractor, ProbabilisticActor
        >>> from torchrl.objectives import ClipPPOLoss
        >>> from torchrl_trpo.objectives import HAPPOUpdater
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
        >>> updater = HAPPOUpdater(ClipPPOLoss(actor), minibatch_size=7, agent_order=[1, 0])
        >>> stats = updater.step(data)
        >>> stats["order"].tolist(), bool((stats["improvement"] > 0).all())
        ([1, 0], True)
    """

    def __init__(
        self,
        losses: ClipPPOLoss | Mapping[str, ClipPPOLoss],
        *,
        lr: float = 5e-4,
        epochs: int = 5,
        minibatch_size: int = 1000,
        max_grad_norm: float = 10.0,
        agent_order: Literal["random", "fixed"] | Sequence[int] = "random",
        compiled: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            losses,
            lr=lr,
            epochs=epochs,
            minibatch_size=minibatch_size,
            max_grad_norm=max_grad_norm,
            compiled=compiled,
            process_group=process_group,
        )
        self._checked_keys: dict[str, list[NestedKey]] = {}  # by group, what was trained when its agents were checked
        self.agent_order = agent_order

    @property
    def n_agents(self) -> int:
        """The number of agents, of all groups together."""
        return len(self._members)

    def step(self, tensordict: TensorDictBase) -> TensorDict:
        """Updates the policy of each agent once on a batch; the batch is not modified.

        If anything raises, policies and optimisers are as before the step, to the bit. A minibatch whose loss or
        gradient is not finite is left out, so that no parameter can become NaN; for the agents that follow, this
        agent has not changed at a row that is not finite.

        Args:
            tensordict: the collected data, ``[*B, T]``, with advantages or what the losses need to compute them.

        Returns:
            Statistics with batch size ``[n_agents]``, in agent index order, all detached.

            - ``accepted`` (bool): whether every step was taken; False if a minibatch was left out.
            - ``kl``: the exact mean ``KL(π_k ‖ π_new)`` in nats, NaN for a distribution without a closed form.
            - ``improvement`` of the surrogate without clipping, times ``M``.
            - ``clip_fraction``: the share of the rows whose ratio is outside of the clipping interval after the update.
            - ``grad_norm``: the gradient's Euclidean norm before it is shortened, mean over the steps; not finite if
              that of a step was not.
            - ``factor_std``: the standard deviation over the rows of the ``M`` that the agents before have left;
              0 of the first.
            - ``order``: ``order[m]`` is the agent that was updated m-th.
        """
        check_separate_losses(self.losses)
        rows = {group: self._rows(group, tensordict) for group in self.losses}
        self._check_agents(rows)
        first = next(iter(rows.values()))
        factor = first.log_prob.new_ones(first.log_prob.shape[: first.row_dims].numel())  # M^1, [N]
        order = drawn_order(self.agent_order, self.n_agents, factor.device, self._ranks)
        self._follow_losses()
        stats: dict[int, TensorDict] = {}
        with self._restored():
            for agent in order:
                member = self._members[agent]
                own = rows[member.group] if member.index is None else rows[member.group].of_agent(member.index)
                stats[agent], ratio = self._update(member, own.with_factor(factor).contiguous())
                factor = factor * ratio.reshape(factor.shape)  # M^{m+1}
            by_agent = TensorDict.stack([stats[agent] for agent in range(self.n_agents)])
            return by_agent.set("order", torch.tensor(order).to(by_agent["kl"].device, non_blocking=True))

    def _make_members(self) -> list[Member]:
        """A member for each agent of all groups; a policy that is not stacked is one agent, as the data must show."""
        members = []
        for group, loss in self.losses.items():
            network, parameters = loss.actor_network, actor_parameters(loss)
            kind, n_agents = resolve_trust_region(None, network, parameters)
            if kind == "per_agent":
                members += [Member(group, loss, self.lr, index=index, n_agents=n_agents) for index in range(n_agents)]
            elif any(isinstance(net, MultiAgentNetBase) and net.n_agents > 1 for net in network.modules()):
                raise ValueError(_shared_message(group))
            else:
                members.append(Member(group, loss, self.lr))
        return members

    def _check_agents(self, rows: Mapping[str, PolicyRows]) -> None:
        """Refuses groups whose agents share their policy, or do not act alone as they do together."""
        stacked = {member.group for member in self._members if member.index is not None}
        for group, of_group in rows.items():
            if group not in stacked and of_group.agent_shape.numel() > 1:
                raise ValueError(_shared_message(group))
            policy = self.losses[group].actor_network, actor_parameters(self.losses[group])
            if group in stacked and self._checked_keys.get(group) != trained_keys(policy[1]):
                check_stacked_agents(*policy, of_group)
                check_agents_alone(*policy, of_group)
                self._checked_keys[group] = trained_keys(policy[1])


def _shared_message(group: str) -> str:
    return (
        f"HAPPO updates the agents one after the other, but agents of group {group!r} share parameters of the policy, "
        "or have them in networks that are not stacked. Give each agent its own slice: "
        "MultiAgentMLP(..., share_params=False). For shared parameters train with the loss "
        "itself, on all agents at once (MAPPO or IPPO)."
    )
