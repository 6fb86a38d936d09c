"""Cooperative games that are solved exactly: no sampling, no estimate.

A batch has one row for each state and joint action ``(s, u)``, ``N`` in all, and the advantage of a row is
``N · ρ(s) · π_k(u|s) · A(s, u)``, with ``ρ`` the discounted visits to the states. So the mean of ``M · ratio ·
advantage`` over the rows, which is what the objectives compute, is ``Σ_s ρ(s) E_{u~π_k}[M · ratio · A(s, u)]`` itself.
A policy's KL does not depend on the action taken: its mean over the rows is the one over states, each counted once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.modules import MultiAgentMLP

from tests.cases import ACTION, LOG_PROB, OBSERVATION, make_policy


@dataclass(frozen=True)
class Game:
    """One reward for the team, ``S`` states and ``U = n_actions ** n_agents`` joint actions.

    Attributes:
        n_agents: the number of agents.
        n_actions: how many actions each of them has.
        rewards: ``[S, U]``; the last agent's action runs fastest.
        transitions: the probabilities of the next state, ``[S, U, S]``.
        start: the probabilities of the first state, ``[S]``.
        gamma: the discount; 0 for games of one step.
    """

    n_agents: int
    n_actions: int
    rewards: Tensor
    transitions: Tensor
    start: Tensor
    gamma: float

    @property
    def n_states(self) -> int:
        return self.rewards.shape[0]

    @property
    def joint_actions(self) -> Tensor:
        """The joint actions, ``[U, n_agents]``."""
        return torch.cartesian_prod(*[torch.arange(self.n_actions)] * self.n_agents).reshape(-1, self.n_agents)

    def observations(self) -> Tensor:
        """What the agents see: the state, one-hot, ``[S, n_agents, S]``."""
        return torch.eye(self.n_states, dtype=torch.float64).unsqueeze(1).expand(-1, self.n_agents, -1)


def matrix_game(payoffs: Tensor) -> Game:
    """A game of one step, with a payoff for each joint action, ``[n_actions] * n_agents``."""
    rewards = payoffs.double().reshape(1, -1)
    ones = torch.ones(1, dtype=torch.float64)
    return Game(payoffs.ndim, payoffs.shape[0], rewards, ones.expand(*rewards.shape, 1), ones, 0.0)


def random_matrix_game(n_agents: int, n_actions: int) -> Game:
    """Payoffs of any scale, drawn from torch's generator."""
    scale = 10 ** (6 * torch.rand((), dtype=torch.float64) - 3)
    return matrix_game(scale * torch.randn([n_actions] * n_agents, dtype=torch.float64))


def random_markov_game(n_agents: int, n_actions: int, n_states: int, gamma: float) -> Game:
    """A game with states, drawn from torch's generator."""
    n_joint = n_actions**n_agents
    return Game(
        n_agents,
        n_actions,
        rewards=torch.randn(n_states, n_joint, dtype=torch.float64),
        transitions=torch.randn(n_states, n_joint, n_states, dtype=torch.float64).mul(2).softmax(-1),
        start=torch.randn(n_states, dtype=torch.float64).softmax(-1),
        gamma=gamma,
    )


def proposition_1(n_agents: int) -> Game:
    """The game of Kuba et al. 2022 (arXiv:2109.11251), proposition 1.

    It pays 1 if the first half of the agents plays 0 and the second half plays 1, else nothing. Agents that share a
    policy reach ``2 ** -n_agents`` at most.
    """
    payoffs = torch.zeros([2] * n_agents)
    payoffs[(0,) * (n_agents // 2) + (1,) * (n_agents // 2)] = 1.0
    return matrix_game(payoffs)


def dilemma_of_one_mover() -> Game:
    """Two agents, of whom one should move: 1 if one does, -10 if both do, nothing if none does."""
    return matrix_game(torch.tensor([[0.0, 1.0], [1.0, -10.0]]))


def tabular_policy(game: Game, *, share_params: bool = False):
    """A softmax over actions for each state, one for each agent or the same for all."""
    layers = {"centralized": False, "share_params": share_params, "num_cells": [], "depth": 0}
    net = MultiAgentMLP(game.n_states, game.n_actions, n_agents=game.n_agents, **layers).double()
    for parameter in net.parameters():
        parameter.data.normal_()
    return make_policy(net, "categorical", validate_args=False)


@torch.no_grad()
def action_probabilities(game: Game, actor) -> Tensor:
    """What each agent does in each state, ``[S, n_agents, n_actions]``."""
    return actor.get_dist(TensorDict({OBSERVATION: game.observations()}, [game.n_states])).probs


def set_action_probabilities(game: Game, actor, probabilities: Tensor) -> None:
    """Sets what the agents do in a game without states, ``[n_agents, n_actions]``."""
    for parameter in actor.parameters():
        parameter.data.zero_()
        if parameter.ndim == 2:  # the biases of unshared layers
            parameter.data.copy_(probabilities.log())


@dataclass(frozen=True)
class Solution:
    """A policy's exact figures.

    Attributes:
        joint: the probabilities of the joint actions, ``[S, U]``.
        visits: the discounted visits to the states, ``[S]``; they sum to ``1 / (1 - gamma)``.
        advantage: ``A(s, u)``, ``[S, U]``.
        expected_return: ``J``.
    """

    joint: Tensor
    visits: Tensor
    advantage: Tensor
    expected_return: float


def solve(game: Game, probabilities: Tensor) -> Solution:
    """Evaluates a policy by linear algebra.

    Args:
        game: the game.
        probabilities: what each agent does, ``[S, n_agents, n_actions]``.
    """
    actions = game.joint_actions
    joint = math.prod(probabilities[:, agent, actions[:, agent]] for agent in range(game.n_agents))
    moves = torch.einsum("su,sut->st", joint, game.transitions)
    system = torch.eye(game.n_states, dtype=torch.float64) - game.gamma * moves
    values = torch.linalg.solve(system, (joint * game.rewards).sum(-1))
    action_values = game.rewards + game.gamma * game.transitions @ values
    return Solution(
        joint=joint,
        visits=torch.linalg.solve(system.T, game.start),
        advantage=action_values - values.unsqueeze(-1),
        expected_return=float(game.start @ values),
    )


def expected_return(game: Game, actor) -> float:
    """The policy's exact return ``J``."""
    return solve(game, action_probabilities(game, actor)).expected_return


def exact_batch(game: Game, actor) -> TensorDict:
    """The batch whose means are the exact expectations under the policy, ``[N]``."""
    solution, actions = solve(game, action_probabilities(game, actor)), game.joint_actions
    n_rows = game.rewards.numel()
    weighted = n_rows * solution.visits.unsqueeze(-1) * solution.joint * solution.advantage
    data = TensorDict(
        {
            OBSERVATION: game.observations().repeat_interleave(len(actions), 0),
            ACTION: actions.repeat(game.n_states, 1),
            "advantage": weighted.reshape(-1, 1, 1).expand(-1, game.n_agents, 1),
        },
        batch_size=[n_rows],
    )
    with torch.no_grad():
        data[LOG_PROB] = actor.get_dist(data).log_prob(data[ACTION])
    return data
