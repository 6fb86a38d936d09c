"""Whether the parameters of a policy belong to its agents as its trust regions have it."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential

from torchrl_trpo.objectives.attention import differentiable_attention
from torchrl_trpo.objectives.policy_network import (
    distribution_parameters,
    single_agent_network,
    slice_agents,
    stacked_prefixes,
)
from torchrl_trpo.objectives.policy_rows import PolicyRows


def check_stacked_agents(
    network: ProbabilisticTensorDictSequential, parameters: TensorDictBase, rows: PolicyRows
) -> None:
    """Refuses a policy of which an agent's actions depend on more than its slice of the stacked parameters.

    Args:
        network: the policy, with parameters stacked on a leading agent dimension.
        parameters: its parameters and buffers.
        rows: a batch; its first row is looked at.

    Raises:
        ValueError: if an agent's actions depend on another one's slice.
    """
    row, agents = rows.take(slice(0, 1)), range(rows.agent_shape.numel())
    names, slopes = _slopes(network, parameters, row)
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


def check_agents_alone(
    network: ProbabilisticTensorDictSequential, parameters: TensorDictBase, rows: PolicyRows
) -> None:
    """Refuses a policy of which an agent, evaluated alone with its slice of the parameters, acts otherwise.

    Args:
        network: the policy, with parameters stacked on a leading agent dimension.
        parameters: its parameters and buffers.
        rows: a batch; its first row is looked at.

    Raises:
        ValueError: if it does, beyond rounding.
    """
    row, agents = rows.take(slice(0, 1)), range(rows.agent_shape.numel())
    together = distribution_parameters(network, parameters.data, row.inputs)
    for agent in agents:
        own = slice_agents(parameters, slice(agent, agent + 1), stacked_prefixes(network))
        single = single_agent_network(network, agent, len(agents))
        expected = {key: value.narrow(row.row_dims, agent, 1) for key, value in together.items(True, True)}
        apart = distribution_parameters(single, own, row.of_agent(agent).inputs)
        if not all(_close(apart.get(key), value) for key, value in expected.items()):
            raise ValueError(
                f"agents are updated one at a time, but agent {agent} alone, with its slice of the parameters, does "
                "not act as among all: the policy has something that depends on other agents, or a buffer with an "
                "entry for each. Legal: layers that act on each agent's features; what differs between agents as a "
                "parameter [n_agents, ...] or in a MultiAgentNetBase."
            )


def check_shared_agents(
    network: ProbabilisticTensorDictSequential, parameters: TensorDictBase, rows: PolicyRows
) -> None:
    """Refuses one trust region for agents that share nothing, unless it was asked for.

    Args:
        network: the policy.
        parameters: its parameters and buffers.
        rows: a batch; its first row is looked at.

    Raises:
        ValueError: if each parameter reaches the actions of one agent at most.
    """
    _, slopes = _slopes(network, parameters, rows.take(slice(0, 1)))
    reached = torch.tensor([[_any(slope) for slope in own] for own in slopes])  # [n_agents, parameters]
    if (reached.sum(0) <= 1).all() and reached.any(1).all():
        raise ValueError(
            f"trust_region: each of {len(reached)} agents has parameters of its own, but not stacked on a leading "
            "agent dimension, as those of a list of networks are not. Legal: MultiAgentMLP(share_params=False), or a "
            "MultiAgentNetBase of your own, for a region each; trust_region='shared' for one region of all."
        )


@torch.enable_grad()
def _slopes(
    network: ProbabilisticTensorDictSequential, parameters: TensorDictBase, row: PolicyRows
) -> tuple[list[NestedKey], list[tuple[torch.Tensor, ...]]]:
    """The names of the parameters, and for each agent a derivative of its distribution by each of them."""
    leaves = parameters.data.clone()
    names = [key for key, value in parameters.items(True, True) if value.requires_grad]
    trained = [leaves.get(name).requires_grad_() for name in names]
    with differentiable_attention():
        outputs = distribution_parameters(network, leaves, row.inputs)
    slopes = []
    for agent in range(row.agent_shape.numel()):
        own = [value.narrow(row.row_dims, agent, 1) for value in outputs.values(True, True) if value.requires_grad]
        directions = [torch.arange(value.numel()).to(value).sin().add(2).reshape(value.shape) for value in own]
        slopes.append(torch.autograd.grad(own, trained, directions, retain_graph=True, materialize_grads=True))
    return names, slopes


def _any(slope: torch.Tensor) -> bool:
    """Whether a derivative is not zero; one that is not finite says nothing, nor does the meta device."""
    return not slope.is_meta and bool((slope.abs() > 0).any())


def _close(value: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two evaluations are the same up to rounding."""
    if value.shape != expected.shape or value.is_meta:
        return value.is_meta
    return torch.allclose(value, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
