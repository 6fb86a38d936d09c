"""The gradient of a critic's loss on minibatches, after the first ones without the Python of losses and TensorDicts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, fx
from torchrl.objectives import PPOLoss

from torchrl_trpo.kernels.batch_function import BatchFunction, Blocks, check_results
from torchrl_trpo.kernels.buffers import REFUSALS, NotCompiled, reason_of
from torchrl_trpo.kernels.record import record
from torchrl_trpo.kernels.settings import setting_of, settings_of
from torchrl_trpo.keys import reads_init
from torchrl_trpo.objectives.policy_update import critic_network_parameters, mean_critic_loss
from torchrl_trpo.seeding import untouched_generators

_FEWEST_STEPS = 50  # of a fit for which tracing pays
_MOST_COMPILED = 4  # functions of a loss: its settings may change in each fit


class CriticGradient:
    """The critic's mean loss on minibatches of one fit, with gradients.

    The loss is called for the first minibatch. Its operations are also recorded, as a graph of plain tensors, which
    serves the other minibatches of that shape, here and in later fits. It does so only if the loss has the settings
    that it had, and if it gives what the loss gives on the first minibatch of a fit, to the bit. Otherwise the loss is
    recorded anew.

    Compiled, the operations serve minibatches of any size, and give the same up to rounding. If what is recorded cannot
    be compiled, a warning says why.

    Nothing is recorded for a loss that a call may change (``value_norm``, buffers of the critic), for recurrent
    critics, whose graphs are long, for fits of few steps, and where the loss has trained parameters of its own, or the
    critic's have hooks. Nor is anything if Python depends on what is in a minibatch.

    Args:
        loss: the loss.
        parameters: the critic's trained parameters.

    Keyword Args:
        steps: the number of minibatches in the fit.
        compiled: whether to compile what is recorded, with the machine's C++ compiler.
    """

    def __init__(self, loss: PPOLoss, parameters: Sequence[Tensor], *, steps: int, compiled: bool = False) -> None:
        self._loss, self._parameters, self._compiled = loss, list(parameters), compiled
        self._function: _Graph | _Compiled | None = None
        self._values: list[Tensor] = []  # what it takes, of all rows of the fit
        self._may_trace = (
            steps >= _FEWEST_STEPS
            and getattr(loss, "value_norm", None) is None
            and not reads_init(loss.critic_network)
            and all(leaf.requires_grad for leaf in critic_network_parameters(loss).values(True, True))
            and not any(leaf._backward_hooks or leaf._post_accumulate_grad_hooks for leaf in parameters)
        )

    def __call__(self, rows: TensorDictBase, drawn: Tensor) -> Tensor:
        """Adds the gradient of the mean loss to the parameters' ``grad``.

        Args:
            rows: the rows of the fit.
            drawn: which of them are in the minibatch.

        Returns:
            The mean loss, without a graph.
        """
        if self._function is not None and self._function.size in (None, len(drawn)):
            mean, *gradients = self._function(self._parameters, _take(self._values, drawn))
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if gradient is None:
                    continue
                if gradient.stride() != parameter.stride():
                    gradient = torch.empty_like(parameter).copy_(gradient)  # as backward does; fused Adam reads memory
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            return mean
        before = _settings(self._loss) if self._may_trace else None
        with torch.enable_grad():
            mean = mean_critic_loss(self._loss, rows[drawn])
        mean.backward()
        may_trace, self._may_trace = self._may_trace, False
        if may_trace and _settings(self._loss) == before:  # or a call changes them
            with untouched_generators():
                self._record(rows, drawn, [mean.detach(), *(parameter.grad for parameter in self._parameters)])
        return mean.detach()

    def _record(self, rows: TensorDictBase, drawn: Tensor, expected: Sequence[Tensor | None]) -> None:
        """Finds a function that gives what is expected of the rows that are drawn, if there is one."""
        critic = _Critic(self._loss, self._parameters, _entries_of(rows))
        values = [rows.get(entry.key)[entry.once] for entry in critic.entries]
        minibatch = _take(values, drawn)
        try:
            graph = _graph_of(critic, minibatch, expected)
        except REFUSALS as error:
            if self._compiled:
                warnings.warn(f"The critic's fit is not compiled: {reason_of(error)}.", stacklevel=5)
            return
        self._function, self._values = graph, values
        if graph is not None and self._compiled and (compiled := graph.compiled(critic, minibatch)) is not None:
            self._function, self._values = compiled, [_packed(values)]


class _Entry(NamedTuple):
    """An entry of rows; what is repeated in it (a team's pooled input, once for each agent) is taken once."""

    key: NestedKey
    shape: torch.Size
    dtype: torch.dtype
    once: tuple[slice, ...]


class _Critic(NamedTuple):
    """What a graph is recorded of: the loss, the critic's trained parameters, and the entries of the rows."""

    loss: PPOLoss
    parameters: Sequence[Tensor]
    entries: Sequence[_Entry]

    def mean(self, values: Sequence[Tensor]) -> Tensor:
        """The mean loss on a minibatch, of the values of its entries."""
        pairs = zip(self.entries, values, strict=True)
        batch = TensorDict({entry.key: value.expand(-1, *entry.shape) for entry, value in pairs}, [len(values[0])])
        return mean_critic_loss(self.loss, batch)

    @torch.enable_grad()
    def results(self, own: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """The mean loss, and its gradient by the parameters, None for one that it does not depend on."""
        mean = self.mean(values)
        return [mean.detach(), *torch.autograd.grad(mean, own, allow_unused=True)]


def _entries_of(rows: TensorDictBase) -> list[_Entry]:
    entries = []
    for key, value in rows.items(True, True):
        once = tuple(slice(0, 1) if dim and not value.stride(dim) else slice(None) for dim in range(value.ndim))
        entries.append(_Entry(key, value.shape[1:], value.dtype, once))
    return entries


def _settings(loss: PPOLoss) -> tuple[Any, ...]:
    return settings_of([("", loss), *loss.critic_network.named_modules(prefix="critic")])


def _take(values: Sequence[Tensor], drawn: Tensor) -> list[Tensor]:
    return [value.index_select(0, drawn) for value in values]


def _packed(values: Sequence[Tensor]) -> Tensor:
    """Tensors ``[N, *shape]`` as one, ``[N, K]``."""
    return torch.cat([value.reshape(len(value), -1) for value in values], 1)


class _Graph:
    """The operations of the mean loss and its gradient on a minibatch, recorded.

    ``before`` is the graph that the loss had; what was compiled then serves on if only the minibatch has another size.
    """

    def __init__(self, critic: _Critic, values: Sequence[Tensor], before: _Graph | None) -> None:
        self.size = len(values[0])
        self._function = record(critic.results, critic.parameters, values)
        self._function.graph.eliminate_dead_code()  # what the loss computes for its log
        self._function.recompile()
        self._constants = [*self._function.buffers(), *self._function.parameters()]
        read = {id(tensor) for tensor in self._constants}
        self._names = [name for name, tensor in critic.loss.named_buffers() if id(tensor) in read]
        self._state = self._state_of(critic)
        self._compiled: _Compiled | None = None
        self._may_compile, self._n_compiled = True, 0
        if before is not None:
            self._n_compiled = before._n_compiled
            if before._state == self._state:
                self._compiled, self._may_compile = before._compiled, before._may_compile

    @torch.no_grad()
    def __call__(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        return self._function(*parameters, *values)

    def fits(self, critic: _Critic, values: Sequence[Tensor], expected: Sequence[Tensor | None]) -> bool:
        """Whether the loss has not changed, and the graph gives what is expected, to the bit."""
        if len(values[0]) != self.size or self._state_of(critic) != self._state:
            return False
        if any(tensor.requires_grad for tensor in self._constants):  # trained too, but not the critic's
            return False
        pairs = zip(self(critic.parameters, values), expected, strict=True)
        return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)

    def _state_of(self, critic: _Critic) -> tuple[Any, ...]:
        """What the operations depend on, besides the parameters and the minibatch."""
        # A buffer may have taken the place of one that is read.
        buffers = dict(critic.loss.named_buffers()) if self._names else {}
        tensors = [*self._constants, *map(buffers.get, self._names)]
        return (*critic.entries, *_settings(critic.loss), *map(setting_of, tensors))

    def compiled(self, critic: _Critic, values: Sequence[Tensor]) -> _Compiled | None:
        """The compiled graph. None if it cannot be compiled, and then a warning has said why."""
        if self._may_compile:
            self._may_compile = False
            try:
                if self._n_compiled == _MOST_COMPILED:
                    raise NotCompiled("the loss's settings, or the shapes of the data, change again and again")
                self._n_compiled += 1
                self._compiled = _Compiled(critic, values, self._function)
            except REFUSALS as error:
                warnings.warn(f"The critic's fit is not compiled: {reason_of(error)}.", stacklevel=5)
        return self._compiled


class _Compiled:
    """The mean loss and its gradient on a minibatch of any size, as one compiled loop over its packed rows.

    ``graph`` is what it stands for, on ``values``.
    """

    size = None

    def __init__(self, critic: _Critic, values: Sequence[Tensor], graph: fx.GraphModule) -> None:
        def function(shared: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
            *own, share = shared  # of one row in the mean
            parts = rows[0].split([value[0].numel() for value in values], 1)
            unpacked = [part.view(-1, *value.shape[1:]) for part, value in zip(parts, values, strict=True)]
            with torch.enable_grad():
                mean = critic.mean(unpacked) * len(rows[0]) * share
                return [mean.detach(), *torch.autograd.grad(mean, own)]

        for value in values:
            if value.dtype != torch.float32 or value.device.type != "cpu":
                raise NotCompiled(f"it reads data of {value.dtype} on {value.device}")
        results: Any = graph.graph.output_node().args[0]
        if None in results:
            raise NotCompiled("a parameter has no gradient")
        packed, own = _packed(values), critic.parameters
        self._function = BatchFunction(function, [*own, torch.ones((), dtype=torch.float32)], [packed])
        check_results(self(own, [packed]), lambda own, rows: graph(*own, *rows), own, values)

    @torch.no_grad()
    def __call__(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        share = torch.tensor(1 / len(values[0]), dtype=torch.float32)
        return self._function([*parameters, share], Blocks(values))


_graphs: WeakKeyDictionary[PPOLoss, _Graph | None] = WeakKeyDictionary()  # None: the loss differs from its graph


def _graph_of(critic: _Critic, values: Sequence[Tensor], expected: Sequence[Tensor | None]) -> _Graph | None:
    """A graph that gives what is expected, the recorded one or a new one; None if there is none.

    One of :data:`REFUSALS` is raised if the loss cannot be recorded, and None returned from then on.
    """
    known = _graphs.get(critic.loss)
    if critic.loss in _graphs and (known is None or known.fits(critic, values, expected)):
        return known
    _graphs[critic.loss] = None
    new = _Graph(critic, values, known)
    # What Python has read of the minibatch is not true of another one, with half of its rows.
    fewer = _take(values, torch.arange(new.size, device=values[0].device) // 2)
    if new.fits(critic, values, expected) and new.fits(critic, fewer, critic.results(critic.parameters, fewer)):
        _graphs[critic.loss] = new
    return _graphs[critic.loss]
