"""Timing that a drift of the machine's speed cannot bias, and what the machine is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def medians(tasks: Mapping[str, Callable[[], object]], repetitions: int, *, warm_up: bool = True) -> dict[str, float]:
    """The median duration of each task; tasks take turns.

    Args:
        tasks: the tasks by name.
        repetitions: how often each is timed.

    Keyword Args:
        warm_up: whether a first turn is not timed.

    Returns:
        Seconds by name.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    if warm_up:
        for task in tasks.values():
            task()
    for _ in range(repetitions):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, str]:
    """What the figures were measured on.

    Returns:
        The CPU's model, its cores, and the versions of what runs on it.
    """
    packages = ("torch", "torchrl", "tensordict", "vmas")
    return {
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores, one torch thread",
        "Python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
