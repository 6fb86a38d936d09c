"""An update that raises somewhere in its middle leaves everything as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.modules import IndependentNormal, MultiAgentMLP, NormalParamExtractor, ProbabilisticActor
from torchrl.objectives import ClipPPOLoss, ValueEstimators

from tests.cases import (
    ACTION,
    GROUP,
    LOG_PROB,
    OBSERVATION,
    REWARD,
    VALUE,
    bits,
    make_actor,
    make_data,
    make_loss,
    same_bits,
)
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import (
    ClippedUpdater,
    HAPPOUpdater,
    HATRPOSequentialObjective,
    TRPOLoss,
)


class RaisesAt(TorchDispatchMode):
    """Raises an error in place of the operation with a number, once; counts the operations without one."""

    def __init__(self, number=None, error=RuntimeError):
        super().__init__()
        self.count, self.number, self.error = 0, number, error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.number:
            raise self.error("out of memory")
        return func(*args, **(kwargs or {}))


def clip_loss(actor):
    loss = ClipPPOLoss(actor, entropy_bonus=False)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB)
    return loss


def make_plain_actor():
    """One network for all agents, without TorchRL's multi-agent classes."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), NormalParamExtractor()).double()
    keys = [(GROUP, "loc"), (GROUP, "scale")]
    return ProbabilisticActor(
        TensorDictModule(net, [OBSERVATION], keys),
        in_keys=keys,
        out_keys=[ACTION],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )


def own_actor():
    return make_actor(share_params=False)


def shared_actor():
    return make_actor(share_params=True)


UPDATES = {
    "plain": (make_plain_actor, lambda actor: TrustRegionUpdater(make_loss(actor))),
    "shared": (shared_actor, lambda actor: TrustRegionUpdater(make_loss(actor))),
    "per_agent": (own_actor, lambda actor: TrustRegionUpdater(make_loss(actor))),
    "not_functional": (own_actor, lambda actor: TrustRegionUpdater(make_loss(actor, functional=False))),
    "hatrpo": (own_actor, lambda actor: TrustRegionUpdater(HATRPOSequentialObjective(make_loss(actor)))),
    "mappo": (shared_actor, lambda actor: ClippedUpdater(clip_loss(actor), epochs=2, minibatch_size=20)),
    "happo": (own_actor, lambda actor: HAPPOUpdater(clip_loss(actor), epochs=2, minibatch_size=20)),
}


@pytest.mark.parametrize("name", UPDATES)
def test_an_error_anywhere_leaves_the_policy_and_the_next_step_as_they_were(name):
    """``TensorDict.to_module`` restores nothing when an exception leaves its block.

    After one error the policy had no parameters of its own any more: later steps were "accepted", and what collects
    never changed.
    """
    make, make_updater = UPDATES[name]

    def begin():
        torch.manual_seed(1)
        actor = make()
        data = make_data(actor)
        return actor, data, make_updater(actor)

    for _ in range(2):  # the first fills caches
        actor, data, updater = begin()
        with RaisesAt() as counted:
            stats = updater.step(data)
        assert stats["accepted"].all()
    after = bits(actor)
    places = torch.linspace(1, counted.count, 10).int().tolist()
    for number, error in zip(places, [KeyboardInterrupt, RuntimeError] * 5, strict=True):
        actor, data, updater = begin()
        parameters, before, state = dict(actor.named_parameters()), bits(actor), torch.get_rng_state()
        with pytest.raises(error, match="out of memory"), RaisesAt(number, error):
            updater.step(data)
        assert all(value is parameters.pop(key) for key, value in actor.named_parameters())
        assert not parameters
        assert same_bits(actor, before)
        torch.set_rng_state(state)
        updater.step(data)
        assert same_bits(actor, after), "the next step was another one"


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("share_params", [True, False], ids=["shared", "per_agent"])
def test_an_error_in_a_forward_pass_leaves_policy_and_critic_their_parameters(share_params, functional):
    """Target parameters are no parameters: a critic that raised under them had none, and an empty state_dict."""
    actor = make_actor(share_params=share_params)
    net = MultiAgentMLP(3, 1, n_agents=3, centralized=False, share_params=share_params, num_cells=[4], depth=1).double()
    critic = TensorDictModule(net, [OBSERVATION], [VALUE])
    loss = TRPOLoss(actor, critic, functional=functional)
    loss.set_keys(action=ACTION, reward=REWARD, value=VALUE)
    data = make_data(actor).exclude("advantage")
    data["next"] = (
        data.select(OBSERVATION).set(REWARD, torch.zeros(5, 8, 3, 1)).set("done", torch.zeros(5, 8, 1).bool())
    )
    bad = data.clone().set(OBSERVATION, data[OBSERVATION][..., :-1])
    estimated = bad.clone().update({"advantage": torch.zeros(5, 8, 3, 1), "value_target": torch.zeros(5, 8, 3, 1)})
    own = [network.state_dict(keep_vars=True) for network in (actor, critic)]
    params = [loss.critic_network_params, loss.target_critic_network_params] if functional else [None, None]
    calls = [
        lambda: loss.value_estimator(bad.clone(), params=params[0], target_params=params[1]),
        lambda: TrustRegionUpdater(loss).step(bad),
        lambda: loss.loss_critic(estimated),
        lambda: loss(estimated),
    ]
    for call in calls:
        with pytest.raises((RuntimeError, ValueError)):
            call()
        for network, before in zip((actor, critic), own, strict=True):
            state = network.state_dict(keep_vars=True)
            assert list(state) == list(before)
            assert all(state[key] is value for key, value in before.items())


@pytest.mark.parametrize("make", [TRPOLoss, ClipPPOLoss])
def test_an_error_in_another_estimator_leaves_the_critic_its_parameters(make):
    """The update calls the loss's estimator for a missing advantage, TorchRL's own too."""
    actor = make_actor()
    net = MultiAgentMLP(3, 1, n_agents=3, centralized=False, share_params=False, num_cells=[4], depth=1).double()
    critic = TensorDictModule(net, [OBSERVATION], [VALUE])
    loss = make(actor, critic)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    loss.make_value_estimator(ValueEstimators.GAE)
    data = make_data(actor).exclude("advantage")
    data["next"] = data.select(OBSERVATION).update({REWARD: torch.zeros(5, 8, 3, 1)})
    data["next", "done"] = data["next", "terminated"] = torch.zeros(5, 8, 1, dtype=torch.bool)
    own = critic.state_dict(keep_vars=True)
    bad = data.clone().set(OBSERVATION, data[OBSERVATION][..., :-1])
    updater = TrustRegionUpdater(loss) if make is TRPOLoss else ClippedUpdater(loss)
    with pytest.raises(RuntimeError):
        updater.step(bad)
    assert all(own[key] is value for key, value in critic.state_dict(keep_vars=True).items())
    critic(data)
    copy.deepcopy(critic)
