"""The gradient of a mean loss on minibatches, after the first ones without the Python of losses and TensorDicts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, fx, nn

from torchrl_trpo.kernels.batch_function import BatchFunction, Blocks, check_results
from torchrl_trpo.kernels.buffers import NotCompiled, reason_of
from torchrl_trpo.kernels.record import record
from torchrl_trpo.kernels.settings import setting_of, settings_of
from torchrl_trpo.kernels.writer import LARGEST_INT
from torchrl_trpo.seeding import untouched_generators

_MOST_COMPILED = 4  # functions of a loss: its settings may change in each fit
_CLOSE = 1e-3  # of the largest number: how far from what is expected without asking how far rounding goes
_DTYPES = (torch.float32, torch.int64, torch.bool)


class MinibatchGradient:
    """A mean loss on minibatches of one fit, with gradients.

    The loss is called for the first minibatch. Its operations are also recorded, as a graph of plain tensors, which
    serves the other minibatches of that shape, here and in later fits. It does so only if the loss has the settings
    that it had, and if it gives what the loss gives on the first minibatch of a fit, to the bit. Otherwise the loss is
    recorded anew.

    Compiled, the operations serve minibatches of any size, and give the same up to rounding; so they must on the first
    minibatch of each fit. If what is recorded cannot be compiled, a warning says why.

    Nothing is recorded if Python depends on what is in a minibatch, if the loss has other trained parameters, if a call
    changes its settings or a layer's buffers, or if a parameter has hooks.

    Args:
        name: what it is of, for the warning, such as ``"The critic's fit"``.
        loss: the loss; what is recorded is kept with it.
        network: the network whose parameters are trained.
        mean: from a minibatch to the mean loss, a scalar.
        parameters: the trained parameters.

    Keyword Args:
        buffers: the loss's buffers whose numbers may change without recording anew: Python does not read them.
        may_record: whether to record the operations.
        compiled: whether to compile what is recorded, with the machine's C++ compiler.
    """

    def __init__(
        self,
        name: str,
        loss: nn.Module,
        network: nn.Module,
        mean: Callable[[TensorDictBase], Tensor],
        parameters: Sequence[Tensor],
        *,
        buffers: Sequence[str] = (),
        may_record: bool,
        compiled: bool,
    ) -> None:
        self._compiled = compiled
        self._loss = _Loss(name, loss, network, mean, list(parameters), buffers)
        self._function: _Graph | _Compiled | None = None
        self._values: list[Tensor] = []  # what it takes, of all rows of the fit
        hooks = (leaf._backward_hooks or leaf._post_accumulate_grad_hooks for leaf in parameters)
        self._may_record = may_record and not any(hooks)

    def __call__(self, rows: TensorDictBase, drawn: Tensor) -> Tensor:
        """Adds the gradient of the mean loss to the parameters' ``grad``.

        Args:
            rows: the rows of the fit.
            drawn: which of them are in the minibatch.

        Returns:
            The mean loss, without a graph.
        """
        parameters = self._loss.parameters
        results = self._of_function(drawn)
        if results is not None:
            mean, *gradients = results
            given = set()  # the memory of the gradients: two may have some in common, and each is written to
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    continue
                memory = gradient.untyped_storage().data_ptr()
                if gradient.stride() != parameter.stride() or memory in given:
                    gradient = torch.empty_like(parameter).copy_(gradient)  # as backward does; fused Adam reads memory
                given.add(memory)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            return mean
        before = None
        if self._may_record:
            try:
                before = self._loss.settings()
            except (RecursionError, RuntimeError) as error:  # of an object that holds itself, or cannot be compared
                self._refuse(error)
        with torch.enable_grad():
            mean = self._loss.mean(rows[drawn])
        mean.backward()
        may_record, self._may_record = self._may_record, False
        if may_record and self._loss.settings() == before:  # or a call changes them
            expected = [mean.detach(), *(parameter.grad for parameter in parameters)]
            if all(each is None or bool(each.isfinite().all()) for each in expected):
                with untouched_generators():
                    self._record(rows, drawn, expected)
        return mean.detach()

    def _of_function(self, drawn: Tensor) -> list[Tensor] | None:
        """The mean and its gradients by what is recorded or compiled; None if the loss is to be called."""
        if self._function is None or self._function.size not in (None, len(drawn)):
            return None
        try:
            return self._function(self._loss.shared(), _take(self._values, drawn))
        except ValueError as error:  # a whole number is too large for compiled code
            self._function = None
            self._refuse(error)
            return None

    def _refuse(self, error: Exception) -> None:
        self._may_record = False
        if self._compiled:
            warnings.warn(f"{self._loss.name} is not compiled: {reason_of(error)}.", stacklevel=6)

    def _record(self, rows: TensorDictBase, drawn: Tensor, expected: Sequence[Tensor | None]) -> None:
        """Finds a function that gives what is expected of the rows that are drawn, if there is one."""
        loss = self._loss._replace(entries=_entries_of(rows))
        values = [rows.get(entry.key)[entry.once] for entry in loss.entries]
        minibatch = _take(values, drawn)
        try:
            graph = _graph_of(loss, minibatch, expected)
            self._function, self._values = graph, values
            if graph is not None and self._compiled and (compiled := graph.compiled(loss, minibatch, expected)):
                self._values = _packed(values)
                self._function = compiled
        except Exception as error:  # of any user's loss, of which the first minibatch is computed already
            self._refuse(error)


class _Entry(NamedTuple):
    """An entry of rows; what is repeated in it (a team's pooled input, once for each agent) is taken once."""

    key: NestedKey
    shape: torch.Size
    dtype: torch.dtype
    once: tuple[slice, ...]


class _Loss(NamedTuple):
    """What a graph is recorded of: as of :class:`MinibatchGradient`, and the entries of the rows."""

    name: str
    module: nn.Module
    network: nn.Module
    mean: Callable[[TensorDictBase], Tensor]
    parameters: Sequence[Tensor]
    buffers: Sequence[str]
    entries: Sequence[_Entry] = ()

    def settings(self) -> tuple[Any, ...]:
        """What the loss and the network are besides their tensors."""
        return settings_of([("", self.module), *self.network.named_modules(prefix="network")])

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


def _entries_of(rows: TensorDictBase) -> list[_Entry]:
    entries = []
    for key, value in rows.items(True, True):
        once = tuple(slice(0, 1) if dim and not value.stride(dim) else slice(None) for dim in range(value.ndim))
        entries.append(_Entry(key, value.shape[1:], value.dtype, once))
    return entries


def _take(values: Sequence[Tensor], drawn: Tensor) -> list[Tensor]:
    return [value.index_select(0, drawn) for value in values]


def _packed(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors ``[N, *shape]`` as one ``[N, K]`` of each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for value in values:
        if value.dtype == torch.int64 and value.numel() and max(int(value.max()), -int(value.min())) >= LARGEST_INT:
            raise NotCompiled(f"it reads whole numbers of {LARGEST_INT} and beyond")
        by_dtype.setdefault(value.dtype, []).append(value.reshape(len(value), -1))
    return [torch.cat(parts, 1) for parts in by_dtype.values()]


class _Graph:
    """The operations of the mean loss and its gradient on a minibatch, recorded.

    ``before`` is the graph that the loss had; what was compiled then serves on if only the minibatch has another size.
    """

    def __init__(self, loss: _Loss, values: Sequence[Tensor], before: _Graph | None) -> None:
        self.size = len(values[0])
        self._function = record(loss.results, loss.shared(), values)
        self._function.graph.eliminate_dead_code()  # what the loss computes for its log
        self._function.recompile()
        self._constants = [*self._function.buffers(), *self._function.parameters()]
        read = {id(tensor) for tensor in self._constants}
        self._names = [name for name, tensor in loss.module.named_buffers() if id(tensor) in read]
        self._state = self._state_of(loss)
        self._compiled: _Compiled | None = None
        self._may_compile, self._n_compiled = True, 0
        if before is not None:
            self._n_compiled = before._n_compiled
            if before._state == self._state:
                self._compiled, self._may_compile = before._compiled, before._may_compile

    @torch.no_grad()
    def __call__(self, shared: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        return self._function(*shared, *values)

    def fits(self, loss: _Loss, values: Sequence[Tensor], expected: Sequence[Tensor | None]) -> bool:
        """Whether the loss has not changed, and the graph gives what is expected, to the bit."""
        if len(values[0]) != self.size or self._state_of(loss) != self._state:
            return False
        if any(tensor.requires_grad for tensor in self._constants):  # trained too, but not among them
            return False
        pairs = zip(self(loss.shared(), values), expected, strict=True)
        return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)

    def _state_of(self, loss: _Loss) -> tuple[Any, ...]:
        """What the operations depend on, besides the numbers that they are given."""
        # A buffer may have taken the place of one that is read.
        buffers = dict(loss.module.named_buffers()) if self._names else {}
        tensors = [*self._constants, *map(buffers.get, self._names)]
        given = [(each.shape, each.dtype) for each in loss.shared()]
        return (*loss.entries, *given, *loss.settings(), *map(setting_of, tensors))

    def compiled(self, loss: _Loss, values: Sequence[Tensor], expected: Sequence[Tensor | None]) -> _Compiled | None:
        """The compiled graph, which gives what is expected. None if it could not be compiled before.

        An error says why it cannot be compiled now.
        """
        if self._compiled is not None and not self._compiled.gives(expected, loss.shared(), values, self._function):
            self._compiled, self._may_compile = None, True  # of a constant that has changed unseen
        if self._may_compile:
            self._may_compile = False
            if self._n_compiled == _MOST_COMPILED:
                raise NotCompiled("the loss's settings, or the shapes of the data, change again and again")
            self._n_compiled += 1
            self._compiled = _Compiled(loss, values, self._function)
        return self._compiled


class _Compiled:
    """The mean loss and its gradient on a minibatch of any size, as one compiled loop over its packed rows.

    ``graph`` is what it stands for, on ``values``.
    """

    size = None

    def __init__(self, loss: _Loss, values: Sequence[Tensor], graph: fx.GraphModule) -> None:
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
        packed, shared = _packed(values), loss.shared()
        self._function = BatchFunction(function, [*shared, torch.ones((), dtype=torch.float32)], packed)
        check_results(self(shared, packed), lambda shared, rows: graph(*shared, *rows), shared, values)
        one = [value[:1] for value in values]
        if not _are_close(self(shared, _packed(one)), loss.results(shared, one)):
            raise NotCompiled("Python depends on the number of rows")

    def gives(
        self,
        expected: Sequence[Tensor | None],
        shared: Sequence[Tensor],
        values: Sequence[Tensor],
        graph: fx.GraphModule,
    ) -> bool:
        """Whether it gives what is expected of some rows, up to rounding."""
        results = self(shared, _packed(values))
        if not _are_close(results, expected):
            try:
                check_results(results, lambda shared, rows: graph(*shared, *rows), shared, values)
            except NotCompiled:
                return False
        return True

    @torch.no_grad()
    def __call__(self, shared: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        share = torch.tensor(1 / len(values[0]), dtype=torch.float32)
        return self._function([*shared, share], Blocks(values))


def _are_close(results: Sequence[Tensor], expected: Sequence[Tensor | None]) -> bool:
    """Whether results are near what is expected."""
    pairs = [(result, other) for result, other in zip(results, expected, strict=True) if other is not None]
    return all(bool(((a - b).abs() <= _CLOSE * b.abs().max() + 1e-7).all()) for a, b in pairs)


_graphs: WeakKeyDictionary[nn.Module, _Graph | None] = WeakKeyDictionary()  # None: the loss differs from its graph


def _graph_of(loss: _Loss, values: Sequence[Tensor], expected: Sequence[Tensor | None]) -> _Graph | None:
    """A graph that gives what is expected, the recorded one or a new one; None if there is none.

    An error is raised if the loss cannot be recorded, and None returned from then on.
    """
    known = _graphs.get(loss.module)
    if loss.module in _graphs and (known is None or known.fits(loss, values, expected)):
        return known
    _graphs[loss.module] = None
    new = _Graph(loss, values, known)
    # What Python has read of the minibatch is not true of another one, with half of its rows.
    fewer = _take(values, torch.arange(new.size, device=values[0].device) // 2)
    if not new.fits(loss, values, expected) or not new.fits(loss, fewer, loss.results(loss.shared(), fewer)):
        raise NotCompiled("its operations, recorded, do not give its results again")
    _graphs[loss.module] = new
    return new
