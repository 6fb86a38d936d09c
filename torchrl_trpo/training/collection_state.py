"""The state of a collector: what a run collects next, in a form that a checkpoint can hold."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase, is_tensor_collection
from torchrl._utils import logger
from torchrl.collectors import Collector

from torchrl_trpo.envs.object_graph import InexactError
from torchrl_trpo.errors import SettingError


class CollectionState:
    """A collector's last step, its transforms and its simulator, as a ``state_dict``.

    Only ``get_extra_state`` gives a simulator's whole state; its buffers alone may be a part of it. A simulator without
    that method begins new episodes when it is resumed, and a warning says so when its state is first saved.

    Args:
        collector: the collector.

    Attributes:
        begins_anew: whether what was loaded has no state of the simulator.
    """

    begins_anew = False

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._has_warned = self._is_checked = False

    def state_dict(self) -> dict[str, Any]:
        """Gives the state in plain containers and tensors; a simulator's that holds anything else is refused."""
        env = self._collector.env
        try:
            simulator = env.base_env.state_dict()
        except InexactError as error:
            simulator = {}
            self._warn_of_new_episodes(f"The environment's state cannot be saved ({error}).")
        if not self._is_checked:
            _check_plain(simulator)
            self._is_checked = True
        if not _has_extra_state(simulator):
            simulator = {}
            self._warn_of_new_episodes("The environment's own state cannot be saved (it has no get_extra_state).")
        return {
            "transforms": env.transform.state_dict(),
            "simulator": simulator,
            "step": _pack(self._last_step),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        env = self._collector.env
        env.transform.load_state_dict(state_dict["transforms"])
        self.begins_anew = not state_dict["simulator"]
        if not self.begins_anew:
            env.base_env.load_state_dict(state_dict["simulator"])
            self._last_step = _unpack(state_dict["step"], self._last_step.device, env.device)
        else:
            self._warn_of_new_episodes(
                "The checkpoint does not hold the environment's own state (it has no get_extra_state)."
            )

    @property
    def _last_step(self) -> TensorDictBase:
        """The data that the policy acts on next. TorchRL has no public name for it, and its ``state_dict`` omits it."""
        return self._collector._carrier

    @_last_step.setter
    def _last_step(self, data: TensorDictBase) -> None:
        self._collector._carrier = data

    def _warn_of_new_episodes(self, reason: str) -> None:
        if not self._has_warned:
            logger.warning(f"{reason} A resumed run begins new episodes, and is not the same to the bit.")
        self._has_warned = True


def _has_extra_state(state: Any) -> bool:
    """Whether a simulator's ``state_dict``, or one inside it, has the result of a ``get_extra_state``."""
    if not isinstance(state, Mapping):
        return False
    own = any(str(key).endswith("_extra_state") and value is not None for key, value in state.items())
    return own or any(_has_extra_state(value) for key, value in state.items() if key != "transforms")


def _check_plain(state: Any) -> None:
    """Refuses a simulator's state that ``weights_only`` could not read, before anything is trained."""
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
        raise SettingError(
            f"the environment's state_dict (get_extra_state) cannot be read again without running code: "
            f"{str(error).splitlines()[0]} Legal: tensors, numbers, text, and lists, tuples and dicts of them."
        ) from error


def _pack(data: TensorDictBase) -> dict[str, Any]:
    """Turns a TensorDict into plain dicts, which ``weights_only`` reads, and keeps the nested batch sizes."""
    if isinstance(data, LazyStackedTensorDict):
        return {"stack_dim": data.stack_dim, "parts": [_pack(part) for part in data.tensordicts]}
    entries = {name: _pack(value) if is_tensor_collection(value) else value.detach() for name, value in data.items()}
    return {"batch_size": list(data.batch_size), "entries": entries}


def _unpack(packed: Mapping[str, Any], device: torch.device | None, tensors_on: torch.device) -> TensorDictBase:
    if "parts" in packed:
        parts = [_unpack(part, device, tensors_on) for part in packed["parts"]]
        return LazyStackedTensorDict(*parts, stack_dim=packed["stack_dim"])
    entries = {
        name: value.to(tensors_on) if isinstance(value, torch.Tensor) else _unpack(value, device, tensors_on)
        for name, value in packed["entries"].items()
    }
    return TensorDict(entries, packed["batch_size"], device=device)
