"""Objects whose settings are plain attributes that are checked when they are assigned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torchrl_trpo.suggest import nearest


class RangedSettings:
    """Checks the numbers that are assigned to its settings, in the constructor and afterwards."""

    _RANGES: ClassVar[Mapping[str, tuple[str, Callable[[Any], bool]]]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._RANGES:
            self._check(name, value)
        super().__setattr__(name, value)

    def _check(self, name: str, value: Any) -> None:
        legal, is_legal = self._RANGES[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be {legal}, got {value!r} of type {type(value).__name__}.")
        if not is_legal(value):
            raise ValueError(f"{name} must be {legal}, got {value!r}.")

    def state_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return {name: getattr(self, name) for name in self._RANGES}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over settings saved by :meth:`state_dict`, all or none.

        Args:
            state_dict: the settings by name.

        Raises:
            KeyError: if a setting is missing or unknown.
        """
        for name in state_dict:
            if name not in self._RANGES:
                raise KeyError(f"{name!r} is not a setting of the updater. {nearest(name, self._RANGES)}")
        for name in self._RANGES:
            if name not in state_dict:
                raise KeyError(f"the setting {name!r} is missing from the state_dict, which has {list(state_dict)}.")
            self._check(name, state_dict[name])
        for name, value in state_dict.items():
            setattr(self, name, value)
