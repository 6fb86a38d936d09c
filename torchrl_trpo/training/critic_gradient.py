"""The gradient of a critic's loss on minibatches, after the first ones without the Python of losses and TensorDicts."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import PPOLoss

from torchrl_trpo.kernels.record import record
from torchrl_trpo.keys import reads_init
from torchrl_trpo.objectives.policy_update import critic_network_parameters, mean_critic_loss

_FEWEST_STEPS = 50  # of a fit for which tracing pays


class CriticGradient:
    """The critic's mean loss on minibatches of one fit, with gradients.

    The loss is called for the first minibatch. Its operations are also recorded, as a graph of plain tensors, which
    serves the other minibatches of that shape, here and in later fits. It does so only if it gives what the loss gives
    on the first minibatch of a fit, to the bit: a loss whose settings have changed is recorded anew.

    Nothing is recorded for a loss that a call may change (``value_norm``, buffers of the critic), for recurrent
    critics, whose graphs are long, and for fits of few steps.

    Args:
        loss: the loss.
        parameters: the critic's trained parameters.
        steps: the number of minibatches in the fit.
    """

    def __init__(self, loss: PPOLoss, parameters: Sequence[Tensor], *, steps: int) -> None:
        self._loss, self._parameters = loss, list(parameters)
        self._graph: _Graph | None = None
        self._may_trace = (
            steps >= _FEWEST_STEPS
            and getattr(loss, "value_norm", None) is None
            and not reads_init(loss.critic_network)
            and all(leaf.requires_grad for leaf in critic_network_parameters(loss).values(True, True))
        )

    def __call__(self, rows: TensorDictBase, drawn: Tensor) -> Tensor:
        """Adds the gradient of the mean loss to the parameters' ``grad``, which is None or 0.

        Args:
            rows: the rows of the fit.
            drawn: which of them are in the minibatch.

        Returns:
            The mean loss, without a graph.
        """
        if self._graph is not None and self._graph.size == len(drawn):
            mean, gradients = self._graph(self._parameters, rows, drawn)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            return mean
        batch = rows[drawn]
        with torch.enable_grad():
            mean = mean_critic_loss(self._loss, batch)
        mean.backward()
        if self._may_trace:
            self._may_trace = False
            expected = [mean.detach(), *(parameter.grad for parameter in self._parameters)]
            self._graph = _graph_of(self._loss, self._parameters, rows, drawn, expected)
        return mean.detach()


class _Graph:
    """The operations of the mean loss and its gradient on a minibatch, recorded."""

    def __init__(self, loss: PPOLoss, parameters: list[Tensor], batch: TensorDictBase) -> None:
        def function(own: list[Tensor], values: list[Tensor]) -> list[Tensor | None]:
            recorded = TensorDict(dict(zip(self._keys, values, strict=True)), batch_size=batch.batch_size)
            with torch.enable_grad():
                mean = mean_critic_loss(loss, recorded)
            return [mean.detach(), *torch.autograd.grad(mean, own, allow_unused=True)]

        self.size = len(batch)
        self._keys = list(batch.keys(True, True))
        self._function = record(function, parameters, [batch.get(key) for key in self._keys])
        self._function.graph.eliminate_dead_code()  # what the loss computes for its log
        self._function.recompile()

    @torch.no_grad()
    def __call__(
        self, parameters: list[Tensor], rows: TensorDictBase, drawn: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        mean, *gradients = self._function(*parameters, *(_take(rows.get(key), drawn) for key in self._keys))
        return mean, gradients


_graphs: WeakKeyDictionary[PPOLoss, _Graph | None] = WeakKeyDictionary()  # None: the loss differs from its graph


def _graph_of(
    loss: PPOLoss, parameters: list[Tensor], rows: TensorDictBase, drawn: Tensor, expected: list[Tensor | None]
) -> _Graph | None:
    """A graph that gives what is expected, the recorded one or a new one; None if there is none."""

    def fits(graph: _Graph) -> bool:
        mean, gradients = graph(parameters, rows, drawn)
        pairs = zip([mean, *gradients], expected, strict=True)
        return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)

    known = loss in _graphs
    graph = _graphs.get(loss)
    if known and (graph is None or (graph.size == len(drawn) and fits(graph))):
        return graph
    new = _Graph(loss, parameters, rows[drawn])
    _graphs[loss] = new if fits(new) else None
    return _graphs[loss]


def _take(value: Tensor, drawn: Tensor) -> Tensor:
    """Rows of an entry; what is repeated in it (a team's pooled input, once for each agent) is copied once."""
    repeated = [dim for dim in range(1, value.ndim) if value.stride(dim) == 0]
    once = value[tuple(slice(0, 1) if dim in repeated else slice(None) for dim in range(value.ndim))]
    return once.index_select(0, drawn).expand(-1, *value.shape[1:])
