"""Errors that name the nearest legal choice, and warnings that name the user's line."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable
from importlib.util import find_spec

_LIBRARIES = {"torchrl_trpo", "torchrl", "tensordict", "torch", "hydra", "contextlib"}


class SettingError(ValueError):
    """An invalid setting; the command line prints the message without a traceback."""


class AgreedError(SettingError):
    """A SettingError that rank 0 has found and that is raised on every rank."""


class PlainKeyError(KeyError):
    """A ``KeyError`` that is printed as its message is; Python's is printed in quotes, with those inside escaped."""

    def __str__(self) -> str:
        return "".join(map(str, self.args))


def require(extras: str, *modules: str, importer: str) -> None:
    """Refuses to go on without modules that an extra installs.

    Args:
        extras: the extras, such as ``"recipes,vmas"``.
        *modules: the modules.

    Keyword Args:
        importer: the module that needs them; ``python -m`` prints the message of its package without a traceback.

    Raises:
        ImportError: if one is not installed; it says what to install.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        command = f"pip install 'torchrl-trpo[{extras}]'"
        raise ImportError(f"{importer} needs {', '.join(missing)}. Use: {command}", name=importer)


def warn(message: str) -> None:
    """Warns of something at the line that called a library: the user's, or a recipe's.

    Args:
        message: what is to be said.
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_back is not None and _is_of_library(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_of_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES and not module.startswith("torchrl_trpo.recipes")


def close_names(given: object, legal: Iterable[str]) -> list[str]:
    """The legal names near one that is not legal, the nearest first: those that it begins, and those spelt alike."""
    names, stem = list(legal), str(given).rstrip("')")  # of a key, ('agents', 'obs')
    begun = [name for name in names if len(stem) > 1 and name.startswith(stem)]
    return [*dict.fromkeys(begun + difflib.get_close_matches(str(given), names, n=3, cutoff=0.5))][:3]


def did_you_mean(names: Iterable[str]) -> str:
    """Asks for one of some names: ``"Did you mean 'x'? "``, or nothing when there is none."""
    listed = " or ".join(map(repr, names))
    return f"Did you mean {listed}? " if listed else ""


def nearest(given: object, legal: Iterable[object]) -> str:
    """Describes the legal values for an error message, nearest names first.

    Args:
        given: the value that is not legal.
        legal: the legal values.

    Returns:
        ``"Did you mean 'x'? Legal: 'x', 'y'."``, without the question when nothing is near.
    """
    names = [str(value) for value in legal]
    return f"{did_you_mean(close_names(given, names))}Legal: {', '.join(map(repr, names)) or 'nothing'}."


def nearest_multiples(value: int, step: int) -> str:
    """The positive multiples of a number around a value, for an error message.

    Args:
        value: the value.
        step: the number.

    Returns:
        ``"90 or 120"``, or of a value below the first multiple that one alone.
    """
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{below + step}"
