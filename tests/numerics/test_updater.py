"""The whole step against its definition, and what must never move a parameter."""

from __future__ import annotations

import math
from copy import deepcopy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import TanhNormal

from tests.cases import (
    ACTION,
    DISTRIBUTIONS,
    LOG_PROB,
    OBSERVATION,
    OLD_DATA,
    bits,
    dense_fisher,
    dense_gradient,
    dense_surrogate,
    distribution,
    flat_parameters,
    make_actor,
    make_data,
    make_loss,
    region_mean,
    same_bits,
    textbook_kl,
)
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.numerics import line_search
from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss

EXACT = {"cg_iters": 60, "cg_tol": 1e-13}
SHARING = pytest.mark.parametrize("share_params", [True, False], ids=["shared", "per_agent"])


@SHARING
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_step_is_the_definition(kind, share_params):
    """θ_k + α^j β x with x = (F + λI)⁻¹ g solved densely; and the logged figures are those of the parameters kept."""
    actor, damping, max_kl = make_actor(kind, share_params=share_params), 0.05, 0.02
    data = make_data(actor)
    per_agent = not share_params
    n = 3 if per_agent else 1
    theta = flat_parameters(actor, n)
    old = distribution(actor, theta, data)
    g = dense_gradient(actor, data, per_agent)
    damped = dense_fisher(actor, data, per_agent) + damping * torch.eye(theta.shape[1], dtype=torch.float64)
    x = torch.linalg.solve(damped, g)
    full_step = (2 * max_kl / (x * (damped @ x.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True)).sqrt() * x

    stats = TrustRegionUpdater(make_loss(actor), max_kl=max_kl, damping=damping, **EXACT).step(data)

    kept = flat_parameters(actor, n)
    torch.testing.assert_close(kept, theta + stats["step_fraction"].unsqueeze(-1) * full_step, rtol=1e-7, atol=1e-10)
    kl = region_mean(textbook_kl(old, distribution(actor, kept, data)), per_agent)
    gain = dense_surrogate(actor, data, per_agent, kept) - dense_surrogate(actor, data, per_agent, theta)
    torch.testing.assert_close(stats["kl"], kl)
    torch.testing.assert_close(stats["improvement"], gain)
    torch.testing.assert_close(stats["expected_improvement"], (g * full_step).sum(-1))
    torch.testing.assert_close(stats["grad_norm"], g.norm(dim=-1))
    assert stats["accepted"].all()
    assert (stats["kl"] <= max_kl).all()
    assert (stats["improvement"] >= 0.5 * stats["step_fraction"] * stats["expected_improvement"]).all()


def test_the_full_step_has_the_radius():
    """½ stepᵀ (F + λI) step = δ, also when CG has not converged."""
    actor = make_actor()
    data, theta = make_data(actor), flat_parameters(actor, 3)
    damped = dense_fisher(actor, data, True) + 0.1 * torch.eye(theta.shape[1], dtype=torch.float64)
    stats = TrustRegionUpdater(TRPOLoss(actor), max_kl=0.004, cg_iters=3).step(data)
    step = (flat_parameters(actor, 3) - theta) / stats["step_fraction"].unsqueeze(-1)
    half = 0.5 * torch.einsum("ni,nij,nj->n", step, damped, step)
    torch.testing.assert_close(half, torch.full_like(half, 0.004))
    assert (stats["cg_residual"] > 1e-4).all()


def test_per_agent_regions_are_separate_trpos():
    """ITRPO with per-agent parameters is one TRPO per agent: in step, in accept decision, in statistics."""
    actor = make_actor(n_agents=3)
    data = make_data(actor, n_agents=3)
    singles = []
    for i in range(3):
        single = make_actor(share_params=False, n_agents=1)
        source = dict(actor.named_parameters())
        for name, parameter in single.named_parameters():
            parameter.data.copy_(source[name].data[i : i + 1])
        singles.append(single)
    stats = TrustRegionUpdater(TRPOLoss(actor)).step(data)
    for i, single in enumerate(singles):
        slices = data.clone()
        slices["agents"] = data["agents"][..., i : i + 1]
        slices["advantage"] = data["advantage"][..., i : i + 1, :]
        alone = TrustRegionUpdater(TRPOLoss(single)).step(slices)
        torch.testing.assert_close(flat_parameters(single, 1)[0], flat_parameters(actor, 3)[i])
        for key in ("accepted", "kl", "improvement", "grad_norm", "cg_residual"):
            torch.testing.assert_close(alone[key][0], stats[key][i])


def rejecting(actor):
    """A search that must fail: the quadratic model is far off for a radius of 1000 nats, with one try."""
    return TrustRegionUpdater(TRPOLoss(actor), max_kl=1000.0, max_backtracks=0)


@SHARING
def test_a_rejected_step_leaves_every_bit(share_params):
    """MARLlib keeps rejected steps: it restores from references to the live parameters."""
    actor = make_actor(share_params=share_params)
    data, before = make_data(actor), bits(actor)
    stats = rejecting(actor).step(data)
    assert not stats["accepted"].any()
    assert same_bits(actor, before)
    for key in ("kl", "improvement", "step_fraction"):
        assert (stats[key] == 0).all(), f"{key} must be that of the parameters kept"
    assert (stats["expected_improvement"] > 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", ["advantage", OBSERVATION, LOG_PROB, ACTION], ids=str)
@SHARING
def test_non_finite_data_moves_nothing(share_params, key, bad):
    """One NaN in 1000 advantages makes every actor parameter NaN in HARL."""
    actor = make_actor(share_params=share_params, validate_args=False)
    data = make_data(actor)
    data[key][2, 3, 1].fill_(bad)  # one row of agent 1
    before = bits(actor)
    updater = TrustRegionUpdater(TRPOLoss(actor))
    with pytest.warns(UserWarning, match=rf"gradient of region {0 if share_params else 1} is not finite") as told:
        stats = updater.step(data)
    assert told[0].filename == __file__
    updater.step(data)  # says it once
    if share_params:
        assert same_bits(actor, before)
        assert not stats["accepted"].any()
    else:
        assert stats["accepted"].tolist() == [True, False, True], "only the agent with the bad entry is rejected"
        for new, old in zip(actor.parameters(), before, strict=True):
            assert torch.equal(new[1], old[1])
    assert stats["grad_norm"].isfinite().tolist() == stats["accepted"].tolist(), "and it shows in the statistics"
    assert all(parameter.isfinite().all() for parameter in actor.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("value", [0.0, 3.0, 3.7, 0.1, -1e6])
@OLD_DATA
def test_equal_advantages_move_nothing(value, dtype):
    """Advantages that are all equal make every actor parameter NaN in HARL.

    And their rounding errors, normalised, once were a gradient like any other: 3.7 is not the mean of its copies.
    """
    actor = make_actor(share_params=True)
    actor = actor.float() if dtype == torch.float32 else actor
    data = make_data(make_actor(), batch=(60, 100)).to(dtype)
    data["advantage"] = torch.full_like(data["advantage"], value)
    loss = TRPOLoss(actor, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
    before = bits(actor)
    stats = TrustRegionUpdater(loss).step(data)
    assert same_bits(actor, before)
    assert not stats["accepted"].any()
    assert (stats["grad_norm"] == 0).all()
    assert stats.isfinite().all()


@pytest.mark.parametrize("scale", [1e-200, 1e-8, 1e8, 1e200])
def test_the_step_does_not_depend_on_the_scale_of_rewards(scale):
    """Not even where the squares of a gradient are 0 or infinite."""
    actor = make_actor()
    twin, data = deepcopy(actor), make_data(actor)
    scaled = data.clone()
    scaled["advantage"] = scale * data["advantage"]
    TrustRegionUpdater(TRPOLoss(actor)).step(data)
    TrustRegionUpdater(TRPOLoss(twin)).step(scaled)
    torch.testing.assert_close(flat_parameters(twin, 3), flat_parameters(actor, 3), rtol=1e-9, atol=1e-10)


def test_subsampling_touches_only_the_fisher_matrix():
    """sb3-contrib sub-samples the whole batch; here gradient, surrogate and KL are those of all rows."""
    actor = make_actor()
    twin = deepcopy(actor)
    data, theta = make_data(actor, batch=(10, 20)), flat_parameters(actor, 3)
    old, g = distribution(actor, theta, data), dense_gradient(actor, data, True)
    stats = TrustRegionUpdater(TRPOLoss(actor), fisher_subsample=0.1).step(data)
    kl = region_mean(textbook_kl(old, distribution(actor, flat_parameters(actor, 3), data)), True)
    torch.testing.assert_close(stats["kl"], kl)
    torch.testing.assert_close(stats["grad_norm"], g.norm(dim=-1))
    assert (stats["kl"] <= 0.01).all()
    whole = TrustRegionUpdater(TRPOLoss(twin)).step(data)
    assert not torch.isclose(stats["expected_improvement"], whole["expected_improvement"], rtol=1e-3).any()


def test_the_batch_is_not_modified():
    actor = make_actor()
    data = make_data(actor)
    copy = data.clone()
    TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(actor))).step(data)
    assert set(data.keys(True, True)) == set(copy.keys(True, True))
    assert (data == copy).all()


def test_statistics_are_detached_and_complete():
    stats = TrustRegionUpdater(TRPOLoss(actor := make_actor())).step(make_data(actor))
    assert stats.batch_size == (3,)
    assert set(stats.keys()) == {
        *("accepted", "kl", "improvement", "expected_improvement", "max_kl"),
        *("step_fraction", "grad_norm", "cg_residual", "order", "log_ratio_max", "ESS"),
    }
    assert not any(value.requires_grad for value in stats.values())
    assert stats["accepted"].dtype == torch.bool


def test_a_schedule_is_an_assignment():
    updater = TrustRegionUpdater(TRPOLoss(actor := make_actor()), max_kl=0.01)
    updater.max_kl = 1e-5
    stats = updater.step(make_data(actor))
    assert (stats["kl"] <= 1e-5).all()
    assert (stats["kl"] > 0).all()


def test_state_dict_round_trip():
    updater = TrustRegionUpdater(TRPOLoss(make_actor()), max_kl=0.5, cg_iters=3, kl_budget="team")
    other = TrustRegionUpdater(TRPOLoss(make_actor()))
    other.load_state_dict(updater.state_dict())
    assert (other.max_kl, other.cg_iters, other.kl_budget) == (0.5, 3, "team")
    other.load_state_dict({name: getattr(updater, name) for name in updater.RANGES})  # of a version without the word
    assert other.kl_budget == "team"
    with pytest.raises(ValueError, match=r"^kl_budget: 'teams'\. Did you mean 'team'.*Legal: 'agent', 'team'"):
        other.kl_budget = "teams"
    with pytest.raises(KeyError, match=r"max_kll.*Did you mean 'max_kl'"):
        other.load_state_dict({"max_kll": 1.0})
    with pytest.raises(KeyError, match=r"damping.*missing"):
        other.load_state_dict({"max_kl": 1.0})
    with pytest.raises(ValueError, match=r"damping must be"):
        other.load_state_dict({**updater.state_dict(), "max_kl": 0.7, "damping": -1.0})
    assert other.max_kl == 0.5, "all or none"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_backtracks", 10.0),
        ("cg_iters", 10.0),
        ("cg_iters", float("inf")),
        *[("max_kl", v) for v in (0, -0.1, float("nan"), float("inf"))],
        *[("damping", v) for v in (-1, float("nan"))],
        *[("cg_iters", v) for v in (0, 2.5)],
        ("cg_tol", -1e-3),
        *[("backtrack_coeff", v) for v in (0, 1, 1.2)],
        ("max_backtracks", -1),
        *[("accept_ratio", v) for v in (-0.1, 1)],
        *[("fisher_subsample", v) for v in (0, 1.01)],
    ],
)
def test_settings_outside_their_range(name, value):
    updater = TrustRegionUpdater(TRPOLoss(make_actor()))
    with pytest.raises(ValueError, match=f"{name} must be"):
        setattr(updater, name, value)
    with pytest.raises(ValueError, match=f"{name} must be"):
        TrustRegionUpdater(TRPOLoss(make_actor()), **{name: value})


@pytest.mark.parametrize(
    "kind", [np.float32, np.float64, np.array, torch.tensor, lambda value: torch.tensor([value]), Fraction]
)
def test_numbers_of_other_libraries(kind):
    """A radius from ``np.linspace`` in float32, or from a tensor, was refused; it is kept as Python's number."""
    updater = TrustRegionUpdater(TRPOLoss(make_actor(), chunk_size=np.int64(7)), max_kl=kind(0.25))
    updater.damping = kind(0.5)
    updater.cg_iters = torch.tensor(3)
    updater.load_state_dict({**updater.state_dict(), "max_backtracks": np.int32(4), "accept_ratio": kind(0.125)})
    taken = (updater.objective.chunk_size, *updater.state_dict().values())
    assert taken == (7, 0.25, 0.5, 3, 1e-6, 0.8, 4, 0.125, 1.0, "agent")
    assert [type(value) for value in taken] == [int, float, float, int, float, float, int, float, float, str]


@pytest.mark.parametrize(
    "value", ["0.01", True, torch.tensor(True), np.True_, np.array([0.1, 0.2]), torch.zeros(0), 1j, None], ids=repr
)
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match=f"max_kl must be a positive number, got .* of type {type(value).__name__}"):
        TrustRegionUpdater(TRPOLoss(make_actor()), max_kl=value)


@pytest.mark.parametrize("name", ["maxkl", "clip_epsilon"])
def test_a_setting_that_is_none_is_named(name):
    """A schedule of ``updater.maxkl`` changed nothing. Subclasses may have attributes of their own."""
    updater = TrustRegionUpdater(make_loss(make_actor()))
    with pytest.raises(AttributeError, match=rf"^{name}: TrustRegionUpdater has no such setting\. .*'max_kl'"):
        setattr(updater, name, 0.5)
    updater._max_kl = 0.5

    class Scheduled(TrustRegionUpdater):
        pass

    Scheduled(make_loss(make_actor())).max_kl_0 = 0.5


def test_the_text_of_a_key_error_is_printed_as_it_is():
    """Python's ``KeyError`` prints its message in quotes, with those inside escaped."""
    with pytest.raises(KeyError) as caught:
        TrustRegionUpdater(TRPOLoss(make_actor())).load_state_dict({"max_kll": 1.0})
    assert str(caught.value).startswith("'max_kll' is not a setting of the updater. Did you mean 'max_kl'? Legal:")


def test_wrong_types():
    with pytest.raises(TypeError, match="trust_regions"):
        TrustRegionUpdater(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("sequential", [False, True], ids=["batched", "sequential"])
@pytest.mark.parametrize(
    "kind", ["normal", "categorical", "masked", "multi_categorical", "composite"]
)  # TorchRL's TanhNormal itself waits, for its bounds
def test_the_whole_step_on_the_meta_device(kind, sequential, monkeypatch):
    """Apart from the accept decision of the line search nothing waits for the device or sits on the CPU."""
    monkeypatch.setattr(line_search, "_all_decided", lambda decided: False)
    data = make_data(make_actor(kind)).to("meta")
    unchecked = {"validate_args": False} if kind in {"normal", "categorical"} else {}
    loss = make_loss(make_actor(kind, device="meta", **unchecked), entropy_bonus=False)
    objective = HATRPOSequentialObjective(loss) if sequential else loss
    stats = TrustRegionUpdater(objective, fisher_subsample=0.5).step(data)
    assert stats["kl"].device.type == "meta"
    assert stats.batch_size == (3,)


class HostWaits(TorchDispatchMode):
    """Counts how often a number of a tensor is asked for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sequential", [False, True], ids=["batched", "sequential"])
@pytest.mark.parametrize("kind", [*DISTRIBUTIONS, "TanhNormal of TorchRL"])
def test_the_host_waits_once_and_once_per_try(kind, sequential):
    actor = make_actor("tanh_normal" if kind == "TanhNormal of TorchRL" else kind)
    if kind == "TanhNormal of TorchRL":  # which asks for its bounds whenever it is made
        actor[-1].distribution_class = TanhNormal
    data, loss = make_data(actor), make_loss(actor, entropy_bonus=False)
    updater = TrustRegionUpdater(HATRPOSequentialObjective(loss) if sequential else loss, fisher_subsample=0.5)
    updater.step(data)  # looks at the policy
    data = make_data(actor)
    with HostWaits() as waits:
        stats = updater.step(data)
    tries = 1 + (stats["step_fraction"].log() / math.log(0.8)).round().int()
    assert tries.max() <= waits.count <= 1 + (tries.sum() if sequential else tries.max())


@pytest.mark.parametrize("sequential", [False, True], ids=["batched", "sequential"])
def test_data_of_another_policy_is_told_once_and_measured(sequential):
    """A collector with a copy that is not updated: each of twenty steps was within max_kl, the last far from the data.

    The statistics at θ_k against their definitions; pieces make no difference.
    """
    actor = make_actor()
    data = make_data(actor)
    loss = make_loss(actor, chunk_size=7)
    updater = TrustRegionUpdater(HATRPOSequentialObjective(loss) if sequential else loss, max_kl=0.02)
    first = updater.step(data)
    assert (first["log_ratio_max"] < 1e-12).all()
    torch.testing.assert_close(first["ESS"], torch.ones(3, dtype=torch.float64))

    log_ratio = (actor.get_dist(data).log_prob(data[ACTION]) - data[LOG_PROB]).detach().flatten(0, 1)  # [N, n_agents]
    with pytest.warns(UserWarning, match="not collected by the policy"):
        stats = updater.step(data)
    ratio = log_ratio.exp()
    torch.testing.assert_close(stats["log_ratio_max"], log_ratio.abs().amax(0))
    torch.testing.assert_close(stats["ESS"], ratio.sum(0).square() / ratio.square().sum(0) / len(ratio))
    updater.step(data)  # a second warning would be an error


@pytest.mark.parametrize("sequential", [False, True], ids=["batched", "sequential"])
def test_an_optimiser_that_moves_the_policy_too_is_told_once(sequential):
    """MAPPO's sum of losses was kept: Adam moved the policy after each trust-region step, and nothing said so."""
    actor = make_actor()
    loss = make_loss(actor)
    updater = TrustRegionUpdater(HATRPOSequentialObjective(loss) if sequential else loss)
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-4)

    def iterate(moves_policy):
        data = make_data(actor)
        updater.step(data)
        loss(data)["loss_objective"].backward()
        if moves_policy:
            optimizer.step()

    iterate(False)
    iterate(True)
    with pytest.warns(UserWarning, match=r"not what the last step left.*optimiser of loss_objective"):
        iterate(True)
    iterate(True)  # a second warning would be an error


def test_a_part_of_a_composite_log_prob_that_was_left_out_is_told():
    actor = make_actor("composite")
    data = make_data(actor)
    loss = make_loss(actor)
    loss.set_keys(sample_log_prob=loss.tensor_keys.sample_log_prob[:1])
    with pytest.warns(UserWarning, match="composite"):
        TrustRegionUpdater(loss).step(data)


def test_inference_mode_is_refused_by_its_name():
    updater, data = TrustRegionUpdater(TRPOLoss(actor := make_actor())), make_data(actor)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        updater.step(data)


def test_actions_at_their_bounds_are_no_other_policy():
    """What a squashed action at its bound says of itself is rounding: single rows are apart by more than 1."""
    actor = make_actor("tanh_normal", n_obs=3, share_params=True).float()
    for parameter in actor.parameters():
        parameter.data *= 5
    data = make_data(actor.double(), (60, 20)).float()
    actor.float()
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        actor(data)
    stats = TrustRegionUpdater(TRPOLoss(actor)).step(data)
    assert stats["log_ratio_max"] > 0.01
