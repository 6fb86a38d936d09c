"""HAPPO: TorchRL's ClipPPOLoss agent by agent, each seeing what the agents before it have changed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import IndependentNormal, MultiAgentMLP, NormalParamExtractor, ProbabilisticActor
from torchrl.objectives import ClipPPOLoss, KLPENPPOLoss
from torchrl.objectives.multiagent import MAPPOLoss

from tests.cases import (
    ACTION,
    DISTRIBUTIONS,
    GROUP,
    LOG_PROB,
    OBSERVATION,
    PARTS,
    REWARD,
    VALUE,
    bits,
    distribution,
    flat_parameters,
    joint_log_prob,
    make_actor,
    make_data,
    make_policy,
    make_single,
    same_bits,
    single_data,
    textbook_kl,
)
from tests.networks.test_recurrent import recurrent_actor, sequences
from tests.rank_processes import on_ranks
from torchrl_trpo.keys import GroupKeys
from torchrl_trpo.objectives import ClippedUpdater, HAPPOUpdater, TRPOLoss
from torchrl_trpo.objectives.policy_network import is_composite
from torchrl_trpo.reporting.diagnosis import PATIENCE, RejectionWatch

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def make_loss(actor, **keywords):
    loss = ClipPPOLoss(actor, **{"entropy_coeff": 0.0, **keywords})
    if is_composite(actor):
        names = [(GROUP, name) for name in PARTS]
        loss.set_keys(action=names, sample_log_prob=[(GROUP, f"{name}_log_prob") for name in PARTS])
    return loss


def updated(actor, data, *, loss=None, steps=1, **settings):
    """The policy after some steps from the same draws, and the last one's statistics."""
    settings = {"lr": 0.01, "epochs": 2, "minibatch_size": 16, **settings}
    updater = HAPPOUpdater(make_loss(actor) if loss is None else loss, **settings)
    torch.manual_seed(5)
    for _ in range(steps):
        stats = updater.step(data)
    return flat_parameters(actor), stats


# ------------------------------------------------------------------ against the definition


def policy_of(net, agent):
    """One agent's share of a MultiAgentMLP, as a policy of plain layers."""
    single = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), NormalParamExtractor()).double()
    for layer in (0, 2):
        for name in ("weight", "bias"):
            getattr(single[layer], name).data = net.params[str(layer), name].data[agent].clone()
    return policy_on(single)


def policy_on(module, *group):
    """A policy of normal actions of a group, or of an agent without one."""
    keys = {name: (*group, name) if group else name for name in ("observation", "loc", "scale", "action")}
    parameters = {name: keys[name] for name in ("loc", "scale")}
    return ProbabilisticActor(
        TensorDictModule(module, in_keys=[keys["observation"]], out_keys=[*parameters.values()]),
        in_keys=parameters,
        out_keys=[keys["action"]],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )


def test_it_is_plain_clip_ppo_in_a_loop_over_the_agents():
    """Written out with a plain network and a plain loss for each agent, its own Adam, and the factor by hand."""
    net = MultiAgentMLP(3, 4, n_agents=3, centralized=False, share_params=False, num_cells=[4], depth=1).double()
    actor, order = make_policy(net, "normal"), [2, 0, 1]
    data = make_data(actor)
    clipping = {"clip_epsilon": 0.1, "entropy_coeff": 0.02}
    singles = [policy_of(net, agent) for agent in range(3)]
    optimizers = [torch.optim.Adam(single.parameters(), lr=0.03) for single in singles]
    loss = make_loss(actor, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,), **clipping)
    updater = HAPPOUpdater(loss, lr=0.03, epochs=3, minibatch_size=16, max_grad_norm=0.5, agent_order=order)
    torch.manual_seed(5)
    stats = [updater.step(data) for _ in range(2)][-1]

    torch.manual_seed(5)
    rows = data.reshape(-1)
    for _ in range(2):
        factor, by_hand = torch.ones(len(rows), 1, dtype=torch.float64), {}
        for agent in order:
            single = singles[agent]
            advantage = rows["advantage"][:, agent]
            advantage = (advantage - advantage.mean()) / advantage.std()
            batch = TensorDict({name: rows[GROUP, name][:, agent] for name in ("observation", "action")}, [len(rows)])
            batch["action_log_prob"], batch["advantage"] = rows[LOG_PROB][:, agent], factor * advantage
            plain = ClipPPOLoss(single, **clipping)
            before, norms = detached(single, batch), []
            for _ in range(3):
                for drawn in torch.randperm(len(rows)).split(16):
                    optimizers[agent].zero_grad()
                    out = plain(batch[drawn])
                    (out["loss_objective"] + out["loss_entropy"]).backward()
                    norms.append(nn.utils.clip_grad_norm_(single.parameters(), 0.5))
                    optimizers[agent].step()
            after = detached(single, batch)
            ratios = [(d.log_prob(batch["action"]) - batch["action_log_prob"]).exp() for d in (before, after)]
            by_hand[agent] = {
                "kl": textbook_kl(before, after).mean(),
                "improvement": ((ratios[1] - ratios[0]) * batch["advantage"].squeeze(-1)).mean(),
                "clip_fraction": ((ratios[1] - 1).abs() > 0.1).double().mean(),
                "grad_norm": torch.stack(norms).mean(),
                "factor_std": factor.std(correction=0),
            }
            factor = factor * ratios[1].unsqueeze(-1)
    for agent, single in enumerate(singles):
        own = [parameter[agent] for parameter in net.params.values(True, True)]
        for ours, theirs in zip(own, single.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
        for name, theirs in by_hand[agent].items():
            torch.testing.assert_close(stats[name][agent], theirs, **EXACT, msg=name)
    assert stats["order"].tolist() == order
    assert stats["accepted"].all()
    assert 0 < stats["clip_fraction"].max() < 1


def detached(actor, batch):
    with torch.no_grad():
        return actor.get_dist(batch.clone())


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_every_kind_of_action_improves_with_an_exact_kl(kind):
    actor = make_actor(kind)
    data = make_data(actor)
    before, theta = copy.deepcopy(data), flat_parameters(actor, 3)
    loss = make_loss(actor, entropy_coeff=0.001)
    _, stats = updated(actor, data, loss=loss, agent_order="fixed", minibatch_size=40, lr=1e-3)
    assert (data == before).all(), "the data is not modified"
    now = flat_parameters(actor, 3)
    old, new = distribution(actor, theta, data), distribution(actor, now, data)
    torch.testing.assert_close(stats["kl"], textbook_kl(old, new).flatten(0, 1).mean(0), **EXACT)
    ratio = (joint_log_prob(new, data) - joint_log_prob(old, data)).exp()
    factor = torch.cat([torch.ones_like(ratio[..., :1]), ratio.cumprod(-1)[..., :-1]], -1)
    improvement = factor * (ratio - 1) * data["advantage"].squeeze(-1)
    torch.testing.assert_close(stats["improvement"], improvement.flatten(0, 1).mean(0), **EXACT)
    assert (stats["improvement"] > 0).all()


def test_settings_of_the_loss_are_those_at_the_step():
    data, results = make_data(make_actor_again()), []
    settings = {"lr": 0.05, "epochs": 3, "minibatch_size": 40}
    for at_first, epsilon in ((0.3, 0.01), (0.01, 0.01), (0.01, 0.3)):
        loss = make_loss(make_actor_again(), clip_epsilon=at_first, max_importance_ratio=5.0)
        updater = HAPPOUpdater(loss, **settings)
        loss.clip_epsilon.fill_(epsilon)
        torch.manual_seed(5)
        results.append(updater.step(data)["kl"])
    assert torch.equal(results[0], results[1])
    assert (results[1] < results[2]).all()


def make_actor_again():
    torch.manual_seed(0)
    return make_actor()


# ------------------------------------------------------------------ one agent at a time


def test_no_gradient_and_no_momentum_moves_another_agent():
    """Adam over stacked parameters moves an agent without a gradient by what it remembers."""
    actor = make_actor()
    data = make_data(actor)
    updater, fresh = (HAPPOUpdater(make_loss(actor), epochs=1, minibatch_size=20) for _ in range(2))
    updater.step(data)
    data["advantage"][:, :, [0, 2]] = 0.0
    before = bits(actor)
    fresh.step(data)
    for new, old in zip(actor.parameters(), before, strict=True):
        assert torch.equal(new[[0, 2]], old[[0, 2]])
        assert not torch.equal(new[1], old[1])
    before = bits(actor)
    updater.step(data)
    for new, old in zip(actor.parameters(), before, strict=True):
        assert (new != old).flatten(1).any(1).all(), "its own momentum does"


def test_only_the_agent_whose_turn_it_is_is_evaluated(monkeypatch):
    actor, seen = make_actor(n_agents=5), []
    data = make_data(actor, n_agents=5)

    def forward(self, inputs, original=MultiAgentMLP.forward):
        seen.append(inputs.shape)
        return original(self, inputs)

    updater = HAPPOUpdater(make_loss(actor), epochs=3, minibatch_size=16)
    updater.step(data)  # looks at the policy
    monkeypatch.setattr(MultiAgentMLP, "forward", forward)
    updater.step(data)
    assert {shape[1] for shape in seen} == {1}
    rows = sum(shape[0] for shape in seen)
    assert rows == 5 * (3 + 2) * 40, "its epochs, and once before and after them"


def test_a_policy_that_was_moved_is_the_one_that_is_updated():
    actor = make_actor()
    updater = HAPPOUpdater(make_loss(actor), minibatch_size=16)
    data = make_data(actor).apply(lambda value: value.float() if value.is_floating_point() else value)
    actor.float()
    before = bits(actor)
    updater.step(data)
    assert not any(torch.equal(new, old) for new, old in zip(actor.parameters(), before, strict=True))


class Scaled(nn.Module):
    """What a policy may do with its observations, by something that is no parameter."""

    def __init__(self):
        super().__init__()
        self.temperature = 1.0
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, observation):
        return self.dropout(observation - self.mean) / self.temperature


@pytest.mark.parametrize(
    ("is_trained", "change"),
    [
        (True, lambda actor, scaled: setattr(scaled, "temperature", 0.2)),
        (True, lambda actor, scaled: setattr(scaled, "mean", torch.ones(3, dtype=torch.float64))),
        (True, lambda actor, scaled: actor.eval()),
        (True, lambda actor, scaled: next(actor.parameters()).requires_grad_(False)),
        (False, lambda actor, scaled: next(actor.parameters()).requires_grad_(True)),
    ],
    ids=["attribute", "buffer", "evaluation", "frozen", "not frozen any more"],
)
@pytest.mark.parametrize("kind", [HAPPOUpdater, ClippedUpdater])
def test_a_policy_that_was_changed_is_the_one_that_is_updated(kind, is_trained, change):
    """HAPPO trained copies that were made with the updater: frozen parameters moved, others stood still."""

    def update(when):
        torch.manual_seed(0)
        mlp = MultiAgentMLP(
            3, 4, n_agents=3, centralized=False, share_params=kind is ClippedUpdater, num_cells=4, depth=1
        )
        scaled = Scaled()
        actor = policy_on(nn.Sequential(scaled, mlp.double(), NormalParamExtractor()), GROUP)
        next(actor.parameters()).requires_grad_(is_trained)
        loss = ClipPPOLoss(actor, functional=False)
        loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB)
        for at in ("before", "after"):
            if at == when:
                change(actor, scaled)
            if at == "before":
                updater = kind(loss, lr=0.01, epochs=2, minibatch_size=16)
        torch.manual_seed(5)
        updater.step(make_data(actor))
        return flat_parameters(actor)

    assert torch.equal(update("after"), update("before"))
    assert not torch.equal(update("after"), update("never"))


@pytest.mark.parametrize("kind", ["per agent", "single"])
def test_a_policy_that_was_moved_between_updates_keeps_its_momentum(kind):
    """Adam's state stayed behind, and its step failed."""
    actor = make_actor() if kind == "per agent" else make_single()[0]
    data = make_data(actor) if kind == "per agent" else single_data(actor).set("advantage", torch.randn(5, 8, 1))
    loss = make_loss(actor).float()
    data = data.apply(lambda value: value.float() if value.is_floating_point() else value)
    updater = HAPPOUpdater(loss, epochs=1, minibatch_size=40)
    updater.step(data)
    loss.to(torch.float64)
    before = bits(actor)
    data = data.apply(lambda value: value.double() if value.is_floating_point() else value)
    data["advantage"].zero_()
    updater.step(data)
    assert {parameter.dtype for parameter in actor.parameters()} == {torch.float64}
    for new, old in zip(actor.parameters(), before, strict=True):
        assert (new != old).all(), "by its momentum alone"
    fresh = HAPPOUpdater(make_loss(copy.deepcopy(actor).float()), epochs=1, minibatch_size=40)
    fresh.losses["agents"].double()
    fresh.load_state_dict(updater.state_dict())
    assert str(fresh.state_dict()) == str(updater.state_dict()), "nor is a state cast that is loaded after the move"


def test_groups_are_one_sequence():
    """Two groups with the parameters and the rows of a group of three take the steps of that group."""
    whole = make_actor()
    data = make_data(whole)
    order, parts, losses, actors = [2, 0, 1], {"one": slice(0, 1), "two": slice(1, 3)}, {}, {}
    split = TensorDict({}, data.batch_size)
    for group, agents in parts.items():
        sizes = {"n_agents": agents.stop - agents.start, "num_cells": [4], "depth": 1}
        net = MultiAgentMLP(3, 4, centralized=False, share_params=False, **sizes).double()
        actor = policy_on(nn.Sequential(net, NormalParamExtractor()), group)
        for parameter, stacked in zip(actor.parameters(), whole.parameters(), strict=True):
            parameter.data = stacked.data[agents].clone()
        for name in ("loc", "scale", "observation", "action", "action_log_prob"):
            split[group, name] = data[GROUP, name][:, :, agents]
        split[group, "advantage"] = data["advantage"][:, :, agents]
        losses[group] = ClipPPOLoss(actor, entropy_coeff=0.0)
        losses[group].set_keys(advantage=(group, "advantage"))
        actors[group] = actor
    _, expected = updated(whole, data, agent_order=order)
    torch.manual_seed(5)
    stats = HAPPOUpdater(losses, lr=0.01, epochs=2, minibatch_size=16, agent_order=order).step(split)
    for name, value in stats.items():
        torch.testing.assert_close(value, expected[name], **EXACT)
    for group, agents in parts.items():
        for parameter, stacked in zip(actors[group].parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(parameter, stacked[agents], **EXACT)


def test_a_policy_without_an_agent_dimension_is_an_agent():
    actor, critic = make_single()
    data = single_data(actor)
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.0)
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    before = bits(actor)
    stats = HAPPOUpdater(loss, minibatch_size=16).step(data)
    assert stats.batch_size == (1,)
    assert stats["improvement"] > 0
    assert "advantage" not in data, "which the loss's own estimator gave"
    assert not any(torch.equal(new, old) for new, old in zip(actor.parameters(), before, strict=True))


@pytest.mark.parametrize("masked", [False, True], ids=["all steps", "masked"])
def test_recurrent_policies_are_updated_on_whole_sequences(masked):
    """What a masked step holds moves nothing, but for the observation, which the policy has read."""
    results = []
    for content in (0.0, 7.0):
        torch.manual_seed(0)
        actor = recurrent_actor()
        data = sequences(actor)
        loss = make_loss(actor, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
        if masked:
            data[GROUP, "counts"] = torch.rand(4, 6, 2, 1) < 0.7
            off = ~data[GROUP, "counts"]
            loss.loss_mask_key = (GROUP, "counts")
            data["advantage"][off] += content
            data[LOG_PROB][off.squeeze(-1)] -= content
        theta, stats = updated(actor, data, loss=loss, minibatch_size=12)
        assert (stats["improvement"] > 0).all()
        assert stats["accepted"].all()
        results.append(theta)
    torch.testing.assert_close(*results, **EXACT)


# ------------------------------------------------------------------ masks, and what is not finite


def test_masked_rows_are_as_if_they_were_not_there():
    keep = torch.rand(5, 8) < 0.7
    results = []
    for masked in (True, False):
        torch.manual_seed(0)
        actor = make_actor()
        data = make_data(actor)
        loss = make_loss(actor, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
        if masked:
            data["kept"] = keep
            data[OBSERVATION][~keep] = math.nan
            data["advantage"][~keep] = math.inf
            loss.loss_mask_key = "kept"
        results.append(updated(actor, data if masked else data[keep], loss=loss))
    torch.testing.assert_close(results[0][0], results[1][0], **EXACT)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], **EXACT)


def test_an_agent_that_takes_part_in_no_row_stays_as_it_is():
    actor = make_actor()
    data = make_data(actor)
    data[GROUP, "mask"] = torch.ones(5, 8, 3, 1, dtype=torch.bool)
    data[GROUP, "mask"][:, :, 1] = False
    loss = make_loss(actor)
    loss.loss_mask_key = (GROUP, "mask")
    before = bits(actor)
    _, stats = updated(actor, data, loss=loss)
    for new, old in zip(actor.parameters(), before, strict=True):
        assert torch.equal(new[1], old[1])
        assert not torch.equal(new[0], old[0])
    assert stats["kl"][1] == stats["improvement"][1] == stats["grad_norm"][1] == 0


@pytest.mark.parametrize("where", ["advantage", OBSERVATION, LOG_PROB], ids=str)
def test_a_minibatch_with_a_nan_is_left_out(where):
    """The others are taken, and to the agents that follow the row is as if nothing had changed there."""
    actor = make_actor()
    data = make_data(actor)
    data[where][1, 2, 1] = math.nan
    before = bits(actor)
    _, stats = updated(actor, data, agent_order=[1, 0, 2])
    assert stats["accepted"].tolist() == [True, False, True]
    assert stats["grad_norm"].isfinite().tolist() == [True, False, True]
    assert all(stats[name].isfinite().all() for name in ("kl", "improvement", "clip_fraction"))
    for new, old in zip(actor.parameters(), before, strict=True):
        assert new.isfinite().all()
        assert not torch.equal(new[1], old[1])


def test_an_update_without_a_finite_minibatch_moves_nothing():
    """One NaN in the rewards is one in all normalised advantages; a later update has no trace of it."""
    actor = make_actor()
    data = make_data(actor)
    loss = make_loss(actor, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
    updater = HAPPOUpdater(loss, epochs=1, minibatch_size=40)
    updater.step(data)
    before, states = bits(actor), copy.deepcopy(updater.state_dict())
    broken = data.clone()
    broken["advantage"][0, 0] = math.nan
    watch = RejectionWatch([GroupKeys(GROUP, 3, *[None] * 6)], max_kl=None, damping=None)
    broken[GROUP, "advantage"] = broken["advantage"]
    for _ in range(PATIENCE):
        stats = updater.step(broken)
        told = watch.update(broken, stats)
    assert not stats["accepted"].any()
    assert same_bits(actor, before)
    assert str(states) == str(updater.state_dict()), "no momentum either"
    assert len(told) == 3
    assert all("not finite; non_finite=stop names where" in report for report in told)


# ------------------------------------------------------------------ settings and states


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": -1}, ValueError, r"^lr must be a number of at least 0, got -1\."),
        ({"lr": "fast"}, TypeError, r"^lr must be a number of at least 0, got 'fast' of type str\."),
        ({"epochs": 0}, ValueError, r"^epochs must be a whole number of at least 1, got 0\."),
        ({"epochs": 2.5}, ValueError, r"^epochs must be a whole number"),
        ({"minibatch_size": 0}, ValueError, r"^minibatch_size must be a whole number of at least 1, got 0\."),
        ({"max_grad_norm": 0}, ValueError, r"^max_grad_norm must be a positive number, got 0\."),
        ({"max_grad_norm": True}, TypeError, r"^max_grad_norm must be a positive number, got True of type bool\."),
        ({"agent_order": [0.5, 1.5, 2]}, ValueError, r"^agent_order: \[0\.5, 1\.5, 2\]\. Legal: "),
        ({"agent_order": [True, False, 2]}, ValueError, r"^agent_order: \[True, False, 2\]\. Legal: "),
        ({"agent_order": 2}, ValueError, r"^agent_order: 2\. Legal: "),
        ({"agent_order": [0, 0, 1]}, ValueError, r"^agent_order: \[0, 0, 1\]\. Legal: 'random', 'fixed', or a seq"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        HAPPOUpdater(make_loss(make_actor()), **settings)
    updater = HAPPOUpdater(make_loss(make_actor()))
    with pytest.raises(error, match=message):
        setattr(updater, *next(iter(settings.items())))


class OwnEntropy(ClipPPOLoss):
    def _get_entropy(self, dist, adv_shape):
        return super()._get_entropy(dist, adv_shape)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            lambda: make_loss(make_actor(share_params=True)),
            ValueError,
            r"'agents' share parameters.*share_params=Fal",
        ),
        (lambda: TRPOLoss(make_actor()), TypeError, r"'agents' is a TRPOLoss\. Legal: a torchrl\.objectives\.Clip"),
        (lambda: {"a": KLPENPPOLoss(make_actor())}, TypeError, r"group 'a' is a KLPENPPOLoss\. Legal"),
        (
            lambda: OwnEntropy(make_actor()),
            TypeError,
            r"OwnEntropy, has _get_entropy of its own.*Legal: ClipPPO",
        ),
        (lambda: make_loss(make_actor(), delay_actor=True), ValueError, r"delay_actor=True .* Use delay_actor=False"),
        (dict, ValueError, r"losses is an empty mapping; legal: \{group: ClipPPOLoss"),
    ],
    ids=["shared", "TRPOLoss", "KLPENPPOLoss", "own entropy", "delayed", "none"],
)
def test_losses_that_cannot_be_updated_in_sequence(loss, error, message):
    with pytest.raises(error, match=message):
        HAPPOUpdater(loss())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda data: data.pop("advantage"),
            KeyError,
            r"is not in the data, and .* Give ClipPPOLoss a critic",
        ),
        (lambda data: data.pop(LOG_PROB), KeyError, r"action_log_prob.* not in the data.*return_log_prob=True"),
        (lambda data: data.set("advantage", data["advantage"][..., 0]), ValueError, r"Use advantage\.unsqueeze\(-1\)"),
    ],
    ids=["no advantage", "no log-probability", "advantage without its last dimension"],
)
def test_data_that_cannot_be(change, error, message):
    actor = make_actor()
    data = make_data(actor)
    change(data)
    with pytest.raises(error, match=message):
        HAPPOUpdater(make_loss(actor)).step(data)
    with pytest.raises(ValueError, match=r"the data is empty: its batch size is \(0, 8\)"):
        HAPPOUpdater(make_loss(actor)).step(data[:0])


def test_a_mappo_loss_will_do():
    """It differs in the critic alone."""
    data, results = make_data(make_actor()), []
    for make in (ClipPPOLoss, MAPPOLoss):
        actor = make_actor_again()
        critic = TensorDictModule(nn.Linear(3, 1).double(), in_keys=[OBSERVATION], out_keys=[VALUE])
        loss = make(actor, critic, entropy_coeff=0.0, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
        loss.set_keys(value=VALUE, reward=REWARD, action=ACTION)
        results.append(updated(actor, data, loss=loss)[0])
    assert torch.equal(*results)


def test_a_saved_state_continues_to_the_bit():
    actor = make_actor()
    data = make_data(actor)
    first = HAPPOUpdater(make_loss(actor), lr=0.01, epochs=2, minibatch_size=16)
    first.step(data)
    resumed = copy.deepcopy(actor)
    second = HAPPOUpdater(make_loss(resumed), minibatch_size=7)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert (second.lr, second.epochs, second.minibatch_size) == (0.01, 2, 16)
    results = []
    for updater in (first, second):
        torch.manual_seed(5)
        updater.lr = 0.02
        results.append(updater.step(data))
    assert (results[0] == results[1]).all()
    assert same_bits(resumed, bits(actor))
    state = first.state_dict()
    with pytest.raises(KeyError, match=r"'optimizers' is missing from the state_dict"):
        second.load_state_dict({name: value for name, value in state.items() if name != "optimizers"})
    with pytest.raises(KeyError, match=r"'max_kl' is not a setting"):
        second.load_state_dict({**state, "max_kl": 0.01})
    with pytest.raises(ValueError, match=r"the state_dict has 2 policies, legal: 3"):
        second.load_state_dict({**state, "optimizers": state["optimizers"][:2]})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda state: {}, r"optimizers\[1\] is not a state of this policy's Adam: KeyError\('param_groups'\)"),
        (lambda state: None, r"optimizers\[1\] is not a state"),
        (lambda state: {**state, "param_groups": []}, r"optimizers\[1\] .* different number of parameter groups"),
        (lambda state: {**state, "state": {0: {"step": torch.ones(())}}}, r"optimizers\[1\] .*KeyError\('exp_avg'\)"),
        (
            lambda state: {**state, "state": {0: {**state["state"][0], "exp_avg_sq": torch.ones(2)}}},
            r"optimizers\[1\] .*exp_avg_sq has shape \(2,\), its parameter \(1, ",
        ),
    ],
    ids=["empty", "none", "no groups", "no moment", "another shape"],
)
def test_a_broken_state_is_not_taken_over_in_part(broken, message):
    actor = make_actor()
    data = make_data(actor)
    first, second = (HAPPOUpdater(make_loss(actor), lr=lr, minibatch_size=20) for lr in (0.01, 0.02))
    first.step(data)
    state = first.state_dict()
    state["optimizers"][1] = broken(state["optimizers"][1])
    before = str(second.state_dict())
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(state)
    assert str(second.state_dict()) == before
    with pytest.raises(ValueError, match=r"^epochs must be"):
        second.load_state_dict({**first.state_dict(), "epochs": 0})
    assert str(second.state_dict()) == before


@pytest.mark.parametrize("kind", ["per agent", "single"])
def test_a_copy_takes_the_same_steps_on_a_policy_of_its_own(kind):
    actor = make_actor() if kind == "per agent" else make_single()[0]
    data = make_data(actor) if kind == "per agent" else single_data(actor).set("advantage", torch.randn(5, 8, 1))
    original = HAPPOUpdater(make_loss(actor), lr=0.01, epochs=2, minibatch_size=16)
    original.step(data)
    original.epochs = 3
    twin = copy.deepcopy(original)
    before, results = bits(actor), []
    for updater in (twin, original):
        torch.manual_seed(5)
        results.append(updater.step(data))
        if updater is twin:
            assert same_bits(actor, before)
    assert (results[0] == results[1]).all()
    assert (results[0]["kl"] > 0).all()
    copied = twin.losses["agents"].actor_network_params
    acting = twin.losses["agents"].actor_network
    assert same_bits(acting, list(copied.parameters())), "its policy was the one from before"
    theirs = original.losses["agents"].actor_network_params
    assert (copied == theirs).all()
    assert not any(torch.equal(new, old) for new, old in zip(actor.parameters(), before, strict=True))
    original.step(data)
    assert not (copied == theirs).all(), "the copy stays where it is"


# ------------------------------------------------------------------ several processes


def one_update(masked):
    """The parameters and statistics after two updates on this rank's environments: 2 of 6 and 4 of 6."""
    several = dist.is_initialized()
    torch.manual_seed(0)
    actor = make_actor("composite" if masked else "normal")
    data = make_data(actor, (6, 7))
    if masked:
        data[GROUP, "counts"] = torch.rand(6, 7, 3, 1) < 0.7
        data[GROUP, "counts"][0] = False
    data = data.split([2, 4])[dist.get_rank()] if several else data
    if several and dist.get_rank():
        with torch.no_grad():
            next(actor.parameters()).add_(1)  # the first one's counts
    loss = make_loss(actor, entropy_coeff=0.01, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
    loss.loss_mask_key = (GROUP, "counts") if masked else "auto"
    group = dist.group.WORLD if several else None
    updater = HAPPOUpdater(loss, lr=0.01, epochs=2, minibatch_size=9, max_grad_norm=0.5, process_group=group)
    torch.manual_seed(7 + (dist.get_rank() if several else 0))
    stats = [updater.step(data) for _ in range(2)][-1]
    return flat_parameters(actor), stats.to_dict()


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
def test_ranks_take_the_steps_of_one_process(masked):
    alone, stats = one_update(masked)
    results = on_ranks(2, one_update, masked)
    for parameters, own_stats in results:
        torch.testing.assert_close(parameters, alone, rtol=0, atol=1e-9)
        for name, value in own_stats.items():
            torch.testing.assert_close(value, stats[name], rtol=1e-6, atol=1e-9, msg=name)
        assert torch.equal(parameters, results[0][0]), "ranks agree to the bit"
