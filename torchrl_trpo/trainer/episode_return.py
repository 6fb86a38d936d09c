"""The mean return of finished episodes in the log of TorchRL's ``Trainer``."""

from __future__ import annotations

from typing import Any

from tensordict import NestedKey, TensorDictBase
from torchrl.trainers import LogScalar

from torchrl_trpo.keys import next_key


class LogEpisodeReturn(LogScalar):
    """Logs the mean return of the episodes that ended in a batch, over episodes and agents.

    It reads the running return that ``RewardSum`` or :func:`~torchrl_trpo.envs.make_env` writes. It logs nothing if the
    data has no such entry or no episode ended. An agent that stays done until the others are counts once.

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
        super().__init__(next_key(key), logname, log_pbar=True, include_std=False)
        self.done_key = next_key(done_key)

    def __call__(self, batch: TensorDictBase) -> dict[str, Any] | None:
        """Computes the entry of the log.

        Args:
            batch: the collected data, ``[*B, T]``.

        Returns:
            The mean return under the hook's name, or None.
        """
        returns = batch.get(self.key, None)
        if returns is None:
            return None
        done = batch.get(self.done_key)
        if (before := batch.get(self.done_key[1:], None)) is not None:
            done = done & ~before
        done = done.flatten(batch.batch_dims)  # [*B, T, n_agents] or [*B, T, 1]
        returns = returns.flatten(batch.batch_dims)
        ended = returns[done.expand_as(returns)]
        return {self.logname: ended.mean().item(), "log_pbar": self.log_pbar} if ended.numel() else None
