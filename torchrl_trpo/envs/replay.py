"""Environments whose simulator cannot be saved, restored by acting out the episode again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, GymEnv, PettingZooWrapper


class ReplayError(RuntimeError):
    """An environment does not follow from its seed and actions, so that it cannot be continued where it was."""


class Replayed(EnvBase):
    """Mixin for an environment whose episodes follow from a seed and the actions: its state is what to replay.

    Each reset takes a seed from a generator of the environment's own, and the actions since are kept, so that
    ``state_dict`` is small and does not look inside the simulator. ``load_state_dict`` resets with that seed and acts
    out the episode again, which takes the simulator's time for it, in another process as well. What was observed last
    is compared with what is observed then, to the bit.

    It comes before the TorchRL class in the bases, and is for one environment, not a batch. ``set_seed`` seeds the
    generator: it starts no episode, the next reset does. In place of ``_step``, replay calls ``_advance``.

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
        # copies, since ParallelEnv writes the next actions into the same memory
        self._actions.append([tensordict.get(key).to("cpu", copy=True) for key in self.action_keys])
        return self._observe(data)

    def _observe(self, data: TensorDictBase) -> TensorDictBase:
        self._observed = [value for key in self.observation_keys if isinstance(value := data.get(key, None), Tensor)]
        return data

    def _advance(self, tensordict: TensorDictBase) -> None:
        """A step of which nothing is read, for replay: subclasses leave out what TorchRL makes of the results.

        Args:
            tensordict: the actions.
        """
        super()._step(tensordict)

    def get_extra_state(self) -> dict[str, Any]:
        """What to replay, for ``state_dict``.

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
            state: what :meth:`get_extra_state` gave, of an environment made alike.

        Raises:
            ReplayError: if the environment does not observe what it observed then.
        """
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
                    f"the environment does not follow from its seed and actions: after {len(steps)} steps from seed "
                    f"{state['seed']} it observes something else than before, so that the run cannot be continued "
                    "exactly. Its simulator draws random numbers that its reset does not seed, keeps something from "
                    "earlier episodes, or is another version."
                )
        self._seeds.set_state(state["generator"].cpu())


def _same(value: Tensor, other: Tensor) -> bool:
    value, other = value.cpu(), other.cpu()
    return value.shape == other.shape and bool(((value == other) | ((value != value) & (other != other))).all())


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
            self._step_parallel(tensordict)
        else:  # the masks are part of the action's spec
            super()._advance(tensordict)
