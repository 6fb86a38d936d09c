"""What TorchRL asks of a PPO loss, asked of TRPOLoss: PPOLoss and MAPPOLoss on the same data are the reference."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from functools import cache
from typing import Any

import pytest
import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
    set_composite_lp_aggregate,
)
from torch import nn
from torch.distributions import Categorical, Gamma, MixtureSameFamily, Normal
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    IndependentNormal,
    MultiAgentMLP,
    NormalParamExtractor,
    OneHotCategorical,
    PopArtValueNorm,
    RunningValueNorm,
    TanhNormal,
)
from torchrl.objectives import PPOLoss, SoftUpdate, ValueEstimators
from torchrl.objectives.multiagent import IPPOLoss, MAPPOLoss
from torchrl.objectives.value import GAE, MultiAgentGAE, TD0Estimator, TD1Estimator, TDLambdaEstimator, VTrace

from tests.cases import bits, same_bits
from torchrl_trpo.errors import PlainKeyError
from torchrl_trpo.keys import path
from torchrl_trpo.objectives import AgentGAE, CentralCriticValueEstimator, TRPOLoss

BATCH, AGENTS, OBSERVED = (2, 3), 2, 3
HEADS = {"normal": 4, "tanh_normal": 4, "categorical": 3, "one_hot": 3, "composite": 7}
DISTRIBUTIONS = {
    "normal": IndependentNormal,
    "tanh_normal": TanhNormal,
    "categorical": Categorical,
    "one_hot": OneHotCategorical,
    "composite": CompositeDistribution,
}
PARTS = {"move": IndependentNormal, "gear": Categorical}
LAYOUTS = {
    "single": {},
    "nested": {"root": ("deep", "inner")},
    "agents": {"root": ("agents",), "n_agents": AGENTS},
    "agents_each": {"root": ("agents",), "n_agents": AGENTS, "share_params": False},
    "team": {"root": ("agents",), "n_agents": AGENTS, "team": True},
}
ESTIMATORS = {
    ValueEstimators.TD0: TD0Estimator,
    ValueEstimators.TD1: TD1Estimator,
    ValueEstimators.TDLambda: TDLambdaEstimator,
    ValueEstimators.GAE: GAE,
    ValueEstimators.MAGAE: AgentGAE,
    ValueEstimators.VTrace: VTrace,
}
CLIPPING = {"clip_fraction", "max_ratio", "mean_ratio", "ESS"}
"""What a clipping loss returns beyond ``PPOLoss``; its ``ESS`` is not a share of the rows."""
KIND = pytest.mark.parametrize("kind", HEADS)
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
FUNCTIONAL = pytest.mark.parametrize("functional", [True, False], ids=["functional", "not_functional"])
IN_NONE_MEAN_SUM = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


@dataclass
class Case:
    """A policy that has moved since it collected the data, its critic, the data, and the keys of all that."""

    actor: ProbabilisticTensorDictSequential
    critic: TensorDictModule | TensorDictSequential
    data: TensorDict
    keys: dict[str, NestedKey | list[NestedKey]]

    def losses(self, other=PPOLoss, theirs=None, **keywords) -> tuple[TRPOLoss, Any]:
        """Ours and TorchRL's, of equal networks with parameters of their own; ``theirs``: keywords of TorchRL's."""
        made = []
        for kind, own in ((TRPOLoss, {}), (other, theirs or {})):
            actor, critic = deepcopy((self.actor, self.critic))
            made.append(kind(actor, critic, **{"entropy_coeff": 0.01, **keywords, **own}))
            made[-1].set_keys(**self.keys)
        return tuple(made)

    def loss(self, **keywords) -> TRPOLoss:
        return self.losses(**keywords)[0]


class Split(nn.Module):
    """Outputs of a network as the parameters of a kind of action."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.extract = kind, NormalParamExtractor()

    def forward(self, outputs):
        if self.kind.endswith("normal"):
            return self.extract(outputs)
        return (*self.extract(outputs[..., :4]), outputs[..., 4:]) if self.kind == "composite" else outputs


def make_critic(critic, key):
    return TensorDictModule(deepcopy(critic.module), critic.in_keys, [key])


def flat_key(*parts):
    return parts if len(parts) > 1 else parts[0]


def make_case(kind="normal", *, given=True, **layout):
    """A case of its own data; ``given``: with an advantage, a value target and values."""
    with set_composite_lp_aggregate(layout.get("aggregate", False)):
        case = build_case(kind, **layout)
    data = case.data.clone() if given else without_estimate(case.data).clone()
    return Case(case.actor, case.critic, data, dict(case.keys))


@cache
def build_case(
    kind, *, root=(), n_agents=None, share_params=True, team=False, common=False, value="state_value", aggregate=False
):
    """The networks and a batch of one layout; built once, since copies are faster."""
    agents = () if n_agents is None else (n_agents,)

    def key(*names):
        return flat_key(*root, *names)

    def network(n_in, n_out):
        if n_agents is None:
            return nn.Linear(n_in, n_out)
        return MultiAgentMLP(n_in, n_out, n_agents, centralized=False, share_params=share_params, num_cells=[2])

    features = 4 if common else OBSERVED
    read = key("features") if common else key("observation")
    if kind == "composite":
        params = [key("params", "move", "loc"), key("params", "move", "scale"), key("params", "gear", "logits")]
        in_keys, actions = [key("params")], [key(name) for name in PARTS]
        kwargs = {"distribution_map": PARTS, "name_map": dict(zip(PARTS, actions, strict=True))}
    else:
        names = ["loc", "scale"] if kind.endswith("normal") else ["logits"]
        params, actions, kwargs = [key(name) for name in names], [key("action")], {}
        in_keys = dict(zip(names, params, strict=True))
    body = [TensorDictModule(network(OBSERVED, features), [key("observation")], [read])] if common else []
    actor = ProbabilisticTensorDictSequential(
        *body,
        TensorDictModule(nn.Sequential(network(features, HEADS[kind]), Split(kind)), [read], params),
        ProbabilisticTensorDictModule(
            in_keys=in_keys,
            out_keys=actions,
            distribution_class=DISTRIBUTIONS[kind],
            distribution_kwargs=kwargs,
            return_log_prob=True,
        ),
    ).double()
    critic = TensorDictModule(network(features, 1), [read], [key(*path(value))]).double()
    critic = TensorDictSequential(*body, critic) if common else critic

    def normal(*last):
        return torch.randn(*BATCH, *last, dtype=torch.float64)

    data = TensorDict({key("observation"): normal(*agents, OBSERVED)}, BATCH)
    if agents:
        data["agents"].batch_size = [*BATCH, *agents]
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        actor(data)
    shared = () if team else agents
    done = torch.rand(*BATCH, *shared, 1) < 0.3
    names = {name: name if team else key(name) for name in ("reward", "done", "terminated")}
    data["next"] = TensorDict(
        {
            key("observation"): normal(*agents, OBSERVED),
            names["reward"]: normal(*shared, 1),
            names["done"]: done,
            names["terminated"]: done & (torch.rand_like(done, dtype=torch.float64) < 0.5),
        },
        BATCH,
    )
    if agents:
        data["next", "agents"].batch_size = [*BATCH, *agents]
    for name in ("advantage", "value_target", key(*path(value))):
        data[name] = normal(*agents, 1)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    log_probs = [key(f"{name}_log_prob") for name in PARTS] if kind == "composite" else key("action_log_prob")
    log_probs = actor.log_prob_keys[0] if aggregate else log_probs
    keys = {**names, "value": key(*path(value)), "sample_log_prob": log_probs}
    return Case(actor, critic, data, {**keys, "action": actions if kind == "composite" else actions[0]})


def results(loss, data, losses=("loss_objective", "loss_entropy", "loss_critic")):
    """What a loss returns, and the gradient of each parameter."""
    loss.zero_grad()
    out = loss(data.clone())
    total = sum(out[key].sum() for key in losses if key in out.keys())
    grads = torch.autograd.grad(total, list(loss.parameters()), allow_unused=True)
    return out.detach(), dict(zip([name for name, _ in loss.named_parameters()], grads, strict=True))


def assert_same(ours, theirs, data, besides=frozenset(), **settings):
    out, grads = results(ours, data, **settings)
    expected, their_grads = results(theirs, data, **settings)
    for key in set(expected.keys(True, True)) - CLIPPING - besides:
        torch.testing.assert_close(out[key], expected[key])
    assert list(grads) == list(their_grads)
    for name, grad in grads.items():
        if grad is None or their_grads[name] is None:
            assert grad is their_grads[name], name
        else:
            torch.testing.assert_close(grad, their_grads[name])


def without_estimate(data):
    return data.exclude(
        "advantage", "value_target", *[key for key in data.keys(True) if path(key)[-1] == "state_value"]
    )


def estimate(loss, data):
    with torch.no_grad():
        return loss.value_estimator(
            data, params=loss.critic_network_params, target_params=loss.target_critic_network_params
        )


# ------------------------------------------------------------------ the numbers of PPOLoss and MAPPOLoss


@KIND
@pytest.mark.parametrize("layout", ["single", "nested", "agents_each", "team"])
@pytest.mark.parametrize("advantage", ["before", "missing"])
def test_values_and_gradients_are_those_of_ppo(kind, layout, advantage):
    case = make_case(kind, **LAYOUTS[layout])
    ours, theirs = case.losses(entropy_bonus=kind != "tanh_normal")  # theirs samples that entropy
    theirs.make_value_estimator(ValueEstimators.MAGAE)
    data = without_estimate(case.data)
    if advantage == "before":
        estimate(ours, data)
        torch.testing.assert_close(estimate(theirs, without_estimate(data))["advantage"], data["advantage"])
    assert_same(ours, theirs, data)


@pytest.mark.parametrize("kind", ["normal", "composite"])
@pytest.mark.parametrize("layout", ["single", "agents"])
@pytest.mark.parametrize("advantage", ["given", "missing"])
def test_values_and_gradients_are_those_of_ppo_without_functional_parameters(kind, layout, advantage):
    case = make_case(kind, **LAYOUTS[layout])
    ours, theirs = case.losses(functional=False, entropy_bonus=kind != "tanh_normal")
    theirs.make_value_estimator(ValueEstimators.MAGAE)
    assert ours.actor_network_params is None
    assert ours.critic_network_params is None
    assert_same(ours, theirs, case.data if advantage == "given" else without_estimate(case.data))


@pytest.mark.parametrize("layout", ["agents", "agents_each", "team"])
@pytest.mark.parametrize("other", [MAPPOLoss, IPPOLoss])
@pytest.mark.parametrize("kind", ["normal", "composite"])
@pytest.mark.parametrize("advantage", ["given", "missing"])
def test_values_and_gradients_are_those_of_mappo(kind, layout, other, advantage):
    """While no ratio leaves the clipping interval."""
    case = make_case(kind, **LAYOUTS[layout])
    settings = {"normalize_advantage": True, "normalize_advantage_exclude_dims": (-2,)}
    ours, theirs = case.losses(other, theirs={"clip_epsilon": 0.99}, **settings)
    data = case.data if advantage == "given" else without_estimate(case.data)
    assert theirs(data)["clip_fraction"] == 0
    assert_same(ours, theirs, data)


@pytest.mark.parametrize("layout", ["agents", "team"])
@pytest.mark.parametrize("norm", [PopArtValueNorm, RunningValueNorm])
@pytest.mark.parametrize("clip_value", [None, 0.2])
@pytest.mark.parametrize("loss_critic_type", ["l2", "smooth_l1"])
def test_a_value_norm_counts_as_in_mappo(layout, norm, clip_value, loss_critic_type):
    """Its statistics move in ``loss_critic`` and in forward, where targets once stayed as large as they are."""
    case = make_case(**LAYOUTS[layout])
    settings = {"clip_value": clip_value, "loss_critic_type": loss_critic_type}
    actor, critic = deepcopy((case.actor, case.critic))
    ours = TRPOLoss(actor, critic, value_norm=norm().double(), **settings)
    actor, critic = deepcopy((case.actor, case.critic))
    theirs = MAPPOLoss(actor, critic, value_norm=norm().double(), **settings)
    for loss in (ours, theirs):
        loss.set_keys(**case.keys)
    for step in range(3):
        data = case.data.clone()
        data["value_target"] = 10 + (step + 1) * data["value_target"]
        for mine, other in zip(ours.loss_critic(data), theirs.loss_critic(data.clone()), strict=True):
            torch.testing.assert_close(mine, other)
        assert_same(ours, theirs, data, losses=("loss_critic",), besides={"loss_objective", "loss_entropy", "entropy"})
        for mine, other in zip(ours.value_norm.buffers(), theirs.value_norm.buffers(), strict=True):
            torch.testing.assert_close(mine, other)


def test_the_team_reward_goes_to_each_agent():
    case = make_case(**LAYOUTS["team"], given=False)
    each = case.data.clone()
    for name in ("reward", "done", "terminated"):
        each["next", name] = case.data["next", name].unsqueeze(-2).expand(*BATCH, AGENTS, 1).clone()
    loss = case.loss()
    assert case.data["next", "reward"].shape == (*BATCH, 1)
    torch.testing.assert_close(estimate(loss, case.data)["advantage"], estimate(loss, each)["advantage"])


# ------------------------------------------------------------------ where gradients go


@pytest.mark.parametrize(("kind", "layout"), [("normal", "single"), ("composite", "agents_each")])
@pytest.mark.parametrize("advantage", ["given", "missing"])
@pytest.mark.parametrize("name", ["loss_objective", "loss_entropy", "loss_critic"])
def test_a_loss_reaches_its_own_network_alone(kind, layout, advantage, name):
    case = make_case(kind, **LAYOUTS[layout])
    loss = case.loss(entropy_coeff=0.1)
    _, grads = results(loss, case.data if advantage == "given" else without_estimate(case.data), losses=(name,))
    own = "critic_network_params" if name == "loss_critic" else "actor_network_params"
    assert {key for key, grad in grads.items() if grad is not None} == {key for key in grads if key.startswith(own)}
    assert all(grad.abs().sum() > 0 for key, grad in grads.items() if key.startswith(own) and "weight" in key)


@pytest.mark.parametrize("separate_losses", [True, False])
@pytest.mark.parametrize(("kind", "layout"), [("normal", "single"), ("composite", "nested"), ("categorical", "agents")])
def test_separate_losses_keep_the_critic_out_of_what_is_shared(kind, layout, separate_losses):
    case = make_case(kind, **LAYOUTS[layout], common=True)
    ours, theirs = case.losses(separate_losses=separate_losses)
    names = [name for name, _ in ours.named_parameters()]
    assert len(names) == len(set(names))
    _, grads = results(ours, case.data, losses=("loss_critic",))
    shared = [grad for name, grad in grads.items() if name.startswith("actor_network_params.module.0")]
    assert len(shared) > 0
    assert all((grad is None) == separate_losses for grad in shared)
    for losses in [("loss_critic",), ("loss_objective",), ("loss_entropy",)]:
        assert_same(ours, theirs, case.data, losses=losses)


def test_the_estimated_advantage_carries_no_gradient():
    case = make_case(given=False)
    loss = case.loss()
    data = loss.value_estimator(
        case.data, params=loss.critic_network_params, target_params=loss.target_critic_network_params
    )
    assert not data["advantage"].requires_grad
    assert not data["value_target"].requires_grad


@pytest.mark.parametrize("name", ["action", "sample_log_prob"])
def test_data_with_gradients_is_refused(name):
    case = make_case()
    case.data[case.keys[name]] = case.data[case.keys[name]].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{case.keys[name]}.*requires grad"):
        case.loss()(case.data)


# ------------------------------------------------------------------ value estimators


@pytest.mark.parametrize(
    ("layout", "estimator"),
    [
        (name, entry)
        for name in ("single", "agents")
        for entry in ESTIMATORS
        if (name, entry.name) != ("agents", "VTrace")
    ],
)
@pytest.mark.parametrize("advantage", ["before", "missing"])
def test_each_value_estimator_serves_as_in_ppo(estimator, layout, advantage):
    """TorchRL's ``VTrace`` has no agents."""
    case = make_case(**LAYOUTS[layout], given=False)
    ours, theirs = case.losses()
    for loss in (ours, theirs):
        loss.make_value_estimator(estimator, gamma=0.8)
    if advantage == "before":
        expected = estimate(theirs, case.data.clone())
        torch.testing.assert_close(estimate(ours, case.data)["value_target"], expected["value_target"])
    assert_same(ours, theirs, case.data)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("form", ["class", "instance", "name"])
def test_an_estimator_may_be_an_entry_a_class_or_an_instance(estimator, form):
    case = make_case(given=False)
    hyperparams: dict[str, Any] = {"gamma": 0.8}
    if estimator in (ValueEstimators.TDLambda, ValueEstimators.GAE, ValueEstimators.MAGAE):
        hyperparams["lmbda"] = 0.7
    by_entry, other = case.loss(), case.loss()
    by_entry.make_value_estimator(estimator, **hyperparams)
    own = {**hyperparams, "value_network": other.critic_network}
    if estimator is ValueEstimators.VTrace:
        own["actor_network"] = case.actor
    if form == "class":
        other.make_value_estimator(ESTIMATORS[estimator], **own)
    elif form == "instance":
        other.make_value_estimator(ESTIMATORS[estimator](**own))
    else:
        assert other.make_value_estimator(estimator.name.lower(), **hyperparams) is other
        assert other.value_type is by_entry.value_type is estimator
    assert isinstance(other.value_estimator, ESTIMATORS[estimator])
    expected, actual = by_entry(case.data), other(case.data)
    for key in expected.keys():
        torch.testing.assert_close(actual[key], expected[key])


@pytest.mark.parametrize("estimator", [None, *ESTIMATORS, MultiAgentGAE], ids=str)
def test_making_an_estimator_returns_the_loss(estimator):
    loss = make_case().loss()
    own = {"gamma": 0.9, "lmbda": 0.9, "value_network": loss.critic_network} if isinstance(estimator, type) else {}
    assert loss.make_value_estimator(estimator, **own) is loss


@pytest.mark.parametrize("name", ["AGENT", object()], ids=["name", "object"])
def test_an_unknown_estimator_is_refused(name):
    loss = make_case().loss()
    with pytest.raises((KeyError, TypeError), match=r"Unknown value estimator alias|value_type must be"):
        loss.make_value_estimator(name)


def test_the_default_estimator_has_the_defaults_of_torchrl():
    """``value_type`` was the class, where a TorchRL loss has the entry."""
    ours, theirs = make_case().losses(MAPPOLoss)
    ours.make_value_estimator()
    theirs.make_value_estimator()
    assert ours.value_type is theirs.value_type is ValueEstimators.MAGAE
    for name in ("gamma", "lmbda"):
        assert getattr(ours.value_estimator, name) == getattr(theirs.value_estimator, name)
    assert isinstance(ours.value_estimator, AgentGAE)
    assert ours.value_estimator.differentiable == theirs.value_estimator.differentiable


# ------------------------------------------------------------------ keys


def test_the_accepted_keys_and_their_defaults_are_those_of_ppo():
    ours, theirs = make_case().losses()
    assert [field.name for field in dataclass_fields(ours._AcceptedKeys)] == [
        field.name for field in dataclass_fields(theirs._AcceptedKeys)
    ]
    assert ours.default_keys() == theirs.default_keys()
    assert ours.tensor_keys == theirs.tensor_keys


@pytest.mark.parametrize("new", ["other", ("some", "other")], ids=["flat", "nested"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "name", ["advantage", "value_target", "value", "sample_log_prob", "action", "reward", "done", "terminated"]
)
def test_each_key_may_have_another_name(name, new, when):
    case = make_case(given=False)
    expected = case.loss()(case.data)
    old = {"advantage": "advantage", "value_target": "value_target", **case.keys}[name]
    if name == "value":
        case.critic = make_critic(case.critic, new)
    elif name in ("reward", "done", "terminated"):
        case.data.rename_key_(("next", old), ("next", *path(new)))
    elif name in ("action", "sample_log_prob"):
        case.data.rename_key_(old, new)
    actor, critic = deepcopy((case.actor, case.critic))
    loss = TRPOLoss(actor, critic, entropy_coeff=0.01)
    if when == "after":
        loss.set_keys(value=case.critic.out_keys[0])
        loss.make_value_estimator()
    loss.set_keys(**{name: new})
    actual = loss(case.data)
    for key in expected.keys():
        torch.testing.assert_close(actual[key], expected[key])
    assert getattr(loss.tensor_keys, name) == new
    written = estimate(loss, case.data)
    if name in ("advantage", "value_target", "value"):
        assert new in written.keys(True)
        assert old not in written.keys(True)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("name", ["advantage", "value_target", "reward", "done", "terminated", "sample_log_prob"])
def test_keys_reach_every_estimator_whether_made_before_or_after(estimator, name):
    before, after = make_case().loss(), make_case().loss()
    before.make_value_estimator(estimator)
    before.set_keys(**{name: ("a", "b")})
    after.set_keys(**{name: ("a", "b")})
    after.make_value_estimator(estimator)
    for loss in (before, after):
        assert getattr(loss.value_estimator.tensor_keys, name) == ("a", "b")


def test_none_restores_a_default_and_unknown_keys_are_refused():
    loss = make_case().loss()
    loss.set_keys(advantage="a")
    loss.set_keys(advantage=None)
    assert loss.tensor_keys.advantage == "advantage"
    with pytest.raises(ValueError, match="an_unknown_key is not an accepted tensordict key"):
        loss.set_keys(an_unknown_key="b")


@pytest.mark.parametrize("kind", ["normal", "categorical"])
@pytest.mark.parametrize("layout", ["single", "nested", "team"])
def test_forward_needs_its_in_keys_alone(kind, layout):
    case = make_case(kind, **LAYOUTS[layout], given=False)
    ours, theirs = case.losses()
    ours.make_value_estimator()
    assert set(ours.in_keys) == set(theirs.in_keys)
    expected, actual = ours(case.data), ours(case.data.select(*ours.in_keys))
    assert set(actual.keys()) == set(expected.keys()) == set(ours.out_keys)
    assert actual["kl"].isnan(), "it needs the distribution of the data"
    for key in set(actual.keys(True, True)) - {"kl"}:
        torch.testing.assert_close(actual[key], expected[key])


@pytest.mark.parametrize("kind", ["normal", "categorical", "one_hot"])
@pytest.mark.parametrize("layout", ["single", "nested"])
def test_tensors_may_be_given_by_name(kind, layout):
    case = make_case(kind, **LAYOUTS[layout], given=False)
    loss = case.loss()
    tensors = {"_".join(path(key)): case.data[key] for key in loss.in_keys}
    expected = loss(case.data.select(*loss.in_keys))
    for key, value in zip(loss.out_keys, loss(**tensors), strict=True):
        torch.testing.assert_close(value, expected[key], equal_nan=key == "kl")
    loss.select_out_keys("loss_objective", "loss_critic")
    for key, value in zip(["loss_objective", "loss_critic"], loss(**tensors), strict=True):
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda entry: entry.name)
def test_what_the_critic_alone_reads_may_be_given_by_name(estimator):
    """TorchRL takes what the policy reads at t+1, and no more."""
    case = make_case(given=False)
    for part in (case.data, case.data["next"]):
        part["state"] = torch.randn(*BATCH, 2, dtype=torch.float64)
    case.critic = TensorDictModule(nn.Linear(2, 1).double(), ["state"], ["state_value"])
    loss = case.loss()
    loss.make_value_estimator(estimator, gamma=0.9)
    values = loss(**{"_".join(path(key)): case.data[key] for key in loss.in_keys})
    expected = loss(case.data.select(*loss.in_keys))
    for key, value in zip(loss.out_keys, values, strict=True):
        torch.testing.assert_close(value, expected[key], equal_nan=key == "kl")


def test_what_a_central_critic_pools_is_among_the_keys():
    case = make_case(root=("agents",), n_agents=AGENTS, given=False)
    for part in (case.data, case.data["next"]):
        part["state"] = torch.randn(*BATCH, 2, dtype=torch.float64)
    central = ("agents", "central")
    case.critic = TensorDictModule(nn.Linear(2, 1).double(), [central], [case.keys["value"]])
    loss = case.loss()
    loss.make_value_estimator(
        CentralCriticValueEstimator,
        gamma=0.9,
        lmbda=0.8,
        value_network=loss.critic_network,
        observation_keys=[],
        state_key="state",
        n_agents=AGENTS,
        central_key=central,
    )
    expected, actual = loss(case.data), loss(case.data.select(*loss.in_keys, strict=False))
    for key in set(actual.keys()) - {"kl"}:
        torch.testing.assert_close(actual[key], expected[key])


def test_selected_out_keys_are_what_is_returned():
    case = make_case()
    loss = case.loss()
    everything = set(loss(case.data).keys())
    loss.select_out_keys("loss_objective")
    assert set(loss(case.data).keys()) == {"loss_objective"}
    assert loss.out_keys == ["loss_objective"]
    loss.reset_out_keys()
    assert set(loss(case.data).keys()) == everything


@pytest.mark.parametrize("kind", ["normal", "composite"])
@pytest.mark.parametrize("entropy_bonus", [True, False])
@pytest.mark.parametrize("clip_value", [None, 0.2])
@pytest.mark.parametrize("log_explained_variance", [True, False])
@pytest.mark.parametrize("critic_coeff", [None, 0.0, 0.5])
def test_out_keys_follow_the_settings(kind, entropy_bonus, clip_value, log_explained_variance, critic_coeff):
    case = make_case(kind)
    settings = {"entropy_bonus": entropy_bonus, "clip_value": clip_value, "critic_coeff": critic_coeff}
    ours, theirs = case.losses(log_explained_variance=log_explained_variance, **settings)
    out = ours(case.data)
    assert set(out.keys()) == set(ours.out_keys)
    assert set(out.keys()) - set(theirs(case.data).keys()) == {"kl", "ESS"}
    assert_same(ours, theirs, case.data)


@LAYOUT
@pytest.mark.parametrize("kind", ["normal", "composite"])
@pytest.mark.parametrize("advantage", ["missing"])
def test_forward_leaves_data_and_parameters_as_they_are(kind, layout, advantage):
    case = make_case(kind, **LAYOUTS[layout], given=advantage == "given")
    loss, copy = case.loss(), case.data.clone()
    before = deepcopy(loss.state_dict())
    first = loss(case.data)
    assert (loss(case.data) == first).all()
    assert set(case.data.keys(True, True)) == set(copy.keys(True, True))
    assert (case.data == copy).all()
    after = loss.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if torch.is_tensor(value))


# ------------------------------------------------------------------ settings


@IN_NONE_MEAN_SUM
@pytest.mark.parametrize(("kind", "layout"), [("composite", "single"), ("normal", "agents_each")])
@pytest.mark.parametrize("masked", [True, False])
def test_reductions_are_those_of_ppo(kind, layout, reduction, masked):
    case = make_case(kind, **LAYOUTS[layout])
    ours, theirs = case.losses(reduction=reduction)
    if masked:
        case.data["collector", "mask"] = torch.rand(*BATCH, 1) < 0.6
    assert_same(ours, theirs, case.data)
    expected = case.data["advantage"].shape[:-1] if reduction == "none" else ()
    out = ours(case.data)
    assert all(out[key].shape == expected for key in ("loss_objective", "loss_entropy", "loss_critic"))


@pytest.mark.parametrize("key", ["auto", None, "counts", ("a", "mask")], ids=str)
@pytest.mark.parametrize(
    ("written", "layout"),
    [("counts", "single"), (("a", "mask"), "agents"), (("collector", "mask"), "single"), ("shifted_valid", "agents")],
    ids=str,
)
def test_a_loss_mask_is_read_as_in_ppo(layout, key, written):
    case = make_case(**LAYOUTS[layout])
    ours, theirs = case.losses()
    ours.loss_mask_key = theirs.loss_mask_key = key
    case.data[written] = torch.tensor([[True, True, False], [False, True, True]])
    if key not in ("auto", None, written):  # PPO goes on without a mask
        with pytest.raises(PlainKeyError, match=r"loss_mask_key: .* is not in the data"):
            ours(case.data)
        return
    out = ours(case.data)
    if ours._loss_mask_keys() and written in ours._loss_mask_keys():
        case.data["advantage"][~case.data[written]] = 1e6
        torch.testing.assert_close(ours(case.data)["loss_objective"], out["loss_objective"])
    assert_same(ours, theirs, case.data)


def test_a_mask_key_that_is_no_key_is_refused():
    with pytest.raises(ValueError, match="loss_mask_key must be"):
        make_case().loss().loss_mask_key = 3


@pytest.mark.parametrize("loss_critic_type", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("clip_value", [None, 0.1, 2, torch.tensor(0.3)], ids=str)
@pytest.mark.parametrize("layout", ["single", "agents"])
def test_critic_losses_are_those_of_ppo(layout, clip_value, loss_critic_type):
    case = make_case(**LAYOUTS[layout])
    ours, theirs = case.losses(clip_value=clip_value, loss_critic_type=loss_critic_type)
    assert_same(ours, theirs, case.data)
    for mine, other in zip(ours.loss_critic(case.data), theirs.loss_critic(case.data.clone()), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("clip_value", [True, torch.zeros(2), "0.1"], ids=str)
def test_a_clip_value_that_is_no_number_is_refused(clip_value):
    """True means the clipping interval of the ratio, which a trust region has not."""
    with pytest.raises(ValueError, match="clip_value must be a float or a scalar tensor"):
        make_case().loss(clip_value=clip_value)


def test_the_critics_loss_writes_nothing_into_the_data():
    """Its new values replaced those of the data, and from then on ``clip_value`` clipped nothing."""
    case = make_case()
    loss, copy = case.loss(clip_value=0.1), case.data.clone()
    first = loss.loss_critic(case.data)[0]
    assert (case.data == copy).all()
    torch.testing.assert_close(loss.loss_critic(case.data)[0], first)


def test_the_critics_mean_loss_is_that_of_ppo():
    """It knows masks and sequences; of ``loss_critic(data)[0].mean()``, half of an example was padding."""
    case = make_case()
    data = case.data.clone()
    data["collector", "mask"] = torch.arange(BATCH[1]).expand(BATCH) < 2
    data["value_target"][:, 2:] = 1e3
    ours, theirs = case.losses()
    torch.testing.assert_close(ours.mean_critic_loss(data), theirs(data.clone())["loss_critic"])


def test_clipping_needs_the_values_of_the_data():
    case = make_case()
    with pytest.raises(KeyError, match="clip_value is set"):
        case.loss(clip_value=0.1)(case.data.exclude("state_value"))


def test_a_flat_advantage_is_refused_in_the_words_of_ppo():
    case = make_case()
    data = case.data.reshape(-1)
    data["advantage"] = data["advantage"].squeeze(-1)
    for loss in case.losses():
        with pytest.raises(ValueError, match="outer product over samples"):
            loss(data)


def test_an_unknown_critic_loss_is_refused():
    case = make_case()
    with pytest.raises(NotImplementedError, match="cubic"):
        case.loss(loss_critic_type="cubic")(case.data)


@pytest.mark.parametrize("missing", ["value_target", "action_log_prob", "action", "observation"])
def test_what_is_missing_is_named(missing):
    case = make_case()
    with pytest.raises(KeyError, match=missing):
        case.loss()(case.data.exclude(missing))


@pytest.mark.parametrize(
    ("layout", "aggregate"),
    [("single", True), ("nested", True), ("single", False), ("nested", False), ("agents", False)],
)
@pytest.mark.parametrize("entropy_coeff", [0.0, 0.1, torch.tensor(0.2)], ids=str)
@pytest.mark.filterwarnings("ignore:You are using a composite distribution, yet your log-probability is a tensor")
def test_composite_actions_with_and_without_aggregated_log_probs(layout, aggregate, entropy_coeff):
    with set_composite_lp_aggregate(aggregate):
        case = make_case("composite", **LAYOUTS[layout], aggregate=aggregate)
        ours, theirs = case.losses(entropy_coeff=entropy_coeff)
        assert_same(ours, theirs, case.data)
        out = ours(case.data)
        assert ("composite_entropy" in out.keys()) == (not aggregate)
        assert set(out.keys()) == set(ours.out_keys)


@set_composite_lp_aggregate(False)
@pytest.mark.parametrize("by_part", [False, True])
@pytest.mark.filterwarnings("ignore:.*does not have an analytic entropy")
def test_composite_actions_of_which_a_part_has_no_closed_form(by_part):
    """Of a mixture there is neither the KL, which forward asked for, nor the entropy, which is sampled."""

    def mixture(logits, loc, scale):
        return MixtureSameFamily(Categorical(logits=logits), Normal(loc, scale))

    names = [("params", "pull", "concentration"), ("params", "pull", "rate")]
    names += [("params", "push", name) for name in ("logits", "loc", "scale")]
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(
            lambda observed: (*2 * [observed[..., 0].exp()], observed, observed, observed.exp()), ["observation"], names
        ),
        ProbabilisticTensorDictModule(
            in_keys=["params"],
            out_keys=["pull", ("deep", "push")],
            distribution_class=CompositeDistribution,
            distribution_kwargs={
                "distribution_map": {"pull": Gamma, "push": mixture},
                "name_map": {"pull": "pull", "push": ("deep", "push")},
            },
            return_log_prob=True,
        ),
    )
    data = make_case().data
    with set_exploration_type(ExplorationType.RANDOM):
        actor(data)
    log_probs = ["pull_log_prob", ("deep", "push_log_prob")]
    coefficients = dict(zip(log_probs, (0.2, 0.7), strict=True)) if by_part else 0.1
    outs = []
    for kind in (TRPOLoss, PPOLoss):
        loss = kind(actor, make_case().critic, entropy_coeff=coefficients)
        loss.set_keys(action=["pull", ("deep", "push")], sample_log_prob=log_probs)
        torch.manual_seed(0)
        outs.append(loss(data))
    assert set(outs[0].keys()) == set(outs[1].keys()) | {"ESS", "kl"}
    assert outs[0]["kl"].isnan()
    for key in outs[1].keys(True, True):
        torch.testing.assert_close(outs[0][key], outs[1][key])


@pytest.mark.parametrize("layout", ["nested", "agents"])
@IN_NONE_MEAN_SUM
def test_each_part_of_an_action_may_have_its_entropy_coefficient(layout, reduction):
    root = LAYOUTS[layout].get("root", ())
    case = make_case("composite", **LAYOUTS[layout])
    coefficients = {flat_key(*root, "move_entropy"): 0.2, flat_key(*root, "gear_entropy"): 0.7}
    ours, theirs = case.losses(entropy_coeff=coefficients, reduction=reduction)
    assert_same(ours, theirs, case.data)
    entropies = ours(case.data)["composite_entropy"]
    expected = -sum(coefficients[key] * entropies[key] for key in coefficients)
    actual = ours(case.data)["loss_entropy"]
    torch.testing.assert_close(actual.detach().sum(), expected.mean() if reduction == "mean" else expected.sum())
    incomplete = case.loss(entropy_coeff={flat_key(*root, "move_entropy"): 0.2})
    with pytest.raises(KeyError, match=r"Missing entropy coeff for head.*gear"):
        incomplete(case.data)


@pytest.mark.parametrize("entropy_coeff", ["0.1", [0.1]], ids=str)
def test_an_entropy_coefficient_is_a_number_or_a_mapping(entropy_coeff):
    with pytest.raises(TypeError, match="entropy_coeff must be a float or a Mapping"):
        make_case().loss(entropy_coeff=entropy_coeff)


@pytest.mark.parametrize(
    ("name", "values"), [("entropy_coeff", (0.1, 0.3)), ("critic_coeff", (1.0, 0.5)), ("clip_value", (0.2, 0.05))]
)
@pytest.mark.parametrize("form", [float, torch.tensor], ids=["float", "tensor"])
def test_coefficients_may_be_scheduled(name, values, form):
    case = make_case()
    first, second = (case.loss(**{name: value}) for value in values)
    setattr(first, name, form(values[1]))
    out, expected = first(case.data), second(case.data)
    for key in expected.keys():
        torch.testing.assert_close(out[key], expected[key])


@pytest.mark.parametrize(
    ("layout", "exclude"), [("single", ()), ("single", (-1,)), ("agents", (-2,)), ("agents", (-1, -2))], ids=str
)
@pytest.mark.parametrize("advantage", ["given", "missing"])
def test_normalised_advantages_are_those_of_ppo(layout, exclude, advantage):
    case = make_case(**LAYOUTS[layout])
    ours, theirs = case.losses(normalize_advantage=True, normalize_advantage_exclude_dims=exclude)
    theirs.make_value_estimator(ValueEstimators.MAGAE)
    assert_same(ours, theirs, case.data if advantage == "given" else without_estimate(case.data))


def test_normalising_over_the_agents_too_warns_as_in_ppo():
    case = make_case(**LAYOUTS["agents"])
    for loss in case.losses(normalize_advantage=True):
        with pytest.warns(UserWarning, match="normalize_advantage_exclude_dims"):
            loss(case.data)


@pytest.mark.parametrize("layout", ["single", "agents"])
def test_an_advantage_norm_scales_as_in_ppo(layout):
    case = make_case(**LAYOUTS[layout])
    ours, theirs = case.losses()
    for loss in (ours, theirs):
        loss.advantage_norm = PopArtValueNorm(beta=0.5).double()
        loss.advantage_norm.update(5 * torch.arange(10.0).double().unsqueeze(-1))
    assert_same(ours, theirs, case.data)
    with pytest.raises(ValueError, match="mutually exclusive"):
        case.loss(normalize_advantage=True, advantage_norm=PopArtValueNorm())


@pytest.mark.parametrize("ratio", [0.9, 1.0, 1.1, 10.0])
@pytest.mark.parametrize("layout", ["single", "agents"])
def test_capped_ratios_are_those_of_ppo(layout, ratio):
    case = make_case(**LAYOUTS[layout])
    ours, theirs = case.losses(max_importance_ratio=ratio)
    assert_same(ours, theirs, case.data)


@pytest.mark.parametrize("ratio", [0.0, -1.0])
def test_a_cap_that_is_not_positive_is_refused(ratio):
    with pytest.raises(ValueError, match="max_importance_ratio must be > 0"):
        make_case().loss(max_importance_ratio=ratio)


@pytest.mark.parametrize("critic_coeff", [None, 0.0, 0.25, 1.0])
def test_the_critics_coefficient_scales_its_loss(critic_coeff):
    case = make_case()
    ours, theirs = case.losses(critic_coeff=critic_coeff)
    assert_same(ours, theirs, case.data)
    assert ("loss_critic" in ours(case.data).keys()) == (critic_coeff != 0.0)
    plain = case.loss(critic_coeff=1.0).loss_critic(case.data)[0]
    torch.testing.assert_close(ours.loss_critic(case.data)[0], plain * (critic_coeff or 1.0))


@pytest.mark.parametrize("layout", ["single", "agents_each"])
@FUNCTIONAL
def test_a_loss_may_have_a_policy_alone(layout, functional):
    case = make_case(**LAYOUTS[layout])
    actor = deepcopy(case.actor)
    ours, theirs = (
        kind(deepcopy(actor), functional=functional, entropy_coeff=0.01, critic_coeff=None)
        for kind in (TRPOLoss, PPOLoss)
    )
    for loss in (ours, theirs):
        loss.set_keys(**{key: value for key, value in case.keys.items() if key != "value"})
    assert_same(ours, theirs, case.data)
    assert "loss_critic" not in ours.out_keys
    with pytest.raises(TypeError, match="Missing positional arguments"):
        TRPOLoss(actor, critic_coeff=1.0)


@pytest.mark.parametrize(
    ("keywords", "hint"),
    [
        ({"critic_coef": 1.0}, "'critic_coeff'"),
        ({"entropy_coef": 1.0}, "'entropy_coeff'"),
        ({"gamma": 0.9}, "gamma"),
        ({"clip_epsilon": 0.2}, r"Legal: TrustRegionUpdater\(loss, max_kl=...\)"),
        ({"reductoin": "sum"}, "'reduction'"),
        ({"compile": True}, "'compiled'"),
        ({"chunk_sise": 10}, "'chunk_size'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_keywords_that_torchrl_has_not_are_refused(keywords, hint):
    """``PPOLoss`` takes any keyword, and ignores those it does not know."""
    with pytest.raises(TypeError, match=f"{next(iter(keywords))}.*{hint}"):
        make_case().loss(**keywords)


@pytest.mark.parametrize("name", ["advantage_key", "value_target_key", "value_key"])
def test_keys_are_not_keywords(name):
    with pytest.raises(RuntimeError, match="set_keys"):
        make_case().loss(**{name: "a"})


def test_networks_may_be_given_by_either_name():
    case = make_case()
    loss = TRPOLoss(actor=case.actor, critic=case.critic)
    assert loss.actor_network.in_keys == case.actor.in_keys
    with pytest.raises(TypeError, match="Missing positional arguments"):
        TRPOLoss()


@pytest.mark.parametrize("layout", ["single", "agents"])
def test_a_lagging_policy_counts_as_in_ppo(layout):
    """In forward; the updater refuses one."""
    case = make_case(**LAYOUTS[layout])
    ours, theirs = case.losses(delay_actor=True)
    for loss in (ours, theirs):
        SoftUpdate(loss, tau=0.5)
        loss.actor_network_params.data.apply_(lambda value: value.mul_(1.1))
    assert_same(ours, theirs, case.data)
    with pytest.raises(ValueError, match="delay_actor=True requires functional=True"):
        case.loss(delay_actor=True, functional=False)


# ------------------------------------------------------------------ a module


@pytest.mark.parametrize("layout", ["single", "agents_each"])
@FUNCTIONAL
@pytest.mark.parametrize("made", [True, False], ids=["estimator", "no_estimator"])
def test_a_deep_copy_says_the_same_with_parameters_of_its_own(layout, functional, made):
    case = make_case(**LAYOUTS[layout])
    loss = case.loss(functional=functional)
    if made:
        loss.make_value_estimator(gamma=0.8, lmbda=0.7)
    data = without_estimate(case.data)
    twin = deepcopy(loss)
    assert type(twin) is type(loss)
    expected = loss(data)
    assert (twin(data) == expected).all()
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in loss.parameters())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.3
    assert (loss(data) == expected).all()
    assert (twin(data)["loss_objective"] != expected["loss_objective"]).all()
    assert (twin(data)["loss_critic"] != expected["loss_critic"]).all()


@pytest.mark.parametrize("layout", ["single", "agents_each"])
@FUNCTIONAL
@pytest.mark.parametrize("made", [True, False], ids=["estimator", "no_estimator"])
def test_a_state_dict_restores_what_a_loss_says(layout, functional, made):
    case = make_case(**LAYOUTS[layout])
    first = case.loss(functional=functional)
    second = case.loss(functional=functional)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.uniform_()
    if made:
        first.make_value_estimator(gamma=0.8, lmbda=0.7)
        second.make_value_estimator()
    result = second.load_state_dict(first.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same_bits(second, bits(first))
    data = without_estimate(case.data) if made else case.data
    assert (first(data) == second(data)).all()


@pytest.mark.parametrize("made", [True, False], ids=["estimator", "no_estimator"])
@pytest.mark.parametrize("separate_losses", [True, False])
@pytest.mark.parametrize("common", [True, False], ids=["common", "apart"])
@FUNCTIONAL
def test_parameters_and_state_are_listed_as_in_ppo(made, common, separate_losses, functional):
    ours, theirs = make_case(common=common).losses(separate_losses=separate_losses, functional=functional)
    if made:
        ours.make_value_estimator()
        theirs.make_value_estimator(ValueEstimators.MAGAE)
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()]
    assert len(names) == len(set(names)) == len(list(ours.parameters()))
    assert not any(name.startswith("target") or "value_estimator" in name for name in names)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["single", "agents_each"])
def test_a_loss_moves_to_another_type(layout, dtype):
    case = make_case(**LAYOUTS[layout])
    loss = case.loss().to(dtype)
    assert all(parameter.dtype == dtype for parameter in loss.parameters())
    data = case.data.apply(lambda value: value.to(dtype) if value.is_floating_point() else value)
    out = loss(data)
    assert out["loss_critic"].dtype == out["loss_objective"].dtype == dtype
    reference = case.loss()(case.data)
    tolerance = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out["loss_critic"].double(), reference["loss_critic"], **tolerance)
    torch.testing.assert_close(out["loss_objective"].double(), reference["loss_objective"], **tolerance)


def test_target_parameters_are_the_critics_without_gradient():
    loss = make_case().loss()
    for key, value in loss.target_critic_network_params.items(True, True):
        assert not value.requires_grad
        assert torch.equal(value, loss.critic_network_params[key])
    loss.critic_network_params.data.apply_(lambda value: value.add_(1.0))
    for key, value in loss.target_critic_network_params.items(True, True):
        assert torch.equal(value, loss.critic_network_params[key])


@pytest.mark.parametrize("layout", ["single", "agents", "agents_each"])
def test_parameters_are_reset(layout):
    case = make_case(**LAYOUTS[layout])
    loss = case.loss()
    before = bits(loss)
    loss.reset_parameters_recursive()
    after = bits(loss)
    assert all((new != old).any() for new, old in zip(after, before, strict=True))
    assert all(value.isfinite().all() for value in after)
    assert loss(case.data)["loss_objective"].isfinite()


@pytest.mark.parametrize("name", ["actor_network", "critic_network"])
def test_a_stateful_network_comes_and_goes(name):
    case = make_case()
    loss, other = case.loss(), case.loss()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.uniform_()
    loss.from_stateful_net(name, other.get_stateful_net(name))
    for key, value in getattr(loss, f"{name}_params").items(True, True):
        assert torch.equal(value, getattr(other, f"{name}_params")[key])


@pytest.mark.parametrize("random", [True, False])
def test_the_randomness_of_vmap_follows_the_networks(random):
    case = make_case()
    body = TensorDictModule(nn.Dropout(0.1), ["observation"], ["observation"])
    critic = TensorDictSequential(body, case.critic) if random else case.critic
    loss = TRPOLoss(case.actor, critic)
    assert loss.vmap_randomness == ("different" if random else "error")


def test_a_copy_of_a_loss_with_a_norm_keeps_one_norm():
    """The estimator denormalises with the statistics that the loss updates, in a copy too."""
    case = make_case()
    norm = PopArtValueNorm().double()
    loss = TRPOLoss(case.actor, case.critic, value_norm=norm)
    loss.make_value_estimator(gamma=0.9, lmbda=0.9, value_norm=norm)
    twin = deepcopy(loss)
    assert twin.value_norm is twin.value_estimator.value_norm
    assert twin.value_norm is not norm
    twin.load_state_dict(loss.state_dict())
    assert twin.value_norm is twin.value_estimator.value_norm


@pytest.mark.parametrize("share_params", [True, False])
@pytest.mark.parametrize("advantage", ["before", "missing"])
def test_a_central_critic_serves_in_every_loss(share_params, advantage):
    """PPOLoss takes the estimator too, and says the same with it."""
    case = make_case(root=("agents",), n_agents=AGENTS, share_params=share_params, given=False)
    central, value = ("agents", "central"), case.keys["value"]
    critic = TensorDictModule(nn.Linear(AGENTS * OBSERVED, 1).double(), [central], [value])
    case.critic = critic
    ours, theirs = case.losses()
    for loss in (ours, theirs):
        loss.make_value_estimator(
            CentralCriticValueEstimator,
            gamma=0.9,
            lmbda=0.8,
            value_network=loss.critic_network,
            observation_keys=[("agents", "observation")],
            central_key=central,
        )
        loss.set_keys(**case.keys)
    data = case.data
    if advantage == "before":
        estimate(ours, data)
    assert_same(ours, theirs, data)
