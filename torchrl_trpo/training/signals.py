"""Stopping a run from outside: at the end of an iteration, or at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from torchrl_trpo.parallel.torchrun import is_first, is_job


class StopSignals:
    """Takes the first SIGINT or SIGTERM as the wish to stop soon; the second one stops at once, as without this.

    In a job of torchrun there is no second one: a terminal's Ctrl-C reaches each process twice, once through torchrun,
    which ends those that do not stop in time.

    Only the main thread can receive signals: elsewhere nothing changes. A signal that the process ignores (SIGINT under
    ``nohup``) stays ignored.

    Attributes:
        received: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Begins to wait for signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the signals back to those who had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        told = f"\n{self.received.name}: finishing the iteration, then a checkpoint."
        if not is_job():
            self.__exit__(None, None, None)
            told += " A second one stops at once."
        if is_first():
            os.write(2, f"{told}\n".encode())  # print may not be entered twice
