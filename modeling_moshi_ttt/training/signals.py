"""Signals that end a run kindly: the step is finished, a checkpoint is saved, and the same command goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# SIGTERM: a cluster's end, or a launcher's; SIGUSR1: SLURM's --signal, some time before that; SIGINT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# torch's launcher sends its processes a signal that the terminal has sent them already
LAUNCHED = "TORCHELASTIC_RUN_ID"


class StopRequest:
    """Which signal asked this process to stop, None while none did; and whether Ctrl-C came again."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.repeated = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.repeated = self.signal is not None and number == signal.SIGINT and LAUNCHED not in os.environ
        self.signal = number
        if self.repeated:
            raise KeyboardInterrupt  # the second one does not wait


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take the signals as requests within the block; outside the main thread, where Python has no handlers, there are none."""
    request = StopRequest()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, request._handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunStopped(Exception):
    """A run that a signal has ended between two steps, saved.

    Attributes:
        exit_code: 128 + the signal's number, as shells have it.
    """

    def __init__(self, number: int, step: int, steps: int, checkpoint: str):
        name = signal.Signals(number).name
        super().__init__(f"{name}: stopped after step {step} of {steps}, saved as {checkpoint}; run the same command again to go on.")
        self.exit_code = 128 + number
