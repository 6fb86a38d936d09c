"""HATRPO's guarantee, in numbers that are exact: no update lowers the return of the team."""

from __future__ import annotations

import pytest
import torch

from tests.cases import textbook_kl
from tests.games import (
    action_probabilities,
    dilemma_of_one_mover,
    exact_batch,
    expected_return,
    proposition_1,
    random_markov_game,
    random_matrix_game,
    set_action_probabilities,
    solve,
    tabular_policy,
)
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss

GAMES, UPDATES = {2: 10, 3: 7, 4: 4}, 8
"""Games by the number of agents: with 3 orders, 3 numbers of actions and 8 updates of each, 1512 updates."""
FEW = [(n, order, 4) for n, order in ((2, "random"), (3, "random"), (3, "greedy"))]
ALL = [(n, order, GAMES[n]) for n in GAMES for order in ("random", "fixed", "greedy")]


def hatrpo(actor, *, agent_order="random", **settings):
    loss = TRPOLoss(actor, entropy_bonus=False)
    return TrustRegionUpdater(HATRPOSequentialObjective(loss, agent_order=agent_order), **settings)


def matrpo(actor, **settings):
    """All agents at once, on the same advantage of the joint action."""
    return TrustRegionUpdater(TRPOLoss(actor, entropy_bonus=False), **settings)


@pytest.mark.parametrize(
    ("n_agents", "agent_order", "games"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FEW)],
)
def test_the_return_never_falls(n_agents, agent_order, games):
    """And it rises by the sum of what the agents' surrogates say (Kuba et al. 2022, lemma 1), at any step length."""
    accepted = updates = 0
    for seed in range(games):
        for n_actions in (2, 3, 4):
            torch.manual_seed(seed)
            game = random_matrix_game(n_agents, n_actions)
            actor = tabular_policy(game)
            max_kl = 10 ** float(2.5 * torch.rand(()) - 3)  # 0.001 to 0.3
            settings = {"max_kl": max_kl, "kl_budget": "team" if seed % 2 else "agent"}
            updater = hatrpo(actor, agent_order=agent_order, damping=1e-3, cg_iters=n_actions, **settings)
            scale = float(game.rewards.abs().max())
            before = expected_return(game, actor)
            for _ in range(UPDATES):
                stats = updater.step(exact_batch(game, actor))
                after = expected_return(game, actor)
                assert after >= before - 1e-13 * scale
                assert abs(float(stats["improvement"].sum()) - (after - before)) <= 1e-12 * scale
                assert (stats["kl"] <= stats["max_kl"]).all()
                assert stats["kl"].sum() <= n_agents * max_kl
                accepted, updates, before = accepted + int(stats["accepted"].sum()), updates + 1, after
    assert updates == 3 * games * UPDATES
    assert accepted > (0.8 if agent_order == "greedy" else 0.9) * n_agents * updates


@pytest.mark.parametrize("gamma", [0.5, 0.9])
@pytest.mark.parametrize("n_agents", [2, 3])
def test_the_bound_holds_with_states(n_agents, gamma):
    """The surrogate leaves out that the states' visits change; the theorem says by how much at most.

    ``J(new) − J(old) ≥ Σ_m L^{i_m} − C Σ_m max_s KL``, with ``C = 4 γ max|A| / (1 − γ)²`` (Kuba et al. 2022, theorem
    2). With a radius that is small enough the right side is positive, and no update can lower the return.
    """
    promised = 0
    for seed, max_kl in enumerate([1e-6, 1e-5, 1e-3, 0.1]):
        torch.manual_seed(seed)
        game = random_markov_game(n_agents, n_actions=3, n_states=2 + seed % 3, gamma=gamma)
        actor = tabular_policy(game)
        updater = hatrpo(actor, max_kl=max_kl, damping=1e-4)
        for _ in range(8):
            data = exact_batch(game, actor)
            old = solve(game, action_probabilities(game, actor))
            old_dist = actor.get_dist(data)
            stats = updater.step(data)
            new = solve(game, action_probabilities(game, actor))
            gain = float(stats["improvement"].sum())
            surrogate = float((old.visits.unsqueeze(-1) * (new.joint - old.joint) * old.advantage).sum())
            assert abs(gain - surrogate) <= 1e-12
            kl = textbook_kl(old_dist, actor.get_dist(data)).detach()  # [N, n_agents]
            torch.testing.assert_close(stats["kl"], kl.mean(0), rtol=1e-9, atol=1e-14)
            penalty = 4 * gamma * float(old.advantage.abs().max()) / (1 - gamma) ** 2 * float(kl.amax(0).sum())
            change = new.expected_return - old.expected_return
            assert change >= gain - penalty
            if gain > penalty:
                promised += 1
                assert change > 0
    assert promised >= 8, "the bound is not empty: at the smallest radius it promises a rise"


@pytest.mark.parametrize("n_agents", [2, 4, pytest.param(6, marks=pytest.mark.slow)])  # slow: 2 and 4 show the power
def test_agents_that_share_a_policy_cannot_win(n_agents):
    """Proposition 1 of Kuba et al. 2022: sharing costs a factor of ``2 ** n_agents`` of the return."""
    game, settings, updates = proposition_1(n_agents), {"max_kl": 0.1, "damping": 1e-4, "cg_iters": 4}, 40
    torch.manual_seed(0)
    own, shared = tabular_policy(game), tabular_policy(game, share_params=True)
    one_by_one, at_once = hatrpo(own, **settings), matrpo(shared, **settings)
    best = 0.0
    for _ in range(updates):
        one_by_one.step(exact_batch(game, own))
        at_once.step(exact_batch(game, shared))
        best = max(best, expected_return(game, shared))
    assert expected_return(game, own) > 0.99
    assert 0.9 * 2.0**-n_agents < best <= 2.0**-n_agents + 1e-12


def test_moving_at_once_can_hurt_where_moving_in_turn_helps():
    """Each of two agents gains by moving as long as the other does not; simultaneous updates move both."""
    game, settings = dilemma_of_one_mover(), {"max_kl": 0.2, "damping": 1e-3}
    returns = {}
    for name, updater in (("MATRPO", matrpo), ("HATRPO", hatrpo)):
        actor = tabular_policy(game)
        set_action_probabilities(game, actor, torch.tensor([[0.95, 0.05]] * 2, dtype=torch.float64))
        before = expected_return(game, actor)
        stats = updater(actor, **settings).step(exact_batch(game, actor))
        assert stats["accepted"].all()
        assert (stats["improvement"] > 0).all()
        returns[name] = expected_return(game, actor)
    assert before == pytest.approx(0.07)
    assert returns["HATRPO"] > 0.2
    assert returns["MATRPO"] < -0.2
