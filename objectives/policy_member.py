"""The policies that clipped updates train one after the other: each with its own loss and its own optimiser."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torch import distributions as D
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import ClipPPOLoss

from torchrl_trpo.distributions.divergence import has_exact_entropy
from torchrl_trpo.kernels.settings import settings_of
from torchrl_trpo.numerics.statistics import HostScalar
from torchrl_trpo.objectives.attention import differentiable_attention
from torchrl_trpo.objectives.functional import other_parameters
from torchrl_trpo.objectives.minibatch_gradient import MinibatchGradient
from torchrl_trpo.objectives.policy_network import (
    agent_parameters,
    build_distribution,
    distribution_parameters,
    single_agent_network,
)
from torchrl_trpo.objectives.policy_rows import PolicyRows
from torchrl_trpo.objectives.policy_update import actor_parameters, exact_entropy, trained
from torchrl_trpo.objectives.recorded_loss import MeanLoss
from torchrl_trpo.parallel.ranks import Ranks

_COUNTS = "_counts"
"""The key of what counts in a minibatch."""
_POLICY_METHODS = ("forward", "_log_weight", "_get_cur_log_prob", "_get_entropy", "_weighted_loss_entropy")
"""The methods that a member's loss takes from ``ClipPPOLoss``, not from the class of its group's loss."""
_SCALARS = ("clip_epsilon", "clip_epsilon_low", "clip_epsilon_high", "entropy_coeff", "max_importance_ratio")
"""The settings of ``ClipPPOLoss`` that are tensors."""


class MemberLoss(ClipPPOLoss):
    """The loss of one member's policy, with the settings of its group's loss; the entropy is exact where possible."""

    def __init__(self, network: ProbabilisticTensorDictSequential, group_loss: ClipPPOLoss) -> None:
        is_asymmetric = "clip_epsilon_low" in dict(group_loss.named_buffers())
        super().__init__(network, functional=False, clip_epsilon=(0.2, 0.2) if is_asymmetric else 0.2)
        self._entropy_coeff_on_host = HostScalar()

    def follow(self, group_loss: ClipPPOLoss) -> None:
        """Takes over the settings that the group's loss has now."""
        for name in _SCALARS:
            if hasattr(group_loss, name):
                setattr(self, name, getattr(group_loss, name))
        self.samples_mc_entropy = group_loss.samples_mc_entropy
        self._entropy_coeff_map = group_loss._entropy_coeff_map  # private: the coefficients by head have no public name
        counts = self._entropy_coeff_map or self._entropy_coeff_on_host.read(group_loss.entropy_coeff)
        self.entropy_bonus = group_loss.entropy_bonus and bool(counts)
        keys = group_loss.tensor_keys
        self.set_keys(action=keys.action, sample_log_prob=keys.sample_log_prob, advantage=keys.advantage)

    def batch_of(self, rows: PolicyRows, counts: Tensor | None) -> TensorDict:
        """What the loss reads of rows, with its keys; ``counts`` is the mask, bool ``[*R, *A, 1]``, if there is one."""
        batch = rows.inputs.copy()
        for key in log_prob_keys(self):
            batch.update(batch.select(key).apply(lambda value: value.squeeze(-1)))
        if isinstance(rows.action, Tensor):
            batch.set(self.tensor_keys.action, rows.action)
        else:
            batch.update(rows.action)
        batch.set(self.tensor_keys.advantage, rows.factor * rows.advantage)
        self.loss_mask_key = None if counts is None else _COUNTS
        return batch if counts is None else batch.set(_COUNTS, counts)

    def _get_entropy(self, dist: D.Distribution, adv_shape: torch.Size) -> Tensor | TensorDict:
        # A hook of PPOLoss without a public name: its estimate by sampling differs from call to call.
        return exact_entropy(dist, adv_shape) if has_exact_entropy(dist) else super()._get_entropy(dist, adv_shape)


class Member:
    """What is updated at a time: an agent's policy, or with ``index`` None that of its whole group.

    It is that of the group's loss at the last :meth:`follow`. The parameters that are trained share the memory of the
    group's; the optimiser is over them alone.
    """

    def __init__(
        self, group: str, group_loss: ClipPPOLoss, lr: float, *, index: int | None = None, n_agents: int = 1
    ) -> None:
        self.group = group
        self.index = index
        self._n_agents = n_agents
        self._settings: tuple[Any, ...] = ()
        self._take_policy(group_loss)
        self.loss = MemberLoss(self.network, group_loss)
        self.optimizer = torch.optim.Adam(trained(self.parameters), lr=lr, fused=True)

    def _take_policy(self, group_loss: ClipPPOLoss) -> None:
        """Takes the group's policy as it is now; an agent's network is copied if more than its tensors has changed."""
        network, parameters = group_loss.actor_network, actor_parameters(group_loss)
        self.parameters = parameters
        if self.index is not None:
            self.parameters = agent_parameters(network, parameters, self.index)
            settings = settings_of(network.named_modules())
            if settings == self._settings:
                return
            self._settings = settings
            network = single_agent_network(network, self.index, self._n_agents)
        self.network = network

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that are trained, each once."""
        return self.optimizer.param_groups[0]["params"]

    def follow(self, group_loss: ClipPPOLoss) -> None:
        """Takes over what the group's loss has now: settings, modules, parameters, and which of these are trained."""
        before = self.optimizer
        states = {key: before.state[leaf] for key, leaf in self.parameters.items(True, True) if leaf in before.state}
        self._take_policy(group_loss)
        self.loss.actor_network = self.network
        self.loss.follow(group_loss)
        self.optimizer = torch.optim.Adam(trained(self.parameters), fused=True)
        self.optimizer.param_groups[0].update(before.param_groups[0], params=trained(self.parameters))
        for key, leaf in self.parameters.items(True, True):
            if leaf.requires_grad and key in states:
                self.optimizer.state[leaf] = {
                    name: value.to(leaf.device) if name == "step" else value.to(leaf)
                    for name, value in states[key].items()
                }

    def mean_loss(self, batch: TensorDictBase) -> Tensor:
        """What a step makes smaller, the mean over a minibatch, a scalar."""
        policy = other_parameters(self.network, self.parameters)
        with set_recurrent_mode(True), policy, differentiable_attention():
            out = self.loss(batch)
        return out["loss_objective"] + out.get("loss_entropy", 0.0)

    def gradient(self, *, may_record: bool) -> MinibatchGradient:
        """The gradient of :meth:`mean_loss` in one update; compiled if it may be recorded and that can be compiled."""
        may_record = may_record and all(leaf.requires_grad for leaf in self.parameters.values(True, True))
        buffers = [name for name, _ in self.loss.named_buffers(recurse=False)]  # such as clip_epsilon: of a schedule
        loss = MeanLoss(self.loss, self.network, self.mean_loss, self.trained, buffers)
        return MinibatchGradient("The policy's update", loss, may_record=may_record, compiled=True)

    @torch.no_grad()
    def distribution(self, rows: PolicyRows, chunk_size: int) -> D.Distribution:
        """The policy at all rows, evaluated ``chunk_size`` environment steps at a time."""
        size = max(1, chunk_size // rows.steps_per_row)
        chunks = [rows.inputs[start : start + size] for start in range(0, len(rows), size)]
        parts = [distribution_parameters(self.network, self.parameters, chunk) for chunk in chunks]
        return build_distribution(self.network, torch.cat(parts))

    def optimizer_with(self, state_dict: dict[str, Any]) -> torch.optim.Adam:
        """An optimiser with a saved state; raises ValueError if it is of parameters with other shapes."""
        optimizer = torch.optim.Adam(self.trained, fused=True)
        optimizer.load_state_dict(state_dict)
        for parameter, state in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if (shape := state[name].shape) != parameter.shape:
                    raise ValueError(f"{name} has shape {tuple(shape)}, its parameter {tuple(parameter.shape)}")
        return optimizer


def check_loss(group: str, loss: ClipPPOLoss, ranks: Ranks) -> None:
    """Refuses a loss whose policy's part is not that of ``ClipPPOLoss``, or is clipped around another policy.

    Raises TypeError if it is no ``ClipPPOLoss``, or has methods of its own for the policy's part; ValueError if it has
    a lagging policy, or statistics of one process alone.
    """
    if not isinstance(loss, ClipPPOLoss):
        raise TypeError(
            f"the loss of group {group!r} is a {type(loss).__name__}. Legal: a torchrl.objectives.ClipPPOLoss."
        )
    own = [name for name in _POLICY_METHODS if _method(type(loss), name) is not _method(ClipPPOLoss, name)]
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


def _method(loss_class: type, name: str) -> object:
    return inspect.unwrap(getattr(loss_class, name))  # TorchRL wraps the forward of each loss class anew


def log_prob_keys(loss: ClipPPOLoss) -> list[NestedKey]:
    """The keys of the recorded log-probabilities: one, or those of the parts of an action."""
    key = loss.tensor_keys.sample_log_prob
    return key if isinstance(key, list) else [key]
