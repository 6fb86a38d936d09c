"""Clipped minibatch steps of policies, as PPO takes them."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import ClipPPOLoss

from torchrl_trpo.arguments import RangedSettings
from torchrl_trpo.distributions.divergence import kl_if_exact
from torchrl_trpo.errors import PlainKeyError
from torchrl_trpo.objectives.functional import copy_parameters
from torchrl_trpo.objectives.loss_groups import check_separate_losses
from torchrl_trpo.objectives.policy_member import Member, check_loss, log_prob_keys
from torchrl_trpo.objectives.policy_rows import PolicyRows
from torchrl_trpo.objectives.policy_update import actor_parameters, read_rows, standardized_advantage
from torchrl_trpo.parallel.minibatches import ADAM_RANGES, average_gradients, count_by_rank, draw_minibatches
from torchrl_trpo.parallel.ranks import Ranks

_FEWEST_STEPS = 10  # of an update for which compiling pays: the first is taken as ever


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
        compiled: whether gradients are compiled with the machine's C++ compiler, in an update of at least 10 steps.
            That is for a CPU and single precision; they are equal up to rounding. Recurrent or partly frozen policies,
            policies with buffers or hooks, and batches with a mask stay as they are. If another one cannot be compiled,
            a warning says why. Default: False.
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

    RANGES = ADAM_RANGES

    def __init__(
        self,
        losses: ClipPPOLoss | Mapping[str, ClipPPOLoss],
        *,
        lr: float = 5e-4,
        epochs: int = 5,
        minibatch_size: int = 1000,
        max_grad_norm: float = 10.0,
        compiled: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.lr = lr
        self.epochs = epochs
        self.minibatch_size = minibatch_size
        self.max_grad_norm = max_grad_norm
        self.compiled = compiled
        self.losses = dict(losses) if isinstance(losses, Mapping) else {"agents": losses}
        if not self.losses:
            raise ValueError("losses is an empty mapping; legal: {group: ClipPPOLoss, ...} with at least one group.")
        self._ranks = Ranks(process_group)
        for group, loss in self.losses.items():
            check_loss(group, loss, self._ranks)
            for tensor in (*loss.parameters(), *loss.buffers()):
                self._ranks.first_(tensor.data)
        self._members = self._make_members()

    def __deepcopy__(self, memo: dict[int, Any]) -> ClippedUpdater:
        """An updater of its own, on copies of the losses, that takes the same steps."""
        self._follow_losses()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for loss in self.losses.values():
            copy_parameters(loss, memo)
        for name, value in vars(self).items():
            if name != "_members":  # their parameters are views on those of the losses; views of copies are made below
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
        rows = [self._rows(member.group, tensordict) for member in self._members]
        self._follow_losses()
        with self._restored():
            stats = [self._update(member, of_group)[0] for member, of_group in zip(self._members, rows, strict=True)]
            return torch.stack(stats)

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """Puts policies and optimisers back, to the bit, if an error leaves the block."""
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
        """Loads a state from :meth:`state_dict`, all of it or nothing.

        Args:
            state_dict: the settings by name, and the optimisers' states.

        Raises:
            PlainKeyError: if something is missing or unknown.
            ValueError: if the number of policies differs, or a state is not one of that policy's optimiser.
        """
        settings = dict(state_dict)
        if "optimizers" not in settings:
            raise PlainKeyError(f"'optimizers' is missing from the state_dict, which has {list(state_dict)}.")
        states = settings.pop("optimizers")
        if len(states) != len(self._members):
            raise ValueError(f"optimizers: the state_dict has {len(states)} policies, legal: {len(self._members)}.")
        optimizers = []
        self._follow_losses()  # the state takes the dtype of the parameters
        for index, (member, state) in enumerate(zip(self._members, states, strict=True)):
            try:
                optimizers.append(member.optimizer_with(state))
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"optimizers[{index}] is not a state of this policy's Adam: {error!r}.") from error
        super().load_state_dict(settings)
        for member, optimizer in zip(self._members, optimizers, strict=True):
            member.optimizer = optimizer

    def _make_members(self) -> list[Member]:
        """The policies that are updated one after the other."""
        return [Member(group, loss, self.lr) for group, loss in self.losses.items()]

    def _follow_losses(self) -> None:
        """Takes over what the losses have now."""
        for member in self._members:
            member.follow(self.losses[member.group])

    def _rows(self, group: str, tensordict: TensorDictBase) -> PolicyRows:
        """The rows of a batch for a group's update; the log-probabilities that its loss reads are in ``inputs``."""
        loss = self.losses[group]
        agents = [member.index for member in self._members if member.group == group]

        def normalize(advantage: Tensor, data: TensorDictBase, computed: bool) -> Tensor:
            if loss.normalize_advantage:
                return standardized_advantage(loss, advantage, data, self._ranks)
            # private: how PPOLoss scales by an advantage_norm
            return loss._maybe_normalize_advantage(advantage, data, update_norm=computed)

        n_agents = None if None in agents else len(agents)
        rows = read_rows(
            loss, tensordict, normalize, n_agents=n_agents, log_prob_keys=log_prob_keys(loss), ranks=self._ranks
        )
        key = loss.tensor_keys.sample_log_prob
        recorded = None if isinstance(key, list) else tensordict.get(key)
        joint_dims = tensordict.batch_dims + len(rows.agent_shape)
        if isinstance(recorded, Tensor) and recorded.shape[joint_dims:].numel() > 1:
            raise ValueError(
                f"{key!r} has shape {tuple(recorded.shape)}, one of each entry of the action, which "
                f"{type(loss).__name__} would clip one by one. Legal: a distribution of the joint action, such as "
                "IndependentNormal, or one within torch.distributions.Independent."
            )
        return rows

    def _update(self, member: Member, rows: PolicyRows) -> tuple[TensorDict, Tensor]:
        """Updates one member on its rows; returns its statistics and its ratios, which are 1 where a row is masked."""
        group_loss = self.losses[member.group]
        counts = (rows.weight > 0).expand_as(rows.log_prob)
        before = member.distribution(rows, self.minibatch_size)
        grad_norm, taken = self._fit(member, rows, counts)
        after = member.distribution(rows, self.minibatch_size)
        low, high = member.loss._clip_bounds  # private: those of one clip_epsilon or of two have no public name
        with torch.no_grad():
            log_ratio = rows.log_ratio(after)
            ratio_before, ratio = (
                rows.log_ratio(each, group_loss.max_importance_ratio).exp() for each in (before, after)
            )
            counts = counts & rows.advantage.isfinite()  # read_rows made it NaN where anything of a row is not finite
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
        """Runs the epochs of one member; returns the mean norm of the gradients, and whether all steps were taken."""
        optimizer: Any = member.optimizer
        optimizer.param_groups[0]["lr"] = self.lr
        has_mask = rows.weight.ndim > 1
        if not has_mask:  # all rows count, and the device need not be asked which
            kept = torch.arange(len(rows), device=counts.device)
        else:
            kept = counts.flatten(1).any(1).nonzero().squeeze(-1)
        kept_by_rank = count_by_rank(kept, self._ranks)
        size = max(1, self.minibatch_size // rows.steps_per_row)
        norms = [rows.log_prob.new_zeros(())] if not sum(kept_by_rank) else []
        taken = rows.log_prob.new_ones((), dtype=torch.bool)
        batch = member.loss.batch_of(rows, counts if has_mask else None)
        n_steps = self.epochs * math.ceil(sum(kept_by_rank) / size)
        may_record = self.compiled and n_steps >= _FEWEST_STEPS and not has_mask and rows.row_dims == 1
        gradient = member.gradient(may_record=may_record)
        for _ in range(self.epochs if sum(kept_by_rank) else 0):
            for drawn in draw_minibatches(kept, kept_by_rank, size, self._ranks):
                optimizer.zero_grad()
                objective = rows.log_prob.new_zeros(())
                if len(drawn):
                    objective = gradient(batch, drawn)
                objective = average_gradients(member.trained, objective, counts, drawn, self._ranks)
                norms.append(torch.nn.utils.clip_grad_norm_(member.trained, self.max_grad_norm))
                finite = (objective + norms[-1]).isfinite()
                # A fused optimiser leaves out the step and the momentum, on the device: GradScaler uses this too.
                optimizer.found_inf = (~finite).float()
                optimizer.step()
                taken &= finite
        return torch.stack(norms).mean(), taken
