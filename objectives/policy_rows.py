"""The rows of a batch as a policy update reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor
from torch import distributions as D

from torchrl_trpo.distributions.divergence import log_prob
from torchrl_trpo.keys import non_finite, path
from torchrl_trpo.parallel.ranks import Ranks, check_same_length

_CPU_ROWS = 4096  # rows times agents that are evaluated at once on a CPU


@dataclass(frozen=True)
class PolicyRows:
    """A batch flattened to ``N`` rows, ``[N, *A, ...]`` with ``A`` the agents if there are several.

    For a recurrent policy the rows are sequences, ``[N, T, *A, ...]``: both dimensions are written ``*R`` here.

    Attributes:
        inputs: what the policy reads, batch size ``[*R]``.
        action: the actions taken, ``[*R, *A, action_dim]``, or a TensorDict of composite actions.
        log_prob: ``log π_k(u|o)`` as collected, ``[*R, *A, 1]``.
        advantage: ``Â``, ``[*R, *A, 1]``.
        weight: the weight of a row in the means, ``[*R, *A, 1]`` or ``[1]``; sums to 1 over the rows of a region.
        factor: the ``M`` of a sequential update, ``[*R, *A, 1]`` or ``[1]``.
        row_dims: the number of dimensions in ``*R``.
        agent_entries: the entries with an agent dimension, each by attribute and key, such as
            ``("inputs", "agents", "observation")``. A TensorDict with that dimension in its batch size is one entry.
    """

    inputs: TensorDict
    action: Tensor | TensorDictBase
    log_prob: Tensor
    advantage: Tensor
    weight: Tensor
    factor: Tensor
    row_dims: int = 1
    agent_entries: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        """The number of rows or sequences, ``N``."""
        return self.log_prob.shape[0]

    @property
    def steps_per_row(self) -> int:
        """The environment steps in a row, 1 or those of a sequence."""
        return self.log_prob.shape[1 : self.row_dims].numel()

    @property
    def agent_shape(self) -> torch.Size:
        """The agent dimension ``*A``, if there is one."""
        return self.log_prob.shape[self.row_dims : -1]

    def of_agent(self, agent: int) -> PolicyRows:
        """The rows of one agent, views with an agent dimension of 1.

        Args:
            agent: the agent's index.

        Returns:
            The agent's rows.
        """
        own = (*[slice(None)] * self.row_dims, slice(agent, agent + 1))
        names = ("inputs", "action", "log_prob", "advantage")
        rows = TensorDict({name: getattr(self, name) for name in names}, self.inputs.batch_size).clone(False)
        for key in self.agent_entries:
            rows.set(key, rows.get(key)[own])
        changed = {name: rows.get(name) for name in names}
        for name in ("weight", "factor"):
            value = getattr(self, name)
            changed[name] = value[own] if value.shape[self.row_dims : -1].numel() > 1 else value
        return replace(self, **changed)

    def contiguous(self) -> PolicyRows:
        """The rows, copied where they are spread over memory."""
        return self._map(lambda value: value.contiguous())

    def take(self, index: Tensor | slice) -> PolicyRows:
        """Some of the rows, with the weights they have.

        Args:
            index: which rows, or sequences.

        Returns:
            The rows.
        """
        return self._map(lambda value: value[index])

    def split(self, size: int) -> list[PolicyRows]:
        """Pieces of at most ``size`` rows; smaller on a CPU, so that a layer's activations stay in a core's cache.

        Args:
            size: the largest number of rows, or sequences.

        Returns:
            The pieces: copies in one stretch of memory if ``size`` is enough for all rows, else views.
        """
        whole = len(self) <= size
        if self.log_prob.device.type == "cpu":
            size = min(size, max(1, _CPU_ROWS // self.log_prob.shape[1:].numel()))
        pieces = [self.take(slice(start, start + size)) for start in range(0, len(self), size)]
        return [piece.contiguous() if whole else piece for piece in pieces]

    def log_ratio(self, dist: D.Distribution, cap: Tensor | None = None) -> Tensor:
        """``log π_θ(u|o) / π_k(u|o)`` of the actions taken.

        Args:
            dist: the policy ``π_θ`` at the rows.
            cap: the largest ratio, as ``PPOLoss`` caps it: the value is capped, the gradient keeps flowing.

        Returns:
            The logarithms, ``[*R, *A, 1]``; 0 where a row is masked.
        """
        log_ratio = log_prob(dist, self.action, self.log_prob.ndim - 1).unsqueeze(-1) - self.log_prob
        if cap is not None:
            log_ratio = log_ratio + (cap.log() - log_ratio.detach()).clamp_max(0)
        if self.weight.ndim == 1:
            return log_ratio
        return torch.where(self.weight > 0, log_ratio, 0.0)  # a masked agent's action is not its own

    def with_factor(self, factor: Tensor) -> PolicyRows:
        """The same rows with another ``M``.

        Args:
            factor: one number per row, ``[N]`` (of sequences ``[N * T]``).

        Returns:
            The rows.
        """
        shape = [*self.log_prob.shape[: self.row_dims], *[1] * (self.log_prob.ndim - self.row_dims)]
        return replace(self, factor=factor.reshape(shape))

    def _map(self, function: Callable[[Any], Any]) -> PolicyRows:
        """Applies a function to all that has rows; a weight or a factor ``[1]`` has none."""
        names = ["inputs", "action", "log_prob", "advantage"]  # an action may be [N]
        names += [name for name in ("weight", "factor") if getattr(self, name).ndim > 1]
        return replace(self, **{name: function(getattr(self, name)) for name in names})


def flatten_rows(
    inputs: TensorDictBase,
    *,
    action: Tensor | TensorDictBase,
    log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor | None,
    group: str | None,
    per_agent: bool,
    sequences: bool = False,
    common: Collection[tuple[str, ...]] = (),
    ranks: Ranks,
) -> PolicyRows:
    """Flattens the batch dimensions ``*B`` of a batch to ``N`` rows, or those of ``[*B, T]`` to ``N`` sequences.

    ``inputs`` has the batch size, ``action`` is ``[*B, *A, action_dim]``, ``log_prob`` ``[*B, *A, 1]``, and the
    advantage broadcastable to it. Where the ``mask``, bool ``[*B, *A, 1]``, is off, rows weigh 0 and are copies of one
    that counts, so that padding, which may be no legal input, cannot spread NaN into sums or gradients. A recurrent
    policy has read its masked inputs: of these, what is not finite is cleared. So it is with ``common`` tensors, which
    agents read of each other, where one of them counts. The weights of all ranks sum to 1, with ``per_agent`` for each
    agent.
    """
    batch_size = inputs.batch_size
    log_prob, advantage = at_least_single(log_prob), at_least_single(advantage)
    values = {"log_prob": log_prob, "advantage": advantage.expand_as(log_prob), "action": action}
    rows = TensorDict({**values, "inputs": inputs}, batch_size=batch_size).detach()
    rows = rows.reshape(-1, batch_size[-1]) if sequences else rows.reshape(-1)
    row_dims = rows.batch_dims
    if sequences:
        check_same_length(rows.shape[1], ranks, log_prob.device)
    agent_entries = tuple(key for key in _agent_entries(rows, group) if key not in common)
    with_agents = {
        key
        for key in rows.keys(True, True)
        if path(key) not in common and any(path(key)[: len(own)] == own for own in agent_entries)
    }
    if mask is None:
        weight = _equal_weight(rows.numel() if per_agent else log_prob.numel(), log_prob, ranks)
    else:
        mask = mask.reshape(rows["log_prob"].shape)

        def cleared(key: NestedKey, value: Tensor) -> Tensor:
            if sequences and path(key)[0] == "inputs":
                return _clear_masked(value, mask, row_dims, key in with_agents)
            if path(key) in common and value.is_floating_point():
                value = _clear_masked(value, mask, row_dims, has_agents=True)
            return _copy_over_masked(value, mask, row_dims, key in with_agents)

        rows = rows.named_apply(cleared, nested_keys=True)
        rows.set("advantage", torch.where(mask, rows.get("advantage"), 0.0))
        count = ranks.sum_(mask.sum(list(range(row_dims)), keepdim=True) if per_agent else mask.sum())
        weight = mask / count.clamp_min(1).to(log_prob.dtype)
    rows.set("advantage", rows.get("advantage") + _non_finite(rows, with_agents))
    return PolicyRows(
        **{key: rows.get(key) for key in (*values, "inputs")},
        weight=weight,
        factor=log_prob.new_ones(1),
        row_dims=row_dims,
        agent_entries=agent_entries,
    )


def at_least_single(value: Tensor) -> Tensor:
    """Half precision as single precision: what it rounds away adds up over the rows. Others stay as they are."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _agent_entries(rows: TensorDict, group: str | None) -> list[tuple[str, ...]]:
    """The entries of the rows with an agent dimension.

    All but the inputs have it if the log-probability does. An input in the agents' group has it if its shape fits. For
    any other input the shape alone decides, ``[*R, n_agents, F]`` unlike a state ``[*R, F]``, unless it is in the group
    of other agents.
    """
    row_dims = rows.batch_dims
    agents = rows["log_prob"].shape[row_dims:-1]
    found = []

    def search(key: tuple[str, ...], value: Any) -> None:
        is_own = key[0] != "inputs" or (group is not None and key[1:2] == (group,))
        fits = value.shape[row_dims : row_dims + len(agents)] == agents
        if not is_tensor_collection(value):
            if fits and (is_own or value.ndim > row_dims + len(agents)):
                found.append(key)
        elif value.batch_dims == row_dims:
            for name, child in value.items():
                search((*key, name), child)
        elif fits and (is_own or group is None):
            found.append(key)

    for name, value in rows.items() if agents else ():
        search((name,), value)
    return found


def _equal_weight(count: int, like: Tensor, ranks: Ranks) -> Tensor:
    """The weight of each row, ``[1]``, when all count the same."""
    if ranks.size == 1:
        return like.new_full((1,), 1 / max(count, 1))
    total = ranks.sum_(torch.tensor([count], dtype=torch.long, device=like.device))
    return (1 / total.double()).to(like.dtype)


def _non_finite(rows: TensorDict, with_agents: set[NestedKey]) -> Tensor:
    """NaN where anything that belongs to a row is not finite, else 0, ``[*R, *A, 1]``.

    An infinite observation or log-probability may leave the surrogate finite: saturated, or with a ratio of 0.
    """
    spread = torch.zeros_like(rows.get("log_prob"))
    for key, value in rows.items(True, True):
        if value.is_floating_point():
            found = non_finite(value, spread.ndim - 1 if key in with_agents else rows.batch_dims)
            spread = spread + _with_ndim(found, spread.ndim)
    return spread


def _kept(mask: Tensor, row_dims: int, has_agents: bool) -> Tensor:
    """Which entries of a value count, by the mask ``[*R, *A, 1]``: ``[*R, *A]``, or ``[*R]`` if it has no agents."""
    keep = mask.squeeze(-1)
    return keep if has_agents or keep.ndim == row_dims else keep.any(dim=row_dims)


def _with_ndim(value: Tensor, ndim: int) -> Tensor:
    """The value with dimensions of 1 behind its own."""
    return value.reshape(*value.shape, *[1] * (ndim - value.ndim))


def _copy_over_masked(value: Tensor, mask: Tensor, row_dims: int, has_agents: bool) -> Tensor:
    """The value of the first row and agent that count, where the mask ``[*R, *A, 1]`` is off.

    If none counts, zeros, and for flags (every action is allowed) True.
    """
    keep = _kept(mask, row_dims, has_agents)
    copied, first = value, keep.flatten().byte().argmax(0, keepdim=True)
    for dim in reversed(range(keep.ndim)):  # index_select does not wait for the device
        copied, first = copied.index_select(dim, first % keep.shape[dim]), first // keep.shape[dim]
    if copied.is_floating_point():
        copied = copied.nan_to_num(0.0, 0.0, 0.0)  # a broken row breaks itself alone
    copied = torch.where(keep.any(), copied, torch.ones_like(copied) if copied.dtype == torch.bool else 0)
    return torch.where(_with_ndim(keep, value.ndim), value, copied)


def _clear_masked(value: Tensor, mask: Tensor, row_dims: int, has_agents: bool) -> Tensor:
    """Zero for what is not finite, and True for flags of which none is set, where the mask ``[*R, *A, 1]`` is off."""
    keep = _kept(mask, row_dims, has_agents)
    if value.is_floating_point():
        return torch.where(_with_ndim(keep, value.ndim) | value.isfinite(), value, 0.0)
    if value.dtype == torch.bool and value.ndim > keep.ndim and value.shape[-1] > 1:  # allowed actions, not is_init
        none = ~value.any(-1)
        return value | (none & ~_with_ndim(keep, none.ndim)).unsqueeze(-1)
    return value
