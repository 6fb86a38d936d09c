"""The gradient of a mean loss on minibatches, after the first ones without the Python of losses and TensorDicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_trpo.errors import warn
from torchrl_trpo.kernels.buffers import reason_of
from torchrl_trpo.objectives.recorded_loss import Compiled, Graph, MeanLoss, entries_of, graph_of, pack, take
from torchrl_trpo.seeding import untouched_generators


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
        loss: the loss.

    Keyword Args:
        may_record: whether to record the operations.
        compiled: whether to compile what is recorded, with the machine's C++ compiler.
    """

    def __init__(self, name: str, loss: MeanLoss, *, may_record: bool, compiled: bool) -> None:
        self._name, self._loss, self._compiled = name, loss, compiled
        self._function: Graph | Compiled | None = None
        self._values: list[Tensor] = []  # what it takes, of all rows of the fit
        hooks = (leaf._backward_hooks or leaf._post_accumulate_grad_hooks for leaf in loss.parameters)
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
                    self._record(rows, drawn, expected, before)
        return mean.detach()

    def _of_function(self, drawn: Tensor) -> list[Tensor] | None:
        """The mean and its gradients by what is recorded or compiled; None if the loss is to be called."""
        if self._function is None or self._function.size not in (None, len(drawn)):
            return None
        try:
            return self._function(self._loss.shared(), take(self._values, drawn))
        except ValueError as error:  # a whole number is too large for compiled code
            self._function = None
            self._refuse(error)
            return None

    def _refuse(self, error: Exception) -> None:
        self._may_record = False
        if self._compiled:
            warn(f"{self._name} is not compiled: {reason_of(error)}.")

    def _record(
        self, rows: TensorDictBase, drawn: Tensor, expected: Sequence[Tensor | None], settings: tuple[Any, ...]
    ) -> None:
        """Finds a function that gives what is expected of the rows that are drawn, if there is one."""
        loss = self._loss._replace(entries=entries_of(rows))
        values = [entry.of(rows) for entry in loss.entries]
        minibatch = take(values, drawn)
        try:
            graph = graph_of(loss, settings, minibatch, expected)
            self._function, self._values = graph, values
            if graph is not None and self._compiled and (compiled := graph.compiled(loss, minibatch, expected)):
                self._values = pack(values)
                self._function = compiled
        except Exception as error:  # of any user's loss, of which the first minibatch is computed already
            self._refuse(error)
