"""A critic's values at ``t`` and at ``t+1``, and the recurrent states that the latter are computed from."""

from __future__ import annotations

from typing import Any, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchrl.modules import set_recurrent_mode

from torchrl_trpo.keys import next_key, reads_init
from torchrl_trpo.objectives.functional import other_parameters


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """The layers of a network that may normalise by the statistics of the rows that it is called with."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def can_share(
    network: TensorDictModuleBase,
    data: TensorDictBase,
    params: TensorDictBase | None,
    next_params: TensorDictBase | None,
) -> bool:
    """Whether :func:`shared_values` can evaluate the critic.

    Not a recurrent one, nor one with other parameters at ``t+1``, nor one whose values of a row are by its batch. And
    only on a CPU: on another device, the rows that are left could not be counted without a wait.
    """
    if any(module.training for module in batch_norms(network)):
        return False
    values = [data.get(key, None) for name in network.in_keys for key in (name, next_key(name))]
    on_cpu = all(value is not None and value.device.type == "cpu" for value in values)
    return on_cpu and not reads_init(network) and _is_same(params, next_params) and not torch.compiler.is_compiling()


def shared_values(
    network: TensorDictModuleBase,
    data: TensorDictBase,
    params: TensorDictBase | None,
    *,
    value_key: NestedKey,
    time_dim: int,
) -> tuple[Tensor, Tensor] | None:
    """The values at ``t`` and ``t+1``, with one value for both where the following step has the same inputs.

    In a rollout, these are all steps but those that end an episode, and the last.

    Args:
        network: the critic.
        data: the data, ``[*B, T]``.
        params: the critic's parameters; None for its own.

    Keyword Args:
        value_key: the value's key in what the critic writes.
        time_dim: the dimension of ``T``.

    Returns:
        Both values, ``[*B, T, n_agents, 1]`` (without agents ``[*B, T, 1]``); None if a few rows that are evaluated
        alone have others than among all, as those of a critic that looks along ``T``.
    """
    now = data.select(*network.in_keys)
    following = cast("TensorDictBase", data.get("next")).select(*network.in_keys)
    is_new = torch.zeros(data.batch_size, dtype=torch.bool)
    for key in network.in_keys:
        is_new |= (following.get(key) != now.get(key).roll(-1, time_dim)).reshape(*data.batch_size, -1).any(-1)
    is_new.narrow(time_dim, -1, 1).fill_(True)
    with other_parameters(network, params):
        value = network(now).get(value_key)
        few = torch.linspace(0, now.numel() - 1, 4).long()
        with torch.no_grad():
            alone = network(now.reshape(-1)[few]).get(value_key)
        if not torch.allclose(alone, value.flatten(0, now.ndim - 1)[few], rtol=1e-3, atol=1e-5, equal_nan=True):
            return None
        next_value = value.roll(-1, time_dim)
        next_value[is_new] = network(following[is_new]).get(value_key)
    return value, next_value.detach()


def add_states(
    network: TensorDictModuleBase, data: TensorDictBase, params: TensorDictBase | None, *, time_dim: int
) -> None:
    """Adds a recurrent critic's states after each step, from which its values at ``t+1`` are computed.

    Args:
        network: the critic.
        data: the data, ``[*B, T]``; written to.
        params: the critic's parameters; None for its own.

    Keyword Args:
        time_dim: the dimension of ``T``.
    """
    carried = [key for key in network.in_keys if next_key(key) in network.out_keys]
    before: TensorDictBase = TensorDict()
    steps: list[TensorDictBase] = []
    with torch.no_grad(), other_parameters(network, params), set_recurrent_mode(False):
        for step in data.select(*network.in_keys, strict=False).unbind(time_dim):
            if not steps and any(step.get(key, None) is None for key in carried):
                step.set("is_init", torch.ones_like(step.get("is_init")))  # from zeros, as sequences do
            for key in carried:
                state, recorded = before.get(next_key(key), None), step.get(key, None)
                if state is not None:
                    begins = step.get("is_init").reshape(*step.batch_size, *[1] * (state.ndim - step.batch_dims))
                    fresh = torch.zeros_like(state) if recorded is None else recorded
                    step.set(key, torch.where(begins, fresh, state))
            before = network(step)
            steps.append(before.get("next").select(*carried))
    for key, state in cast("TensorDict", torch.stack(steps, time_dim)).items(True, True):
        data.set(next_key(key), state)
        if data.get(key, None) is None:
            data.set(key, torch.zeros_like(state))
    data.set(("next", "is_init"), torch.zeros_like(data.get("is_init")))


def _is_same(params: TensorDictBase | None, others: TensorDictBase | None) -> bool:
    """Whether two sets of parameters are the same tensors."""
    if params is None or others is None:
        return params is others
    pairs: Any = zip(params.values(True, True), others.values(True, True), strict=True)
    return all(one.data_ptr() == other.data_ptr() for one, other in pairs)
