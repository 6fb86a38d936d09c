"""PPO's unclipped surrogate as a loss, with exact KL and entropies."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    composite_lp_aggregate,
    dispatch,
)
from torch import Tensor
from torch import distributions as D
from torchrl.modules import ValueNorm
from torchrl.objectives import PPOLoss, ValueEstimators
from torchrl.objectives.utils import default_value_kwargs
from torchrl.objectives.value import ValueEstimatorBase

from torchrl_trpo.arguments import plain_number
from torchrl_trpo.distributions.divergence import has_exact_entropy, kl_if_exact, sum_events
from torchrl_trpo.errors import nearest
from torchrl_trpo.numerics.statistics import effective_sample_size
from torchrl_trpo.objectives.agent_gae import AgentGAE
from torchrl_trpo.objectives.collected import broadcast_advantage, collected_log_prob
from torchrl_trpo.objectives.critic_loss import CriticLoss
from torchrl_trpo.objectives.functional import copy_parameters, parameters_restored
from torchrl_trpo.objectives.policy_network import is_composite
from torchrl_trpo.objectives.policy_update import (
    actor_parameters,
    collected_distribution,
    current_estimator,
    estimated_advantage,
    estimator_mask_keys,
    exact_entropy,
    row_mask,
    standardized_advantage,
)
from torchrl_trpo.parallel.ranks import Ranks

_NOT_OFFERED = {"kwargs", "gamma", "actor", "critic", "advantage_key", "value_target_key", "value_key"}
"""Arguments of ``PPOLoss`` that TorchRL has replaced."""


class SurrogateLoss(CriticLoss):
    """The part of :class:`TRPOLoss` that evaluates: :meth:`forward`, and the value estimator.

    The private methods of ``PPOLoss`` that it overrides are the hooks that TorchRL's own losses override
    (``MAPPOLoss``, ``ClipPPOLoss``); none of them has a public name.

    Its arguments are those of :class:`TRPOLoss`.
    """

    default_value_estimator = ValueEstimators.MAGAE

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential | None,
        critic_network: TensorDictModule | None,
        *,
        entropy_coeff: float | Mapping[NestedKey, float],
        value_norm: ValueNorm | None,
        process_group: dist.ProcessGroup | None,
        **kwargs: Any,
    ) -> None:
        accepted = set(inspect.signature(PPOLoss).parameters) - {"kwargs"}
        for name in kwargs:
            if name not in accepted:  # PPOLoss would ignore it
                raise TypeError(
                    f"{name}: {type(self).__name__} has no such argument. {_legal_instead(type(self), name)}"
                )
        super().__init__(actor_network, critic_network, entropy_coeff=plain_number(entropy_coeff), **kwargs)
        self.value_norm = value_norm
        self._figures: dict[str, Tensor] = {}  # kl and ESS, from _log_weight to the end of forward
        self.ranks = Ranks(process_group)
        if self.ranks.size > 1 and self.advantage_norm is not None:
            raise ValueError(
                "advantage_norm: its statistics would be of each process alone. Legal: normalize_advantage."
            )
        for tensor in (*self.parameters(), *self.buffers()):
            self.ranks.first_(tensor.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies the loss. The networks of the copy, its estimator's too, hold the parameters that it trains."""
        copy_parameters(self, memo)
        result = memo[id(self)] = self.__class__.__new__(self.__class__)
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result

    @property
    def actor_parameters(self) -> TensorDictBase:
        """The policy's parameters and buffers, whether the loss is functional or not."""
        return actor_parameters(self)

    @property
    def out_keys(self) -> list[NestedKey]:
        """What :meth:`forward` returns."""
        if self._out_keys is not None:  # set by select_out_keys
            return self._out_keys
        by_part = self.entropy_bonus and is_composite(self.actor_network) and not composite_lp_aggregate(nowarn=True)
        keys = ["loss_objective", "kl_approx", "kl", "ESS"]
        keys += ["entropy", "loss_entropy"] if self.entropy_bonus else []
        keys += ["composite_entropy"] if by_part else []
        if self._has_critic:  # private: critic_coeff would have to be read from the device
            keys += ["loss_critic"]
            keys += ["value_clip_fraction"] if self.clip_value else []
            keys += ["explained_variance"] if self.log_explained_variance else []
        return keys

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Evaluates the objective at the current parameters.

        With a critic and a ``value_norm``, the statistics of the values move as in :meth:`loss_critic`, unless
        gradients are off (``torch.no_grad``): a second call then gives another ``loss_critic``, as with ``MAPPOLoss``.
        Nothing else changes.

        Args:
            tensordict: the data, ``[*B, T]``.

        Returns:
            The losses and log entries that the class docstring lists, without batch dimensions.
        """
        tensordict = tensordict.clone(False)
        keys = self.tensor_keys
        advantage, _ = estimated_advantage(self, tensordict)
        log_prob_k = collected_log_prob(self, tensordict)
        tensordict.set(
            keys.advantage, broadcast_advantage(advantage, log_prob_k, keys.advantage, tensordict.batch_dims)
        )
        if not isinstance(keys.sample_log_prob, list) and isinstance(tensordict.get(keys.sample_log_prob), Tensor):
            tensordict.set(keys.sample_log_prob, log_prob_k.squeeze(-1))  # of the joint action
        try:
            with parameters_restored(self.actor_network, self.critic_network):
                return super().forward(tensordict).update(self._figures)
        finally:
            self._figures = {}

    def make_value_estimator(self, value_type: ValueEstimators | type | Any = None, **hyperparams: Any) -> Self:
        """Makes the value estimator, as for any TorchRL loss; one that is given as a class gets the loss's keys too.

        Args:
            value_type: a ``ValueEstimators`` entry or its name, or a ``ValueEstimatorBase`` class or instance. Default,
                and for ``ValueEstimators.MAGAE``: :class:`AgentGAE`, a ``MultiAgentGAE``.
            **hyperparams: the estimator's arguments, such as ``gamma`` and ``lmbda``. Without ``value_norm``, an
                :class:`AgentGAE` denormalises values if another one has done so; None says that values are raw.

        Returns:
            The loss itself.

        Raises:
            ValueError: if the estimator's ``value_network`` or ``value_norm`` is not the loss's, if it does not
                denormalise values that the one before it did, or if its statistics would be of one process alone.
        """
        given = hyperparams.get("value_network", getattr(value_type, "value_network", None))
        if given is not None and self.critic_network is not None and given is not self.critic_network:
            raise ValueError(
                "value_network is another network than the loss's critic_network: values would come from one that "
                "loss_critic does not train. Legal: the critic_network that the loss was made with."
            )
        norm = hyperparams.get("value_norm", getattr(value_type, "value_norm", None))
        if self.critic_network is not None and norm not in (None, self.value_norm):
            raise ValueError(
                "value_norm: the value estimator has another one than the loss, so that values would be denormalised "
                f"with statistics that nothing moves. Legal: the loss's, {self.value_norm}; None for raw values."
            )
        is_default = value_type is None or getattr(value_type, "name", str(value_type)).upper() == "MAGAE"
        own_norm = self.value_norm
        if norm is None and own_norm is not None and getattr(own_norm, "critic_is_normalized", False):
            if "value_norm" in hyperparams:
                own_norm.critic_is_normalized = False
            elif is_default or (isinstance(value_type, type) and issubclass(value_type, AgentGAE)):
                hyperparams["value_norm"] = own_norm  # as the one before it, or one outside of the loss
            else:
                raise ValueError(
                    "value_norm: the critic outputs normalised values, which this estimator would not denormalise. "
                    "Legal: AgentGAE(..., value_norm=loss.value_norm)."
                )
        if is_default:
            defaults = default_value_kwargs(self.default_value_estimator)
            super().make_value_estimator(AgentGAE, **{**defaults, "value_network": self.critic_network, **hyperparams})
            self.value_type = ValueEstimators.MAGAE
        else:
            super().make_value_estimator(value_type, **hyperparams)
        if not isinstance(value_type, ValueEstimatorBase):
            self.set_keys()  # hands on the keys that it has
        if getattr(current_estimator(self), "mask_keys", None) == AgentGAE.masks_of("auto"):
            self._forward_masks()  # one of its own must be that of the loss, too, when both are used
        self._set_in_keys()
        if self.ranks.size > 1 and getattr(self.value_estimator, "average_gae", False):
            raise ValueError(
                "average_gae=True would normalise the advantages of each process alone. Legal: average_gae=False, with "
                "normalize_advantage=True in TRPOLoss, which is over all of them."
            )
        return self

    @PPOLoss.loss_mask_key.setter
    def loss_mask_key(self, value: NestedKey | Literal["auto"] | None) -> None:
        """Which entry says what counts, as for any TorchRL loss; the value estimator reads it too."""
        PPOLoss.loss_mask_key.fset(self, value)
        self._forward_masks()

    def _forward_masks(self) -> None:
        estimator = current_estimator(self)
        if isinstance(estimator, AgentGAE):
            estimator.mask_keys = estimator_mask_keys(self)

    # ---------------------------------------------------------------- hooks of PPOLoss

    def _set_in_keys(self) -> None:
        # What a critic reads at t+1 need not be what the policy reads, which is all that PPOLoss names.
        super()._set_in_keys()
        for key in getattr(current_estimator(self), "in_keys", ()):
            keys = [unravel_key(part) for part in (key if isinstance(key, list) else [key])]
            self._in_keys += [part for part in keys if part not in self._in_keys]

    def _standardize_advantage(self, advantage: Tensor, tensordict: TensorDictBase) -> Tensor:
        # Over the rows that count, of all ranks; PPOLoss knows one mask and one process.
        return standardized_advantage(self, advantage, tensordict, self.ranks)

    def _log_weight(self, tensordict: TensorDictBase, adv_shape: torch.Size) -> Any:
        # The only place where PPOLoss has both the ratios and the distribution that its losses are computed from.
        collected = collected_distribution(self.actor_network, tensordict)
        log_weight, dist, kl_approx, log_is_weight = super()._log_weight(tensordict, adv_shape=adv_shape)
        with torch.no_grad():
            log_ratio = log_weight if log_is_weight is None else log_weight + log_is_weight
            kl = None if collected is None else kl_if_exact(collected, dist, log_ratio.ndim - 1)
            kl = torch.full_like(log_ratio, torch.nan) if kl is None else kl.unsqueeze(-1)
            self._figures = {
                # private: the mean over what the loss's masks let count has no public name
                "kl": self._reduce_loss(kl, tensordict, reduction="mean"),
                "ESS": effective_sample_size(log_ratio, row_mask(self, tensordict, log_ratio)),
            }
        return log_weight, dist, kl_approx, log_is_weight

    def _get_cur_log_prob(self, tensordict: TensorDictBase, params: TensorDictBase | None = None) -> Any:
        # A distribution that is not Independent has a log-probability for each entry of an action; PPOLoss would take
        # those for actions of their own.
        log_prob, dist, composite = super()._get_cur_log_prob(tensordict, params)
        if not composite:
            log_prob = sum_events(log_prob, tensordict.get(self.tensor_keys.sample_log_prob).ndim)
        return log_prob, dist, composite

    def _get_entropy(self, dist: D.Distribution, adv_shape: torch.Size) -> Tensor | TensorDict:
        # Without sampling where possible: PPOLoss's estimate differs from call to call.
        return exact_entropy(dist, adv_shape) if has_exact_entropy(dist) else super()._get_entropy(dist, adv_shape)


def _legal_instead(loss: type[SurrogateLoss], name: str) -> str:
    """What is legal in place of an argument that a loss does not have."""
    if name == "clip_epsilon":
        return "Legal: TrustRegionUpdater(loss, max_kl=...), which bounds a step where ClipPPOLoss clips."
    names = [*inspect.signature(loss).parameters, *inspect.signature(PPOLoss).parameters]
    return nearest(name, [each for each in dict.fromkeys(names) if each not in _NOT_OFFERED])
