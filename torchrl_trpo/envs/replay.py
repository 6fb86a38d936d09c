"""Restores environments whose simulator cannot be saved, by replaying the episode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, GymEnv, PettingZooWrapper


class ReplayError(RuntimeError):
    """A replayed environment differs from the saved one, so the run cannot be continued exactly."""


class Replayed(EnvBase):
    """Mixin for an environment whose episodes are determined by a seed and the actions: its state is these.

    Each reset takes a seed from the environment's own generator, and the actions since are kept, so ``state_dict`` is
    small and does not look inside the simulator. ``load_state_dict`` resets with that seed and replays the episode, in
    another process as well, which takes as long as the simulator needs for it. It compares the last observations with
    the saved ones, to the bit.

    The mixin comes before the TorchRL class in the bases, and is for one environment, not a batch. ``set_seed`` seeds
    the generator; the next reset starts an episode. The replay calls ``_advance`` rather than ``_step``.

    The state is ``{"generator": Tensor, "seed": int | None, "actions": list[Tensor], "observed": list[Tensor]}``: the
    seed of the episode, or None before the first, and the actions ``[T, ...]`` since it began, in the order of
    ``action_keys``. ``torch.load(weights_only=True)`` reads it.

    Args:
        *args: as of the TorchRL class.

    Keyword Args:
        **kwargs: as of the TorchRL class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seeds = torch.Generator()
        self._seeds.seed()
        self._begin(None)
        super().__init__(*args, **kwargs)

    def _begin(self, seed: int | None) -> None:
        self._episode_seed = seed
        self._actions: list[list[Tensor]] = []
        self._observed: list[Tensor] = []

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            self._seeds.seed()
        else:
            self._seeds.manual_seed(seed)

    def _reset(
        self, tensordict: TensorDictBase | None = None, *, seed: int | None = None, **kwargs: Any
    ) -> TensorDictBase:
        if seed is None:
            seed = int(torch.randint(2**31, (), generator=self._seeds))
        self._begin(seed)
        return self._observe(super()._reset(tensordict, seed=seed, **kwargs))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        data = super()._step(tensordict)
        # copied, because ParallelEnv writes the next actions into the same memory
        self._actions.append([tensordict.get(key).to("cpu", copy=True) for key in self.action_keys])
        return self._observe(data)

    def _observe(self, data: TensorDictBase) -> TensorDictBase:
        self._observed = [value for key in self.observation_keys if isinstance(value := data.get(key, None), Tensor)]
        return data

    def _advance(self, tensordict: TensorDictBase) -> None:
        """Takes a step of the replay, whose results nobody reads; subclasses skip TorchRL's work on them."""
        super()._step(tensordict)

    def get_extra_state(self) -> dict[str, Any]:
        """Returns what to replay, for ``state_dict``.

        Returns:
            The state, as described for the class.
        """
        return {
            "generator": self._seeds.get_state(),
            "seed": self._episode_seed,
            "actions": [torch.stack(actions) for actions in zip(*self._actions, strict=True)],
            "observed": [value.to("cpu", copy=True) for value in self._observed],
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Replays an episode, for ``load_state_dict``.

        Args:
            state: from :meth:`get_extra_state` of an environment made with the same arguments.

        Raises:
            ReplayError: if the last observations differ from the saved ones, or the actions are of another shape.
        """
        for key, actions in zip(self.action_keys, state["actions"], strict=False):
            if (saved := actions.shape[1:]) != (own := self.full_action_spec[key].shape):
                raise ReplayError(
                    f"the saved episode cannot be replayed: its {key!r} has shape {[*saved]}, and here it is "
                    f"{[*own]}. It was saved with other arguments, or by another version of torchrl-trpo."
                )
        self._begin(None)
        if state["seed"] is not None:
            self._reset(seed=state["seed"])
            steps = list(zip(*state["actions"], strict=True))
            for index, actions in enumerate(steps):
                entries = dict(zip(self.action_keys, actions, strict=True))
                tensordict = TensorDict(entries, self.batch_size, device=self.device)
                if index < len(steps) - 1:
                    self._advance(tensordict)
                else:
                    self._observe(super()._step(tensordict))
            self._actions = [[action.cpu() for action in actions] for actions in steps]
            if len(self._observed) != len(state["observed"]) or not all(map(_same, self._observed, state["observed"])):
                raise ReplayError(
                    f"the replayed episode differs: {len(steps)} steps after seed {state['seed']} the observations are "
                    "not the saved ones, so the run cannot be continued exactly. The simulator draws random numbers "
                    "that its reset does not seed, keeps something from earlier episodes, or is another version."
                )
        self._seeds.set_state(state["generator"].cpu())


def _same(value: Tensor, other: Tensor) -> bool:
    return np.array_equal(value.cpu(), other.cpu(), equal_nan=True)


class ReplayedGymEnv(Replayed, GymEnv):
    """TorchRL's ``GymEnv`` with a state, see :class:`Replayed`."""

    def _advance(self, tensordict: TensorDictBase) -> None:
        if len(self.action_keys) > 1 or self.wrapper_frame_skip > 1:
            super()._advance(tensordict)
        else:
            self._env.step(self.read_action(tensordict.get(self.action_key)))


class ReplayedPettingZooWrapper(Replayed, PettingZooWrapper):
    """TorchRL's ``PettingZooWrapper`` with a state, see :class:`Replayed`."""

    def _advance(self, tensordict: TensorDictBase) -> None:
        if self.parallel and not any(self.has_action_mask.values()):
            self._step_parallel(tensordict)  # private: the simulator's step alone has no public name
        else:  # the step updates the masks of the action spec
            super()._advance(tensordict)
