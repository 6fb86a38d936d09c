"""Policies and critics for the recipes, on TorchRL's multi-agent networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, OneHot, TensorSpec, Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import (
    MLP,
    ConvNet,
    IndependentNormal,
    MaskedCategorical,
    MaskedOneHotCategorical,
    MultiAgentConvNet,
    MultiAgentMLP,
    NormalParamExtractor,
    OneHotCategorical,
    PopArtValueNorm,
    ProbabilisticActor,
)

from torchrl_trpo import distributions
from torchrl_trpo.errors import SettingError, nearest
from torchrl_trpo.keys import GroupKeys, group_keys, in_group, next_key
from torchrl_trpo.networks.recurrent import CELLS, RecurrentModule

_SMALLEST_PICTURE = 7
"""The smallest picture of which two 3 by 3 convolutions with stride 2 leave something."""


def make_actor(
    env: EnvBase, keys: GroupKeys, *, share_params: bool, hidden: Sequence[int] = (128, 128), network: str = "mlp"
) -> ProbabilisticActor:
    """A decentralised policy: each agent acts on its own observation.

    Args:
        env: the environment; continuous actions get a ``BoundedTanhNormal``, or an ``IndependentNormal``
            without, discrete ones a ``Categorical`` or ``MultiCategorical``, masked where the environment gives an
            ``"action_mask"``.
        keys: the group that acts.

    Keyword Args:
        share_params: whether the agents share one network or have one each, stacked on a leading agent dimension.
        hidden: the sizes of the hidden layers.
        network: ``"mlp"``, ``"gru"`` or ``"lstm"`` (the first hidden layer is recurrent). Images ``[C, H, W]`` are read
            by a convolutional network first.

    Returns:
        The policy, from ``[*B, n_agents, F]`` to actions ``[*B, n_agents, A]`` with their log-probability.

    Raises:
        SettingError: if it has no network for the observation or no distribution for the action, or ``network`` and
            ``hidden`` do not fit.
    """
    spec = env.full_action_spec_unbatched[keys.action]
    distribution, kwargs, names, n_outputs = _distribution(spec, keys.agent_shape, masked=keys.action_mask is not None)
    if keys.action_mask is not None:
        legal = (*keys.agent_shape, n_outputs)
        shape = env.full_observation_spec_unbatched[keys.action_mask].shape
        if "logits" not in names or shape != legal:
            raise SettingError(
                f"env: {keys.action_mask!r} has shape {tuple(shape)}, for the action {type(spec).__name__} "
                f"{tuple(spec.shape)}. Legal: {legal} for discrete actions, no mask for continuous ones."
            )
    last = [] if "logits" in names else [NormalParamExtractor()]
    outputs = [in_group(keys.group, name) for name in names]
    settings: dict[str, Any] = {"share_params": share_params, "hidden": hidden, "network": network}
    module = _network(env, keys, keys.observation, outputs, n_outputs, **settings, name="policy", last=last)
    parameters = dict(zip(names, outputs, strict=True))
    if keys.action_mask is not None:
        parameters["mask"] = keys.action_mask
    return ProbabilisticActor(
        module,
        in_keys=parameters,
        out_keys=[keys.action],
        spec=Composite({keys.action: spec}),
        distribution_class=distribution,
        distribution_kwargs=kwargs,
        return_log_prob=True,
        log_prob_keys=[keys.log_prob],
    )


def make_critic(
    env: EnvBase, keys: GroupKeys, *, share_params: bool, hidden: Sequence[int] = (128, 128), network: str = "mlp"
) -> TensorDictModuleBase:
    """Each agent's own critic ``V(o_i)``.

    Args:
        env: the environment.
        keys: the group whose critic it is.

    Keyword Args:
        share_params: whether the agents share one network.
        hidden: the sizes of the hidden layers.
        network: as for :func:`make_actor`.

    Returns:
        The critic, from observations ``[*B, n_agents, F]`` to values ``[*B, n_agents, 1]``.
    """
    settings: dict[str, Any] = {"share_params": share_params, "hidden": hidden, "network": network}
    return _network(env, keys, keys.observation, [keys.value], 1, **settings, name="critic")


def make_central_critic(
    env: EnvBase,
    keys: GroupKeys,
    *,
    inputs: str = "observations",
    agent_one_hot: bool = False,
    others_actions: bool = False,
    hidden: Sequence[int] = (128, 128),
    network: str = "mlp",
) -> TensorDictModuleBase:
    """The centralised critic ``V(s)`` or ``V(s, u^-i)`` over what ``CentralCriticValueEstimator`` pools.

    Args:
        env: the environment.
        keys: the group whose critic it is.

    Keyword Args:
        inputs: ``"observations"`` of all agents of all groups, ``"state"`` of the environment, or ``"both"``.
        agent_one_hot: whether the agent's index is part of the input, so that agents' values may differ.
        others_actions: whether the others' actions are part of the input.
        hidden: the sizes of the hidden layers.
        network: as for :func:`make_actor`.

    Returns:
        The critic, from the pooled input ``[*B, n_agents, F]`` to values ``[*B, n_agents, 1]``.
    """
    observations, actions = env.full_observation_spec_unbatched, env.full_action_spec_unbatched
    size = keys.n_agents if agent_one_hot else 0
    for other in group_keys(env):
        size += observations[other.observation].shape.numel() if inputs != "state" else 0
        if others_actions:
            action = actions[other.action]
            action = action.to_one_hot_spec() if isinstance(action, Categorical) else action  # MultiCategorical too
            size += (other.n_agents - (other.group == keys.group)) * action.shape[-1]
    size += observations["state"].shape.numel() if inputs != "observations" else 0
    differ = agent_one_hot or others_actions
    if network != "mlp" or differ:
        settings: dict[str, Any] = {"share_params": True, "hidden": hidden, "network": network}
        return _network(env, keys, keys.central, [keys.value], 1, **settings, name="critic", size=size)
    value = MLP(size, 1, num_cells=list(hidden), activation_class=nn.Tanh, device=env.device)
    return TensorDictModule(TeamCritic(value), in_keys=[keys.central], out_keys=[keys.value])


def make_value_norm(popart: bool, device: torch.device) -> PopArtValueNorm | None:
    """Makes the running statistics that normalise the critic's values.

    Args:
        popart: whether values are normalised.
        device: where the statistics are.

    Returns:
        The statistics, or None.
    """
    return PopArtValueNorm(device=device) if popart else None


class TeamCritic(nn.Module):
    """Evaluates a value network once for the whole team, for a pooled input that is the same for all agents.

    Args:
        network: from ``[*B, F]`` to ``[*B, 1]``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, central: torch.Tensor) -> torch.Tensor:
        """The team's value, repeated for each agent.

        Args:
            central: the pooled input, ``[*B, n_agents, F]``.

        Returns:
            The values, ``[*B, n_agents, 1]``.
        """
        value = self.network(central[..., 0, :])
        return value.unsqueeze(-2).expand(*central.shape[:-1], value.shape[-1])


def _distribution(
    spec: TensorSpec, agent_shape: tuple[int, ...], *, masked: bool
) -> tuple[type[Distribution] | partial, dict[str, Any], list[str], int]:
    """The distribution for an action space, its constants, its parameters, and how many numbers they are."""
    is_vector = spec.ndim == len(agent_shape) + 1  # an agent's action
    if type(spec) is Categorical and spec.ndim == len(agent_shape):
        return MaskedCategorical if masked else torch.distributions.Categorical, {}, ["logits"], spec.n
    if isinstance(spec, MultiCategorical) and is_vector:
        first, *others = spec.nvec.reshape(-1, spec.shape[-1]).tolist()
        if all(nvec == first for nvec in others):
            return distributions.MultiCategorical, {"nvec": first}, ["logits"], sum(first)
    if type(spec) is OneHot and is_vector:
        return MaskedOneHotCategorical if masked else OneHotCategorical, {}, ["logits"], spec.shape[-1]
    if isinstance(spec, (Bounded, Unbounded)) and spec.dtype.is_floating_point and is_vector:
        bounds = {"low": spec.space.low, "high": spec.space.high}
        bounded = torch.stack([bound.abs() < 1e30 for bound in bounds.values()])  # no bound may be inf, or the largest
        if bounded.all():
            constants = {name: _constant(bound) for name, bound in bounds.items()}
            return distributions.BoundedTanhNormal, constants, ["loc", "scale"], 2 * spec.shape[-1]
        if not bounded.any():
            return IndependentNormal, {}, ["loc", "scale"], 2 * spec.shape[-1]
    raise SettingError(
        f"the recipes have no policy for the action space {type(spec).__name__} {tuple(spec.shape)} of {spec.space}. "
        f"Legal: Categorical of shape {[*agent_shape]}; OneHot, MultiCategorical (the same for all agents) and "
        f"continuous actions (all bounds or none) of shape [{', '.join([*map(str, agent_shape), 'A'])}]. Change the "
        "space with a transform of TorchRL; agents that differ are groups of their own."
    )


def _constant(bound: Tensor) -> float | tuple[Any, ...]:
    """A bound as numbers, so that no tensor must be read later; one number if it is the same for all actions."""

    def of_list(numbers: Any) -> Any:
        return tuple(map(of_list, numbers)) if isinstance(numbers, list) else numbers

    distinct = bound.unique().tolist()
    return distinct[0] if len(distinct) == 1 else of_list(bound.tolist())


def _network(
    env: EnvBase,
    keys: GroupKeys,
    in_key: NestedKey,
    out_keys: list[NestedKey],
    n_outputs: int,
    *,
    share_params: bool,
    hidden: Sequence[int],
    network: str,
    name: str,
    last: Sequence[nn.Module] = (),
    size: int | None = None,
) -> TensorDictModuleBase:
    """A network of each agent's own input, ``[*B, n_agents, F]`` to ``[*B, n_agents, n_outputs]``."""
    agents: dict[str, Any] = {"n_agents": keys.n_agents, "centralized": False, "share_params": share_params}
    hidden = list(hidden)
    if network not in (legal := ("mlp", *CELLS)):
        raise SettingError(f"network: {network!r}. {nearest(network, legal)}")
    if network != "mlp" and not hidden:
        raise SettingError(
            f"hidden: {hidden}. Legal with network={network!r}: one size or more, the first is recurrent."
        )
    modules: list[TensorDictModuleBase] = []
    shape = env.full_observation_spec_unbatched[in_key].shape[len(keys.agent_shape) :] if size is None else (size,)
    if len(shape) not in (1, 3) or (len(shape) == 3 and min(shape[1:]) < _SMALLEST_PICTURE):
        raise SettingError(
            f"the recipes have no network for the observation {in_key!r} of shape {tuple(shape)}. Legal: (F,), or "
            f"pictures (C, H, W) of at least {_SMALLEST_PICTURE} by {_SMALLEST_PICTURE}; use TorchRL's "
            "FlattenObservation, or a one-hot of an index."
        )
    if len(shape) == 3:
        pixels = in_group(keys.group, f"{name}_pixels")
        images = _convolutions(env, keys, shape, agents)
        modules.append(TensorDictModule(images, in_keys=[in_key], out_keys=[pixels]))
        example = torch.zeros(*keys.agent_shape, *shape, device=env.device)
        shape, in_key = images(example).shape[-1:], pixels
    n_inputs = shape[-1]
    if network != "mlp":
        features, state = in_group(keys.group, f"{name}_features"), in_group(keys.group, f"{name}_state")
        recurrent = RecurrentModule(
            n_inputs,
            hidden[0],
            cell=network,
            in_keys=[in_key, state, "is_init"],
            out_keys=[features, next_key(state)],
            n_agents=None if keys.group is None else keys.n_agents,
            share_params=share_params,
            device=env.device,
        )
        modules.append(recurrent)
        n_inputs, in_key, hidden = hidden[0], features, hidden[1:]
    layers: dict[str, Any] = {"num_cells": hidden, "depth": len(hidden), "activation_class": nn.Tanh}
    layers |= {"device": env.device} if keys.group is None else {"device": env.device, **agents}
    head: nn.Module = (MLP if keys.group is None else MultiAgentMLP)(n_inputs, n_outputs, **layers)
    head = nn.Sequential(head, *last) if last else head
    modules.append(TensorDictModule(head, in_keys=[in_key], out_keys=out_keys))
    return modules[0] if len(modules) == 1 else TensorDictSequential(*modules)


def _convolutions(env: EnvBase, keys: GroupKeys, shape: Sequence[int], agents: Mapping[str, Any]) -> nn.Module:
    """A network that reads pictures ``[*B, n_agents, C, H, W]``."""
    layers: dict[str, Any] = {"num_cells": [16, 32], "kernel_sizes": 3, "strides": 2, "device": env.device}
    if keys.group is None:
        return ConvNet(in_features=shape[0], **layers)
    return MultiAgentConvNet(in_features=shape[0], **layers, **agents)
