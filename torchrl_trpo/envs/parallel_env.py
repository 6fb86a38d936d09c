"""TorchRL's ``ParallelEnv``, which survives Ctrl-C, restores its environments, and closes after a worker died."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torchrl.envs import EnvBase, ParallelEnv


class RestorableParallelEnv(ParallelEnv):
    """A ``ParallelEnv`` for long runs: it can be interrupted, restored and closed.

    - Ctrl-C reaches every process of a terminal. The workers ignore it, so that the main process can finish its
      iteration and close them.
    - ``load_state_dict`` returns when every worker has restored its environment. TorchRL's goes on after
      ``shutdown_timeout``, and a replay of a long episode takes longer.
    - ``close`` also works when a worker has died.
    """

    is_closed: bool

    def __init__(self, num_workers: int, make: Callable[[], EnvBase], **kwargs: Any) -> None:
        super().__init__(num_workers, partial(_make_in_worker, make, os.getpid()), **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], **kwargs: Any) -> None:
        """Restores all environments; raises RuntimeError if a worker fails, which prints its own error."""
        try:
            super().load_state_dict(state_dict, **kwargs)
            self.state_dict()  # a worker answers when it has finished loading
        except (EOFError, OSError) as error:
            raise RuntimeError(
                "a worker of the ParallelEnv died while it restored its environment; its own error is printed above."
            ) from error
        for index in range(self.num_workers):
            # Private: TorchRL leaves a "done" flag set after loading, and the next step would return old data. Nothing
            # public clears it.
            self._shm_done_flags[index] = 0

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Ends all workers, also when one has died."""
        try:
            super().close(raise_if_closed=raise_if_closed)
        except (OSError, RuntimeError, ValueError):
            if self.is_closed:
                raise
            self.is_closed = True  # a worker died, and TorchRL has ended the others


def _make_in_worker(make: Callable[[], EnvBase], main_process: int) -> EnvBase:
    """Makes an environment; in a worker, Ctrl-C is ignored from then on."""
    if os.getpid() != main_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return make()
