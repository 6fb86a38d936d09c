"""Normalises observations with running statistics."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.transforms import VecNormV2

from torchrl_trpo.parallel.ranks import Ranks

_VARIES = 1e-7  # the least standard deviation of what varies: less is rounding


class ObservationNorm(VecNormV2):
    """A ``VecNormV2`` of what was observed: its statistics leave out absent agents and numbers that are not finite.

    When some environments begin new episodes, only their observations count. TorchRL counts those of the others again,
    and a ``SerialEnv`` has their old ones there. The statistics are kept in double precision, since the variance is the
    mean square less the square of the mean. Observations are in single precision, before and after. A number that has
    not varied has no scale: its mean is subtracted, and nothing else. TorchRL divides by 1e-4, so that the first other
    value would be 10 000 times what it is.

    ``masks`` maps an observation, ``[num_envs, *F]``, to the mask of its present agents, ``[num_envs, n_agents]``.
    """

    # VecNormV2 has no public way to merge or mask its statistics: _loc, _var (the mean square) and _count.
    _count: Any
    _loc: Any
    _var: Any
    _merged: tuple[TensorDictBase, ...] | None = None  # count, mean and mean square after the last merge

    def __init__(self, in_keys: Sequence[NestedKey], masks: Mapping[NestedKey, NestedKey]) -> None:
        super().__init__(in_keys=in_keys, decay=1.0, reduce_batch_dims=True)
        self.masks = masks
        self._counts: dict[NestedKey, Tensor] = {}
        self._begun: Tensor | None = None  # which environments begin an episode now, [num_envs, 1]; None: all count

    @torch.no_grad()
    def merge(self, ranks: Ranks) -> None:
        """Merges the statistics across ranks. All ranks call it after each batch.

        Between two calls, each rank adds its own observations to the merged statistics.
        """
        if ranks.size == 1 or self._loc is None:
            return
        own = self._count, self._loc, self._var
        before = self._merged or tuple(part.apply(torch.zeros_like) for part in own)
        for key in list(self._loc.keys(True, True)):
            count, mean, square = (part.get(key) for part in own)
            old_count, old_mean, old_square = (part.get(key).double() for part in before)
            added = ranks.sum_(count - old_count)
            for value, old in ((mean, old_mean), (square, old_square)):
                sums = ranks.sum_(value.double() * count - old * old_count)
                value.copy_(torch.where(added > 0, (sums + old * old_count) / (old_count + added), value))
            count.copy_(old_count + added)
        self._merged = tuple(part.clone() for part in own)

    def set_extra_state(self, state: Any) -> None:
        """Loads saved statistics, which are merged ones, and moves them to the environment's device."""
        if self._loc is not None:
            device = next(iter(self._loc.values(True, True))).device
            state = {key: value.to(device) for key, value in state.items()}
        super().set_extra_state(state)
        if self._loc is not None:
            self._loc, self._var = self._loc.double(), self._var.double()
        self._merged = None if self._loc is None else (self._count.clone(), self._loc.clone(), self._var.clone())

    def set_container(self, container: Any) -> None:
        """Attaches the transform to an environment, without TorchRL's warning about batches."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Support of .* for containers with non-empty batch-size")
            super().set_container(container)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self._counts = {key: next_tensordict.get(mask) for key, mask in self.masks.items()}
        return super()._step(tensordict, next_tensordict)

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        self._begun = tensordict.get("_reset", None)
        try:
            return super()._reset(tensordict, tensordict_reset)
        finally:
            self._begun = None

    def _maybe_stateful_init(self, data: TensorDictBase) -> None:
        begins = self._loc is None
        super()._maybe_stateful_init(data)
        if begins:
            self._loc, self._var = self._loc.double(), self._var.double()
            # a count for each number, since absent agents and NaNs leave out some of them
            self._count = self._loc.apply(lambda mean, count: count.expand_as(mean).clone(), self._count)

    def _stateful_update(self, data: TensorDictBase) -> None:
        if self.frozen:
            return
        for key, value in self._maybe_cast_to_float(data).items(True, True):
            counts = value.isfinite()  # one NaN would make the statistics NaN forever
            if (mask := self._counts.get(key)) is not None:
                mask = mask.reshape(*data.batch_size, -1)
                counts = counts & mask.reshape(*mask.shape, *[1] * (value.ndim - mask.ndim))
            if self._begun is not None:
                counts = counts & self._begun.reshape(*data.batch_size, *[1] * (value.ndim - data.ndim))
            mean, square, count = (part.get(key) for part in (self._loc, self._var, self._count))
            number = counts.sum(0)
            count += number
            value = torch.where(counts, value, 0.0).double()
            for statistic, batch in ((mean, value), (square, value.square())):
                statistic.lerp_(batch.sum(0) / number.clamp_min(1), number.to(batch.dtype) / count.clamp_min(1))

    def _norm(self, data: TensorDictBase, loc: TensorDictBase, var: TensorDictBase, count: TensorDictBase) -> Any:
        loc, scale = self._loc_scale_of(*(part.select(*data.keys(True, True)) for part in (loc, var)))
        return (data - loc) / scale

    def _get_loc_scale(self, loc_only: bool = False) -> Any:
        return self._loc_scale_of(self._loc, self._var)

    def _loc_scale_of(self, loc: TensorDictBase, var: TensorDictBase) -> Any:
        # TorchRL keeps E[x] and E[x²]. If x is constant, rounding can make E[x²] − E[x]² negative, and its root NaN.
        deviation = (var - loc.pow(2)).clamp_min(0.0).sqrt()
        scale = deviation.apply(lambda each: each.clamp_min(self.eps).where(each > _VARIES, 1.0))
        return loc.float(), scale.float()


def observation_norm(env: EnvBase) -> ObservationNorm | None:
    """The transform that normalises an environment's observations, and whose statistics are saved, if it has one."""
    return next((transform for transform in env.transform if isinstance(transform, ObservationNorm)), None)


class TransformState:
    """The state of an environment's transforms alone, whatever its batch size: the statistics of observations."""

    def __init__(self, env: EnvBase) -> None:
        self._env = env

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, at the key that a collector's state also has."""
        return {"transforms": self._env.transform.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the state; other entries of a collector's state are ignored."""
        self._env.transform.load_state_dict(state_dict["transforms"])
