"""A mean loss and its gradient on a minibatch: recorded as operations on plain tensors, and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, fx, nn

from torchrl_trpo.kernels.batch_function import BatchFunction, Blocks, check_results
from torchrl_trpo.kernels.buffers import NotCompiled
from torchrl_trpo.kernels.record import record
from torchrl_trpo.kernels.settings import setting_of, settings_of
from torchrl_trpo.kernels.writer import LARGEST_INT

_MOST_KEPT = 4  # graphs of a loss, one for each of its settings
_MOST_COMPILED = 4  # functions of a loss: its settings may change in each fit
_CLOSE = 1e-3  # of the largest number: how far from what is expected without asking how far rounding goes
_DTYPES = (torch.float32, torch.int64, torch.bool)


class Entry(NamedTuple):
    """An entry of the rows of a fit.

    Attributes:
        key: its key.
        shape: its shape in a row.
        dtype: its type.
        repeated: by dimension, whether it is repeated there: a team's pooled input, once for each agent.
    """

    key: NestedKey
    shape: torch.Size
    dtype: torch.dtype
    repeated: tuple[bool, ...]

    def of(self, rows: TensorDictBase) -> Tensor:
        """The entry of some rows, with what is repeated once."""
        once = tuple(slice(0, 1) if is_repeated else slice(None) for is_repeated in self.repeated)
        return rows.get(self.key)[once]


def entries_of(rows: TensorDictBase) -> list[Entry]:
    """The entries of the rows of a fit."""
    entries = []
    for key, value in rows.items(True, True):
        repeated = tuple(dim > 0 and not stride for dim, stride in enumerate(value.stride()))
        entries.append(Entry(key, value.shape[1:], value.dtype, repeated))
    return entries


class MeanLoss(NamedTuple):
    """A mean loss on minibatches.

    Attributes:
        module: the loss; what is recorded is kept with it.
        network: the network whose parameters are trained.
        mean: from a minibatch to the mean loss, a scalar.
        parameters: the trained parameters.
        buffers: the loss's buffers whose numbers may change without recording anew: Python does not read them.
        entries: the entries of the rows.
    """

    module: nn.Module
    network: nn.Module
    mean: Callable[[TensorDictBase], Tensor]
    parameters: Sequence[Tensor]
    buffers: Sequence[str] = ()
    entries: Sequence[Entry] = ()

    def settings(self) -> tuple[Any, ...]:
        """What the loss and the network are besides their tensors."""
        return settings_of([("", self.module), *self.network.named_modules(prefix="network")])

    def state(self, settings: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the operations depend on, besides the numbers that they are given and the size of the minibatch."""
        return (*self.entries, *((each.shape, each.dtype) for each in self.shared()), *settings)

    def mean_of(self, values: Sequence[Tensor]) -> Tensor:
        """The mean loss on a minibatch, of the values of its entries."""
        pairs = zip(self.entries, values, strict=True)
        batch = TensorDict({entry.key: value.expand(-1, *entry.shape) for entry, value in pairs}, [len(values[0])])
        return self.mean(batch)

    def shared(self) -> list[Tensor]:
        """What all rows share, and whose numbers may change."""
        return [*self.parameters, *(getattr(self.module, name) for name in self.buffers)]

    @torch.enable_grad()
    def results(self, shared: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """The mean loss, and its gradient by the parameters, None for one that it does not depend on."""
        mean = self.mean_of(values)
        return [mean.detach(), *torch.autograd.grad(mean, shared[: len(self.parameters)], allow_unused=True)]


def take(values: Sequence[Tensor], drawn: Tensor) -> list[Tensor]:
    """The rows that are drawn."""
    return [value.index_select(0, drawn) for value in values]


def pack(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors ``[N, *shape]`` as one ``[N, K]`` of each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for value in values:
        if value.dtype == torch.int64 and value.numel() and max(int(value.max()), -int(value.min())) >= LARGEST_INT:
            raise NotCompiled(f"it reads whole numbers of {LARGEST_INT} and beyond")
        by_dtype.setdefault(value.dtype, []).append(value.reshape(len(value), -1))
    return [torch.cat(parts, 1) for parts in by_dtype.values()]


class Graph:
    """The operations of the mean loss and its gradient on a minibatch, recorded.

    ``before`` is the graph that the loss had; what was compiled then serves on if only the minibatch has another size.
    """

    def __init__(self, loss: MeanLoss, values: Sequence[Tensor], before: Graph | None) -> None:
        self.size = len(values[0])
        self._function = record(loss.results, loss.shared(), values)
        self._function.graph.eliminate_dead_code()  # what the loss computes for its log
        self._function.recompile()
        self._constants = [*self._function.buffers(), *self._function.parameters()]
        read = {id(tensor) for tensor in self._constants}
        self._names = [name for name, tensor in loss.module.named_buffers() if id(tensor) in read]
        self._values_read = self._read_by(loss)
        self._compiled: Compiled | None = None
        self._may_compile = True
        if before is not None and before._values_read == self._values_read:
            self._compiled, self._may_compile = before._compiled, before._may_compile

    @torch.no_grad()
    def __call__(self, shared: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """The mean loss and its gradient by each parameter, of as many rows as were recorded."""
        return self._function(*shared, *values)

    def fits(self, loss: MeanLoss, values: Sequence[Tensor], expected: Sequence[Tensor | None]) -> bool:
        """Whether what it reads has not changed, and it gives what is expected, to the bit."""
        if len(values[0]) != self.size or self._read_by(loss) != self._values_read:
            return False
        if any(tensor.requires_grad for tensor in self._constants):  # trained too, but not among them
            return False
        pairs = zip(self(loss.shared(), values), expected, strict=True)
        return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)

    def _read_by(self, loss: MeanLoss) -> list[Any]:
        """The tensors that are read elsewhere, and the buffers that may have taken the place of one."""
        buffers = dict(loss.module.named_buffers()) if self._names else {}
        return [*map(setting_of, [*self._constants, *map(buffers.get, self._names)])]

    def compiled(self, loss: MeanLoss, values: Sequence[Tensor], expected: Sequence[Tensor | None]) -> Compiled | None:
        """The compiled graph, which gives what is expected. None if it could not be compiled before.

        An error says why it cannot be compiled now.
        """
        if self._compiled is not None and not self._compiled.gives(expected, loss.shared(), values, self._function):
            self._compiled, self._may_compile = None, True  # of a constant that has changed unseen
        if self._may_compile:
            self._may_compile = False
            kept = _kept[loss.module]
            if kept.n_compiled == _MOST_COMPILED:
                raise NotCompiled("the loss's settings, or the shapes of the data, change again and again")
            kept.n_compiled += 1
            self._compiled = Compiled(loss, values, self._function)
        return self._compiled


class Compiled:
    """The mean loss and its gradient on a minibatch of any size, as one compiled loop over its packed rows.

    ``graph`` is what it stands for, on ``values``.
    """

    size = None

    def __init__(self, loss: MeanLoss, values: Sequence[Tensor], graph: fx.GraphModule) -> None:
        def function(given: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
            *shared, share = given  # of one row in the mean
            unpacked, begin = [], dict.fromkeys(_DTYPES, 0)
            for value in values:
                packed = next(each for each in rows if each.dtype == value.dtype)
                part = packed.narrow(1, begin[value.dtype], value[0].numel())
                begin[value.dtype] += value[0].numel()
                unpacked.append(part.view(-1, *value.shape[1:]))
            with torch.enable_grad():
                mean = loss.mean_of(unpacked) * len(rows[0]) * share
                return [mean.detach(), *torch.autograd.grad(mean, shared[: len(loss.parameters)])]

        for value in values:
            if value.dtype not in _DTYPES or value.device.type != "cpu":
                raise NotCompiled(f"it reads data of {value.dtype} on {value.device}")
        results: Any = graph.graph.output_node().args[0]
        if None in results:
            raise NotCompiled("a parameter has no gradient")
        packed, shared = pack(values), loss.shared()
        self._function = BatchFunction(function, [*shared, torch.ones((), dtype=torch.float32)], packed)
        check_results(self(shared, packed), lambda shared, rows: graph(*shared, *rows), shared, values)
        one = [value[:1] for value in values]
        if not _are_close(self(shared, pack(one)), loss.results(shared, one)):
            raise NotCompiled("Python depends on the number of rows")

    def gives(
        self,
        expected: Sequence[Tensor | None],
        shared: Sequence[Tensor],
        values: Sequence[Tensor],
        graph: fx.GraphModule,
    ) -> bool:
        """Whether it gives what is expected of some rows, up to rounding."""
        results = self(shared, pack(values))
        if not _are_close(results, expected):
            try:
                check_results(results, lambda shared, rows: graph(*shared, *rows), shared, values)
            except NotCompiled:
                return False
        return True

    @torch.no_grad()
    def __call__(self, shared: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """The mean loss and its gradient by each parameter, of some packed rows."""
        share = torch.tensor(1 / len(values[0]), dtype=torch.float32)
        return self._function([*shared, share], Blocks(values))


def _are_close(results: Sequence[Tensor], expected: Sequence[Tensor | None]) -> bool:
    """Whether results are near what is expected."""
    pairs = [(result, other) for result, other in zip(results, expected, strict=True) if other is not None]
    return all(bool(((a - b).abs() <= _CLOSE * b.abs().max() + 1e-7).all()) for a, b in pairs)


class _Kept:
    """What is kept of a loss: graphs by its state, the latest last; None if the loss differs from its graph."""

    def __init__(self) -> None:
        self.graphs: dict[Any, Graph | None] = {}
        self.n_compiled = 0


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def graph_of(
    loss: MeanLoss, settings: tuple[Any, ...], values: Sequence[Tensor], expected: Sequence[Tensor | None]
) -> Graph | None:
    """A graph that gives what is expected, a recorded one or a new one; None if there is none.

    ``settings`` are those of the loss.

    An error is raised if the loss cannot be recorded, and None returned from then on.
    """
    graphs, state = _kept.setdefault(loss.module, _Kept()).graphs, loss.state(settings)
    is_known = state in graphs
    known = graphs[state] = graphs.pop(state, None)
    if is_known and (known is None or known.fits(loss, values, expected)):
        return known
    graphs[state] = None
    if len(graphs) > _MOST_KEPT:
        del graphs[next(iter(graphs))]
    new = Graph(loss, values, known)
    # What Python has read of the minibatch is not true of another one, with half of its rows.
    fewer = take(values, torch.arange(new.size, device=values[0].device) // 2)
    if not new.fits(loss, values, expected) or not new.fits(loss, fewer, loss.results(loss.shared(), fewer)):
        raise NotCompiled("its operations, recorded, do not give its results again")
    graphs[state] = new
    return new
