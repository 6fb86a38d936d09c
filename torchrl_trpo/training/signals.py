"""Stopping a run with a signal: after the current iteration, or at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from torchrl_trpo.parallel.torchrun import is_first, is_job


class StopSignals:
    """Notes the first SIGINT or SIGTERM, so that the run can stop soon; a second one stops it at once.

    In a job of torchrun, later signals are ignored: a terminal's Ctrl-C reaches each process twice, once through
    torchrun, and torchrun itself ends processes that do not stop in time.

    Only the main thread can receive signals; in other threads this does nothing. A signal that the process ignores
    (SIGINT under ``nohup``) stays ignored.

    Attributes:
        received: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handlers_before: dict[int, Any] = {}

    def install(self) -> None:
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._handlers_before[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        """Restores the handlers that were there before."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        text = f"\n{self.received.name}: finishing the iteration, then a checkpoint."
        if not is_job():
            self.restore()
            text += " A second one stops at once."
        if is_first():
            os.write(2, f"{text}\n".encode())  # print may not be called inside print, which the signal may interrupt
