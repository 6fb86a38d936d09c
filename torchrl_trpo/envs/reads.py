"""How Python reads tensors while a function is traced: the values that it branches on, and ``x[mask]``."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchrl_trpo.envs.snapshot import n_writes

if TYPE_CHECKING:
    from torchrl_trpo.envs.tracing import Places

_MOST_CALLS = 60_000
"""Of PyTorch's functions in one call of the simulator's; the code for more would take minutes to compile."""

_MOST_TRIES = 12
"""Of drawing one position again; a step with more is left to VMAS."""


_DRAWS = torch.Tag.nondeterministic_seeded
"""Of an operation that draws: it stays in a graph if nothing reads what it draws, since the generator moves on."""


@torch.library.custom_op("torchrl_trpo::draw_if", mutates_args=(), tags=_DRAWS)
def draw_if(is_due: Tensor, like: Tensor) -> Tensor:
    """Uniform random numbers in [0, 1), in a trace: they are drawn if a bool holds, and are not used otherwise."""
    return torch.rand_like(like)


@torch.library.custom_op("torchrl_trpo::draw_in_mask", mutates_args=(), tags=_DRAWS)
def draw_in_mask(mask: Tensor, size: Sequence[int], method: str) -> Tensor:
    """Random numbers for all rows, in a trace: they are drawn for those in a mask, and are not used otherwise."""
    return getattr(torch.empty(size, device=mask.device), method)()


@torch.library.custom_op("torchrl_trpo::first_in_mask", mutates_args=())
def first_in_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """The first row of ``tensor[mask]``, ``[1, ...]``, in a trace."""
    return tensor.index_select(0, mask.int().argmax().reshape(1))


@torch.library.custom_op("torchrl_trpo::if_any_near", mutates_args=())
def if_any_near(near: Tensor, force: Tensor, value: Tensor) -> Tensor:
    """A force ``[n, 2]``, or what goes with it, if any environment is near, bool ``[n]``; else zero."""
    return torch.where(near.any(), value, 0.0)


class Untraceable(Exception):
    """A function that no graph stands for, with the reason."""


_READS = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item}
_BY_ROW = {  # functions that may be applied to x[mask] row by row
    *("add", "sub", "mul", "div", "true_divide", "rsub", "neg", "abs", "sqrt", "exp", "sin", "cos", "pow", "square"),
    *("minimum", "maximum", "clamp", "where", "isnan", "invert", "zeros_like"),
    *("lt", "le", "gt", "ge", "eq", "ne", "to", "float", "long", "int", "bool", "clone"),
    *("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not"),
}
_BY_DIMENSION = {  # and these, if the mask has one dimension, as x[mask] has then as many as x
    *("norm", "vector_norm", "linalg_vector_norm", "squeeze", "unsqueeze"),
    *("sum", "argmax", "cat", "stack", "view", "expand"),
}
_SIZED = {torch.zeros: None, torch.ones: None, torch.randn: "normal_", torch.rand: "uniform_"}


class _Rows(int):
    """The number of rows of ``x[mask]``, of which sizes are made and nothing else."""

    mask: Tensor

    @classmethod
    def of(cls, mask: Tensor, number: int) -> _Rows:
        rows = cls(number)
        rows.mask = mask
        return rows

    def __mul__(self, other: int) -> _Rows:
        return _Rows.of(self.mask, int.__mul__(self, other))

    def _refuse(self, *_: Any) -> Any:
        raise Untraceable("it computes with the number of rows of x[mask]")

    __add__ = __radd__ = __sub__ = __rsub__ = __rmul__ = __floordiv__ = __mod__ = __pow__ = _refuse
    __truediv__ = __rtruediv__ = __float__ = __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = int.__hash__


def _is_tracer(module: str) -> bool:
    """Whether a module reads tensors for itself, as PyTorch's do, but for checks of a distribution's arguments."""
    return module.startswith("torch.") and not module.startswith("torch.distributions.")


def _is_view(indices: Sequence[Any]) -> bool:
    """Whether indexing gives a view, whatever the tensor."""
    return all(isinstance(index, (int, slice, type(None), type(...))) for index in indices)


class Reads(TorchFunctionMode):
    """Intercepts how Python reads tensors: records what it reads, or replays it while the function is traced.

    While it replays, ``x[mask]`` with a mask of bools is all of ``x``, whose rows outside of the mask are not used.

    Args:
        look: finds the places of the simulator's tensors.
        record: what a run recorded, to be replayed; None to record.
    """

    def __init__(self, look: Callable[[], Places], record: Reads | None = None) -> None:
        super().__init__()
        self._look = look
        self.values: list[Any] = [] if record is None else record.values
        self.written: list[set[int]] = [] if record is None else list(record.written)  # by branch, the places
        self.guards: list[tuple[Tensor, Any]] = []
        self._replays = record is not None
        self._n_replayed = self._n_calls = self._n_branches = 0
        self._is_broad_phase = False
        self._near: dict[frozenset[int], Tensor] = {}  # by the identities of two entities, where they are near
        self._found_near: Tensor | None = None
        self._forced: bool | None = None  # what all values that are read are taken to be, for now
        self._read_while_forced: list[Tensor] = []
        self._n_tries: int | None = None  # of a function that draws until a condition holds, while it is at work
        self._is_due: Tensor | None = None  # whether it draws again
        self._masked: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: x[mask], and the mask

    def as_broad_phase(self, collides: Any) -> Callable[..., bool]:
        """``World.collides``, which passes whenever only the positions would decide."""

        def passed(world: Any, *entities: Any) -> bool:
            if sys._getframe(1).f_globals is not collides.__globals__:  # not VMAS's physics, but a scenario
                return collides(world, *entities)
            self._is_broad_phase, self._found_near = True, None
            try:
                return collides(world, *entities)
            finally:
                self._is_broad_phase = False
                if self._found_near is not None:
                    self._near[frozenset(map(id, entities))] = self._found_near

        return passed

    def as_update_of_forces(self, update: Any) -> Callable[..., None]:
        """``World.update_env_forces``, which adds no force of a collision that the broad phase would not have passed.

        The narrow phase keeps lines and boxes a bit farther apart than the broad phase does, and spheres not.
        """

        def updated(world: Any, a: Any, force_a: Any, torque_a: Any, b: Any, force_b: Any, torque_b: Any) -> None:
            is_collision = sys._getframe(1).f_code.co_name.endswith("_collision")
            of_spheres = all(type(entity.shape).__name__ == "Sphere" for entity in (a, b))
            near, values = self._near.get(frozenset((id(a), id(b)))), [force_a, torque_a, force_b, torque_b]
            if is_collision and near is not None and not of_spheres:
                values = [if_any_near(near, force_a, v) if isinstance(v, Tensor) else v for v in values]
            return update(world, a, values[0], values[1], b, values[2], values[3])

        return updated

    def as_tries(self, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function that draws for some rows again while any of them needs it, with as many tries each time.

        A try that no row needs changes nothing, and draws nothing when the trace runs.
        """

        def drawn(*args: Any, **kwargs: Any) -> Tensor:
            self._n_tries, self._is_due = 0, None
            try:
                return draw(*args, **kwargs)
            finally:
                self._n_tries = self._is_due = None

        return drawn

    def _read_try(self, is_due: Tensor) -> bool:
        self._n_tries = (self._n_tries or 0) + 1
        self._is_due = is_due.clone().reshape(())
        if self._n_tries <= _MOST_TRIES:
            return True
        self.guards.append((self._is_due, False))
        return False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._n_calls += 1
        if self._n_calls > _MOST_CALLS:
            raise Untraceable(f"it calls PyTorch more than {_MOST_CALLS} times, and would take minutes to compile")
        if self._is_broad_phase and func is Tensor.any:
            self._found_near = args[0]
        if func in _READS and not _is_tracer(sys._getframe(1).f_globals.get("__name__", "")):
            return self._read(func, *args)
        if not self._replays:
            return func(*args, **(kwargs or {}))
        if self._is_due is not None and func is Tensor.uniform_:
            tensor, low, high = args
            return tensor.copy_(draw_if(self._is_due, tensor) * (high - low) + low)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            tensor, index, *value = args
            mask, *rest = index if isinstance(index, tuple) else (index,)
            if isinstance(mask, Tensor) and mask.dtype == torch.bool and _is_view(rest):
                tensor = tensor[(slice(None),) * mask.ndim + tuple(rest)] if rest else tensor
                return self._write(tensor, mask, *value) if value else self._tag(tensor.clone(), mask)
            keeps_rows = mask is ... or (isinstance(mask, slice) and mask == slice(None)) or tensor.shape[:1] == (1,)
            masks = [self._masked[id(each)][1] for each in (tensor, *value) if id(each) in self._masked]
            if id(tensor) in self._masked and masks[0].ndim == 1 and keeps_rows and _is_view((mask, *rest)):
                if not value:  # of all rows of x[mask]
                    return self._tag(func(*args), masks[0])
                if len(masks) == 2 or not isinstance(value[0], Tensor):
                    self._check_same(masks[0], masks[-1])
                    return func(*args)
        flat = [*_flat(args), *_flat((kwargs or {}).values())]
        masked = [each for each in flat if id(each) in self._masked]
        if masked:
            return self._call_by_row(func, masked, args, kwargs or {})
        for rows in flat:
            if isinstance(rows, _Rows):
                return self._tag(self._make(func, rows.mask, args, kwargs or {}), rows.mask)
        return func(*args, **(kwargs or {}))

    def _read(self, func: Callable[..., Any], tensor: Tensor) -> Any:
        if self._n_tries is not None:
            return self._read_try(tensor)
        if self._forced is not None and not self._is_broad_phase:
            self._read_while_forced.append(tensor)
            return func(torch.tensor(self._forced))
        if not self._replays:
            self.values.append(True if self._is_broad_phase else func(tensor))
            return self.values[-1]
        if self._n_replayed == len(self.values):
            raise Untraceable("it branches on random numbers")
        value = self.values[self._n_replayed]
        self._n_replayed += 1
        if not self._is_broad_phase:
            self.guards.append((tensor.clone().reshape(()), value))
        return value

    def branch(self, test: Callable[[], Any]) -> Iterator[None]:
        """Runs the body of an ``if`` whichever way its test goes, and then takes back what it should not have changed.

        It does if the test depends on one bool. Otherwise it is an ``if`` as ever.
        """
        drawn = torch.get_rng_state()
        if_true, read = self._forced_to(True, test)
        if not read:
            if if_true:
                yield
            return
        places = self._look()
        if not self._replays:
            self._check_test(test, drawn, places)
        if_false, read_too = self._forced_to(False, test)
        if if_true == if_false or len(read) != 1 or len(read_too) != 1 or read[0].dtype != torch.bool:
            if test():
                yield
            return
        taken = read[0].clone().reshape(()) if if_true else ~read[0].reshape(())
        before = {id(tensor): (tensor, n_writes(tensor), tensor.clone()) for tensor in places.tensors}
        branch = self._n_branches
        self._n_branches += 1
        self.written += [] if self._replays else [set()]
        yield
        after = self._look()
        everywhere = set(range(len(after.paths)))
        difference = places.difference(after) or after.difference_in_sharing(places.same(), after.same(), everywhere)
        if not self._replays and not torch.equal(torch.get_rng_state(), drawn):
            difference = "it draws random numbers"
        if difference:
            raise Untraceable(f"an if changes more than tensors: {difference}")
        merged: dict[tuple[int, int], Tensor] = {}
        for number, tensor in enumerate(after.tensors):
            old, writes, values = before[id(places.tensors[number])]
            if not self._replays and (tensor is not old or n_writes(tensor) != writes):
                self.written[branch].add(number)  # the tracer's own tensors do not count writes
            if number not in self.written[branch]:
                continue
            holder = after.holders[number]
            if tensor.shape != old.shape or tensor.dtype != old.dtype or holder is None:
                raise Untraceable(f"an if replaces {after.paths[number]}")
            pair = (id(tensor), id(old))
            if pair not in merged:
                new = torch.where(taken, tensor, values)
                merged[pair] = tensor.copy_(new) if tensor is old else new
            holder[0][holder[1]] = merged[pair]

    def _check_test(self, test: Callable[[], Any], drawn: Tensor, places: Places) -> None:
        """Refuses a test that changes something, or draws: it runs more than once."""
        writes = [n_writes(tensor) for tensor in places.tensors]
        for value in (True, False):
            self._forced_to(value, test)
        after = self._look()
        is_same = not places.difference(after) and all(map(operator.is_, places.tensors, after.tensors))
        if not is_same or [n_writes(tensor) for tensor in after.tensors] != writes:
            raise Untraceable("the test of an if changes what objects hold")
        if not torch.equal(torch.get_rng_state(), drawn):
            raise Untraceable("the test of an if draws random numbers")

    def _forced_to(self, value: bool, test: Callable[[], Any]) -> tuple[bool, list[Tensor]]:
        """What a test gives if the tensors that it reads are a value, and these tensors."""
        self._forced, self._read_while_forced = value, []
        try:
            return bool(test()), self._read_while_forced
        finally:
            self._forced = None

    def _tag(self, tensor: Tensor, mask: Tensor) -> Tensor:
        self._masked[id(tensor)] = (tensor, mask)
        return tensor

    def _write(self, tensor: Tensor, mask: Tensor, value: Any) -> None:
        """``tensor[mask] = value``."""
        if id(value) in self._masked:
            self._check_same(mask, self._masked[id(value)][1])
        elif isinstance(value, Tensor) and value.ndim > tensor.ndim - mask.ndim and value.shape != (1,):
            raise Untraceable(f"x[mask] = a tensor of shape {tuple(value.shape)}")
        rows = mask.reshape(*mask.shape, *[1] * (tensor.ndim - mask.ndim))
        value = torch.as_tensor(value, device=tensor.device).to(tensor.dtype)
        tensor.copy_(torch.where(rows, value, tensor))

    def _call_by_row(
        self, func: Callable[..., Any], masked: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        name = func.__name__.strip("_")
        if name == "get":
            return self._get(func, *args)
        if func in (torch.gather, Tensor.gather):
            return self._gather(*args, **kwargs)
        mask = self._masked[id(masked[0])][1]
        is_by_row = name in _BY_ROW or name[1:] in _BY_ROW  # __iadd__, add_, __radd__
        if not is_by_row and not (name in _BY_DIMENSION and mask.ndim == 1):
            raise Untraceable(f"it applies {func.__name__} to x[mask], which cannot be done row by row")
        for other in masked[1:]:
            self._check_same(mask, self._masked[id(other)][1])
        for each in _flat(args):
            if isinstance(each, Tensor) and id(each) not in self._masked and each.ndim >= masked[0].ndim:
                raise Untraceable(f"{func.__name__} of x[mask] and a tensor of shape {tuple(each.shape)}")
        return self._tag(func(*args, **kwargs), mask)

    def _get(self, getter: Any, tensor: Tensor) -> Any:
        """An attribute of x[mask]."""
        name, mask = getter.__self__.__name__, self._masked[id(tensor)][1]
        if name == "shape" and mask.ndim == 1 and len(tensor) % len(mask) == 0:
            return torch.Size((_Rows.of(mask, len(tensor)), *tensor.shape[1:]))
        if name not in {"device", "dtype"}:
            raise Untraceable(f"it reads {name} of x[mask]")
        return getattr(tensor, name)

    def _make(self, func: Callable[..., Any], mask: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """A new tensor with the rows of x[mask]."""
        if func not in _SIZED or (_SIZED[func] and id(mask) in self._masked):
            raise Untraceable(f"it calls {func.__name__} with the number of rows of x[mask]")
        if _SIZED[func] is None:
            return func(*args, **kwargs)
        return draw_in_mask(mask, [int(size) for size in _flat(args)], _SIZED[func])

    def _gather(self, table: Tensor, dim: int, index: Tensor) -> Tensor:
        """Entries of the first row of x[mask], at places that each row has."""
        if {id(table), id(index)} - {*self._masked} or dim == 0 or index.shape[0] != 1:
            raise Untraceable("it gathers entries of x[mask] of each row")
        mask = self._masked[id(table)][1]
        self._check_same(mask, self._masked[id(index)][1])
        return self._tag(first_in_mask(table, mask).gather(dim, index), mask)

    def _check_same(self, mask: Tensor, other: Tensor) -> None:
        """Two masks in one statement must be equal, whenever it runs."""
        if mask is not other:
            if mask.shape != other.shape:
                raise Untraceable("x[mask] with two masks")
            self.guards.append(((mask == other).all(), True))


def _flat(values: Any) -> list[Any]:
    """Values, and those of lists and tuples."""
    return [each for value in values for each in (_flat(value) if isinstance(value, (list, tuple)) else [value])]
