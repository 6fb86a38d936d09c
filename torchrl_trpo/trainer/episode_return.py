"""The mean return of finished episodes in the log of TorchRL's ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import NestedKey, TensorDictBase
from torchrl.trainers import Trainer, TrainerHookBase

from torchrl_trpo.keys import path


class LogEpisodeReturn(TrainerHookBase):
    """Logs the mean return of the episodes that ended in a batch, over episodes and agents.

    It reads the running return that ``RewardSum`` or :func:`~torchrl_trpo.envs.make_env` writes. It logs nothing if the
    data has no such entry or no episode ended.

    Args:
        key: the running return ``[*B, T, n_agents, 1]`` or ``[*B, T, 1]``, inside ``"next"``.

    Keyword Args:
        done_key: the done flags of the agents or of all of them, inside ``"next"``.
        logname: the name in the log and in the progress bar.
    """

    def __init__(
        self,
        key: NestedKey = "episode_reward",
        *,
        done_key: NestedKey = "done",
        logname: str = "episode_return",
    ) -> None:
        self.key = path(key)
        self.done_key = path(done_key)
        self.logname = logname

    def __call__(self, batch: TensorDictBase) -> dict[str, Any] | None:
        """Computes the entry of the log.

        Args:
            batch: the collected data, ``[*B, T]``.

        Returns:
            The mean return under the hook's name, or None.
        """
        returns = batch.get(("next", *self.key), None)
        if returns is None:
            return None
        done = batch.get(("next", *self.done_key)).flatten(batch.batch_dims)  # [*B, T, n_agents] or [*B, T, 1]
        returns = returns.flatten(batch.batch_dims)
        ended = returns[done.expand_as(returns)]
        return {self.logname: ended.mean().item(), "log_pbar": True} if ended.numel() else None

    def state_dict(self) -> dict[str, Any]:
        """An empty dict: the hook has no state."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Does nothing: the hook has no state.

        Args:
            state_dict: is not read.
        """

    def register(self, trainer: Trainer, name: str | None = None) -> None:
        """Registers the hook before the optimisation steps.

        Args:
            trainer: the trainer.
            name: the name in the checkpoint. Default: after the hook's name in the log.
        """
        trainer.register_op("pre_steps_log", self)
        trainer.register_module(name or f"log_{self.logname}", self)
