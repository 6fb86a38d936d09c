"""The tasks that there are: those of the simulators that are installed."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from torchrl_trpo.errors import SettingError, nearest

_ROBOTS = ["Ant", "CoupledHalfCheetah", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup"]
_ROBOTS += ["Pusher", "Reacher", "Swimmer", "Walker2d"]


class SimulatorError(SettingError, ImportError):
    """An environment whose simulator is not installed."""


def check_name(name: str) -> None:
    """Refuses an environment's name whose library or task does not exist, or is not installed."""
    library, _, task = name.partition("/")
    if library == "custom":
        return
    if library not in LIBRARIES:
        raise SettingError(f"env: {name!r}. {nearest(library, [*LIBRARIES, 'custom'])}")
    known = known_tasks(library)
    if not known:
        raise SimulatorError(
            f"env: {name!r} needs a simulator that is not installed. Use: pip install 'torchrl-trpo[recipes,{library}]'"
        )
    if task not in known:
        raise SettingError(f"env: {name!r}. {nearest(name, [f'{library}/{other}' for other in known])}")


def known_tasks(library: str) -> list[str]:
    """The tasks of a library; none if it is not installed.

    They are looked up by its files, without an import. Gymnasium is imported, since its plugins register tasks.
    """
    return _TASKS[library]()


def _modules(package: str, *folders: str) -> list[str]:
    """The names of the modules in folders of a package, which is not imported; none if it is not installed."""
    spec = importlib.util.find_spec(package)
    roots = (spec and spec.submodule_search_locations) or []
    files = [file for root in roots for folder in folders for file in Path(root, folder).glob("[!_]*.py")]
    return sorted(file.stem for file in files)


def _gym_tasks() -> list[str]:
    if not importlib.util.find_spec("gymnasium"):
        return []
    return [name for name in importlib.import_module("gymnasium").registry if re.fullmatch(r"[\w-]+", name)]


_TASKS: dict[str, Callable[[], list[str]]] = {
    "vmas": lambda: _modules("vmas", "scenarios", "scenarios/mpe", "scenarios/debug"),
    "pettingzoo": lambda: [name for name in _modules("mpe2", "") if re.fullmatch(r"simple\w*_v\d+", name)],
    "mamujoco": lambda: _ROBOTS if importlib.util.find_spec("gymnasium_robotics") else [],
    "gym": _gym_tasks,
}
LIBRARIES = tuple(_TASKS)
"""The libraries that have tasks by name."""
