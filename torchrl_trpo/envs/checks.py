"""Checks of what environments give: their specs at construction, and numbers of a batch that are not finite."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl._utils import logger
from torchrl.data import OneHot, TensorSpec
from torchrl.envs import ActionMask, Compose, EnvBase, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_trpo.keys import GroupKeys, group_keys, group_of, next_key
from torchrl_trpo.seeding import untouched_generators


class EnvironmentFault(RuntimeError):
    """An environment breaks its specs, or a batch of it holds numbers that are not finite.

    Args:
        message: what is wrong, and where.
        env_index: the environment within the batch, if it is known.
        step: the step within the batch, if it is known.
        key: the entry that is wrong, if it is known.
    """

    def __init__(
        self, message: str, env_index: int | None = None, step: int | None = None, key: NestedKey | None = None
    ) -> None:
        super().__init__(message)
        self.env_index = env_index
        self.step = step
        self.key = key


def check_specs(env: EnvBase, name: str, seed: int) -> None:
    """Runs TorchRL's ``check_env_specs``: compares three steps of random legal actions with the specs.

    It leaves the global random generators as they were. It seeds the environment, which the caller then seeds again.

    Args:
        env: the environment, one or a batch.
        name: its name, for the error.
        seed: a seed for the environment and the actions.

    Raises:
        EnvironmentFault: if the environment fails, or if its specs and its data differ.
    """
    masks = [
        _LegalActions(keys.action, keys.action_mask)
        for keys in group_keys(env)
        if keys.action_mask is not None
        and env.full_observation_spec[keys.action_mask].shape == _mask_shape(env.full_action_spec[keys.action])
    ]
    if masks:
        env = TransformedEnv(env, Compose(*masks), auto_unwrap=True)
    log = logging.getLogger("torchrl")
    level = log.level
    log.setLevel(logging.WARNING)  # it logs that the check succeeded
    try:
        with untouched_generators():
            check_env_specs(env, seed=seed)
    except Exception as error:
        raise EnvironmentFault(
            f"env: {name!r} fails TorchRL's check_env_specs, three steps of random actions: {type(error).__name__}: "
            f"{error}. Legal: entries with the keys, shapes, dtypes and bounds of the environment's specs."
        ) from error
    finally:
        log.setLevel(level)


def check_seed(env: EnvBase, seed: int) -> None:
    """Warns if two resets with the same seed differ, so that a run cannot be repeated.

    It leaves the global random generators as they were, and the environment seeded and reset.

    Args:
        env: the environment, one or a batch.
        seed: the seed.
    """
    observed = []
    for _ in range(2):
        with untouched_generators(seed):
            env.set_seed(seed)
            observed.append(env.reset())
    for key in env.full_observation_spec.keys(True, True):
        one, other = (data.get(key) for data in observed)
        if isinstance(one, Tensor) and not torch.equal(one.nan_to_num(), other.nan_to_num()):
            logger.warning(
                f"Two resets of the environment with seed {seed} differ in {key}, so that a run cannot be repeated. "
                "Likely: it draws random numbers that its _set_seed, or its reset(seed=...), does not seed."
            )
            return


class _LegalActions(ActionMask):
    """Random actions are legal ones. An agent that may do nothing, as an absent one, may do anything."""

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        mask = next_tensordict.get(self.in_keys[1], None)
        if mask is not None:
            self.action_spec.update_mask(mask | ~mask.any(-1, keepdim=True))
        return next_tensordict


def _mask_shape(spec: TensorSpec) -> torch.Size | None:
    """The shape of a mask of discrete actions; None for continuous ones, for which there is no mask."""
    if not isinstance(spec, ActionMask.ACCEPTED_SPECS):
        return None
    return spec.shape if isinstance(spec, OneHot) else spec.to_one_hot_spec().shape


class NonFinite(NamedTuple):
    """Where a batch is not finite.

    Attributes:
        env_index: the environment.
        step: the step within the batch.
        key: the entry.
        total: how many numbers of the batch are not finite, in all entries that count.
    """

    env_index: int
    step: int
    key: NestedKey
    total: int


def find_non_finite(data: TensorDictBase, groups: Sequence[GroupKeys]) -> NonFinite | None:
    """Finds the first number in a batch that is NaN or infinite.

    It reads the floating-point entries among each group's observations, the global ``"state"``, the actions, their
    log-probabilities, the rewards and the next observations. Entries of absent agents do not count: by the mask of the
    step, and for next observations by the mask of the next step. The first number is that of the earliest step, then of
    the first environment, then of the first entry in the order above.

    If all numbers are finite, the device is read once.

    Args:
        data: the batch, ``[num_envs, T]``.
        groups: the keys of the groups.

    Returns:
        Where the number is, or None.
    """
    entries = _floating(data, groups)
    if not entries or bool(torch.stack([_finite(value, mask).all() for _, value, mask in entries]).all()):
        return None
    wrong = [~_finite(value, mask).flatten(2) for _, value, mask in entries]  # each [num_envs, T, ...]
    rows = torch.stack([value.any(-1) for value in wrong], -1)  # [num_envs, T, entries]
    step, env_index, entry = rows.transpose(0, 1).nonzero()[0].tolist()
    return NonFinite(env_index, step, entries[entry][0], sum(int(value.sum()) for value in wrong))


def _floating(data: TensorDictBase, groups: Sequence[GroupKeys]) -> list[tuple[NestedKey, Tensor, Tensor | None]]:
    """The entries to look at, each with the mask of its agents."""
    masks: dict[NestedKey, NestedKey | None] = {keys.observation: keys.mask for keys in groups}
    masks["state"] = None
    masks |= {key: keys.mask for keys in groups for key in (keys.action, keys.log_prob)}
    masks |= {next_key(keys.reward): keys.mask if group_of(keys.reward) else None for keys in groups}
    masks |= {next_key(keys.observation): None if keys.mask is None else next_key(keys.mask) for keys in groups}
    masks[next_key("state")] = None
    entries = []
    for key, mask in masks.items():
        value = data.get(key, None)
        if value is not None and value.is_floating_point():
            entries.append((key, value, None if mask is None else data.get(mask)))
    return entries


def _finite(value: Tensor, mask: Tensor | None) -> Tensor:
    finite = value.isfinite()
    return finite if mask is None else finite | ~mask.reshape(*mask.shape, *[1] * (value.ndim - mask.ndim))
