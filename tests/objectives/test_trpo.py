"""The objective as a TorchRL loss: values, gradients, keys, masks, and that forward changes nothing."""

from __future__ import annotations

import math
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    Gumbel,
    Independent,
    Kumaraswamy,
    Laplace,
    MixtureSameFamily,
    Normal,
    Poisson,
    SigmoidTransform,
    TransformedDistribution,
    Weibull,
)
from torch.nn.functional import softplus
from torchrl.modules import (
    IndependentNormal,
    NormalParamExtractor,
    PopArtValueNorm,
    ProbabilisticActor,
    TanhNormal,
    TruncatedNormal,
)
from torchrl.objectives import ClipPPOLoss, PPOLoss, ValueEstimators
from torchrl.objectives.value import MultiAgentGAE

from tests.cases import (
    ACTION,
    DISTRIBUTIONS,
    GROUP,
    LOG_PROB,
    OBSERVATION,
    OLD_DATA,
    PARTS,
    bits,
    dense_gradient,
    distribution,
    flat_parameters,
    joint_log_prob,
    make_actor,
    make_data,
    make_loss,
    make_single,
    same_bits,
    single_data,
    textbook_kl,
)
from torchrl_trpo import TrustRegionUpdater, entropy, kl_divergence
from torchrl_trpo.distributions import MultiCategorical
from torchrl_trpo.distributions.divergence import log_prob
from torchrl_trpo.objectives import ClippedUpdater, HAPPOUpdater, HATRPOSequentialObjective, TRPOLoss

SHARING = pytest.mark.parametrize("share_params", [True, False], ids=["shared", "per_agent"])


def moved(actor, amount=0.1):
    """The same policy after a change of its parameters."""
    for parameter in actor.parameters():
        parameter.data += amount * torch.randn_like(parameter)
    return actor


# ------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_and_gradients_are_those_of_ppo(reduction):
    actor, critic = make_single()
    data = single_data(actor)
    ours = TRPOLoss(actor, critic, reduction=reduction, entropy_coeff=0.01)
    theirs = PPOLoss(deepcopy(actor), deepcopy(critic), reduction=reduction, entropy_coeff=0.01)
    moved_by = [0.05 * torch.randn_like(p) for p in ours.parameters()]
    results = []
    for loss in (ours, theirs):
        loss.value_estimator = MultiAgentGAE(gamma=0.99, lmbda=0.95, value_network=loss.critic_network)
        for parameter, change in zip(loss.parameters(), moved_by, strict=True):
            parameter.data += change
        out = loss(data.clone())
        sum(out[key].sum() for key in out.keys() if key.startswith("loss_")).backward()
        results.append((out.detach(), [parameter.grad for parameter in loss.parameters()]))
    (our_out, our_grads), (their_out, their_grads) = results
    for key in their_out.keys():
        torch.testing.assert_close(our_out[key], their_out[key])
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b)


@SHARING
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_kl_is_exact_and_of_the_joint_action(kind, share_params):
    """HARL's discrete KL is 4 to 17 times too large; sb3-contrib and omnisafe average over action dimensions."""
    actor = make_actor(kind, share_params=share_params)
    data, loss = make_data(actor), make_loss(actor)
    old = distribution(actor, flat_parameters(actor), data)
    moved(actor)
    new = distribution(actor, flat_parameters(actor), data)
    torch.testing.assert_close(loss(data)["kl"], textbook_kl(old, new).mean())
    assert loss(data)["kl"] > 1e-3


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_kl_of_a_policy_from_itself_is_zero_with_zero_gradient(kind):
    actor = make_actor(kind)
    data = make_data(actor)
    theta = flat_parameters(actor).requires_grad_()
    kl = kl_divergence(distribution(actor, theta.detach(), data), distribution(actor, theta, data)).mean()
    (slope,) = torch.autograd.grad(kl, theta)
    assert kl.abs() < 1e-12
    assert slope.abs().max() < 1e-12
    assert make_loss(actor)(data)["kl"].abs() < 1e-12


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_surrogates_gradient_is_the_policy_gradient(kind):
    """At θ_k: ∇L = mean[∇log π(u|o) Â]."""
    actor = make_actor(kind, share_params=True)
    data = make_data(actor)
    theta = flat_parameters(actor).requires_grad_()
    log_prob = joint_log_prob(distribution(actor, theta, data), data)
    (expected,) = torch.autograd.grad((log_prob * data["advantage"].squeeze(-1)).mean(), theta)
    torch.testing.assert_close(dense_gradient(actor, data, False), expected)
    loss = make_loss(actor)
    loss(data)["loss_objective"].backward()
    actual = torch.cat([p.grad.flatten() for p in loss.actor_network_params.values(True, True)])
    torch.testing.assert_close(-actual, expected[0])


def test_effective_sample_size():
    actor = make_actor()
    data, loss = make_data(actor), TRPOLoss(actor)
    torch.testing.assert_close(loss(data)["ESS"].item(), 1.0)
    moved(actor, 0.3)
    ratio = (distribution(actor, flat_parameters(actor), data).log_prob(data[ACTION]) - data[LOG_PROB]).exp()
    torch.testing.assert_close(loss(data)["ESS"], ratio.sum() ** 2 / (ratio**2).sum() / ratio.numel())


def squashed_by_sigmoid(loc, scale):
    return TransformedDistribution(Normal(loc, scale), [SigmoidTransform(), AffineTransform(-2.0, 2.5)])


@pytest.mark.parametrize(
    ("kind", "log_slope"),
    [
        (TanhNormal, lambda z: math.log(4) - 2 * z - 2 * softplus(-2 * z)),
        (partial(TanhNormal, low=-2.0, high=0.5), lambda z: math.log(5) - 2 * z - 2 * softplus(-2 * z)),
        (squashed_by_sigmoid, lambda z: math.log(2.5) - z - 2 * softplus(-z)),
    ],
    ids=["tanh", "bounds", "sigmoid"],
)
def test_the_entropy_of_a_squashed_normal_is_an_integral(kind, log_slope):
    """It was 0.1 nats too small at a scale of 5, and its slope along the location a tenth at 8."""
    locs, scales = torch.tensor([-20.0, -3.0, 0.0, 0.7, 2.0]), torch.tensor([1e-3, 0.3, 1.0, 3.0, 8.0, 100.0])
    points = [each.flatten().double().requires_grad_() for each in torch.meshgrid(locs, scales, indexing="ij")]
    loc, scale = (point.unsqueeze(-1) for point in points)
    u = torch.linspace(-12, 12, 4_001, dtype=torch.float64)
    log_density = Normal(0.0, 1.0).log_prob(u)
    expected = torch.trapezoid(log_density.exp() * (log_slope(loc + scale * u) - log_density + scale.log()), u)
    slopes = torch.autograd.grad(expected.sum(), points)
    for dtype, rtol in [(torch.float64, 0), (torch.float32, 1e-6)]:
        own = [point.detach().to(dtype).requires_grad_() for point in points]
        actual = entropy(kind(*(point.unsqueeze(-1) for point in own)), 1)
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=1e-5)
        for slope, known in zip(torch.autograd.grad(actual.sum(), own), slopes, strict=True):
            torch.testing.assert_close(slope.double(), known, rtol=rtol, atol=1e-4)


def test_an_entropy_that_is_inherited_and_of_no_use_is_named():
    with pytest.raises(NotImplementedError, match=r"no exact entropy for Poisson\. Legal: entropy_bonus=False"):
        entropy(Independent(Poisson(torch.ones(4, 2)), 1))


def test_the_entropy_of_several_discrete_actions_is_a_sum_over_joint_actions():
    dist = MultiCategorical(torch.randn(4, 5, dtype=torch.float64), nvec=(3, 2))
    log_p = torch.stack([dist.log_prob(torch.tensor([a, b]).expand(4, 2)) for a in range(3) for b in range(2)])
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(entropy(dist), -(log_p.exp() * log_p).sum(0))


def test_a_part_of_a_composite_action_is_summed_over_its_dimensions():
    """Its distribution may be a plain ``Normal``, which leaves a number for each dimension."""
    p, q = (TensorDict({"move": {"loc": torch.randn(4, 2), "scale": torch.rand(4, 2) + 0.5}}, [4]) for _ in range(2))
    action = TensorDict({"move": torch.randn(4, 2)}, [4])
    results = []
    for kind in (Normal, IndependentNormal):
        dist, other = (CompositeDistribution(params, distribution_map={"move": kind}) for params in (p, q))
        results.append([kl_divergence(dist, other), log_prob(dist, action), entropy(dist)])
    for plain, independent in zip(*results, strict=True):
        torch.testing.assert_close(plain, independent)


@OLD_DATA
def test_entropy_counts_in_the_policy_update():
    """With no advantage at all, the step raises the entropy; and the logged improvement is that of the surrogate."""
    for kind in ("normal", "tanh_normal", "categorical"):
        actor = make_actor(kind, share_params=True)
        data = make_data(actor)
        data["advantage"] *= 0
        loss = TRPOLoss(actor, entropy_coeff=0.5)
        before = loss(data)["entropy"]
        stats = TrustRegionUpdater(loss).step(data)
        gain = loss(data)["entropy"] - before
        assert gain > 1e-4
        torch.testing.assert_close(stats["improvement"][0], 0.5 * gain)
        loss.entropy_coeff = 0.0  # a schedule takes effect at once
        assert not TrustRegionUpdater(loss).step(data)["accepted"].any()


# ------------------------------------------------------------------ a TorchRL loss


def test_out_keys_are_what_forward_returns():
    actor, critic = make_single()
    for keywords in ({}, {"entropy_bonus": False}, {"log_explained_variance": False}, {"clip_value": 0.2}):
        loss = TRPOLoss(actor, critic, **keywords)
        data = single_data(actor)
        loss.value_estimator(data)
        assert set(loss(data).keys()) == set(loss.out_keys)
        assert loss(data)["kl"].isfinite()
        without = data.exclude("loc", "scale")
        assert set(loss(without).keys()) == set(loss.out_keys)
        assert loss(without)["kl"].isnan(), "of which the data has no distribution"
    loss = TRPOLoss(actor)
    assert set(loss(data).keys()) == set(loss.out_keys)
    assert "loss_critic" not in loss.out_keys


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_forward_changes_nothing(kind):
    """MARLlib's loss function moves parameters."""
    actor = make_actor(kind)
    data, loss = make_data(actor), make_loss(actor, entropy_coeff=0.1)
    copy, before, generator = data.clone(), bits(loss), torch.get_rng_state()
    first = loss(data)
    assert torch.equal(generator, torch.get_rng_state()), "no randomness is drawn"
    assert (first == loss(data)).all()
    assert same_bits(loss, before)
    assert set(data.keys(True, True)) == set(copy.keys(True, True))
    assert (data == copy).all()


def test_dispatch():
    actor, critic = make_single()
    data = single_data(actor)
    loss = TRPOLoss(actor, critic)
    loss.make_value_estimator(gamma=0.9, lmbda=0.9)
    values = loss(
        observation=data["observation"],
        action=data["action"],
        action_log_prob=data["action_log_prob"],
        next_observation=data["next", "observation"],
        next_reward=data["next", "reward"],
        next_done=data["next", "done"],
        next_terminated=data["next", "terminated"],
    )
    expected = loss(data.exclude("loc", "scale"))
    for key, value in zip(loss.out_keys, values, strict=True):
        torch.testing.assert_close(value, expected[key], equal_nan=key == "kl")


def test_set_keys():
    actor, critic = make_single()
    data = single_data(actor)
    loss = TRPOLoss(actor, critic)
    loss.set_keys(advantage="a", value_target="v", reward="r", sample_log_prob="old", action="u")
    for old, new in [("action", "u"), ("action_log_prob", "old"), (("next", "reward"), ("next", "r"))]:
        data.rename_key_(old, new)
    loss.value_estimator(data)
    assert {"a", "v"} <= set(data.keys())
    assert loss(data)["loss_critic"].isfinite()
    assert TrustRegionUpdater(loss).step(data)["accepted"].all()


def test_a_missing_advantage_is_computed():
    actor, critic = make_single()
    data = single_data(actor)
    loss = TRPOLoss(actor, critic)
    with_advantage = loss.value_estimator(data.clone())
    torch.testing.assert_close(loss(data)["loss_objective"], loss(with_advantage)["loss_objective"])
    stats = TrustRegionUpdater(loss).step(data)
    assert stats["accepted"].all()
    assert "advantage" not in data.keys()


def test_copies_and_state_dicts():
    actor, critic = make_single()
    loss = TRPOLoss(actor, critic)
    loss.make_value_estimator(gamma=0.99, lmbda=0.95)
    twin = deepcopy(loss)
    data = loss.value_estimator(single_data(actor))
    TrustRegionUpdater(loss).step(data)
    assert not same_bits(twin, bits(loss))
    twin.load_state_dict(loss.state_dict())
    assert same_bits(twin, bits(loss))
    assert (twin(data) == loss(data)).all()
    single = loss.to(torch.float32)
    assert all(p.dtype == torch.float32 for p in single.parameters())
    loss.reset_parameters_recursive()


def test_the_collecting_policy_is_the_one_that_is_updated():
    """Parameters are written in place: the collector's policy needs no copy."""
    actor = make_actor()
    data, before = make_data(actor), bits(actor)
    TrustRegionUpdater(TRPOLoss(actor)).step(data)
    assert not same_bits(actor, before)


def test_not_functional():
    actor, critic = make_single()
    data = single_data(actor)
    loss = TRPOLoss(actor, critic, functional=False)
    loss.value_estimator(data)
    before = bits(actor)
    assert TrustRegionUpdater(loss).step(data)["accepted"].all()
    assert not same_bits(actor, before)


def test_a_step_inside_no_grad():
    """The value estimator is called in no_grad, and so the step easily is."""
    actor = make_actor()
    twin, data = deepcopy(actor), make_data(actor)
    with torch.no_grad():
        stats = TrustRegionUpdater(TRPOLoss(actor)).step(data)
    TrustRegionUpdater(TRPOLoss(twin)).step(data)
    assert stats["accepted"].all()
    assert same_bits(actor, bits(twin))


def test_a_lagging_policy_is_refused():
    actor, _ = make_single()
    data = single_data(actor)
    data["advantage"] = torch.randn(5, 8, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="delay_actor=False"):
        TrustRegionUpdater(TRPOLoss(actor, delay_actor=True)).step(data)


def test_frozen_parameters_stay():
    actor, _ = make_single()
    frozen = next(actor.parameters()).requires_grad_(False)
    copy, data = frozen.clone(), single_data(actor)
    data["advantage"] = torch.randn(5, 8, 1, dtype=torch.float64)
    assert TrustRegionUpdater(TRPOLoss(actor)).step(data)["accepted"].all()
    assert torch.equal(frozen, copy)


def test_tied_parameters_move_together():
    net = nn.Linear(3, 3).double()
    actor = ProbabilisticActor(
        TensorDictModule(nn.Sequential(net, nn.Tanh(), net), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    data = single_data(actor)
    data["advantage"] = torch.randn(5, 8, 1, dtype=torch.float64)
    before = net.weight.detach().clone()
    assert TrustRegionUpdater(TRPOLoss(actor)).step(data)["accepted"].all()
    assert actor.module[0].module[0] is actor.module[0].module[2]
    assert not torch.equal(net.weight, before)


def test_compiled_forward_equals_eager():
    actor, critic = make_single()
    loss = TRPOLoss(actor, critic, entropy_coeff=0.01)
    data = loss.value_estimator(single_data(actor)).detach()
    eager = loss(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(loss, backend="eager", fullgraph=True)(data)
    for key in eager.keys():
        torch.testing.assert_close(compiled[key], eager[key])


@OLD_DATA
def test_an_importance_cap_holds_in_the_update():
    actor = make_actor(share_params=True)
    data = make_data(actor)
    moved(actor, 0.5)
    loss = TRPOLoss(actor, max_importance_ratio=1.05)
    ratio = (distribution(actor, flat_parameters(actor), data).log_prob(data[ACTION]) - data[LOG_PROB]).exp()
    assert (ratio > 1.05).any()
    terms = ratio.clamp_max(1.05) * data["advantage"].squeeze(-1)
    torch.testing.assert_close(loss(data)["loss_objective"], -terms.mean())
    theta = flat_parameters(actor)
    stats = TrustRegionUpdater(loss, max_kl=1e-5, accept_ratio=0.0).step(data)
    kept = flat_parameters(actor)
    assert not torch.equal(kept, theta)
    new = (distribution(actor, kept, data).log_prob(data[ACTION]) - data[LOG_PROB]).exp().clamp_max(1.05)
    gain = (new * data["advantage"].squeeze(-1)).mean() - terms.mean()
    torch.testing.assert_close(stats["improvement"][0], gain)


def make_popart(share_params=False, beta=0.5):
    """A loss whose critic outputs normalised values, its norm, and data with targets far from 0."""
    actor, norm = make_actor(share_params=share_params), PopArtValueNorm(beta=beta).double()
    critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    critic = TensorDictModule(critic, [OBSERVATION], ["state_value"])
    loss = TRPOLoss(actor, critic, value_norm=norm, loss_critic_type="l2", clip_value=0.2)
    loss.make_value_estimator(gamma=0.9, lmbda=0.9, value_norm=norm)
    data = make_data(actor)
    data["value_target"] = 50 + 10 * torch.randn_like(data["advantage"])
    loss.update_value_norm(data)
    with torch.no_grad():
        data["state_value"] = norm.denormalize(critic(data.clone())["state_value"])
    data["value_target"] = 3 * data["value_target"]
    return loss, norm, data


def test_a_policy_update_and_an_evaluation_leave_the_value_norm_alone():
    loss, norm, data = make_popart()
    objective = HATRPOSequentialObjective(loss)
    before = deepcopy(loss.critic_network_params.data), deepcopy(norm.state_dict())
    objective(data)
    loss.policy_rows(data)
    assert TrustRegionUpdater(objective).step(data)["accepted"].all()
    with torch.no_grad():
        first = loss(data)
        assert (loss(data) == first).all()
        loss.loss_critic(data)
    assert (loss.critic_network_params.data == before[0]).all()
    assert all(torch.equal(value, before[1][key]) for key, value in norm.state_dict().items())
    loss(data)
    assert not torch.equal(norm.debiasing_term, before[1]["debiasing_term"])


def test_forward_corrects_the_critic_before_it_is_evaluated():
    """Forward moved no statistics; a loop of ``loss(data)``, as TorchRL's scripts are, never had any."""
    torch.manual_seed(0)
    loss, norm, data = make_popart()
    twin = deepcopy(loss)
    values = norm.denormalize(loss.critic_network(data.clone())["state_value"])
    out = loss(data)
    torch.testing.assert_close(norm.denormalize(loss.critic_network(data.clone())["state_value"]), values)
    out["loss_critic"].backward()

    twin.update_value_norm(data)
    norm = twin.value_norm
    with twin.critic_network_params.to_module(twin.critic_network):
        value = twin.critic_network(data.clone())["state_value"]
    target, old = norm.normalize(data["value_target"]), norm.normalize(data["state_value"])
    clipped = old + (value - old).clamp(-0.2, 0.2)
    torch.maximum((value - target) ** 2, (clipped - target) ** 2).mean().backward()
    for name, parameter in loss.critic_network_params.items(True, True):
        torch.testing.assert_close(parameter.grad, twin.critic_network_params[name].grad)
    residual = norm.denormalize(value) - data["value_target"]
    explained = 1 - residual.var(0, correction=0) / data["value_target"].var(0, correction=0)
    torch.testing.assert_close(out["explained_variance"], explained.detach())


def test_a_graph_from_before_a_correction_is_not_differentiated_with_what_came_after():
    """The gradient of the hidden layers was silently that of the corrected last layer."""
    loss, _, data = make_popart()
    first = loss(data)["loss_critic"]
    loss(data)["loss_critic"].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_value_norm_without_an_estimator_that_knows_it():
    """As in MAPPOLoss: the critic outputs raw values, the distance is taken in normalised space."""
    actor, critic = make_single()
    norm = PopArtValueNorm(shape=1)
    loss = TRPOLoss(actor, critic, value_norm=norm, loss_critic_type="l2")
    data = loss.value_estimator(single_data(actor))
    target, value = data["value_target"], critic(data.clone())["state_value"]
    value_loss = loss.loss_critic(data)[0]
    torch.testing.assert_close(value_loss, (norm.normalize(target) - norm.normalize(value)) ** 2)


# ------------------------------------------------------------------ agents and masks


def test_the_region_is_inferred_from_the_actor():
    assert TRPOLoss(make_actor(share_params=True)).trust_region == "shared"
    loss = TRPOLoss(make_actor(share_params=False, n_agents=5))
    assert (loss.trust_region, loss.n_regions) == ("per_agent", 5)
    assert TRPOLoss(make_actor(share_params=False), trust_region="shared").n_regions == 1
    assert TRPOLoss(make_single()[0]).trust_region == "shared"


def test_one_region_over_unshared_parameters():
    """trust_region="shared" on stacked parameters: one KL, one step length for all."""
    actor = make_actor()
    data, theta = make_data(actor), flat_parameters(actor, 3)
    old = distribution(actor, theta, data)
    stats = TrustRegionUpdater(TRPOLoss(actor, trust_region="shared")).step(data)
    assert stats.batch_size == (1,)
    kl = textbook_kl(old, distribution(actor, flat_parameters(actor, 3), data))
    torch.testing.assert_close(stats["kl"], kl.mean().reshape(1))


def test_a_teams_advantage_is_broadcast():
    actor = make_actor()
    data = make_data(actor)
    team = data.clone()
    team["advantage"] = data["advantage"][..., :1, :].squeeze(-2)  # [*B, T, 1]
    data["advantage"] = data["advantage"][..., :1, :].expand_as(data["advantage"]).clone()
    loss = TRPOLoss(actor)
    torch.testing.assert_close(loss(team)["loss_objective"], loss(data)["loss_objective"])
    twin = deepcopy(actor)
    TrustRegionUpdater(loss).step(team)
    TrustRegionUpdater(TRPOLoss(twin)).step(data)
    torch.testing.assert_close(flat_parameters(actor, 3), flat_parameters(twin, 3))


@SHARING
def test_masked_rows_count_nowhere(share_params):
    """KL and Fisher are not masked in HARL though the surrogate is; RNN padding counts in both in MARLlib."""
    actor = make_actor(share_params=share_params)
    data = make_data(actor, batch=(4, 6))
    padded = torch.cat([data, data.clone()], dim=1)
    padded[:, 6:][OBSERVATION].fill_(torch.nan)
    padded["advantage"][:, 6:] = 1e9
    padded["mask"] = torch.arange(12).expand(4, 12).unsqueeze(-1) < 6
    padded = padded[:, torch.randperm(12)]
    loss, plain = TRPOLoss(actor), TRPOLoss(twin := deepcopy(actor))
    loss.loss_mask_key = "mask"
    stats, expected = TrustRegionUpdater(loss).step(padded), TrustRegionUpdater(plain).step(data)
    assert stats["accepted"].all()
    torch.testing.assert_close(flat_parameters(actor), flat_parameters(twin))
    torch.testing.assert_close(stats.exclude("accepted", "order"), expected.exclude("accepted", "order"))


def test_each_agents_advantages_are_normalised_over_its_rows():
    actor = make_actor()
    data = make_data(actor)
    raw = data["advantage"] * torch.tensor([1.0, 10.0, 100.0]).unsqueeze(-1) + 5
    data["advantage"] = raw.clone()
    loss = TRPOLoss(actor, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
    expected = (raw - raw.mean((0, 1))) / raw.std((0, 1))
    torch.testing.assert_close(loss.policy_rows(data).advantage, expected.flatten(0, 1))


def test_advantages_whose_deviation_overflows_are_told():
    """They were divided by infinity: each step had a gradient of 0, and was rejected without a word."""
    actor = make_actor()
    data = make_data(actor)
    data["advantage"] *= 1e200
    with pytest.warns(UserWarning, match=r"gradient of region 0, 1, 2 is not finite"):
        stats = TrustRegionUpdater(
            TRPOLoss(actor, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
        ).step(data)
    assert not stats["accepted"].any()


@pytest.mark.parametrize("padding", [1e3, torch.nan])
def test_masked_rows_do_not_count_in_the_normalised_advantage(padding):
    actor = make_actor()
    data = make_data(actor)
    padded = torch.cat([data, data.clone()])
    padded["advantage"][5:] = padding
    padded["mask"] = (torch.arange(10) < 5).reshape(10, 1, 1).expand(10, 8, 1)
    keywords = {"normalize_advantage": True, "normalize_advantage_exclude_dims": (-2,)}
    loss, plain = TRPOLoss(actor, **keywords), TRPOLoss(twin := deepcopy(actor), **keywords)
    loss.loss_mask_key = "mask"
    torch.testing.assert_close(loss(padded)["loss_objective"], plain(data)["loss_objective"])
    TrustRegionUpdater(loss).step(padded)
    TrustRegionUpdater(plain).step(data)
    torch.testing.assert_close(flat_parameters(actor), flat_parameters(twin))


def test_masked_rows_do_not_count_in_the_effective_sample_size():
    actor = make_actor()
    data, loss = make_data(actor), TRPOLoss(actor)
    data["mask"] = torch.rand(5, 8, 1) < 0.5
    data[LOG_PROB][~data["mask"].squeeze(-1)] = torch.nan
    loss.loss_mask_key = "mask"
    torch.testing.assert_close(loss(data)["ESS"].item(), 1.0)


def test_an_agent_without_rows_is_skipped():
    actor = make_actor()
    data, before = make_data(actor), bits(actor)
    data["alive"] = torch.ones(5, 8, 3, 1, dtype=torch.bool)
    data["alive"][..., 1, :] = False
    loss = TRPOLoss(actor)
    loss.loss_mask_key = "alive"
    assert TrustRegionUpdater(loss).step(data)["accepted"].tolist() == [True, False, True]
    assert all(torch.equal(new[1], old[1]) for new, old in zip(actor.parameters(), before, strict=True))


# ------------------------------------------------------------------ bad input


def test_a_missing_advantage_without_a_critic():
    data = make_data(actor := make_actor()).exclude("advantage")
    data["advantages"] = torch.zeros(5, 8, 3, 1)
    with pytest.raises(KeyError, match=r"advantage.*is not in the data.*critic_network.*Did you mean.*advantages"):
        TrustRegionUpdater(TRPOLoss(actor)).step(data)


@pytest.mark.parametrize("method", ["forward", "step"])
@pytest.mark.parametrize("shape", [(5, 8, 3), (5, 8, 3, 2), (5, 8, 4, 1), (5, 8), (5, 8, 1, 3, 1)])
def test_an_advantage_of_the_wrong_shape(shape, method):
    loss = TRPOLoss(actor := make_actor())
    data = make_data(actor)
    data["advantage"] = torch.zeros(shape, dtype=torch.float64)
    run = loss if method == "forward" else TrustRegionUpdater(loss).step
    with pytest.raises(ValueError, match=r"advantage.*shape.*(unsqueeze|Legal: \(5, 8, 3, 1\)|does not fit)"):
        run(data)


@pytest.mark.parametrize("key", [ACTION, LOG_PROB, OBSERVATION], ids=str)
def test_keys_that_are_not_in_the_data(key):
    data = make_data(actor := make_actor())
    data.rename_key_(key, (GROUP, key[1] + "s"))
    with pytest.raises(KeyError, match=rf"{key[1]}.*is not in the data.*Did you mean.*{key[1]}s"):
        TrustRegionUpdater(TRPOLoss(actor)).step(data)


def test_the_agents_of_policy_and_data_differ():
    data = make_data(make_actor(n_agents=2), n_agents=2)
    with pytest.raises(ValueError, match=r"3 agents.*\(5, 8, 2\)"):
        TrustRegionUpdater(TRPOLoss(make_actor(n_agents=3))).step(data)


def test_empty_data():
    data = make_data(actor := make_actor())[:0]
    with pytest.raises(ValueError, match=r"data is empty.*\(0, 8\)"):
        TrustRegionUpdater(TRPOLoss(actor)).step(data)


def test_unknown_regions():
    with pytest.raises(ValueError, match=r"per-agent.*Did you mean 'per_agent'"):
        TRPOLoss(make_actor(), trust_region="per-agent")
    with pytest.raises(ValueError, match=r"stacked.*share_params=False"):
        TRPOLoss(make_actor(share_params=True), trust_region="per_agent")
    plain = make_single(n_obs=4, n_act=2, hidden=4)[0]  # leading dimensions coincide, but layers are no agents
    with pytest.raises(ValueError, match=r"stacked.*share_params=False"):
        TRPOLoss(plain, trust_region="per_agent")


def test_distributions_without_an_exact_kl():
    actor, _ = make_single()
    actor[-1].distribution_class = torch.distributions.StudentT
    actor[-1].distribution_kwargs = {"df": 3.0}
    data = TensorDict({"observation": torch.randn(4, 3, dtype=torch.float64)}, [4])
    data["action"] = torch.randn(4, 2, dtype=torch.float64)
    data["action_log_prob"], data["advantage"] = torch.zeros(4, 2).double(), torch.randn(4, 1).double()
    with pytest.raises(NotImplementedError, match=r"StudentT.*register_kl"):
        TrustRegionUpdater(TRPOLoss(actor, entropy_bonus=False)).step(data)


def two_humps(loc, scale):
    """A mixture, which has a density but no closed form of its KL or entropy."""
    humps = IndependentNormal(torch.stack([loc, -loc], -2), torch.stack([scale, scale], -2))
    return MixtureSameFamily(Categorical(logits=torch.zeros_like(loc[..., :2])), humps)


def test_a_kl_without_a_closed_form_is_nan_where_it_is_only_logged():
    """Forward, and the clipped updates, raised the error that belongs to the trust region alone."""
    actor = make_actor()
    actor[-1].distribution_class = two_humps
    data = make_data(actor)
    loss = TRPOLoss(actor, entropy_bonus=False)
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB)
    out = loss(data)
    assert set(out.keys()) == set(loss.out_keys) == {"loss_objective", "kl_approx", "kl", "ESS"}
    assert out["kl"].isnan()
    torch.testing.assert_close(-out["loss_objective"], data["advantage"].mean())
    out = HATRPOSequentialObjective(loss)(data)
    assert out["loss_objective"].isfinite()
    assert out["kl"].isnan().all()
    clipping = ClipPPOLoss(actor, entropy_bonus=False)
    clipping.set_keys(action=ACTION, sample_log_prob=LOG_PROB)
    stats = HAPPOUpdater(clipping, minibatch_size=40).step(data)
    assert stats["kl"].isnan().all()
    assert (stats["improvement"] > 0).all()
    with pytest.raises(NotImplementedError, match=r"MixtureSameFamily.*register_kl"):
        TrustRegionUpdater(loss).step(data)


def plain_transformed(loc, scale):
    return TransformedDistribution(Normal(torch.zeros_like(loc), torch.ones_like(scale)), [AffineTransform(loc, scale)])


class NamedTransformed(TransformedDistribution):
    """It names its parameters as its base does, and one of them is in the bijection."""

    arg_constraints = Normal.arg_constraints

    def __init__(self, loc, scale):
        super().__init__(Normal(torch.zeros_like(loc), scale), [AffineTransform(loc, 1.0)], validate_args=False)


def test_a_bijection_that_has_a_gradient_is_not_shared():
    """A step of 25 times the radius was accepted."""
    parameters = torch.rand(2, 4, 2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no exact KL"):
        kl_divergence(NamedTransformed(*parameters.detach()), NamedTransformed(*parameters))


@pytest.mark.parametrize("kind", [Weibull, Kumaraswamy, plain_transformed], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("event_dims", [0, 1])
def test_a_bijection_that_moves_with_the_policy_is_not_shared(kind, event_dims):
    """Of such distributions only the fixed base was compared: every KL was 0, and no step too long."""
    p, q = (torch.distributions.Independent(kind(*torch.rand(2, 4, 2)), event_dims) for _ in range(2))
    with pytest.raises(NotImplementedError, match="no exact KL"):
        kl_divergence(p, q)
    curved = torch.rand(2, 4, 2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no exact KL"):
        kl_divergence(kind(*curved.detach()), kind(*curved))


def test_a_registered_closed_form_is_preferred_to_that_of_the_base():
    """The base is a ``Uniform``, whose KL has no curvature; a step was refused for that."""
    actor, _ = make_single()
    actor[-1].distribution_class = lambda loc, scale: Independent(Gumbel(loc, scale), 1)
    data = single_data(actor)
    data["advantage"] = torch.randn(5, 8, 1, dtype=torch.float64)
    stats = TrustRegionUpdater(TRPOLoss(actor)).step(data)
    assert stats["accepted"].all()
    before, after = (Gumbel(params["loc"], params["scale"]) for params in (data, actor.get_dist_params(data.clone())))
    kl = torch.distributions.kl_divergence(before, after)
    torch.testing.assert_close(kl_divergence(before, after), kl)
    torch.testing.assert_close(stats["kl"][0], kl.sum(-1).mean())


def test_truncated_normals_are_refused():
    p = TruncatedNormal(torch.zeros(4, 2), torch.ones(4, 2))
    with pytest.raises(NotImplementedError, match=r"TruncatedNormal.*normaliser.*Legal: .*TanhNormal"):
        kl_divergence(p, p)


def test_a_kl_that_bounds_no_trust_region_is_refused():
    """The curvature of a ``Laplace`` was 0 in its location. Its KL has a value all the same."""
    actor, _ = make_single()
    actor[-1].distribution_class = lambda loc, scale: torch.distributions.Independent(Laplace(loc, scale), 1)
    data = single_data(actor)
    data["advantage"] = torch.randn(5, 8, 1, dtype=torch.float64)
    loss = TRPOLoss(actor)
    assert loss(data)["kl"].isfinite()
    with pytest.raises(NotImplementedError, match=r"Laplace has no second derivative.*bounds no trust region"):
        TrustRegionUpdater(loss).step(data)


def test_a_policy_with_two_distributions_is_refused():
    """Of two actions, one after the other, the KL was that of the last."""
    first, second = (make_single()[0] for _ in range(2))
    policy = ProbabilisticTensorDictSequential(*first, *second, return_composite=True)
    with pytest.raises(ValueError, match=r"2 probabilistic modules.*CompositeDistribution"):
        TRPOLoss(policy)
    with pytest.raises(ValueError, match=r"^actor_network: the policy has 0 probabilistic modules"):
        TRPOLoss(first.module[0])


def test_a_policy_that_masks_itself():
    """Logits of -inf once made the KL NaN and every step a rejected one."""
    actor = make_actor("categorical", share_params=True)
    actor.module[0].module = nn.Sequential(actor.module[0].module, NeverTheLast())
    data = make_data(actor)
    assert (data[ACTION] < 3).all()
    stats = TrustRegionUpdater(TRPOLoss(actor)).step(data)
    assert stats["accepted"].all()
    assert 0.003 < stats["kl"] <= 0.01


class NeverTheLast(nn.Module):
    def forward(self, logits):
        return torch.cat([logits[..., :-1], torch.full_like(logits[..., -1:], -torch.inf)], -1)


def test_composite_actions_in_a_tensordict_without_the_agents_in_its_batch_size():
    """A categorical part, ``[N, n]``, was not sliced for one agent of a sequence."""
    actor = make_actor("composite")
    full = make_data(actor)
    flat = TensorDict({key: full[key] for key in full.keys(True, True)}, batch_size=full.batch_size)
    assert flat[GROUP].batch_size == (5, 8)
    results = []
    for data in (full, flat):
        twin = make_actor("composite")
        twin.load_state_dict(actor.state_dict())
        objective = HATRPOSequentialObjective(make_loss(twin), agent_order="fixed")
        results.append(TrustRegionUpdater(objective).step(data))
    assert results[0]["accepted"].all()
    torch.testing.assert_close(results[1]["kl"], results[0]["kl"])
    torch.testing.assert_close(results[1]["improvement"], results[0]["improvement"])


@pytest.mark.parametrize("batch", [(1, 8), (5, 8)], ids=["one environment", "several"])
def test_a_team_advantage_is_normalised_over_all_rows(batch):
    """``[*B, T, 1]`` with ``normalize_advantage_exclude_dims=(-2,)``, the agents, was normalised for each time step."""
    actor = make_actor()
    data = make_data(actor, batch)
    data["advantage"] = team = 3 + torch.randn(*batch, 1, dtype=torch.float64)
    loss = TRPOLoss(actor, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
    expected = ((team - team.mean()) / team.std()).unsqueeze(-2)
    rows = loss.policy_rows(data).advantage
    torch.testing.assert_close(rows, expected.expand(*batch, 3, 1).reshape(rows.shape))
    data[GROUP, "mask"] = torch.rand(*batch, 3) < 0.5
    counts = data[GROUP, "mask"].any(-1)
    data["advantage"] = torch.where(counts.unsqueeze(-1), team, 100.0)
    loss.loss_mask_key = (GROUP, "mask")
    expected = ((team[counts] - team[counts].mean()) / team[counts].std())[:, None].expand(-1, 3, 1)
    rows, mask = loss.policy_rows(data).advantage, data[GROUP, "mask"].flatten(0, 1)
    torch.testing.assert_close(rows[mask], expected[mask[counts.flatten()]], msg="of the rows in which an agent counts")


@pytest.mark.parametrize("exclude", [(-2,), (0,), (1, -1)], ids=str)
@pytest.mark.parametrize("make", [TRPOLoss, ClipPPOLoss])
def test_rows_are_never_normalised_apart(make, exclude):
    """Without an agent dimension, -2 is time: with one environment each advantage would be its own mean."""
    actor, _ = make_single()
    data = single_data(actor, batch=(1, 8))
    data["advantage"] = torch.randn(1, 8, 1, dtype=torch.float64)
    loss = make(actor, normalize_advantage=True, normalize_advantage_exclude_dims=exclude)
    updater = TrustRegionUpdater(loss) if make is TRPOLoss else ClippedUpdater(loss)
    with pytest.raises(ValueError, match=r"normalize_advantage_exclude_dims: .* batch or time dimension of \(1, 8\)"):
        updater.step(data)


@pytest.mark.parametrize("share_params", [True, False, None], ids=["shared", "per_agent", "single"])
def test_entries_of_an_action_are_no_agents(share_params):
    """A ``Normal`` that is not ``Independent`` has one log-probability for each entry of an action.

    With a single agent they were taken as agents: the KL reported was a third of the true one. The step is that of the
    ``IndependentNormal``.
    """
    kept = []
    for distribution_class in (IndependentNormal, torch.distributions.Normal):
        torch.manual_seed(2)
        actor = make_single()[0] if share_params is None else make_actor(share_params=share_params)
        actor[-1].distribution_class = distribution_class
        data = single_data(actor) if share_params is None else make_data(actor)
        if share_params is None:
            data["advantage"] = torch.randn(5, 8, 1, dtype=torch.float64)
        loss = TRPOLoss(actor, entropy_coeff=0.01)
        before = loss(data)
        objective = HATRPOSequentialObjective(loss) if share_params is False else loss
        stats = TrustRegionUpdater(objective, max_kl=0.02).step(data)
        kept.append([flat_parameters(actor), *before.values(), *loss(data).values(), *stats.values()])
        torch.testing.assert_close(loss(data)["kl"], stats["kl"].mean())
    for one, other in zip(*kept, strict=True):
        torch.testing.assert_close(one, other)


def test_a_clipped_update_refuses_ratios_of_an_actions_entries():
    actor, _ = make_single()
    actor[-1].distribution_class = torch.distributions.Normal
    data = single_data(actor)
    data["advantage"] = torch.randn(5, 8, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\(5, 8, 2\), one of each entry of the action.*IndependentNormal"):
        ClippedUpdater(ClipPPOLoss(actor)).step(data)


def test_parts_of_a_composite_need_not_be_independent():
    """``forward`` worked, ``step`` did not."""
    kept = []
    for normal in (IndependentNormal, torch.distributions.Normal):
        torch.manual_seed(2)
        actor = make_actor("composite")
        actor[-1].distribution_kwargs["distribution_map"] = {**PARTS, "move": normal}
        data = make_data(actor)
        stats = TrustRegionUpdater(loss := make_loss(actor)).step(data)
        kept.append([flat_parameters(actor), *stats.values(), loss(data)["kl"]])
    for one, other in zip(*kept, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["categorical", "one_hot", "normal"])
@pytest.mark.parametrize("action", ["action", ("robot", "action")])
def test_log_probs_that_may_be_agents_or_actions_are_refused(action, kind):
    """One agent's entries were taken for agents, with a KL for each."""
    layers = [nn.Linear(3, 12).double(), nn.Unflatten(-1, (2, 6))]
    keys = ["loc", "scale"] if kind == "normal" else ["logits"]
    if kind == "normal":
        layers.append(NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(nn.Sequential(*layers), ["observation"], keys),
        in_keys=keys,
        out_keys=[action],
        distribution_class=DISTRIBUTIONS[kind],
        return_log_prob=True,
    )
    data = single_data(actor)
    data["advantage"] = torch.randn(5, 8, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"one of each agent, or of each action of one agent.*MultiCategorical"):
        TrustRegionUpdater(TRPOLoss(actor)).step(data)


def test_an_update_moves_no_running_statistics():
    """Batch norm counted each candidate of the line search, those of a rejected step too."""
    actor, _ = make_single()
    actor.module[0].module.insert(0, nn.BatchNorm1d(3).double())
    data = single_data(actor.eval(), batch=(40,))
    data["advantage"] = torch.randn(40, 1, dtype=torch.float64)
    actor.train()
    before = {key: value.clone() for key, value in actor.named_buffers()}
    with pytest.warns(UserWarning, match="batch norm"):
        stats = TrustRegionUpdater(TRPOLoss(actor)).step(data)
    assert stats["accepted"].all()
    assert all(torch.equal(value, before[key]) for key, value in actor.named_buffers())


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("make", [TRPOLoss, ClipPPOLoss])
def test_an_estimator_that_knows_no_masks_must_see_an_end_before_the_padding(make, ends, time_first):
    """TorchRL's estimators do not read the loss's mask: what padding is paid was in the advantages of real steps."""
    actor, critic = make_single()
    loss = make(actor, critic)
    loss.loss_mask_key = "mask"
    if make is TRPOLoss:  # the default of the other
        loss.make_value_estimator(ValueEstimators.GAE)
    data = single_data(actor)
    data["mask"] = (torch.arange(8) < 6).expand(5, 8)
    data["next", "done"][:, 5] = data["next", "terminated"][:, 5] = ends
    if time_first:
        data = data.transpose(0, 1).contiguous().refine_names("time", ...)
    updater = TrustRegionUpdater(loss) if make is TRPOLoss else ClippedUpdater(loss)
    if ends:
        assert updater.step(data)["accepted"].all()
        return
    with pytest.raises(ValueError, match=r"GAE does not know the loss's mask.*AgentGAE, mask_key"):
        updater.step(data)


def test_agents_with_a_scalar_action_each():
    """``[*B, n_agents]`` of a group, without an action dimension: agents are not summed to one."""
    loc = TensorDictModule(nn.Sequential(nn.Linear(3, 1), nn.Flatten(-2)).double(), [OBSERVATION], [(GROUP, "loc")])
    actor = ProbabilisticActor(
        loc,
        in_keys={"loc": (GROUP, "loc")},
        out_keys=[ACTION],
        distribution_class=Normal,
        distribution_kwargs={"scale": 1.0},
        return_log_prob=True,
    )
    data = make_data(actor)
    old = actor.get_dist(data.clone())
    stats = TrustRegionUpdater(TRPOLoss(actor)).step(data)
    assert stats["accepted"].all()
    kl = torch.distributions.kl_divergence(old, actor.get_dist(data.clone())).mean()
    torch.testing.assert_close(stats["kl"], kl.detach().reshape(1))


def test_one_entry_is_no_choice_between_agents_and_actions():
    """A discrete action of shape ``(1,)``; and a ``Normal`` of one entry in a clipped update."""
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(nn.Linear(3, 4), nn.Unflatten(-1, (1, 4))).double(), ["observation"], ["logits"]
        ),
        in_keys=["logits"],
        out_keys=["action"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    single, _ = make_single(n_act=1)
    single[-1].distribution_class = Normal
    for policy, make in ((actor, TRPOLoss), (single, ClipPPOLoss)):
        data = single_data(policy)
        data["advantage"] = torch.randn(5, 8, 1, dtype=torch.float64)
        loss = make(policy)
        updater = TrustRegionUpdater(loss) if make is TRPOLoss else ClippedUpdater(loss)
        assert updater.step(data)["accepted"].all()
