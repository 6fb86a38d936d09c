"""Policies and critics for the recipes, on TorchRL's multi-agent networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.data import Bounded
from torchrl.envs import EnvBase
from torchrl.modules import (
    MLP,
    MultiAgentMLP,
    NormalParamExtractor,
    ProbabilisticActor,
    TanhNormal,
)

from torchrl_trpo.envs import GROUP

OBSERVATION: NestedKey = (GROUP, "observation")
ACTION: NestedKey = (GROUP, "action")
LOG_PROB: NestedKey = (GROUP, "action_log_prob")
REWARD: NestedKey = (GROUP, "reward")
VALUE: NestedKey = (GROUP, "state_value")
CENTRAL: NestedKey = (GROUP, "central_observation")


def make_actor(env: EnvBase, *, share_params: bool, hidden: Sequence[int] = (128, 128)) -> ProbabilisticActor:
    """A decentralised policy: each agent acts on its own observation.

    Args:
        env: the environment; continuous actions get a ``TanhNormal`` within their bounds, discrete ones a
            ``Categorical``.

    Keyword Args:
        share_params: whether the agents share one network or have one each, stacked on a leading agent dimension.
        hidden: the sizes of the hidden layers.

    Returns:
        The policy, from ``[*B, n_agents, F]`` to actions ``[*B, n_agents, A]`` with their log-probability.
    """
    action_spec = env.full_action_spec_unbatched[ACTION]
    continuous = isinstance(action_spec, Bounded)
    n_outputs = 2 * action_spec.shape[-1] if continuous else action_spec.space.n
    network = _decentralised(env, n_outputs, share_params, hidden)
    if continuous:
        network = nn.Sequential(network, NormalParamExtractor())
    names = ["loc", "scale"] if continuous else ["logits"]
    keys: list[NestedKey] = [(GROUP, name) for name in names]
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=[OBSERVATION], out_keys=keys),
        in_keys=keys,
        out_keys=[ACTION],
        spec=env.action_spec_unbatched,
        distribution_class=TanhNormal if continuous else Categorical,
        distribution_kwargs={"low": action_spec.space.low, "high": action_spec.space.high} if continuous else {},
        return_log_prob=True,
    )


def make_critic(env: EnvBase, *, share_params: bool, hidden: Sequence[int] = (128, 128)) -> TensorDictModule:
    """Each agent's own critic ``V(o_i)``.

    Args:
        env: the environment.

    Keyword Args:
        share_params: whether the agents share one network.
        hidden: the sizes of the hidden layers.

    Returns:
        The critic, from observations ``[*B, n_agents, F]`` to values ``[*B, n_agents, 1]``.
    """
    network = _decentralised(env, 1, share_params, hidden)
    return TensorDictModule(network, in_keys=[OBSERVATION], out_keys=[VALUE])


def make_central_critic(
    env: EnvBase, *, agent_one_hot: bool, others_actions: bool = False, hidden: Sequence[int] = (128, 128)
) -> TensorDictModule:
    """The centralised critic ``V(s)`` or ``V(s, u^-i)`` over what ``CentralCriticValueEstimator`` pools.

    Args:
        env: the environment.

    Keyword Args:
        agent_one_hot: whether the agent's index is part of the input, so that agents' values may differ.
        others_actions: whether the others' actions are part of the input.
        hidden: the sizes of the hidden layers.

    Returns:
        The critic, from the pooled input ``[*B, n_agents, F]`` to values ``[*B, n_agents, 1]``.
    """
    n_agents, n_inputs = env.full_observation_spec_unbatched[OBSERVATION].shape
    size = n_agents * n_inputs
    size += n_agents if agent_one_hot else 0
    if others_actions:
        action_shape = env.full_action_spec_unbatched[ACTION].shape
        size += (n_agents - 1) * (action_shape[-1] if len(action_shape) > 1 else 1)
    network: nn.Module = MLP(
        in_features=size, out_features=1, num_cells=list(hidden), activation_class=nn.Tanh, device=env.device
    )
    if not (agent_one_hot or others_actions):
        network = TeamCritic(network)
    return TensorDictModule(network, in_keys=[CENTRAL], out_keys=[VALUE])


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


def _decentralised(env: EnvBase, n_outputs: int, share_params: bool, hidden: Sequence[int]) -> nn.Module:
    """A network of each agent's own observation, ``[*B, n_agents, F]`` to ``[*B, n_agents, n_outputs]``."""
    n_agents, n_inputs = env.full_observation_spec_unbatched[OBSERVATION].shape
    return MultiAgentMLP(
        n_inputs,
        n_outputs,
        n_agents=n_agents,
        centralized=False,
        share_params=share_params,
        num_cells=list(hidden),
        depth=len(hidden),
        activation_class=nn.Tanh,
        device=env.device,
    )
