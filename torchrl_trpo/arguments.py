"""Checks of numbers: plain Python numbers, and settings that are checked when they are assigned."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from torchrl_trpo.errors import PlainKeyError, nearest


def plain_number(value: Any) -> Any:
    """A real number, also of NumPy or in a one-entry tensor, as ``int`` or ``float``; a bool and all else unchanged."""
    if isinstance(value, np.generic | np.ndarray | Tensor) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def positive_whole(name: str, value: Any) -> int:
    """A count as ``int``; raises ValueError if it is not a whole number of at least 1."""
    number = plain_number(value)
    if type(number) is not int or number < 1:
        raise ValueError(f"{name}: {value!r}. Legal: a whole number of at least 1.")
    return number


class RangedSettings:
    """An object that checks what is assigned to its settings: numbers in ranges, and words.

    Numbers of NumPy and of tensors are converted to Python's.
    """

    RANGES: ClassVar[Mapping[str, tuple[str, Callable[[Any], bool]]]] = {}
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._settings():
            value = self._checked(name, value)
        elif not name.startswith("_") and not hasattr(self, name) and self._is_unknown(name):
            raise AttributeError(
                f"{name}: {type(self).__name__} has no such setting. {nearest(name, self._settings())}"
            )
        super().__setattr__(name, value)

    def _is_unknown(self, name: str) -> bool:
        """Whether a class of this library has no such attribute; others may have any."""
        is_ours = type(self).__module__.startswith("torchrl_trpo.")
        return is_ours and name not in inspect.signature(type(self)).parameters

    def _settings(self) -> list[str]:
        return [*self.RANGES, *self.CHOICES]

    def _checked(self, name: str, value: Any) -> float | str:
        if name in self.CHOICES:
            if value not in self.CHOICES[name]:
                raise ValueError(f"{name}: {value!r}. {nearest(value, self.CHOICES[name])}")
            return str(value)
        legal, is_legal = self.RANGES[name]
        number = plain_number(value)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{name} must be {legal}, got {value!r} of type {type(value).__name__}.")
        if not is_legal(number):
            raise ValueError(f"{name} must be {legal}, got {value!r}.")
        return number

    def state_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return {name: getattr(self, name) for name in self._settings()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads settings saved by :meth:`state_dict`, all or none; words that it does not have stay as they are.

        Args:
            state_dict: the settings by name.

        Raises:
            PlainKeyError: if a number is missing, or a setting is unknown.
        """
        for name in state_dict:
            if name not in self._settings():
                raise PlainKeyError(f"{name!r} is not a setting of the updater. {nearest(name, self._settings())}")
        for name in self.RANGES:
            if name not in state_dict:
                raise PlainKeyError(f"the setting {name!r} is missing from the state_dict, which has {[*state_dict]}.")
        for name, value in state_dict.items():
            self._checked(name, value)
        for name, value in state_dict.items():
            setattr(self, name, value)
