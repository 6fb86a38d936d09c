"""A policy's forward pass, compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from torchrl_trpo.objectives.policy_network import distribution_parameters


class CompiledPolicy:
    """A policy's forward pass to its distribution parameters, compiled; it can be differentiated once, not twice.

    ``torch.compile`` would trace through TensorDicts and ``vmap`` again at each update. So ``make_fx`` first traces the
    pass to a graph of operations on plain tensors, and that graph is compiled with the ``options`` of
    ``torch.compile``, once for each shape of the inputs. A policy whose operations depend on the values that it reads
    cannot be traced: torch raises an error.
    """

    def __init__(self, network: ProbabilisticTensorDictSequential, options: Mapping[str, Any]) -> None:
        self._network = network
        self._options = options
        self._functions: dict[tuple, tuple[list, Callable[..., Sequence[Tensor]]]] = {}

    def __call__(self, parameters: TensorDictBase, inputs: TensorDictBase) -> TensorDict:
        """The distribution's parameters at ``inputs``, both of batch size ``[*R]``."""
        values = [*parameters.values(True, True), *inputs.values(True, True)]
        form = tuple((value.shape, value.dtype, value.device) for value in values)
        if form not in self._functions:
            self._functions[form] = self._compile(parameters, inputs)
        keys, function = self._functions[form]
        return TensorDict(dict(zip(keys, function(values), strict=True)), batch_size=inputs.batch_size)

    def __deepcopy__(self, memo: dict) -> CompiledPolicy:
        """A copy, which compiles for itself."""
        return CompiledPolicy(deepcopy(self._network, memo), self._options)

    def _compile(self, parameters: TensorDictBase, inputs: TensorDictBase) -> tuple[list, Callable]:
        keys: list = []

        def function(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
            own, rows, remaining = parameters.clone(False), inputs.clone(False), iter(values)
            for part in (own, rows):
                for key in list(part.keys(True, True)):
                    part.set(key, next(remaining))
            outputs = distribution_parameters(self._network, own, rows)
            keys[:] = outputs.keys(True, True)
            return tuple(outputs.values(True, True))

        values = [*parameters.detach().values(True, True), *inputs.values(True, True)]
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(values)
        return keys, torch.compile(graph, dynamic=False, **self._options)
