"""Questions to a policy network: its trust regions, its distribution, one agent's part of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from tensordict.nn import (
    AddStateIndependentNormalScale,
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
)
from torch import Tensor, nn
from torch import distributions as D
from torchrl.modules import TanhNormal, set_recurrent_mode
from torchrl.modules.models.multiagent import MultiAgentNetBase

from torchrl_trpo.distributions import BoundedTanhNormal
from torchrl_trpo.errors import nearest
from torchrl_trpo.kernels.settings import setting_of
from torchrl_trpo.keys import path
from torchrl_trpo.objectives.functional import other_parameters


def resolve_trust_region(
    trust_region: str | None, network: ProbabilisticTensorDictSequential, parameters: TensorDictBase
) -> tuple[Literal["shared", "per_agent"], int]:
    """The kind of trust region of a policy, inferred where it is None, and the number of regions.

    Raises ValueError if the kind is unknown, or regions are per agent and a parameter is not.
    """
    if trust_region not in {None, "shared", "per_agent"}:
        raise ValueError(f"trust_region: {trust_region!r}. {nearest(trust_region, ['shared', 'per_agent', None])}")
    trained = {key: value for key, value in parameters.items(True, True) if value.requires_grad}
    prefixes = stacked_prefixes(network)
    if trust_region == "shared" or (trust_region is None and not prefixes):
        return "shared", 1
    loose = {key: value for key, value in trained.items() if not any(key[: len(p)] == p for p in prefixes)}
    # Outside of multi-agent networks, parameters count as stacked by their shape, but never those of a plain layer.
    plain = [m for m in network.modules() if type(m).__module__.startswith("torch.nn.") and _is_trained_layer(m)]
    plain += [m for m in network.modules() if isinstance(m, MultiAgentNetBase) and m.share_params]
    sizes = {net.n_agents for net in _unshared_nets(network)} or {
        value.shape[0] for value in loose.values() if value.ndim
    }
    n_agents = max(sizes, default=0)
    shared = {key: tuple(v.shape) for key, v in loose.items() if plain or v.ndim < 2 or v.shape[0] != n_agents}
    if shared or len(sizes) != 1:
        raise ValueError(
            f"trust_region={trust_region!r}: a region for each agent needs every parameter of the policy stacked on a "
            f"leading agent dimension, but {', '.join(f'{key} {shape}' for key, shape in shared.items())} is not. "
            "Legal: MultiAgentMLP(share_params=False) for networks, [n_agents, A] for a standard deviation and other "
            "parameters of your own; or trust_region='shared', one region for all."
        )
    return "per_agent", n_agents


def _is_trained_layer(module: nn.Module) -> bool:
    if isinstance(module, (nn.ParameterDict, nn.ParameterList)):
        return False
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def stacked_prefixes(network: ProbabilisticTensorDictSequential) -> list[tuple[str, ...]]:
    """The keys of a policy's stacked parameters and buffers, without trained parameters outside of its networks.

    They are those of its unshared multi-agent networks, and buffers and frozen parameters ``[n_agents, ...]`` that are
    not a plain layer's, such as a standard deviation that is set by hand.
    """
    nets = set(_unshared_nets(network))
    prefixes = [(*name.split("."), "params") for name, module in network.named_modules() if module in nets]
    sizes = {value.shape[0] for net in nets for value in net.params.values(True, True)}
    inner = {each for net in network.modules() if isinstance(net, MultiAgentNetBase) for each in net.modules()}
    for name, module in network.named_modules():
        if module not in inner and not type(module).__module__.startswith("torch.nn."):
            for key, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if value.ndim > 1 and not value.requires_grad and {value.shape[0]} == sizes:
                    prefixes.append((*filter(None, name.split(".")), key))
    return prefixes


def _unshared_nets(network: nn.Module) -> list[MultiAgentNetBase]:
    return [net for net in network.modules() if isinstance(net, MultiAgentNetBase) and not net.share_params]


def distribution_keys(network: ProbabilisticTensorDictSequential) -> list[NestedKey]:
    """The keys of the distribution's parameters that a policy writes, such as ``("agents", "loc")``."""
    return list(distribution_module(network).in_keys)


def distribution_parameters(
    network: ProbabilisticTensorDictSequential, parameters: TensorDictBase, inputs: TensorDictBase
) -> TensorDictBase:
    """The parameters of a policy's distribution at ``inputs``, both of batch size ``[*R]``; nothing else changes.

    The last dimension of a recurrent policy's inputs is time. Running statistics that it writes into buffers are lost.
    """
    parameters = parameters.apply(lambda value: value if value.requires_grad else value.clone())
    with set_recurrent_mode(True), other_parameters(network, parameters):
        return network.get_dist_params(inputs.copy()).select(*distribution_keys(network))


def build_distribution(network: ProbabilisticTensorDictSequential, dist_params: TensorDictBase) -> D.Distribution:
    """A policy's distribution; TorchRL's ``TanhNormal`` as the equal, faster ``BoundedTanhNormal``."""
    module = distribution_module(network)
    if module.distribution_class is not TanhNormal:
        return module.get_dist(dist_params)
    names = [path(name)[-1] for name in module.dist_keys]
    own = {name: dist_params.get(key) for name, key in zip(names, module.in_keys, strict=True)}
    return BoundedTanhNormal(**own, **module.distribution_kwargs)


def input_keys(network: ProbabilisticTensorDictSequential) -> list[NestedKey]:
    """The keys that a policy reads: its ``in_keys`` without the composite distribution's parameters that it writes."""
    written = [path(key) for key in network.out_keys]
    return [key for key in network.in_keys if not any(_is_inside(out, path(key)) for out in written)]


def is_composite(network: ProbabilisticTensorDictSequential) -> bool:
    """Whether a policy's actions have several parts: its distribution is a ``CompositeDistribution``."""
    return distribution_module(network).distribution_class is CompositeDistribution


def distribution_settings(network: ProbabilisticTensorDictSequential) -> Any:
    """The settings of a policy's distribution, such as its bounds, to be compared."""
    return setting_of(distribution_module(network).distribution_kwargs)


def distribution_module(network: ProbabilisticTensorDictSequential) -> ProbabilisticTensorDictModule:
    """The module that makes the policy's distribution; there must be one."""
    found = [module for module in network.modules() if isinstance(module, ProbabilisticTensorDictModule)]
    if len(found) != 1:
        raise ValueError(
            f"actor_network: the policy has {len(found)} probabilistic modules. Legal: one, at its end; a "
            f"CompositeDistribution for actions of several parts.\n{network}"
        )
    return found[0]


def single_agent_network(
    network: ProbabilisticTensorDictSequential, agent: int, n_agents: int
) -> ProbabilisticTensorDictSequential:
    """A copy of a multi-agent policy for one agent alone, which is evaluated at one agent's cost.

    It is to be called with parameters stacked ``[1, ...]`` and observations ``[*B, 1, F]``. Its own parameters are the
    original's, but for copies of those in TorchRL's multi-agent networks. Raises ValueError if the agents'
    networks read each other's observations.
    """
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    single = deepcopy(network, memo=shared)
    for module in single.modules():
        if isinstance(module, MultiAgentNetBase):
            if module.centralized:
                raise ValueError(
                    "agents are updated one at a time, but the policy is a MultiAgentNet with centralized=True: an "
                    "agent's actions depend on all observations. Use centralized=False."
                )
            module.n_agents = 1
        elif isinstance(module, AddStateIndependentNormalScale) and len(module.scale_shape) > 1:
            module.scale_shape = torch.Size([1, *module.scale_shape[1:]])
        elif isinstance(module, ProbabilisticTensorDictModule):
            module.distribution_class = _of_agent(module.distribution_class, agent, n_agents)
            module.distribution_kwargs = _of_agent(module.distribution_kwargs, agent, n_agents)
    return single


def slice_agents(
    parameters: TensorDictBase, agents: slice, prefixes: list[tuple[str, ...]], at: tuple[str, ...] = ()
) -> TensorDictBase:
    """Views on some agents' slices of what a policy has for each agent; other parameters and buffers stay whole.

    It has the trained parameters and the ``prefixes`` (:func:`stacked_prefixes`) for each agent. ``at`` is the key of
    ``parameters`` in the policy's.
    """
    if at in prefixes:
        return parameters.data[agents]
    sliced = {}
    for key, value in parameters.items():
        if is_tensor_collection(value):
            sliced[key] = slice_agents(value, agents, prefixes, (*at, key))
        else:
            sliced[key] = value.data[agents] if value.requires_grad or (*at, key) in prefixes else value.data
    return TensorDict(sliced)


def agent_parameters(
    network: ProbabilisticTensorDictSequential, parameters: TensorDictBase, agent: int
) -> TensorDictBase:
    """One agent's parameters, to be trained alone: leaves ``[1, ...]`` that share the memory of the stacked ones.

    An optimiser that writes into the leaves writes into the policy of all agents. The leaves do not hold the other
    agents' parameters, so that nothing moves those. A tied parameter is one leaf.
    """
    leaves = slice_agents(parameters, slice(agent, agent + 1), stacked_prefixes(network)).clone(False)
    by_parameter: dict[int, nn.Parameter] = {}
    for key, value in parameters.items(True, True):
        if value.requires_grad:
            leaf = by_parameter.setdefault(id(value), nn.Parameter(leaves.get(key)))
            leaves.set(key, leaf)
    return leaves


def _is_inside(key: tuple[str, ...], outer: tuple[str, ...]) -> bool:
    return len(key) > len(outer) and key[: len(outer)] == outer


def _of_agent(value: Any, agent: int, n_agents: int) -> Any:
    """An agent's part of bounds that differ between agents, ``[n_agents, A]``, as an action spec gives them.

    Also of those in a mapping (for the parts of a ``CompositeDistribution``), and in a ``functools.partial``.
    """
    if isinstance(value, Mapping):
        return {name: _of_agent(part, agent, n_agents) for name, part in value.items()}
    if isinstance(value, functools.partial):
        return functools.partial(value.func, *value.args, **_of_agent(value.keywords, agent, n_agents))
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim > 1 and value.shape[-2] == n_agents:
        return value[..., agent : agent + 1, :]
    rows = isinstance(value, (tuple, list)) and all(isinstance(row, (tuple, list)) for row in value)
    if rows and len(value) == n_agents:
        return value[agent : agent + 1]
    return value
