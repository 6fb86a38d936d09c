"""HAPPO: clipped minibatch steps agent by agent, each seeing what the agents before it have changed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torch import distributions as D
from torchrl.modules import set_recurrent_mode
from torchrl.modules.models.multiagent import MultiAgentNetBase
from torchrl.objectives import ClipPPOLoss

from torchrl_trpo.divergence import has_exact_entropy, kl_divergence
from torchrl_trpo.layout import reads_init
from torchrl_trpo.minibatches import ADAM_RANGES, average_gradients, count_by_rank, draw_minibatches
from torchrl_trpo.objectives.agent_sequence import AgentSequence, AgentTurn
from torchrl_trpo.objectives.loss_parts import estimated_advantage, exact_entropy, row_mask, standardized_advantage
from torchrl_trpo.objectives.policy_network import (
    agent_policy,
    distribution_parameters,
    input_keys,
    resolve_trust_region,
    slice_agents,
    stacked_prefixes,
)
from torchrl_trpo.objectives.policy_rows import (
    LOG_PROB_ROLE,
    PolicyRows,
    broadcast_advantage,
    check_agent_dim,
    entry,
    flatten_rows,
)
from torchrl_trpo.ranged import RangedSettings
from torchrl_trpo.ranks import Ranks

_COUNTS = "_counts"
"""Which steps of a sequence count, in a minibatch."""
_OF_THE_POLICY = ("forward", "_log_weight", "_get_cur_log_prob", "_get_entropy", "_weighted_loss_entropy")
"""What of a loss an agent's update takes from ``ClipPPOLoss`` itself."""


@dataclass
class _Member:
    """An agent of the sequence.

    Attributes:
        group: the agent's group.
        index: where it is in the group; None for the one agent of a policy without an agent dimension.
        network: its policy.
        parameters: the policy's parameters and buffers; those that are trained share the memory of the group's.
        optimizer: over its own parameters.
    """

    group: str
    index: int | None
    network: ProbabilisticTensorDictSequential
    parameters: TensorDictBase
    optimizer: torch.optim.Adam

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that are trained, each once."""
        return self.optimizer.param_groups[0]["params"]


class _AgentLoss(ClipPPOLoss):
    """``ClipPPOLoss``, with the entropy by a formula wherever there is one."""

    def _get_entropy(self, dist: D.Distribution, adv_shape: torch.Size) -> Tensor | TensorDict:
        return exact_entropy(dist, adv_shape) if has_exact_entropy(dist) else super()._get_entropy(dist, adv_shape)


class HAPPOUpdater(RangedSettings):
    r"""Updates agent by agent with TorchRL's ``ClipPPOLoss`` (HAPPO, Kuba et al. 2022, arXiv:2109.11251, algorithm 2).

    Agents are updated in an order :math:`i_1, \dots, i_n`. Agent :math:`i_m` takes some epochs of Adam steps on

    .. math::
        \mathbb{E}\big[ \min\big( r\, M^m \hat A^{i_m},\ \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon)\,
        M^m \hat A^{i_m} \big) \big] + c_H\, \mathbb{E}[H(\pi_\theta^{i_m})],
        \quad r = \frac{\pi_\theta^{i_m}(u|o)}{\pi_k^{i_m}(u|o)}

    with the :math:`M^m` of :class:`AgentSequence`. Only the agent whose turn it is is evaluated, so that an update
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

    _RANGES = ADAM_RANGES

    def __init__(
        self,
        losses: ClipPPOLoss | Mapping[str, ClipPPOLoss],
        *,
        lr: float = 5e-4,
        epochs: int = 5,
        minibatch_size: int = 1000,
        max_grad_norm: float = 10.0,
        agent_order: Literal["random", "fixed"] | Sequence[int] = "random",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.lr = lr
        self.epochs = epochs
        self.minibatch_size = minibatch_size
        self.max_grad_norm = max_grad_norm
        self.losses = dict(losses) if isinstance(losses, Mapping) else {"agents": losses}
        if not self.losses:
            raise ValueError("losses is an empty mapping; legal: {group: ClipPPOLoss, ...} with at least one group.")
        self._ranks = Ranks(process_group)
        self._members: list[_Member] = []
        for group, loss in self.losses.items():
            _check_loss(group, loss, self._ranks)
            for tensor in (*loss.parameters(), *loss.buffers()):
                self._ranks.first_(tensor.data)
            self._members += _make_members(group, loss, lr)
        self._sequence = AgentSequence(len(self._members), agent_order=agent_order, ranks=self._ranks)

    def __deepcopy__(self, memo: dict[int, Any]) -> HAPPOUpdater:
        """An updater of its own, on copies of the losses, that takes the same steps."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for name, value in vars(self).items():
            if name != "_members":  # whose parameters share the memory of the losses', which a copy would not
                setattr(copied, name, copy.deepcopy(value, memo))
        members = [_make_members(group, loss, self.lr) for group, loss in copied.losses.items()]
        copied._members = [member for of_group in members for member in of_group]
        for member, original in zip(copied._members, self._members, strict=True):
            member.optimizer.load_state_dict(copy.deepcopy(original.optimizer.state_dict()))
        return copied

    @property
    def n_agents(self) -> int:
        """The number of agents, of all groups together."""
        return len(self._members)

    @property
    def agent_order(self) -> Literal["random"] | tuple[int, ...]:
        """The order of the agents, or ``"random"``; can be assigned."""
        return self._sequence.agent_order

    @agent_order.setter
    def agent_order(self, order: Literal["random", "fixed"] | Sequence[int]) -> None:
        self._sequence.agent_order = order

    def step(self, tensordict: TensorDictBase) -> TensorDict:
        """Updates the policy of each agent once on a batch; the batch is not modified.

        A minibatch whose loss or gradient is not finite is left out, so that no parameter can become NaN; to the agents
        that follow, a row that is not finite is as if this agent had not changed there.

        Args:
            tensordict: the collected data, ``[*B, T]``, with advantages or what the losses need to compute them.

        Returns:
            Statistics with batch size ``[n_agents]``, in agent index order, all detached.

            - ``accepted`` (bool): whether every step was taken; False if a minibatch was left out.
            - ``kl``: the exact mean ``KL(π_k ‖ π_new)`` in nats.
            - ``improvement`` of the surrogate without clipping, times ``M``.
            - ``clip_fraction``: the share of the rows whose ratio is outside of the clipping interval after the update.
            - ``grad_norm``: the gradient's Euclidean norm before it is shortened, mean over the steps; not finite if
              that of a step was not.
            - ``factor_std``: the standard deviation over the rows of the ``M`` that the agents before have left;
              0 of the first.
            - ``order``: ``order[m]`` is the agent that was updated m-th.
        """
        rows = {group: self._rows(group, loss, tensordict) for group, loss in self.losses.items()}
        first = next(iter(rows.values()))
        order: list[int] = []
        updated: list[TensorDict] = []
        for turn in self._sequence.turns(first.log_prob.new_ones(first.log_prob.shape[: first.row_dims].numel())):
            updated.append(self._update(self._members[turn.agent], rows[self._members[turn.agent].group], turn))
            order.append(turn.agent)
        stats: TensorDict = torch.stack(updated)
        stats = stats[sorted(range(len(order)), key=order.__getitem__)]
        return stats.set("order", torch.tensor(order, device=stats["kl"].device))

    def state_dict(self) -> dict[str, Any]:
        """The settings by name, and the ``optimizers``' states by agent."""
        return {**super().state_dict(), "optimizers": [member.optimizer.state_dict() for member in self._members]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, all or none.

        Args:
            state_dict: the settings by name, and the optimisers' states.

        Raises:
            KeyError: if something is missing or unknown.
            ValueError: if it is of another number of agents, or an optimiser's state is not that of the agent's.
        """
        settings = dict(state_dict)
        if "optimizers" not in settings:
            raise KeyError(f"'optimizers' is missing from the state_dict, which has {list(state_dict)}.")
        states = settings.pop("optimizers")
        if len(states) != self.n_agents:
            raise ValueError(f"optimizers: the state_dict has {len(states)} agents, legal: {self.n_agents}.")
        optimizers = []
        for agent, (member, state) in enumerate(zip(self._members, states, strict=True)):
            _follow(member, self.losses[member.group])  # whose type the state takes
            try:
                optimizers.append(_loaded(member.trained, state))
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"optimizers[{agent}] is not a state of this agent's Adam: {error!r}.") from error
        super().load_state_dict(settings)
        for member, optimizer in zip(self._members, optimizers, strict=True):
            member.optimizer = optimizer

    def _rows(self, group: str, loss: ClipPPOLoss, tensordict: TensorDictBase) -> PolicyRows:
        """What the group's update needs of a batch; what the loss reads is in the rows' ``inputs`` and ``action``."""
        if 0 in tensordict.batch_size:
            raise ValueError(f"the data is empty: its batch size is {tuple(tensordict.batch_size)}.")
        tensordict = tensordict.clone(False)
        keys = loss.tensor_keys
        advantage = self._advantage(loss, tensordict)
        log_prob = entry(tensordict, keys.sample_log_prob, LOG_PROB_ROLE)
        if is_tensor_collection(log_prob):  # of the parts of a composite action
            log_prob = sum(log_prob.values(True, True))
        log_prob = log_prob.unsqueeze(-1)
        members = [member for member in self._members if member.group == group]
        if members[0].index is not None:
            check_agent_dim(log_prob, tensordict.batch_size, -2, len(members))
        elif log_prob.shape[tensordict.batch_dims : -1].numel() > 1:
            raise ValueError(_shared_message(group))
        inputs = entry(tensordict, input_keys(loss.actor_network), "the actor's in_keys")
        for name in _log_prob_keys(loss):
            inputs.update(tensordict.select(name).apply(lambda value: value.unsqueeze(-1)))  # to be known as per agent
        return flatten_rows(
            inputs,
            action=entry(tensordict, keys.action, "action"),
            log_prob=log_prob,
            advantage=broadcast_advantage(advantage, log_prob, keys.advantage),
            mask=row_mask(loss, tensordict, log_prob),
            per_agent=True,
            sequences=reads_init(loss.actor_network),
            ranks=self._ranks,
        )

    def _advantage(self, loss: ClipPPOLoss, tensordict: TensorDictBase) -> Tensor:
        """The advantage, normalised over the whole batch if the loss does so."""
        advantage, missing = estimated_advantage(loss, tensordict)
        if loss.normalize_advantage:
            return standardized_advantage(loss, advantage, tensordict, self._ranks)
        return loss._maybe_normalize_advantage(advantage, tensordict, update_norm=missing)

    def _update(self, member: _Member, rows: PolicyRows, turn: AgentTurn) -> TensorDict:
        """Updates one agent; ends its turn."""
        group_loss = self.losses[member.group]
        if member.index is not None:
            rows = rows.of_agent(member.index)
        rows = rows.with_factor(turn.factor).contiguous()
        _follow(member, group_loss)
        counts = (rows.weight > 0).expand_as(rows.log_prob)
        before = self._distribution(member, rows)
        grad_norm, taken = self._fit(member, rows, counts)
        after = self._distribution(member, rows)
        low, high = group_loss._clip_bounds
        with torch.no_grad():
            log_ratio = rows.log_ratio(after)
            ratio_before, ratio = (
                rows.log_ratio(each, group_loss.max_importance_ratio).exp() for each in (before, after)
            )
            counts = counts & rows.advantage.isfinite()  # which is NaN where anything of a row is not finite
            rows_of = {
                "kl": kl_divergence(before, after, rows.log_prob.ndim - 1).unsqueeze(-1),
                "improvement": rows.factor * (ratio - ratio_before) * rows.advantage,
                "clip_fraction": ((log_ratio < low) | (log_ratio > high)).to(ratio.dtype),
                "change": (rows.factor - 1).expand_as(ratio),
                "square": (rows.factor - 1).square().expand_as(ratio),  # of what is small: it keeps the digits
            }
            means = [(rows.weight * torch.where(counts, value, 0.0)).sum() for value in rows_of.values()]
            sums = dict(zip(rows_of, self._ranks.sum_(torch.stack(means)).unbind(), strict=True))
            sums["factor_std"] = (sums.pop("square") - sums.pop("change").square()).clamp_min(0).sqrt()
            turn.finish(torch.where(counts, ratio, 1.0))
        return TensorDict({"accepted": taken, **sums, "grad_norm": grad_norm})

    def _fit(self, member: _Member, rows: PolicyRows, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The epochs of one agent; gives the mean norm of the gradients, and whether all steps were taken."""
        loss = _make_loss(self.losses[member.group], member.network)
        member.optimizer.param_groups[0]["lr"] = self.lr
        kept = counts.flatten(1).any(1).nonzero().squeeze(-1)
        kept_by_rank = count_by_rank(kept, self._ranks)
        size = max(1, self.minibatch_size // rows.steps_per_row)
        norms = [rows.log_prob.new_zeros(())] if not sum(kept_by_rank) else []
        taken = True
        for _ in range(self.epochs if sum(kept_by_rank) else 0):
            for drawn in draw_minibatches(kept, kept_by_rank, size, self._ranks):
                member.optimizer.zero_grad()
                objective = rows.log_prob.new_zeros(())
                if len(drawn):
                    batch = _minibatch(self.losses[member.group], rows.take(drawn), counts[drawn])
                    policy = member.parameters.to_module(member.network, preserve_module_state=False)
                    with set_recurrent_mode(True), policy:
                        out = loss(batch)
                    objective = out["loss_objective"] + out.get("loss_entropy", 0.0)
                    objective.backward()
                objective = average_gradients(member.trained, objective.detach(), counts[drawn].sum(), self._ranks)
                norms.append(torch.nn.utils.clip_grad_norm_(member.trained, self.max_grad_norm))
                if (objective + norms[-1]).isfinite():  # waits for the device, to leave no momentum behind
                    member.optimizer.step()
                else:
                    taken = False
        return torch.stack(norms).mean(), torch.tensor(taken, device=rows.log_prob.device)

    @torch.no_grad()
    def _distribution(self, member: _Member, rows: PolicyRows) -> D.Distribution:
        """The agent's policy at all rows, evaluated a minibatch at a time."""
        size = max(1, self.minibatch_size // rows.steps_per_row)
        parts = [
            distribution_parameters(member.network, member.parameters, rows.inputs[start : start + size])
            for start in range(0, len(rows), size)
        ]
        return member.network.build_dist_from_params(torch.cat(parts))


def _check_loss(group: str, loss: ClipPPOLoss, ranks: Ranks) -> None:
    """Refuses a loss whose policy's part is not that of ``ClipPPOLoss``, or cannot be updated in sequence."""
    if not isinstance(loss, ClipPPOLoss):
        raise TypeError(
            f"the loss of group {group!r} is a {type(loss).__name__}. Legal: a torchrl.objectives.ClipPPOLoss."
        )
    own = [name for name in _OF_THE_POLICY if _function(type(loss), name) is not _function(ClipPPOLoss, name)]
    if own:
        raise TypeError(
            f"the loss of group {group!r}, {type(loss).__name__}, has {', '.join(own)} of its own, which the update of "
            "an agent would not use. Legal: ClipPPOLoss, or a class that changes only the critic's part."
        )
    if loss.delay_actor:
        raise ValueError(
            "delay_actor=True keeps a lagging policy for clipping; agents are clipped around the one that collected "
            "the data. Use delay_actor=False."
        )
    if ranks.size > 1 and loss.advantage_norm is not None:
        raise ValueError("advantage_norm: its statistics would be of each process alone. Legal: normalize_advantage.")


def _function(loss_class: type, name: str) -> object:
    return inspect.unwrap(getattr(loss_class, name))  # a LossModule wraps its forward anew in each class


def _actor_parameters(loss: ClipPPOLoss) -> TensorDictBase:
    return loss.actor_network_params if loss.functional else TensorDict.from_module(loss.actor_network)


def _make_members(group: str, loss: ClipPPOLoss, lr: float) -> list[_Member]:
    """The agents of a group, or the one agent of a policy without an agent dimension, as the data will tell."""
    network, parameters = loss.actor_network, _actor_parameters(loss)
    kind, n_agents = resolve_trust_region(None, network, parameters)
    policies: list[tuple[int | None, ProbabilisticTensorDictSequential, TensorDictBase]]
    if kind == "per_agent":
        policies = [(index, *agent_policy(network, parameters, index, n_agents)) for index in range(n_agents)]
    elif any(isinstance(net, MultiAgentNetBase) and net.n_agents > 1 for net in network.modules()):
        raise ValueError(_shared_message(group))
    else:
        policies = [(None, network, parameters)]
    members = []
    for index, own_network, own_parameters in policies:
        leaves = {id(leaf): leaf for leaf in own_parameters.values(True, True) if leaf.requires_grad}
        optimizer = torch.optim.Adam(leaves.values(), lr=lr, fused=True)
        members.append(_Member(group, index, own_network, own_parameters, optimizer))
    return members


def _loaded(parameters: list[Tensor], state_dict: dict[str, Any]) -> torch.optim.Adam:
    """An optimizer with a saved state."""
    optimizer = torch.optim.Adam(parameters, fused=True)
    optimizer.load_state_dict(state_dict)
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, its parameter {tuple(parameter.shape)}")
    return optimizer


def _follow(member: _Member, loss: ClipPPOLoss) -> None:
    """Lets an agent's parameters be views on the group's again, which may have been moved or cast; Adam's state too."""
    if member.index is not None:
        agents = slice(member.index, member.index + 1)
        views = slice_agents(_actor_parameters(loss), agents, stacked_prefixes(loss.actor_network))
        for key, value in member.parameters.items(True, True):
            value.data = views.get(key)
    for parameter, state in member.optimizer.state.items():
        for name, value in state.items():
            state[name] = value.to(parameter.device) if name == "step" else value.to(parameter)


def _make_loss(loss: ClipPPOLoss, network: ProbabilisticTensorDictSequential) -> ClipPPOLoss:
    """The loss of one agent's policy, with the settings that the group's has now."""
    epsilon = (loss.clip_epsilon_low, loss.clip_epsilon_high) if loss._asymmetric_clip else (loss.clip_epsilon,)
    clip_epsilon = tuple(map(float, epsilon))
    cap = loss.max_importance_ratio
    own = _AgentLoss(
        network,
        functional=False,
        clip_epsilon=clip_epsilon if loss._asymmetric_clip else clip_epsilon[0],
        entropy_bonus=loss.entropy_bonus and bool(loss._entropy_coeff_map or loss.entropy_coeff),
        samples_mc_entropy=loss.samples_mc_entropy,
        entropy_coeff=loss._entropy_coeff_map or loss.entropy_coeff,
        max_importance_ratio=None if cap is None else float(cap),
    )
    keys = loss.tensor_keys
    own.set_keys(action=keys.action, sample_log_prob=keys.sample_log_prob, advantage=keys.advantage)
    own.loss_mask_key = _COUNTS
    return own


def _minibatch(loss: ClipPPOLoss, rows: PolicyRows, counts: Tensor) -> TensorDict:
    """What the loss of an agent reads, with its keys; the advantages times ``M``."""
    keys, batch = loss.tensor_keys, rows.inputs
    for name in _log_prob_keys(loss):
        batch.update(batch.select(name).apply(lambda value: value.squeeze(-1)))
    if isinstance(rows.action, Tensor):
        batch.set(keys.action, rows.action)
    else:
        batch.update(rows.action)
    batch.set(keys.advantage, rows.factor * rows.advantage)
    return batch.set(_COUNTS, counts)


def _log_prob_keys(loss: ClipPPOLoss) -> list[NestedKey]:
    key = loss.tensor_keys.sample_log_prob
    return key if isinstance(key, list) else [key]


def _shared_message(group: str) -> str:
    return (
        f"HAPPO updates the agents one after the other, but agents of group {group!r} share parameters of the policy. "
        "Give each agent its own: MultiAgentMLP(..., share_params=False). For shared parameters train with the loss "
        "itself, on all agents at once (MAPPO or IPPO)."
    )
