"""TorchRL's collector with compiled rollouts."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import set_exploration_type
from torchrl.modules.tensordict_module.exploration import RandomPolicy

from torchrl_trpo.envs.fused_rollout import FusedRollout
from torchrl_trpo.errors import warn
from torchrl_trpo.kernels.buffers import NotCompiled
from torchrl_trpo.keys import next_key

_TRAJ_IDS = ("collector", "traj_ids")
_MOST = 16  # times that a collector compiles anew


class CompiledCollector(Collector):
    """TorchRL's ``Collector``, whose rollouts in a :class:`~torchrl_trpo.envs.CompiledVmasEnv` are compiled.

    Policy, transforms, simulator and resets are compiled into loops over the environments, which write the batch
    themselves. What comes out is what ``Collector`` gives, up to rounding: the random numbers are the same. The
    parameters of the policy are read where they are, so that an update needs no compilation. A policy that cannot be
    compiled is called at each step. If rollouts cannot be compiled at all, a warning says why, and they are those of
    ``Collector``.

    Args:
        *args: as of :class:`~torchrl.collectors.Collector`.

    Keyword Args:
        **kwargs: as of :class:`~torchrl.collectors.Collector`.

    Attributes:
        why_not_compiled: why rollouts are not compiled; None if they are.

    Examples:
        >>> from torchrl_trpo.envs import CompiledCollector, CompiledVmasEnv
        >>> env = CompiledVmasEnv("simple", num_envs=32, seed=0)
        >>> collector = CompiledCollector(env, frames_per_batch=160, total_frames=320)
        >>> [batch.shape for batch in collector]
        [torch.Size([32, 5]), torch.Size([32, 5])]
    """

    _carrier: TensorDictBase
    pre_collect_hook: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fused: FusedRollout | None = None
        self._n_compiled = 0
        self._is_torn = False  # whether a rollout has ended in the middle of a step
        self._returns_same_td: bool = self.return_same_td
        self.why_not_compiled: str | None = None
        self._compile()

    def _compile(self) -> None:
        try:
            self._n_compiled += 1
            if reason := self._reason_against():
                raise NotCompiled(reason)
            with set_exploration_type(self.exploration_type):
                self._fused = FusedRollout(self.env, self._wrapped_policy, self._carried)
            reason = self._fused.why_policy_not_compiled
            if reason and not isinstance(self._wrapped_policy, RandomPolicy):
                warn(f"The policy is called at each step, not compiled: {reason}.")
        except NotCompiled as error:
            self._fused, self.why_not_compiled = None, str(error)
            warn(f"Rollouts are not compiled: {error}.")
        # a batch of a compiled rollout has memory of its own, and needs no copy
        self.return_same_td = self._returns_same_td or self._fused is not None

    def _reason_against(self) -> str | None:
        """Which argument asks for something that compiled rollouts do not do."""
        devices = {self.env.device, self.policy_device, self.storing_device} - {None, torch.device("cpu")}
        asked = {
            "settings of the policy or the environment change again and again": self._n_compiled > _MOST,
            "a replay buffer is written at each step": self.replay_buffer is not None and not self.extend_buffer,
            "random frames come first": bool(self.init_random_frames),
            "compact_obs leaves entries out": bool(self._compact_next_keys),
            "another process may interrupt them": self.interruptor is not None,
            "the policy is compiled already": self.compiled_policy or self.cudagraphed_policy,
            "there is no buffer for a batch": not self._use_buffers,
            f"they are compiled on the CPU alone, and this is on {', '.join(map(str, devices))}": bool(devices),
        }
        return next((reason for reason, holds in asked.items() if holds), None)

    @property
    def _carried(self) -> TensorDictBase:
        """The data that the policy acts on next, without the ids of trajectories."""
        return self._carrier.exclude("collector")

    def rollout(self) -> TensorDictBase:
        """Collects a batch.

        Returns:
            The batch, ``[*env.batch_size, frames_per_batch / num_envs]``.
        """
        if self._fused is None:
            return super().rollout()
        hook, self.pre_collect_hook = self.pre_collect_hook, None  # called here, and not again
        try:
            if hook is not None:
                hook()
            with set_exploration_type(self.exploration_type):
                if not self._fused.is_current(self._wrapped_policy):
                    self._compile()
            if self._fused is None:
                return super().rollout()
        finally:
            self.pre_collect_hook = hook
        if self.reset_at_each_iter or self._is_torn:
            self._carrier.update(self.env.reset())
            self._start_new_trajectories()
        self._is_torn = True
        batch = self._final_rollout.apply(lambda leaf: leaf.new_empty(leaf.shape))
        with set_exploration_type(self.exploration_type):
            following = self._fused.collect(self._carried, batch)
        self._is_torn = False
        if self.track_traj_ids:
            following.set(_TRAJ_IDS, self._number_trajectories(self._carrier.get(_TRAJ_IDS), batch))
        self._carrier = following
        return self._maybe_set_truncated(batch)

    def _number_trajectories(self, first: Tensor, batch: TensorDictBase) -> Tensor:
        """Writes the ids of a batch's trajectories, as ``Collector`` does step by step.

        Args:
            first: those at the first step, ``[n]``.
            batch: the batch, ``[n, T]``.

        Returns:
            Those after the last step.
        """
        dones = [batch.get(next_key(key)).flatten(2).any(-1) for key in self.env.done_keys]
        ends = torch.stack(dones).any(0)
        ids = torch.full((len(first), batch.shape[1] + 1), -1)
        if n_ends := int(ends.sum()):
            ids.T[1:][ends.T] = self._traj_pool.get_traj_and_increment(n_ends)  # in the order of time
        ids = ids.cummax(1).values
        ids = torch.where(ids < 0, first.unsqueeze(1), ids)
        batch.set(_TRAJ_IDS, ids[:, :-1].contiguous())
        return ids[:, -1].clone()
