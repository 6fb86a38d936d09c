"""Clipped minibatch steps: TorchRL's MAPPOLoss in the loop that everybody writes."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.multiagent import MAPPOLoss

from tests.cases import (
    ACTION,
    GROUP,
    LOG_PROB,
    OBSERVATION,
    bits,
    distribution,
    flat_parameters,
    joint_log_prob,
    make_actor,
    make_data,
    same_bits,
    textbook_kl,
)
from torchrl_trpo.objectives import AgentGAE, ClippedUpdater, HAPPOUpdater

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def make_loss(actor, **keywords):
    loss = MAPPOLoss(actor, entropy_coeff=0.0, **keywords)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB)
    return loss


def updated(actor, data, *, loss=None, **settings):
    """The policy after two updates from the same draws, and the last one's statistics."""
    settings = {"lr": 0.01, "epochs": 2, "minibatch_size": 16, **settings}
    updater = ClippedUpdater(make_loss(actor) if loss is None else loss, **settings)
    torch.manual_seed(5)
    for _ in range(2):
        stats = updater.step(data)
    return flat_parameters(actor), stats


@pytest.mark.parametrize("share_params", [True, False], ids=["shared", "a policy each"])
def test_it_is_mappo_in_a_plain_loop(share_params):
    actor = make_actor(share_params=share_params)
    data = make_data(actor)
    plain = copy.deepcopy(actor)
    clipping = {"clip_epsilon": 0.1, "normalize_advantage": True}
    settings = {"lr": 0.03, "epochs": 3, "max_grad_norm": 0.5}
    _, stats = updated(actor, data, loss=make_loss(actor, **clipping), **settings)

    torch.manual_seed(5)
    rows = data.reshape(-1)
    advantage = rows["advantage"]  # normalised over the whole batch, each agent's for itself
    rows["advantage"] = (advantage - advantage.mean(0)) / advantage.std(0)
    loss = make_loss(plain, clip_epsilon=0.1, normalize_advantage=False)
    parameters = list(plain.parameters())
    loss_parameters = [p for p in loss.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(loss_parameters, lr=0.03)
    for _ in range(2):
        before = distribution(plain, flat_parameters(plain), rows)
        norms = []
        for _ in range(3):
            for drawn in torch.randperm(len(rows)).split(16):
                optimizer.zero_grad()
                loss(rows[drawn])["loss_objective"].backward()
                norms.append(nn.utils.clip_grad_norm_(loss_parameters, 0.5))
                optimizer.step()
        after = distribution(plain, flat_parameters(plain), rows)
    for ours, theirs in zip(actor.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    ratios = [(joint_log_prob(d, rows) - rows[LOG_PROB]).exp() for d in (before, after)]
    by_hand = {
        "kl": textbook_kl(before, after).mean(),
        "improvement": ((ratios[1] - ratios[0]) * rows["advantage"].squeeze(-1)).mean(),
        "clip_fraction": ((ratios[1] - 1).abs() > 0.1).double().mean(),
        "grad_norm": torch.stack(norms).mean(),
    }
    for name, theirs in by_hand.items():
        torch.testing.assert_close(stats[name], theirs.detach().reshape(1), **EXACT, msg=name)
    assert stats["accepted"].tolist() == [True]


def test_masked_agents_do_not_count():
    actor = make_actor(share_params=True)
    data = make_data(actor)
    data[GROUP, "mask"] = torch.rand(5, 8, 3) < 0.7
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        noise = torch.randn_like(data[OBSERVATION]) * ~data[GROUP, "mask"].unsqueeze(-1)
        own = copy.deepcopy(actor)
        loss = make_loss(own)
        loss.loss_mask_key = (GROUP, "mask")
        noisy = data.clone()
        noisy[OBSERVATION] += noise
        results.append(updated(own, noisy, loss=loss)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("updater", [ClippedUpdater, HAPPOUpdater])
def test_the_value_estimator_must_know_the_mask(updater):
    """TorchRL's losses do not tell theirs; a padded step was then in the advantages of the others."""
    actor = make_actor()
    critic = TensorDictModule(nn.Linear(3, 1).double(), in_keys=[OBSERVATION], out_keys=[(GROUP, "state_value")])
    loss = ClipPPOLoss(actor, critic)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, value=(GROUP, "state_value"))
    loss.make_value_estimator(AgentGAE, gamma=0.9, lmbda=0.9, value_network=critic)
    data = make_data(actor)
    updater(loss).step(data)
    data[GROUP, "mask"] = torch.ones(5, 8, 3, dtype=torch.bool)
    loss.loss_mask_key = (GROUP, "mask")
    with pytest.raises(
        ValueError, match=r"loss_mask_key=\('agents', 'mask'\).*Legal: make_value_estimator\(AgentGAE, ma"
    ):
        updater(loss).step(data)
    loss.make_value_estimator(AgentGAE, gamma=0.9, lmbda=0.9, value_network=critic, mask_key=loss.loss_mask_key)
    updater(loss).step(data)


def test_each_group_has_a_policy_and_an_optimizer():
    actors = {name: make_actor(share_params=True) for name in ("a", "b")}
    losses, data = {}, make_data(actors["a"])
    for name, actor in actors.items():
        own = make_data(actor)
        data[f"{name}_advantage"] = own["advantage"]
        losses[name] = make_loss(actor)
        losses[name].set_keys(advantage=f"{name}_advantage")
    before = bits(actors["b"])
    data["b_advantage"].zero_()
    updater = ClippedUpdater(losses, minibatch_size=16)
    stats = updater.step(data)
    assert stats.batch_size == (2,)
    assert same_bits(actors["b"], before)
    assert stats["kl"][0] > 0
    assert len(updater.state_dict()["optimizers"]) == 2
    with pytest.raises(ValueError, match=r"^optimizers: the state_dict has 1 policies, legal: 2\.$"):
        updater.load_state_dict({**updater.state_dict(), "optimizers": updater.state_dict()["optimizers"][:1]})


def test_it_continues_from_its_state():
    actor = make_actor(share_params=True)
    data = make_data(actor)
    whole = copy.deepcopy(actor)
    updated(whole, data)
    first = ClippedUpdater(make_loss(actor), lr=0.01, epochs=2, minibatch_size=16)
    torch.manual_seed(5)
    first.step(data)
    drawn = torch.get_rng_state()
    second = ClippedUpdater(make_loss(actor))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.set_rng_state(drawn)
    second.step(data)
    assert same_bits(actor, bits(whole))
