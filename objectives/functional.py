"""Evaluating a network with other parameters than its own."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase, TensorDictParams
from torch import Tensor, nn


@contextlib.contextmanager
def other_parameters(network: nn.Module, parameters: TensorDictBase | None) -> Iterator[None]:
    """Gives a network other parameters for the block; its own are back afterwards, also after an error.

    ``parameters`` holds buffers too, with the keys of ``TensorDict.from_module(network)``; None stands for its own.
    """
    if parameters is None:
        yield
        return
    with parameters_restored(network):
        own = parameters.to_module(network, preserve_module_state=False)
        yield
        own.to_module(network, preserve_module_state=False)


@contextlib.contextmanager
def in_evaluation(network: nn.Module) -> Iterator[None]:
    """Puts a network in evaluation mode, and each of its modules back into its own mode afterwards."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def parameters_restored(*networks: nn.Module | None) -> Iterator[None]:
    """Puts the networks' own parameters and buffers back if an error leaves the block.

    TorchRL's losses, value estimators and multi-agent networks swap parameters with ``TensorDict.to_module``. When an
    ``Exception`` leaves its block, it restores nothing: the network keeps clones, or the tensors of ``vmap``. When
    anything else leaves it (Ctrl-C), it raises another error; here the original one is raised again.
    """
    if torch.compiler.is_compiling():  # a compiled graph raises nothing that could be caught here
        yield
        return
    modules = [module for network in networks if network is not None for module in network.modules()]
    before = [[dict(registry) for registry in _registries(module)] for module in modules]
    tensors = [_tensor_attributes(module) for module in modules]
    handled = sys.exception()
    try:
        yield
    except BaseException as error:
        for module, registered, attributes in zip(modules, before, tensors, strict=True):
            for registry, own in zip(_registries(module), registered, strict=True):
                registry.clear()
                registry.update(own)
            for name in _tensor_attributes(module):
                del vars(module)[name]
            vars(module).update(attributes)
        replaced = error.__context__
        of_tensordict = isinstance(error, RuntimeError) and replaced is not handled
        if of_tensordict and replaced is not None and not isinstance(replaced, Exception):
            raise replaced from None
        raise


def copy_parameters(loss: nn.Module, memo: dict[int, Any]) -> None:
    """Copies a loss's parameters into the memory of a deepcopy, so that networks and loss of the copy have the same.

    tensordict's own deepcopy gives the loss parameters that no network holds.
    """
    held = (each for module in loss.modules() for each in (module, *vars(module).values()))
    for network in held:
        for module in network.modules() if isinstance(network, nn.Module) else ():
            if isinstance(module, TensorDictParams) and id(module) not in memo:
                copied = module.apply(lambda leaf: copy.deepcopy(leaf, memo))
                memo[id(module)] = TensorDictParams(copied, no_convert=module.no_convert)


def _registries(module: nn.Module) -> tuple[dict, dict]:
    """A module's parameters and buffers by name, private: no public view of them can be written to."""
    return vars(module)["_parameters"], vars(module)["_buffers"]


def _tensor_attributes(module: nn.Module) -> dict[str, Any]:
    """The tensors that are plain attributes of a module: ``to_module`` puts those there that are no ``Parameter``."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (Tensor, TensorDictBase))}
