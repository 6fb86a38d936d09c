"""Checks of which agents' actions each parameter of a policy reaches.

The structure of a policy does not depend on its parameters or inputs. So it is tested on a few rows of a batch, in
evaluation mode, with parameters and inputs changed a little, so that no derivative is 0 by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor

from torchrl_trpo.objectives.attention import differentiable_attention
from torchrl_trpo.objectives.functional import in_evaluation
from torchrl_trpo.objectives.policy_network import (
    distribution_parameters,
    single_agent_network,
    slice_agents,
    stacked_prefixes,
)
from torchrl_trpo.objectives.policy_rows import PolicyRows
from torchrl_trpo.parallel.ranks import Ranks

_ROWS = 4


def check_stacked_agents(
    network: ProbabilisticTensorDictSequential, parameters: TensorDictBase, rows: PolicyRows
) -> None:
    """Raises ValueError if an agent's actions depend on more than its own slice of the stacked parameters."""
    agents = range(rows.agent_shape.numel())
    names, slopes = _slopes(network, parameters, rows)
    for agent in agents:
        others = [other for other in agents if other != agent]
        wrong = [name for name, slope in zip(names, slopes[agent], strict=True) if _any(slope[others])]
        if wrong:
            raise ValueError(
                f"trust_region='per_agent': the actions of agent {agent} depend on other agents' slices of {wrong}: "
                f"the leading dimension is as long as there are agents ({len(agents)}), but does not separate them. "
                "Legal: [n_agents, A] for a standard deviation, MultiAgentMLP(share_params=False) for networks, or "
                "trust_region='shared'."
            )


@torch.no_grad()
def check_agents_alone(
    network: ProbabilisticTensorDictSequential, parameters: TensorDictBase, rows: PolicyRows
) -> None:
    """Raises ValueError if an agent that is evaluated alone, with its slice of the parameters, acts differently."""
    few, agents = _few(rows), range(rows.agent_shape.numel())
    moved, prefixes = _moved_parameters(parameters), stacked_prefixes(network)
    with in_evaluation(network), differentiable_attention():
        together = distribution_parameters(network, moved, few.inputs)
        for agent in agents:
            single = single_agent_network(network, agent, len(agents))
            own = slice_agents(moved, slice(agent, agent + 1), prefixes)
            apart = distribution_parameters(single, own, few.of_agent(agent).inputs)
            expected = {key: _of_agent(value, agent, few) for key, value in together.items(True, True)}
            if not all(_close(apart.get(key), value) for key, value in expected.items()):
                raise ValueError(
                    f"agents are updated one at a time, but agent {agent} alone, with its slice of the parameters, "
                    "does not act as among all: something in the policy depends on other agents. Legal: layers that "
                    "act on each agent's features; parameters or buffers [n_agents, ...] for what differs between "
                    "agents, or a MultiAgentNetBase."
                )


def check_shared_agents(
    network: ProbabilisticTensorDictSequential, parameters: TensorDictBase, rows: PolicyRows
) -> None:
    """Raises ValueError if agents have one trust region, but share no parameter."""
    _, slopes = _slopes(network, parameters, rows)
    reached = torch.tensor([[_any(slope) for slope in own] for own in slopes])  # [n_agents, parameters]
    if (reached.sum(0) <= 1).all() and reached.any(1).all():
        raise ValueError(
            f"trust_region: each of {len(reached)} agents has parameters of its own, but not stacked on a leading "
            "agent dimension, as those of a list of networks are not. Legal: MultiAgentMLP(share_params=False), or a "
            "MultiAgentNetBase of your own, for a region each; where their networks differ, a group with a loss of its "
            "own for each agent; trust_region='shared' for one region of all."
        )


@torch.no_grad()
def common_entries(
    network: ProbabilisticTensorDictSequential,
    parameters: TensorDictBase,
    rows: PolicyRows,
    entries: Sequence[tuple[str, ...]],
    ranks: Ranks,
) -> list[tuple[str, ...]]:
    """Those of the agents' tensors, ``entries`` of the rows, of which an agent reads the others' part too.

    Such as observations that agents exchange, and a picture with as many channels as there are agents. It waits for the
    device once.
    """
    agents = range(rows.agent_shape.numel())
    if not entries or len(agents) == 1 or rows.log_prob.is_meta:
        return []
    few, moved = _few(rows), _moved_parameters(parameters)
    with in_evaluation(network), differentiable_attention():
        before = distribution_parameters(network, moved, few.inputs)

        def reaches_others(entry: tuple[str, ...], agent: int) -> Tensor:
            inputs, own = few.inputs.clone(), (*[slice(None)] * few.row_dims, agent)
            part = inputs.get(entry[1:])
            part[own] = _exchanged(part[own])
            after = distribution_parameters(network, moved, inputs)
            rest = [other for other in agents if other != agent]
            pairs = [(value, after.get(key)) for key, value in before.items(True, True)]
            return torch.stack([_differ(*(_of_agent(v, each, few) for v in pair)) for pair in pairs for each in rest])

        found = [torch.cat([reaches_others(entry, agent) for agent in agents]).any() for entry in entries]
    flags = ranks.max_(torch.stack(found).int()).tolist()
    return [entry for entry, is_common in zip(entries, flags, strict=True) if is_common]


@torch.enable_grad()
def _slopes(
    network: ProbabilisticTensorDictSequential, parameters: TensorDictBase, rows: PolicyRows
) -> tuple[list[NestedKey], list[tuple[Tensor, ...]]]:
    """The names of the parameters, and for each agent the derivative of its distribution by each of them."""
    few = _few(rows)
    leaves = _moved_parameters(parameters)
    names = [key for key, value in leaves.items(True, True) if value.requires_grad]
    trained = [leaves.get(name) for name in names]
    with in_evaluation(network), differentiable_attention():
        outputs = distribution_parameters(network, leaves, few.inputs)
    slopes = []
    for agent in range(few.agent_shape.numel()):
        own = [_of_agent(value, agent, few) for value in outputs.values(True, True) if value.requires_grad]
        directions = [2 + _waves(value) for value in own]
        slopes.append(torch.autograd.grad(own, trained, directions, retain_graph=True, materialize_grads=True))
    return names, slopes


def _few(rows: PolicyRows) -> PolicyRows:
    """A few rows, with inputs changed a little."""
    few = rows.take(slice(0, _ROWS))
    return replace(few, inputs=few.inputs.apply(_moved))


def _moved_parameters(parameters: TensorDictBase) -> TensorDictBase:
    """The parameters changed a little, as new leaves; those that are trained require gradients."""
    return parameters.apply(lambda value: _moved(value).requires_grad_(value.requires_grad))


def _moved(value: Tensor) -> Tensor:
    """The values, each changed by a different amount; no random number is drawn."""
    value = value.detach()
    return value + 0.1 * _waves(value) if value.is_floating_point() else value.clone()


def _exchanged(value: Tensor) -> Tensor:
    """Other values; of integers and flags, which may have no others, those of other rows."""
    return _moved(value).nan_to_num() if value.is_floating_point() else value.roll(1, 0)


def _waves(value: Tensor) -> Tensor:
    """Numbers between -1 and 1, different for each entry."""
    return torch.arange(1, 1 + value.numel(), device=value.device).to(value.dtype).sin().reshape(value.shape)


def _of_agent(value: Tensor, agent: int, rows: PolicyRows) -> Tensor:
    """An agent's part of an output ``[*R, n_agents, F]``; the whole output if the agents have it in common."""
    per_agent = value.ndim > rows.row_dims and value.shape[rows.row_dims] == rows.agent_shape.numel()
    return value.narrow(rows.row_dims, agent, 1) if per_agent else value


def _any(slope: Tensor) -> bool:
    """Whether any entry of a derivative is not 0; NaN and tensors on the meta device count as 0."""
    return not slope.is_meta and bool((slope.abs() > 0).any())


def _differ(value: Tensor, other: Tensor) -> Tensor:
    """Whether two evaluations differ by more than rounding, a scalar; NaN does not."""
    if not value.is_floating_point():
        return (value != other).any()
    tolerance = torch.finfo(value.dtype).eps ** 0.5
    return ((value - other).abs() > tolerance * (1 + value.abs())).any()


def _close(value: Tensor, expected: Tensor) -> bool:
    """Whether two evaluations are equal up to rounding."""
    if value.shape != expected.shape or value.is_meta:
        return value.is_meta
    if not value.is_floating_point():
        return torch.equal(value, expected)
    tolerance = torch.finfo(value.dtype).eps ** 0.5
    return torch.allclose(value, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
