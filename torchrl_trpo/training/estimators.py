"""The recipes' value estimators: made with their critics, given to losses, and asked for advantages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.objectives import PPOLoss

from torchrl_trpo.keys import GroupKeys, group_keys
from torchrl_trpo.networks import make_central_critic, make_critic, make_value_norm
from torchrl_trpo.objectives import AgentGAE, CentralCriticValueEstimator
from torchrl_trpo.objectives.loss_groups import by_group, check_own_entries
from torchrl_trpo.objectives.policy_update import run_value_estimator

_Loss = TypeVar("_Loss", bound=PPOLoss)


def own_critic_estimator(
    env: EnvBase,
    keys: GroupKeys,
    *,
    gamma: float,
    lmbda: float,
    share_params: bool = True,
    hidden: Sequence[int] = (128, 128),
    network: str = "mlp",
    value_norm: bool = False,
) -> AgentGAE:
    """Makes a critic ``V(o_i)`` of each agent's own observation, and the estimator that evaluates it.

    Args:
        env: the environment.
        keys: the group whose critic it is.

    Keyword Args:
        gamma: the discount.
        lmbda: GAE's λ.
        share_params: whether the agents share one network.
        hidden: the sizes of the hidden layers.
        network: ``"mlp"``, ``"gru"`` or ``"lstm"``.
        value_norm: whether the critic outputs values normalised by PopArt.

    Returns:
        The estimator. A loss takes its ``value_network`` and its ``value_norm``, see :func:`attach_estimator`.
    """
    return AgentGAE(
        gamma=gamma,
        lmbda=lmbda,
        value_network=make_critic(env, keys, share_params=share_params, hidden=hidden, network=network),
        value_norm=make_value_norm(value_norm, env.device),
        mask_key=keys.mask or "auto",
        other_mask_keys=[other.mask for other in group_keys(env) if other.mask],
        device=env.device,
    )


def central_critic_estimator(
    env: EnvBase,
    keys: GroupKeys,
    *,
    gamma: float,
    lmbda: float,
    inputs: Literal["observations", "state", "both"] = "observations",
    agent_one_hot: bool = False,
    others_actions_of: TensorDictModuleBase | None = None,
    hidden: Sequence[int] = (128, 128),
    network: str = "mlp",
    value_norm: bool = False,
    team_reward: Literal["mean", "sum"] | None = None,
) -> CentralCriticValueEstimator:
    """Makes a centralised critic ``V(s)`` or ``V(s, u^-i)``, and the estimator that pools its input and evaluates it.

    Args:
        env: the environment; its observations, rewards and masks of all groups are read.
        keys: the group whose critic it is.

    Keyword Args:
        gamma: the discount.
        lmbda: GAE's λ.
        inputs: what the critic reads: the observations of all agents, the environment's state, or both.
        agent_one_hot: whether the agent's index is an input, so that agents' values may differ.
        others_actions_of: the policy of all groups, if the other agents' actions are inputs. Default: they are not.
        hidden: the sizes of the hidden layers.
        network: ``"mlp"``, ``"gru"`` or ``"lstm"``.
        value_norm: whether the critic outputs values normalised by PopArt.
        team_reward: replaces the rewards of all agents of all groups by their mean or sum. Default: rewards as they
            are.

    Returns:
        The estimator. A loss takes its ``value_network`` and its ``value_norm``, see :func:`attach_estimator`.
    """
    groups, others_actions = group_keys(env), others_actions_of is not None
    critic = make_central_critic(
        env,
        keys,
        inputs=inputs,
        agent_one_hot=agent_one_hot,
        others_actions=others_actions,
        hidden=hidden,
        network=network,
    )
    return CentralCriticValueEstimator(
        gamma=gamma,
        lmbda=lmbda,
        value_network=critic,
        observation_keys=[other.observation for other in groups] if inputs != "state" else [],
        central_key=keys.central,
        state_key="state" if inputs != "observations" else None,
        n_agents=keys.n_agents,
        action_keys=[other.action for other in groups] if others_actions else None,
        actor_network=others_actions_of,
        agent_one_hot=agent_one_hot,
        team_reward=team_reward,
        reward_keys=[other.reward for other in groups],
        value_norm=make_value_norm(value_norm, env.device),
        mask_key=keys.mask or "auto",
        other_mask_keys=[other.mask for other in groups if other.mask],
        device=env.device,
    )


def attach_estimator(loss: _Loss, estimator: AgentGAE, keys: GroupKeys) -> _Loss:
    """Gives a loss its value estimator, and both the keys and the mask of their group.

    Args:
        loss: a loss whose critic is the estimator's ``value_network``.
        estimator: the estimator.
        keys: the group.

    Returns:
        The loss.
    """
    loss.make_value_estimator(estimator)
    loss.set_keys(**keys.loss_keys)
    loss.loss_mask_key = keys.mask or "auto"
    return loss


@torch.no_grad()
def estimate_advantages(losses: Iterable[PPOLoss], data: TensorDictBase) -> None:
    """Writes values, advantages and value targets into a batch, with each loss's value estimator.

    It is an error if two losses write the same entry: one would train on the other's advantages.

    Args:
        losses: the losses of the groups.
        data: the batch, ``[*B, T]``.
    """
    groups = by_group(losses)
    check_own_entries(groups)
    for loss in groups.values():
        run_value_estimator(loss, data)
