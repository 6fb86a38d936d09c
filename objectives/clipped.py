"""Clipped minibatch steps of policies, as PPO takes them."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torch import distributions as D
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import ClipPPOLoss

from torchrl_trpo.arguments import RangedSettings
from torchrl_trpo.distributions.divergence import has_exact_entropy, kl_if_exact
from torchrl_trpo.errors import PlainKeyError
from torchrl_trpo.keys import entry, reads_init
from torchrl_trpo.numerics.statistics import read
from torchrl_trpo.objectives.agent_gae import AgentGAE
from torchrl_trpo.objectives.attention import differentiable_attention
from torchrl_trpo.objectives.collected import action_group, broadcast_advantage, collected_log_prob
from torchrl_trpo.objectives.functional import other_parameters
from torchrl_trpo.objectives.loss_parts import (
    actor_parameters,
    check_padding,
    check_separate_losses,
    estimated_advantage,
    exact_entropy,
    mask_keys,
    row_mask,
    standardized_advantage,
)
from torchrl_trpo.objectives.policy_network import (
    build_distribution,
    distribution_parameters,
    input_keys,
    slice_agents,
    stacked_prefixes,
)
from torchrl_trpo.objectives.policy_rows import PolicyRows, flatten_rows
from torchrl_trpo.parallel.minibatches import ADAM_RANGES, average_gradients, count_by_rank, draw_minibatches
from torchrl_trpo.parallel.ranks import Ranks

_COUNTS = "_counts"
"""Which steps of a sequence count, in a minibatch."""
_OF_THE_POLICY = ("forward", "_log_weight", "_get_cur_log_prob", "_get_entropy", "_weighted_loss_entropy")
"""What of a loss an agent's update takes from ``ClipPPOLoss`` itself."""


@dataclass
class Member:
    """What is updated at a time: one agent's policy, or that of a group.

    Attributes:
        group: the group.
        index: the agent's place in the group; None for the policy of the whole group.
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


class ClippedUpdater(RangedSettings):
    r"""Updates policies by epochs of minibatch steps with TorchRL's ``ClipPPOLoss``, as MAPPO and IPPO do.

    The policy of each group of agents takes some epochs of Adam steps on

    .. math::
        \mathbb{E}\big[ \min\big( r \hat A,\ \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon) \hat A \big) \big]
        + c_H\, \mathbb{E}[H(\pi_\theta)], \quad r = \frac{\pi_\theta(u|o)}{\pi_k(u|o)}

    (Schulman et al. 2017, arXiv:1707.06347), the mean over rows and agents. It is what the trust-region updates are
    compared with: the critic is fitted beside it, as theirs is, so that nothing but the policy's step differs.

    Clipping, entropy, keys and masks are the loss's, as they are at the time of a step; an :class:`AgentGAE` is to have
    the same masks (``mask_key=loss.loss_mask_key``). Advantages are normalised over
    the whole batch, not over minibatches, if the loss has ``normalize_advantage``. Settings are plain attributes:
    change them between steps for a schedule (``updater.lr = 1e-4``).

    Args:
        losses: one ``ClipPPOLoss`` (``MAPPOLoss``, ``IPPOLoss``), or a mapping ``{group: ClipPPOLoss}``.

    Keyword Args:
        lr: Adam's learning rate. Default: 5e-4.
        epochs: passes over the batch. Default: 5.
        minibatch_size: rows (environment steps) per gradient step, of all processes together; of a recurrent policy, as
            many whole sequences as have these steps. Default: 1000.
        max_grad_norm: the gradient's largest Euclidean norm; a longer one is shortened to it. Default: 10.
        process_group: the processes of ``torch.distributed`` that update together, each with rows of its own, as for
            :class:`TRPOLoss`: they begin with the first one's parameters and take the steps of one process with all
            rows. Default: this process alone.

    Raises:
        TypeError: if ``losses`` holds anything but ``ClipPPOLoss``, or a setting is not a number.
        ValueError: if a setting is outside its range.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs.utils import ExplorationType, set_exploration_type
        >>> from torchrl.modules import IndependentNormal, MultiAgentMLP, NormalParamExtractor, ProbabilisticActor
        >>> from torchrl.objectives import MAPPOLoss
        >>> from torchrl_trpo.objectives import ClippedUpdater
        >>> net = MultiAgentMLP(3, 4, n_agents=2, centralized=False, share_params=True, num_cells=8, depth=1)
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
        >>> loss = MAPPOLoss(actor)
        >>> loss.set_keys(action=("agents", "action"), sample_log_prob=("agents", "action_log_prob"))
        >>> stats = ClippedUpdater(loss, minibatch_size=7).step(data)
        >>> stats.batch_size, bool((stats["improvement"] > 0).all())
        (torch.Size([1]), True)
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
        for group, loss in self.losses.items():
            _check_loss(group, loss, self._ranks)
            for tensor in (*loss.parameters(), *loss.buffers()):
                self._ranks.first_(tensor.data)
        self._members = self._make_members()

    def __deepcopy__(self, memo: dict[int, Any]) -> ClippedUpdater:
        """An updater of its own, on copies of the losses, that takes the same steps."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for name, value in vars(self).items():
            if name != "_members":  # whose parameters share the memory of the losses', which a copy would not
                setattr(copied, name, copy.deepcopy(value, memo))
        copied._members = copied._make_members()
        for member, original in zip(copied._members, self._members, strict=True):
            member.optimizer.load_state_dict(copy.deepcopy(original.optimizer.state_dict()))
        return copied

    def step(self, tensordict: TensorDictBase) -> TensorDict:
        """Updates the policy of each group once on a batch; the batch is not modified.

        If anything raises, policies and optimisers are as before the step, to the bit. A minibatch whose loss or
        gradient is not finite is left out, so that no parameter can become NaN.

        Args:
            tensordict: the collected data, ``[*B, T]``, with advantages or what the losses need to compute them.

        Returns:
            Statistics with batch size ``[n_groups]``, all detached.

            - ``accepted`` (bool): whether every step was taken; False if a minibatch was left out.
            - ``kl``: the exact mean ``KL(π_k ‖ π_new)`` in nats, NaN for a distribution without a closed form.
            - ``improvement`` of the surrogate without clipping.
            - ``clip_fraction``: the share of the rows whose ratio is outside of the clipping interval after the update.
            - ``grad_norm``: the gradient's Euclidean norm before it is shortened, mean over the steps; not finite if
              that of a step was not.
        """
        check_separate_losses(self.losses)
        rows = [self._rows(member.group, self.losses[member.group], tensordict) for member in self._members]
        with self._restored():
            stats = [self._update(member, of_group)[0] for member, of_group in zip(self._members, rows, strict=True)]
            return torch.stack(stats)

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """Puts policies and optimisers back, to the bit, if an error leaves."""
        tensors = [value.data for loss in self.losses.values() for value in actor_parameters(loss).values(True, True)]
        before = [value.clone() for value in tensors]
        optimizers = [copy.deepcopy(member.optimizer.state_dict()) for member in self._members]
        try:
            yield
        except BaseException:
            for value, own in zip(tensors, before, strict=True):
                value.copy_(own)
            for member, state in zip(self._members, optimizers, strict=True):
                member.optimizer.load_state_dict(state)
            raise

    def state_dict(self) -> dict[str, Any]:
        """The settings by name, and the ``optimizers``' states by policy."""
        return {**super().state_dict(), "optimizers": [member.optimizer.state_dict() for member in self._members]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, all or none.

        Args:
            state_dict: the settings by name, and the optimisers' states.

        Raises:
            PlainKeyError: if something is missing or unknown.
            ValueError: if it is of another number of policies, or an optimiser's state is not that of the policy's.
        """
        settings = dict(state_dict)
        if "optimizers" not in settings:
            raise PlainKeyError(f"'optimizers' is missing from the state_dict, which has {list(state_dict)}.")
        states = settings.pop("optimizers")
        if len(states) != len(self._members):
            raise ValueError(f"optimizers: the state_dict has {len(states)} policies, legal: {len(self._members)}.")
        optimizers = []
        for index, (member, state) in enumerate(zip(self._members, states, strict=True)):
            _follow(member, self.losses[member.group])  # whose type the state takes
            try:
                optimizers.append(_loaded(member.trained, state))
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"optimizers[{index}] is not a state of this policy's Adam: {error!r}.") from error
        super().load_state_dict(settings)
        for member, optimizer in zip(self._members, optimizers, strict=True):
            member.optimizer = optimizer

    def _make_members(self) -> list[Member]:
        """What is updated one after the other."""
        return [
            make_member(group, None, loss.actor_network, actor_parameters(loss), self.lr)
            for group, loss in self.losses.items()
        ]

    def _check_agents(self, group: str, log_prob: Tensor, batch_size: torch.Size) -> None:
        """Refuses log-probabilities ``[*B, *A, 1]`` that are not of the group's agents."""

    def _rows(self, group: str, loss: ClipPPOLoss, tensordict: TensorDictBase) -> PolicyRows:
        """What the group's update needs of a batch; what the loss reads is in the rows' ``inputs`` and ``action``."""
        if 0 in tensordict.batch_size:
            raise ValueError(f"the data is empty: its batch size is {tuple(tensordict.batch_size)}.")
        _check_masks(group, loss)
        tensordict = tensordict.clone(False)
        keys = loss.tensor_keys
        advantage, missing = estimated_advantage(loss, tensordict)
        check_padding(loss, tensordict)
        log_prob = collected_log_prob(loss, tensordict)
        recorded = None if isinstance(keys.sample_log_prob, list) else tensordict.get(keys.sample_log_prob)
        if isinstance(recorded, Tensor) and recorded.shape[log_prob.ndim - 1 :].numel() > 1:
            raise ValueError(
                f"{keys.sample_log_prob!r} has shape {tuple(recorded.shape)}, one of each entry of the action, which "
                f"{type(loss).__name__} would clip one by one. Legal: a distribution of the joint action, such as "
                "IndependentNormal, or one within torch.distributions.Independent."
            )
        advantage = broadcast_advantage(advantage, log_prob, keys.advantage)
        if loss.normalize_advantage:
            advantage = standardized_advantage(loss, advantage, tensordict, self._ranks)
        else:
            advantage = loss._maybe_normalize_advantage(advantage, tensordict, update_norm=missing)
        self._check_agents(group, log_prob, tensordict.batch_size)
        inputs = entry(tensordict, input_keys(loss.actor_network), "the actor's in_keys")
        for name in _log_prob_keys(loss):
            inputs.update(tensordict.select(name).apply(lambda value: value.unsqueeze(-1)))  # to be known as per agent
        return flatten_rows(
            inputs,
            action=entry(tensordict, keys.action, "action"),
            log_prob=log_prob,
            advantage=advantage,
            mask=row_mask(loss, tensordict, log_prob),
            group=action_group(loss),
            per_agent=any(member.index is not None for member in self._members),
            sequences=reads_init(loss.actor_network),
            ranks=self._ranks,
        )

    def _update(self, member: Member, rows: PolicyRows) -> tuple[TensorDict, Tensor]:
        """Updates one member on its rows; gives its statistics and the ratios of its actions, 1 where none counts."""
        group_loss = self.losses[member.group]
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
            kl = kl_if_exact(before, after, rows.log_prob.ndim - 1)
            rows_of = {
                "kl": torch.full_like(ratio, torch.nan) if kl is None else kl.unsqueeze(-1),
                "improvement": rows.factor * (ratio - ratio_before) * rows.advantage,
                "clip_fraction": ((log_ratio < low) | (log_ratio > high)).to(ratio.dtype),
            }
            if rows.factor.ndim > 1:  # of a sequence
                change = (rows.factor - 1).expand_as(ratio)  # small: its square keeps the digits
                rows_of |= {"change": change, "square": change.square()}
            means = [(rows.weight * torch.where(counts, value, 0.0)).sum() for value in rows_of.values()]
            sums = dict(zip(rows_of, self._ranks.sum_(torch.stack(means)).unbind(), strict=True))
            if rows.factor.ndim > 1:
                sums["factor_std"] = (sums.pop("square") - sums.pop("change").square()).clamp_min(0).sqrt()
        stats = TensorDict({"accepted": taken, **sums, "grad_norm": grad_norm})
        return stats, torch.where(counts, ratio, 1.0)

    @torch.enable_grad()
    def _fit(self, member: Member, rows: PolicyRows, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The epochs of one member; gives the mean norm of the gradients, and whether all steps were taken."""
        loss = _make_loss(self.losses[member.group], member.network)
        optimizer: Any = member.optimizer
        optimizer.param_groups[0]["lr"] = self.lr
        kept = _kept(rows, counts)
        kept_by_rank = count_by_rank(kept, self._ranks)
        size = max(1, self.minibatch_size // rows.steps_per_row)
        norms = [rows.log_prob.new_zeros(())] if not sum(kept_by_rank) else []
        taken = rows.log_prob.new_ones((), dtype=torch.bool)
        for _ in range(self.epochs if sum(kept_by_rank) else 0):
            for drawn in draw_minibatches(kept, kept_by_rank, size, self._ranks):
                optimizer.zero_grad()
                objective = rows.log_prob.new_zeros(())
                if len(drawn):
                    batch = _minibatch(self.losses[member.group], rows.take(drawn), counts[drawn])
                    policy = other_parameters(member.network, member.parameters)
                    with set_recurrent_mode(True), policy, differentiable_attention():
                        out = loss(batch)
                    objective = out["loss_objective"] + out.get("loss_entropy", 0.0)
                    objective.backward()
                objective = average_gradients(member.trained, objective.detach(), counts[drawn].sum(), self._ranks)
                norms.append(torch.nn.utils.clip_grad_norm_(member.trained, self.max_grad_norm))
                finite = (objective + norms[-1]).isfinite()
                # As GradScaler tells a fused optimiser to leave a step out: on the device, the momentum too.
                optimizer.found_inf = (~finite).float()
                optimizer.step()
                taken &= finite
        return torch.stack(norms).mean(), taken

    @torch.no_grad()
    def _distribution(self, member: Member, rows: PolicyRows) -> D.Distribution:
        """The member's policy at all rows, evaluated a minibatch at a time."""
        size = max(1, self.minibatch_size // rows.steps_per_row)
        parts = [
            distribution_parameters(member.network, member.parameters, rows.inputs[start : start + size])
            for start in range(0, len(rows), size)
        ]
        return build_distribution(member.network, torch.cat(parts))


def _check_loss(group: str, loss: ClipPPOLoss, ranks: Ranks) -> None:
    """Refuses a loss whose policy's part is not that of ``ClipPPOLoss``, or is clipped around another policy."""
    if not isinstance(loss, ClipPPOLoss):
        raise TypeError(
            f"the loss of group {group!r} is a {type(loss).__name__}. Legal: a torchrl.objectives.ClipPPOLoss."
        )
    own = [name for name in _OF_THE_POLICY if _function(type(loss), name) is not _function(ClipPPOLoss, name)]
    if own:
        raise TypeError(
            f"the loss of group {group!r}, {type(loss).__name__}, has {', '.join(own)} of its own, which the update "
            "would not use. Legal: ClipPPOLoss, or a class that changes only the critic's part."
        )
    if loss.delay_actor:
        raise ValueError(
            "delay_actor=True keeps a lagging policy for clipping; policies are clipped around the one that collected "
            "the data. Use delay_actor=False."
        )
    if ranks.size > 1 and loss.advantage_norm is not None:
        raise ValueError("advantage_norm: its statistics would be of each process alone. Legal: normalize_advantage.")


def _check_masks(group: str, loss: ClipPPOLoss) -> None:
    """Refuses a loss whose value estimator lets masked steps reach the others; TorchRL's losses do not tell theirs."""
    estimator = loss._value_estimator
    if isinstance(estimator, AgentGAE) and not {*mask_keys(loss)} <= {*estimator.mask_keys}:
        raise ValueError(
            f"the loss of group {group!r} has loss_mask_key={loss.loss_mask_key!r}, and its value estimator reads "
            f"{list(estimator.mask_keys)}: masked steps would be in the advantages of the others. Legal: "
            f"make_value_estimator({type(estimator).__name__}, mask_key=loss.loss_mask_key, ...)."
        )


def _function(loss_class: type, name: str) -> object:
    return inspect.unwrap(getattr(loss_class, name))  # a LossModule wraps its forward anew in each class


def make_member(
    group: str,
    index: int | None,
    network: ProbabilisticTensorDictSequential,
    parameters: TensorDictBase,
    lr: float,
) -> Member:
    """A member with an optimiser of its own.

    Args:
        group: the group.
        index: the agent's place in the group, or None for the policy of the whole group.
        network: the policy.
        parameters: its parameters and buffers.
        lr: Adam's learning rate.

    Returns:
        The member.
    """
    leaves = {id(leaf): leaf for leaf in parameters.values(True, True) if leaf.requires_grad}
    return Member(group, index, network, parameters, torch.optim.Adam(leaves.values(), lr=lr, fused=True))


def _loaded(parameters: list[Tensor], state_dict: dict[str, Any]) -> torch.optim.Adam:
    """An optimizer with a saved state."""
    optimizer = torch.optim.Adam(parameters, fused=True)
    optimizer.load_state_dict(state_dict)
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, its parameter {tuple(parameter.shape)}")
    return optimizer


def _follow(member: Member, loss: ClipPPOLoss) -> None:
    """Lets a member's parameters be views on the group's again, which may have been moved or cast; Adam's state too."""
    if member.index is not None:
        agents = slice(member.index, member.index + 1)
        views = slice_agents(actor_parameters(loss), agents, stacked_prefixes(loss.actor_network))
        for key, value in member.parameters.items(True, True):
            value.data = views.get(key)
    for parameter, state in member.optimizer.state.items():
        for name, value in state.items():
            state[name] = value.to(parameter.device) if name == "step" else value.to(parameter)


def _make_loss(loss: ClipPPOLoss, network: ProbabilisticTensorDictSequential) -> ClipPPOLoss:
    """The loss of a member's policy, with the settings that the group's has now."""
    names = ["clip_epsilon_low", "clip_epsilon_high"] if loss._asymmetric_clip else ["clip_epsilon"]
    names += ["entropy_coeff"] + ["max_importance_ratio"] * (loss.max_importance_ratio is not None)
    numbers = read({name: getattr(loss, name) for name in names})
    clip_epsilon = [value for name, value in numbers.items() if name.startswith("clip")]
    own = _AgentLoss(
        network,
        functional=False,
        clip_epsilon=tuple(clip_epsilon) if loss._asymmetric_clip else clip_epsilon[0],
        entropy_bonus=loss.entropy_bonus and bool(loss._entropy_coeff_map or numbers["entropy_coeff"]),
        samples_mc_entropy=loss.samples_mc_entropy,
        entropy_coeff=loss._entropy_coeff_map or loss.entropy_coeff,
        max_importance_ratio=numbers.get("max_importance_ratio"),
    )
    keys = loss.tensor_keys
    own.set_keys(action=keys.action, sample_log_prob=keys.sample_log_prob, advantage=keys.advantage)
    own.loss_mask_key = _COUNTS
    return own


def _kept(rows: PolicyRows, counts: Tensor) -> Tensor:
    """The indices of the rows, or sequences, in which anything counts."""
    if rows.weight.ndim == 1:  # without a mask all do, and the device need not be asked which
        return torch.arange(len(rows), device=counts.device)
    return counts.flatten(1).any(1).nonzero().squeeze(-1)


def _minibatch(loss: ClipPPOLoss, rows: PolicyRows, counts: Tensor) -> TensorDict:
    """What the loss of a member reads, with its keys; the advantages times ``M``."""
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
