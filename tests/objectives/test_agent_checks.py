"""Policies of several agents: which parameters are whose."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
from torch import nn
from torchrl.modules import IndependentNormal, MultiAgentMLP, NormalParamExtractor, ProbabilisticActor
from torchrl.objectives import ClipPPOLoss

from tests.cases import ACTION, GROUP, LOG_PROB, OBSERVATION, make_data, region_mean, textbook_kl
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import HAPPOUpdater, HATRPOSequentialObjective, TRPOLoss


class Networks(nn.Module):
    """A list of one network per agent, stacked on the way out."""

    def __init__(self):
        super().__init__()
        self.networks = nn.ModuleList(nn.Linear(3, 4) for _ in range(3))

    def forward(self, observation):
        return torch.stack([net(x) for net, x in zip(self.networks, observation.unbind(-2), strict=True)], -2)


class Scale(nn.Module):
    """A standard deviation that does not depend on the observation."""

    def __init__(self, *shape):
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(*shape))

    def forward(self, loc):
        return loc, self.log_std.exp().expand_as(loc)


class Mixing(nn.Module):
    """Agents see each other behind their networks."""

    def forward(self, outputs):
        return outputs + outputs.mean(-2, keepdim=True)


class Seen(nn.Module):
    """Agents see each other without a gradient."""

    def forward(self, outputs):
        return outputs + outputs.detach().mean(-2, keepdim=True)


class Offset(nn.Module):
    """An entry for each agent in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.randn(3, 4))

    def forward(self, outputs):
        return outputs + self.offset


def networks(n_outputs):
    return MultiAgentMLP(3, n_outputs, n_agents=3, centralized=False, share_params=False, num_cells=[4], depth=1)


def make_policy(*layers):
    keys = [(GROUP, "loc"), (GROUP, "scale")]
    net = nn.Sequential(*layers).double()
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=[OBSERVATION], out_keys=keys),
        in_keys=keys,
        out_keys=[ACTION],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )


def hatrpo(actor):
    return TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(actor)))


def itrpo(actor):
    return TrustRegionUpdater(TRPOLoss(actor))


def happo(actor):
    loss = ClipPPOLoss(actor, entropy_bonus=False)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB)
    return HAPPOUpdater(loss, lr=0.01)


@pytest.mark.parametrize("make_updater", [itrpo, hatrpo, happo])
@pytest.mark.parametrize("scale", [lambda: Scale(3, 2), lambda: AddStateIndependentNormalScale((3, 2))], ids="ab")
def test_a_standard_deviation_for_each_agent(scale, make_updater):
    """``[n_agents, A]`` raised from inside tensordict; it is per agent, and the KL is that of the agent's policy."""
    actor = make_policy(networks(2), scale())
    data = make_data(actor)
    old = actor.get_dist(data.clone())
    stats = make_updater(actor).step(data)
    assert stats["accepted"].all()
    new = actor.get_dist(data.clone())
    assert (old.base_dist.scale[0, 0] != new.base_dist.scale[0, 0]).all()
    torch.testing.assert_close(stats["kl"], region_mean(textbook_kl(old, new), True))


@pytest.mark.parametrize("make_updater", [itrpo, hatrpo, happo])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda: [networks(2), Scale(2)], r"log_std.*\(2,\) is not.*\[n_agents, A\]"),
        (lambda: [Networks(), NormalParamExtractor()], "not stacked"),
    ],
    ids=["shared standard deviation", "list of networks"],
)
def test_what_is_not_stacked_is_named(layers, message, make_updater):
    """ITRPO took one region for all without a word; HATRPO advised ``share_params=False``, which the user had."""
    actor = make_policy(*layers())
    data = make_data(actor)
    with pytest.raises(ValueError, match=message):
        make_updater(actor).step(data)


@pytest.mark.parametrize("layers", [lambda: [networks(2), Scale(2)], lambda: [Networks(), NormalParamExtractor()]])
def test_one_region_for_all_may_be_asked_for(layers):
    actor = make_policy(*layers())
    data = make_data(actor)
    old = actor.get_dist(data.clone())
    stats = TrustRegionUpdater(TRPOLoss(actor, trust_region="shared")).step(data)
    assert stats["accepted"].all()
    torch.testing.assert_close(stats["kl"], textbook_kl(old, actor.get_dist(data.clone())).mean().reshape(1))


@pytest.mark.parametrize("make_updater", [itrpo, hatrpo, happo])
def test_agents_that_see_each_other_have_no_regions_of_their_own(make_updater):
    actor = make_policy(networks(4), Mixing(), NormalParamExtractor())
    data = make_data(actor)
    with pytest.raises(ValueError, match=r"actions of agent 0 depend on other agents' slices"):
        make_updater(actor).step(data)


@pytest.mark.parametrize("make_updater", [hatrpo, happo])
def test_an_agent_alone_must_be_what_it_is_among_all(make_updater):
    actor = make_policy(networks(4), Seen(), NormalParamExtractor())
    data = make_data(actor)
    with pytest.raises(ValueError, match=r"agent 0 alone, .* does not act as among all"):
        make_updater(actor).step(data)
    assert itrpo(actor).step(data)["accepted"].all()


@pytest.mark.parametrize("make_updater", [itrpo, hatrpo, happo])
@pytest.mark.parametrize(
    "constant",
    [
        Offset,
        lambda: Scale(3, 2).requires_grad_(False),
        lambda: AddStateIndependentNormalScale((3, 2), make_param=False),
    ],
    ids=["buffer", "frozen parameter", "tensordict's buffer"],
)
def test_a_constant_for_each_agent_is_each_agents(constant, make_updater):
    """A standard deviation that is set by hand, ``[n_agents, A]``, was that of all agents for an agent alone."""
    last = [NormalParamExtractor()] if constant is Offset else []
    actor = make_policy(networks(4 if last else 2), constant(), *last)
    data = make_data(actor)
    old = actor.get_dist(data.clone())
    stats = make_updater(actor).step(data)
    assert stats["accepted"].all()
    torch.testing.assert_close(stats["kl"], region_mean(textbook_kl(old, actor.get_dist(data.clone())), True))


def test_a_frozen_policy_is_refused():
    actor = make_policy(networks(4), NormalParamExtractor()).requires_grad_(False)
    data = make_data(actor)
    with pytest.raises(ValueError, match="no parameter of the policy requires a gradient"):
        itrpo(actor).step(data)


@pytest.mark.parametrize("hidden", ["caught error", "zeros", "zero head"])
@pytest.mark.parametrize("make_updater", [itrpo, hatrpo, happo])
def test_nothing_hides_what_agents_see_of_each_other(hidden, make_updater):
    """A caught error switched the look at the policy off; a row of zeros, or a head of zeros, has no derivatives."""
    net = networks(4)
    actor = make_policy(net, nn.ReLU(), Mixing(), NormalParamExtractor())
    for value in net.parameters():
        if hidden == "zero head":
            value.data.zero_()
    data = make_data(actor)
    updater = make_updater(actor)
    if hidden == "zeros":
        data[OBSERVATION][0, 0] = 0
    for _ in range(2):
        with pytest.raises(ValueError, match=r"actions of agent 0 depend on other agents' slices"):
            updater.step(data)


@pytest.mark.parametrize("make_updater", [itrpo, hatrpo])
def test_what_is_frozen_may_be_shared_and_containers_are_no_layers(make_updater):
    """A frozen encoder, and a standard deviation in a ``ParameterDict``, were refused as shared."""

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(3, 3).requires_grad_(False)
            self.net = networks(2)
            self.own = nn.ParameterDict({"log_std": nn.Parameter(torch.zeros(3, 2))})

        def forward(self, observation):
            loc = self.net(self.encoder(observation))
            return loc, self.own["log_std"].exp().expand_as(loc)

    actor = make_policy(Policy())
    data = make_data(actor)
    old = actor.get_dist(data.clone())
    stats = make_updater(actor).step(data)
    assert stats["accepted"].all()
    torch.testing.assert_close(stats["kl"], region_mean(textbook_kl(old, actor.get_dist(data.clone())), True))
