"""``pytest -p tests.on_device``: what tests create is on the device in the environment variable ``TEST_DEVICE``.

The project has to follow. Tests that name the CPU, or compare with it, fail for that alone.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

TESTS = Path(__file__).parent
LIBRARIES = {
    "torch",
    "tensordict",
    "torchrl",
    "_pytest",
    "pluggy",
    "xdist",
    "hypothesis",
    "functools.py",
    "contextlib.py",
}


class OnDevice(TorchFunctionMode):
    """Puts what is made without a device by a test, or by a library that it calls, on a device."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.constructors = _device_constructors()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        placed = kwargs.get("device") is not None or kwargs.get("generator") is not None
        if func in self.constructors and not placed and _is_for_a_test():
            kwargs = {**kwargs, "device": self.device}
        return func(*args, **kwargs)


def _is_for_a_test():
    """Whether the innermost frame that is not a library's is a test's."""
    frame = sys._getframe(2)
    while frame is not None:
        if (told := _is_a_test(frame.f_code.co_filename)) is not None:
            return told
        frame = frame.f_back
    return False


@functools.cache
def _is_a_test(name):
    """Whether a file is the tests' own, None for a library's; the environments among them draw on the CPU."""
    file = Path(name)
    if file.suffix != ".py" or LIBRARIES.intersection(file.parts):
        return None
    return TESTS in file.parents and file.name != "environments.py"


def pytest_configure(config):
    config.on_device = OnDevice(os.environ["TEST_DEVICE"])
    config.on_device.__enter__()


def pytest_unconfigure(config):
    config.on_device.__exit__(None, None, None)
