"""The loss of a critic, also of one that outputs normalised values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.modules import ValueNorm, recurrent_mode, set_recurrent_mode
from torchrl.objectives import PPOLoss

from torchrl_trpo.keys import entry
from torchrl_trpo.objectives.functional import in_evaluation, other_parameters, parameters_restored
from torchrl_trpo.objectives.policy_update import (
    critic_network_parameters,
    current_estimator,
    mean_critic_loss,
    row_mask,
)
from torchrl_trpo.objectives.popart import check_values, update_value_norm
from torchrl_trpo.parallel.ranks import Ranks
from torchrl_trpo.seeding import untouched_generators


class CriticLoss(PPOLoss):
    """The part of :class:`TRPOLoss` that is about the critic: its loss, and the statistics of its values."""

    value_norm: ValueNorm | None
    ranks: Ranks
    _started_norm: Sequence[int] = ()  # the versions of its buffers when its statistics were known not to be empty
    _correction_is_checked = False

    def loss_critic(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The critic's distance from the value targets, also of masked entries; to be minimised is its masked mean.

        Each call moves the statistics of ``value_norm`` towards these targets first, unless gradients are off
        (``torch.no_grad``). The last layer of a critic that outputs normalised values is then corrected in place, so
        that no value changes (PopArt); a graph from an earlier call can no longer be differentiated. If values do
        change, because that layer does not output them, a ``ValueError`` says so at the first correction.

        Args:
            tensordict: the data with value targets, ``[*B]``; of a recurrent critic whole sequences, ``[*B, T]``.

        Returns:
            The distance ``[*B, n_agents, 1]`` times ``critic_coeff``, the share of clipped values (None without
            ``clip_value``) and the explained variance (None unless it is logged).
        """
        if not recurrent_mode():  # torch.compile cannot enter it twice
            with set_recurrent_mode(True):
                return self.loss_critic(tensordict)
        if torch.is_grad_enabled() and self.value_norm is not None:
            with self._correction_checked(tensordict, self.value_norm):
                self.update_value_norm(tensordict)
        with parameters_restored(self.critic_network):
            return super().loss_critic(tensordict.clone(False))  # values are written, that clip_value must not read

    @contextlib.contextmanager
    def _correction_checked(self, tensordict: TensorDictBase, norm: ValueNorm) -> Iterator[None]:
        """Raises ValueError if the first correction of the critic changes its values of a few rows."""
        network = self.critic_network
        if self._correction_is_checked or network is None or self._critic_to_correct(norm) is None:
            yield
            return

        @torch.no_grad()
        def values() -> Tensor:
            own = other_parameters(network, critic_network_parameters(self))
            with untouched_generators(0), in_evaluation(network), own:
                few = network(tensordict[:4].select(*network.in_keys, strict=False))
            return norm.denormalize(few.get(self.tensor_keys.value))

        before = values()
        yield
        check_values(before, values(), norm)
        self._correction_is_checked = True

    def mean_critic_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The mean of :meth:`loss_critic` over what the masks let count: what an optimiser of the critic minimises.

        Args:
            tensordict: the data with value targets, ``[*B]``; of a recurrent critic whole sequences, ``[*B, T]``.

        Returns:
            The loss, a scalar; 0 if nothing counts.
        """
        return mean_critic_loss(self, tensordict)

    def update_value_norm(self, tensordict: TensorDictBase) -> None:
        """Moves the statistics of ``value_norm``, as :meth:`loss_critic` does; nothing without one.

        Args:
            tensordict: the data with value targets, ``[*B]``; ``B`` may be 0, where other processes have rows.
        """
        if self.value_norm is not None:
            targets = entry(tensordict, self.tensor_keys.value_target, "value_target")
            mask = row_mask(self, tensordict, targets)
            targets = targets if mask is None else targets[mask].unsqueeze(-1)
            critic = self._critic_to_correct(self.value_norm)
            update_value_norm(self.value_norm, targets, critic, self.ranks)
            if critic is not None:
                self._started_norm = _versions(self.value_norm)

    def _critic_to_correct(self, norm: ValueNorm) -> TensorDictBase | None:
        """The critic's parameters if moving the statistics would change its values, else None.

        It would not if the critic outputs raw values, or if the statistics are empty.
        """
        if not self.corrects_critic:
            return None
        has_started = _versions(norm) == self._started_norm  # nothing else has written to them, such as a loaded state
        if not has_started and not any(bool(buffer.any()) for buffer in norm.buffers()):  # waits for the device
            return None
        return critic_network_parameters(self)

    @property
    def corrects_critic(self) -> bool:
        """Whether the critic outputs normalised values, which the estimator denormalises with ``value_norm``."""
        if self.value_norm is None:
            return False
        own = getattr(current_estimator(self), "value_norm", None)
        # or one outside of the loss computes the advantages, whatever the loss has by default
        return own is self.value_norm or getattr(self.value_norm, "critic_is_normalized", False)

    def _critic_loss_inputs(
        self, target_return: Tensor, state_value: Tensor, old_state_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # In normalised space, as in MAPPOLoss; there the critic always outputs raw values.
        norm = self.value_norm
        if norm is None:
            return target_return, state_value, old_state_value
        if not self.corrects_critic:
            state_value = norm.normalize(state_value)
        old_state_value = None if old_state_value is None else norm.normalize(old_state_value)
        return norm.normalize(target_return.detach()), state_value, old_state_value


def _versions(norm: ValueNorm) -> list[int]:
    return [buffer._version for buffer in norm.buffers()]  # private: PyTorch counts the writes to a tensor nowhere else
