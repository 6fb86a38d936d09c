"""The sequential update: order, factor, cost, groups."""

from __future__ import annotations

import gc
from copy import deepcopy
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchrl.modules import IndependentNormal, MultiAgentMLP, NormalParamExtractor, ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss

from tests.cases import (
    ACTION,
    GROUP,
    LOG_PROB,
    OBSERVATION,
    OLD_DATA,
    VALUE,
    bits,
    dense_fisher,
    dense_gradient,
    dense_surrogate,
    distribution,
    flat_parameters,
    make_actor,
    make_data,
    make_loss,
    make_single,
    region_mean,
    same_bits,
    single_data,
    textbook_kl,
)
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.numerics.conjugate_gradient import conjugate_gradient
from torchrl_trpo.objectives import ClippedUpdater, HAPPOUpdater, HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.objectives.policy_region import PolicyTrustRegion


@pytest.mark.parametrize(
    ("agent_order", "kl_budget"), [([1, 2, 0], "agent"), ("greedy", "agent"), ("greedy", "team")], ids=str
)
def test_sequence_and_factor_against_a_hand_calculation(agent_order, kl_budget):
    """Agent 1 with M = 1, agent 2 with M = π_new(1)/π_k(1), agent 0 with both ratios: each step by dense formulas.

    Agent 0 gains more than agent 2 before the first step, and less with M. A greedy order goes by the latter.
    """
    actor = make_actor()
    data, damping, max_kl = make_data(actor), 0.1, 0.01
    data["advantage"] *= torch.tensor([1, 1.6, 0.985]).unsqueeze(-1)
    theta = flat_parameters(actor, 3)
    old = distribution(actor, theta, data)
    damped = dense_fisher(actor, data, True) + damping * torch.eye(theta.shape[1], dtype=torch.float64)
    objective = HATRPOSequentialObjective(TRPOLoss(actor), agent_order=agent_order)
    settings = {"max_kl": max_kl, "cg_iters": 60, "cg_tol": 1e-13, "kl_budget": kl_budget}
    stats = TrustRegionUpdater(objective, **settings).step(data)
    assert stats["order"].tolist() == [1, 2, 0]

    current, factor = theta.clone(), torch.ones(5, 8, 1, dtype=torch.float64)
    left, budget, first_gains = [0, 1, 2], 3 * max_kl, None
    for agent in [1, 2, 0]:
        leaf = current.clone().requires_grad_()
        surrogate = dense_surrogate(actor, data, True, leaf, factor)
        g = torch.autograd.grad(surrogate.sum(), leaf)[0]
        x = torch.linalg.solve(damped, g)
        gains = (g * x).sum(-1)
        first_gains = gains if first_gains is None else first_gains
        assert agent_order != "greedy" or agent == max(left, key=lambda index: gains[index])
        radius = budget * gains[agent] / gains[left].sum() if kl_budget == "team" else gains.new_tensor(max_kl)
        torch.testing.assert_close(stats["max_kl"][agent], radius)
        step = (2 * radius / gains[agent]).sqrt() * x[agent] * stats["step_fraction"][agent]
        current[agent] += step
        left.remove(agent)
        budget -= stats["kl"][agent]
        ratio = (distribution(actor, current, data).log_prob(data[ACTION]) - data[LOG_PROB]).exp()
        factor = factor * ratio[..., agent : agent + 1].detach()
    torch.testing.assert_close(flat_parameters(actor, 3), current, rtol=1e-7, atol=1e-10)
    assert first_gains[0] > first_gains[2]
    assert not torch.allclose(factor, torch.ones_like(factor), atol=1e-3)
    kl = region_mean(textbook_kl(old, distribution(actor, current, data)), True)
    torch.testing.assert_close(stats["kl"], kl)


@pytest.mark.parametrize("sequential", [True, False])
def test_a_team_shares_its_budget_out_by_what_each_agent_gains(sequential):
    """In proportion to gᵀ(F + λI)⁻¹g at M = 1, so that all agents have one step length, whatever the order."""
    actor = make_actor()
    data, theta = make_data(actor), flat_parameters(actor, 3)
    data["advantage"][..., 2, :] *= 0.3
    leaf = theta.clone().requires_grad_()
    surrogate = dense_surrogate(actor, data, True, leaf)
    g = torch.autograd.grad(surrogate.sum(), leaf)[0]
    damped = dense_fisher(actor, data, True) + 0.1 * torch.eye(theta.shape[1], dtype=torch.float64)
    gains = (g * torch.linalg.solve(damped, g)).sum(-1)
    expected = 3 * 0.01 * gains / gains.sum()
    assert expected.max() > 2 * expected.min()
    loss = TRPOLoss(actor)
    objective = HATRPOSequentialObjective(loss, agent_order=[1, 2, 0]) if sequential else loss
    stats = TrustRegionUpdater(objective, max_kl=0.01, cg_iters=60, cg_tol=1e-13, kl_budget="team").step(data)
    torch.testing.assert_close(stats["max_kl"], expected)
    first = 1 if sequential else slice(None)  # the others' gradients have M in them
    improvement = (2 * expected * gains).sqrt()
    torch.testing.assert_close(stats["expected_improvement"][first], improvement[first])
    assert improvement.sum() > (2 * 0.01 * gains).sqrt().sum()
    assert stats["accepted"].all()


def test_nobody_has_a_negative_share_of_a_team_s_budget(monkeypatch):
    """Without damping, rounding may leave a residual beyond g, and xᵀFx < 0; the others had more than the budget."""

    def diverged(product, g, **settings):
        x, residual, *others = conjugate_gradient(product, g, **settings)
        return x, torch.cat([3 * g[:1], residual[1:]]), *others

    monkeypatch.setattr("torchrl_trpo.numerics.updater.conjugate_gradient", diverged)
    actor = make_actor()
    stats = TrustRegionUpdater(TRPOLoss(actor), max_kl=0.01, kl_budget="team").step(make_data(actor))
    assert stats["max_kl"][0] == 0
    torch.testing.assert_close(stats["max_kl"].sum(), 3 * stats["max_kl"].new_tensor(0.01))
    assert stats["kl"].sum() <= 0.03


def test_a_team_s_budget_does_not_depend_on_the_advantage_s_scale():
    """Squares of its gradient are beyond float32."""
    radii = []
    for scale in (1.0, 1e-25):
        torch.manual_seed(0)
        actor = make_actor()
        data = make_data(actor).apply(lambda value: value.float() if value.is_floating_point() else value)
        data["advantage"] = scale * data["advantage"]
        radii.append(TrustRegionUpdater(TRPOLoss(actor.float()), kl_budget="team").step(data)["max_kl"])
    assert radii[0].max() > 1.2 * radii[0].min()
    torch.testing.assert_close(*radii)


def test_the_factor_changes_what_the_second_agent_does():
    """MARLlib's HATRPO is not sequential with its default settings."""
    actor = make_actor(n_agents=2)
    twin, data = deepcopy(actor), make_data(actor, n_agents=2)
    TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(actor), agent_order=[0, 1])).step(data)
    TrustRegionUpdater(TRPOLoss(twin)).step(data)
    sequential, simultaneous = flat_parameters(actor, 2), flat_parameters(twin, 2)
    torch.testing.assert_close(sequential[0], simultaneous[0])
    assert not torch.allclose(sequential[1], simultaneous[1], rtol=1e-3)


def test_ratios_are_those_of_the_parameters_written():
    """Kept from the last evaluation, computed where there was none, and never those of other parameters."""
    actor = make_actor()
    loss = make_loss(actor)
    rows = loss.policy_rows(make_data(actor))
    every = torch.ones(3, dtype=torch.bool)
    step = 0.05 * torch.randn_like(loss.policy_region(rows).parameters)
    ratios = []
    for evaluated in (0.5, 1.0, None):
        region = loss.policy_region(rows)
        if evaluated is not None:
            region.evaluate(region.parameters + evaluated * step)
        restore = region.snapshot()
        region.write(region.parameters + step, every)
        ratios.append(region.ratio())
        restore()
    assert ratios[0].isnan().all()
    torch.testing.assert_close(ratios[1], ratios[2])
    assert (ratios[2] - 1).abs().max() > 0.01


@OLD_DATA
def test_an_agent_that_is_masked_leaves_the_factor_as_it_was():
    """Where agent 0 is dead, M stays 1 for agent 1: what the padding's ratio would be is nobody's change."""
    actor = make_actor(n_agents=2)
    data, theta = make_data(actor, n_agents=2), flat_parameters(actor, 2)
    data["alive"] = torch.ones(5, 8, 2, 1, dtype=torch.bool)
    data["alive"][..., 0, :] = torch.rand(5, 8, 1) < 0.5
    loss = TRPOLoss(actor)
    loss.loss_mask_key = "alive"
    stats = TrustRegionUpdater(HATRPOSequentialObjective(loss, agent_order="fixed")).step(data)
    assert stats["accepted"].all()
    current = torch.stack([flat_parameters(actor, 2)[0], theta[1]])
    ratio = (distribution(actor, current, data).log_prob(data[ACTION]) - data[LOG_PROB]).exp().detach()
    factor = torch.where(data["alive"].squeeze(-1), ratio, 1.0)[..., :1]
    leaf = current.requires_grad_()
    (g,) = torch.autograd.grad(dense_surrogate(actor, data, True, leaf, factor)[1], leaf)
    torch.testing.assert_close(stats["grad_norm"][1], g[1].norm())
    spread = factor[data["alive"][..., 1, 0]].std(correction=0)
    torch.testing.assert_close(stats["factor_std"], torch.stack([torch.zeros(()), spread]), rtol=1e-4, atol=1e-6)
    assert "factor_std" not in TrustRegionUpdater(loss).step(data), "outside of a sequence there is no factor"


def test_one_agent_is_trpo():
    actor = make_actor(n_agents=1)
    twin, data = deepcopy(actor), make_data(actor, n_agents=1)
    stats = TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(actor))).step(data)
    expected = TrustRegionUpdater(TRPOLoss(twin)).step(data)
    torch.testing.assert_close(flat_parameters(actor), flat_parameters(twin))
    torch.testing.assert_close(stats["kl"], expected["kl"])


@OLD_DATA
def test_random_orders_come_from_torchs_generator():
    objective = HATRPOSequentialObjective(TRPOLoss(actor := make_actor()))
    updater, data = TrustRegionUpdater(objective), make_data(actor)
    orders = []
    for _ in range(2):
        torch.manual_seed(3)
        orders.append([tuple(updater.step(data)["order"].tolist()) for _ in range(12)])
    assert orders[0] == orders[1]
    assert len(set(orders[0])) > 1
    assert all(sorted(order) == [0, 1, 2] for order in orders[0])


def test_statistics_are_in_agent_order():
    """Row i is agent i whatever the order: here only agent 2 has advantages."""
    actor = make_actor()
    data = make_data(actor)
    data["advantage"][..., :2, :] = 0
    stats = TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(actor), agent_order=[2, 0, 1])).step(data)
    assert stats["accepted"].tolist() == [False, False, True]
    assert stats["order"].tolist() == [2, 0, 1]


@pytest.mark.parametrize("key", ["advantage", OBSERVATION, ACTION, LOG_PROB], ids=str)
def test_a_rejected_agent_keeps_its_bits_and_the_others_go_on(key):
    """An agent that was not moved leaves M as it was: its own NaNs must not reach the agents after it."""
    actor = make_actor(validate_args=False)
    data = make_data(actor)
    data[key][2, 3, 1].fill_(torch.nan)
    before = bits(actor)
    updater = TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(actor), agent_order=[1, 0, 2]))
    with pytest.warns(UserWarning, match="gradient of region 1 is not finite"):
        stats = updater.step(data)
    assert stats["accepted"].tolist() == [True, False, True]
    for new, old in zip(actor.parameters(), before, strict=True):
        assert torch.equal(new[1], old[1])
        assert not torch.equal(new[0], old[0])


class FlopCounter(TorchDispatchMode):
    """Counts the operations of all matrix products."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of_an_update(n_agents):
    actor = make_actor(n_agents=n_agents)
    updater = TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(actor)), max_backtracks=0)
    updater.step(make_data(actor, n_agents=n_agents))  # looks at the policy
    data = make_data(actor, n_agents=n_agents)
    with FlopCounter() as counter:
        updater.step(data)
    return counter.total


def test_cost_is_linear_in_the_number_of_agents():
    """Evaluating all agents to update one makes HATRPO cost O(n²); here 16 agents cost four times 4 agents."""
    assert flops_of_an_update(16) == 4 * flops_of_an_update(4) > 0


@pytest.mark.parametrize("given", ["tensors", "tuples", "arrays", "partial"])
def test_bounds_that_differ_between_agents(given):
    """TorchRL's action specs give bounds [n_agents, A] to the distribution; an agent is evaluated with its own."""
    bounds = {"low": ((-1.0, -2.0), (-3.0, -4.0)), "high": ((1.0, 2.0), (3.0, 4.0))}
    if given != "tuples":
        bounds = {name: torch.tensor(bound, dtype=torch.float64) for name, bound in bounds.items()}
    if given == "arrays":
        bounds = {name: bound.numpy() for name, bound in bounds.items()}
    actor = make_actor("tanh_normal", n_agents=2, **bounds)
    if given == "partial":
        actor[-1].distribution_class, actor[-1].distribution_kwargs = partial(TanhNormal, **bounds), {}
    twin, data = deepcopy(actor), make_data(actor, n_agents=2)
    data["advantage"][..., 0, :] = 0  # then the second agent's factor is 1, and its step that of TRPO
    TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(actor), agent_order="fixed")).step(data)
    TrustRegionUpdater(TRPOLoss(twin)).step(data)
    torch.testing.assert_close(flat_parameters(actor, 2), flat_parameters(twin, 2))


def test_groups_share_one_sequence():
    """Teams whose agents differ in observation and action sizes: every agent of every group is one step."""
    drones = make_actor("normal", n_agents=2, n_obs=3)
    car, _ = make_single(n_obs=5)
    data = make_data(drones, n_agents=2, n_obs=3)
    data.update(single_data(car, n_obs=5).exclude("next"))
    data["car_advantage"] = torch.randn(5, 8, 1, dtype=torch.float64)
    losses = {"drones": TRPOLoss(drones), "car": TRPOLoss(car)}
    losses["car"].set_keys(advantage="car_advantage")
    objective = HATRPOSequentialObjective(losses, agent_order=[2, 0, 1])
    twin = deepcopy(objective)
    stats = TrustRegionUpdater(objective).step(data)
    assert stats.batch_size == (3,)
    assert stats["accepted"].all()
    assert stats["order"].tolist() == [2, 0, 1]
    # The car went first and changed what the drones do.
    TrustRegionUpdater(HATRPOSequentialObjective(twin.losses["drones"], agent_order="fixed")).step(data)
    alone = torch.cat([p.flatten() for p in twin.losses["drones"].parameters()])
    after_car = torch.cat([p.flatten() for p in losses["drones"].parameters()])
    assert not torch.allclose(alone, after_car, rtol=1e-3)


def test_forward_is_the_sequential_surrogate():
    actor = make_actor()
    data = make_data(actor)
    objective = HATRPOSequentialObjective(TRPOLoss(actor), agent_order=[2, 0, 1])
    TrustRegionUpdater(objective).step(data)
    old = TensorDict({key: data[GROUP, key] for key in ("loc", "scale")})
    theta = flat_parameters(actor, 3).requires_grad_()
    dist = distribution(actor, theta, data)
    ratio = (dist.log_prob(data[ACTION]) - data[LOG_PROB]).exp()  # [5, 8, 3]
    advantage, expected, factor = data["advantage"].squeeze(-1), 0.0, 1.0
    for agent in [2, 0, 1]:
        expected = expected + (factor * ratio[..., agent] * advantage[..., agent]).mean()
        factor = factor * ratio[..., agent].detach()
    first, second = objective(data), objective(data)
    torch.testing.assert_close(first["loss_objective"], -expected)
    kl = region_mean(textbook_kl(actor[-1].distribution_class(**old), dist), True)
    torch.testing.assert_close(first["kl"], kl)
    assert (first["kl"] > 0).all()
    assert (first == second).all()
    assert set(first.keys()) == set(objective.out_keys)
    assert deepcopy(objective).select_out_keys("kl").out_keys == ["kl"]
    first["loss_objective"].backward()
    slopes = [parameter.grad.reshape(3, -1) for parameter in TensorDict.from_module(actor).values(True, True)]
    torch.testing.assert_close(-torch.cat(slopes, 1), torch.autograd.grad(expected, theta)[0])


def test_deepcopy_and_state_dict():
    objective = HATRPOSequentialObjective(TRPOLoss(actor := make_actor()))
    twin, data = deepcopy(objective), make_data(actor)
    TrustRegionUpdater(objective).step(data)
    assert not same_bits(twin, bits(objective))
    twin.load_state_dict(objective.state_dict())
    assert same_bits(twin, bits(objective))


def test_a_shared_policy_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"agents.*share_params=False.*MATRPO"):
        HATRPOSequentialObjective(TRPOLoss(make_actor(share_params=True)))
    policy, _ = make_single()  # a plain network: found out when the data has several agents
    objective = HATRPOSequentialObjective(TRPOLoss(policy))
    data = single_data(policy, batch=(5, 8, 3))
    data.batch_size = (5, 8)
    data["advantage"] = torch.randn(5, 8, 3, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"share_params=False"):
        TrustRegionUpdater(objective).step(data)


class PolicyWithScale(nn.Module):
    """Stacked networks, a scale that all agents share, and a normaliser of observations: ``[A]`` as long as ``n``."""

    def __init__(self, shared_scale):
        super().__init__()
        self.net = MultiAgentMLP(3, 3 if shared_scale else 6, 3, centralized=False, share_params=False, num_cells=[4])
        self.net.double()
        self.register_buffer("mean", torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
        self.register_buffer("count", torch.tensor(7.0))
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)) if shared_scale else None

    def forward(self, observation):
        out = self.net(observation - self.mean)
        if self.scale is not None:
            return out, self.scale.expand_as(out)
        loc, scale = out.chunk(2, -1)
        return loc, scale.exp()


def actor_with_scale(shared_scale):
    keys = [(GROUP, "loc"), (GROUP, "scale")]
    module = TensorDictModule(PolicyWithScale(shared_scale), in_keys=[OBSERVATION], out_keys=keys)
    distribution = {"distribution_class": IndependentNormal, "return_log_prob": True}
    return ProbabilisticActor(module, in_keys=keys, out_keys=[ACTION], **distribution)


def test_buffers_are_not_sliced_like_parameters():
    """A normaliser ``[F]`` with F = n_agents once was cut per agent: the KL reported was not the policy's."""
    actor = actor_with_scale(shared_scale=False)
    data = make_data(actor)
    old = actor.get_dist(data.clone())
    stats = TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(actor))).step(data)
    assert stats["accepted"].all()
    torch.testing.assert_close(stats["kl"], region_mean(textbook_kl(old, actor.get_dist(data.clone())), True))


def test_a_parameter_that_agents_share_is_noticed_whatever_its_length():
    """A standard deviation ``[A]`` with A = n_agents once was cut per agent, and the rejected agent's policy moved."""
    for trust_region in (None, "per_agent"):
        with pytest.raises(ValueError, match=r"'scale'\) \(3,\) is not.*\[n_agents, A\].*trust_region='shared'"):
            TRPOLoss(actor_with_scale(shared_scale=True), trust_region=trust_region)
    assert TRPOLoss(actor_with_scale(shared_scale=True), trust_region="shared").n_regions == 1


def test_keys_at_the_root():
    """Observations need no group: what is ``[N, n_agents, F]`` is one per agent."""
    actor = make_actor()
    root = make_single_key_actor(actor)
    data = make_data(actor)
    flat = TensorDict({key: data[GROUP, key] for key in ("observation", "action", "action_log_prob")}, [5, 8])
    flat["advantage"] = data["advantage"]
    twin = deepcopy(actor)
    TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(root), agent_order="fixed")).step(flat)
    TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(twin), agent_order="fixed")).step(data)
    torch.testing.assert_close(flat_parameters(root, 3), flat_parameters(twin, 3))


def make_single_key_actor(actor):
    """The same policy with keys at the root."""
    net = deepcopy(actor.module[0].module)
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )


def test_forward_knows_the_importance_cap():
    """It is the surrogate that the updater maximises: for one agent, the capped one of TRPOLoss."""
    actor = make_actor(n_agents=1)
    data = make_data(actor, n_agents=1)
    for parameter in actor.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    loss = TRPOLoss(actor, max_importance_ratio=1.05)
    capped = HATRPOSequentialObjective(loss)(data)["loss_objective"]
    torch.testing.assert_close(capped, loss(data)["loss_objective"])
    assert not torch.allclose(capped, TRPOLoss(actor)(data)["loss_objective"])


def test_one_region_over_stacked_parameters_is_refused():
    with pytest.raises(ValueError, match=r"trust_region='shared'.*Leave trust_region out"):
        HATRPOSequentialObjective(TRPOLoss(make_actor(), trust_region="shared"))
    with pytest.raises(ValueError, match="empty mapping"):
        HATRPOSequentialObjective({})


def test_the_order_can_be_assigned():
    objective = HATRPOSequentialObjective(TRPOLoss(make_actor()))
    objective.agent_order = "fixed"
    assert objective.agent_order == (0, 1, 2)
    objective.agent_order = torch.tensor([2, 1, 0])
    assert objective.agent_order == (2, 1, 0)
    with pytest.raises(ValueError, match="agent_order"):
        objective.agent_order = [0, 0, 1]


@pytest.mark.parametrize("order", ["sorted", [0, 1], [0, 1, 1], [1, 2, 3]])
def test_bad_orders(order):
    with pytest.raises(ValueError, match=r"agent_order.*'random', 'fixed', 'greedy', or.*3 agents"):
        HATRPOSequentialObjective(TRPOLoss(make_actor()), agent_order=order)


@pytest.mark.parametrize("agent_order", ["fixed", "greedy"])
def test_one_region_at_a_time_is_in_memory(agent_order, monkeypatch):
    def count():
        return sum(type(each) is PolicyTrustRegion for each in gc.get_objects())

    def counted(*arguments, **settings):
        alive.append(count())
        return conjugate_gradient(*arguments, **settings)

    actor = make_actor()
    objective, data = HATRPOSequentialObjective(TRPOLoss(actor), agent_order=agent_order), make_data(actor)
    gc.collect()
    alive, before = [], count()
    monkeypatch.setattr("torchrl_trpo.numerics.updater.conjugate_gradient", counted)
    TrustRegionUpdater(objective).step(data)
    assert alive == [before + 1] * (3 if agent_order == "fixed" else 6)


def test_a_greedy_order_needs_the_updater():
    actor = make_actor()
    objective, data = HATRPOSequentialObjective(TRPOLoss(actor), agent_order="greedy"), make_data(actor)
    with pytest.raises(TypeError, match=r"^gains: None\. agent_order='greedy' needs it"):
        next(objective.trust_regions(data))


@pytest.mark.parametrize("agent_order", ["greedy", "fixed"])
@pytest.mark.parametrize("unknown", [[1], [0, 1, 2]], ids=str)
def test_a_team_s_budget_without_a_gradient(unknown, agent_order):
    """Whose gradient is not finite comes last in a greedy order, and leaves the team's budget to the others."""
    actor = make_actor()
    data, before = make_data(actor), flat_parameters(actor, 3)
    data["advantage"][0, 0, unknown] = torch.inf
    objective = HATRPOSequentialObjective(TRPOLoss(actor), agent_order=agent_order)
    with pytest.warns(UserWarning, match="The gradient of region"):
        stats = TrustRegionUpdater(objective, kl_budget="team").step(data)
    assert sorted(stats["order"].tolist()) == [0, 1, 2]
    assert (~stats["accepted"]).nonzero().flatten().tolist() == unknown
    assert torch.equal(flat_parameters(actor, 3)[unknown], before[unknown])
    if len(unknown) == 1:
        *others, last = stats["order"] if agent_order == "greedy" else [0, 2, 1]
        assert last == 1
        spent = stats["kl"][others[0]] if agent_order == "greedy" else stats["max_kl"][others[0]]
        torch.testing.assert_close(stats["max_kl"][others[1]], 0.03 - spent)


def test_other_losses_are_refused():
    with pytest.raises(TypeError, match="TRPOLoss"):
        HATRPOSequentialObjective({"cars": torch.nn.Linear(1, 1)})


def test_policies_that_read_each_others_observations_are_refused():
    actor = make_actor()
    net = MultiAgentMLP(3, 4, n_agents=3, centralized=True, share_params=False, num_cells=[4], depth=1).double()
    actor.module[0].module = nn.Sequential(net, NormalParamExtractor())
    data = make_data(actor)
    with pytest.raises(ValueError, match="centralized=False"):
        TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(actor))).step(data)


def test_keys_are_set_on_the_groups():
    objective = HATRPOSequentialObjective(TRPOLoss(make_actor()))
    objective.set_keys(advantage="other")
    assert objective.losses["agents"].tensor_keys.advantage == "other"
    with pytest.raises(ValueError, match=r"losses\[group\]"):
        HATRPOSequentialObjective({"a": TRPOLoss(make_actor()), "b": TRPOLoss(make_actor())}).set_keys(advantage="x")


def test_keys_and_networks_of_several_groups():
    losses = {"a": TRPOLoss(make_actor()), "b": TRPOLoss(make_actor())}
    objective = HATRPOSequentialObjective(losses)
    objective.set_keys(advantage={"a": "x", "b": "y"})
    assert [loss.tensor_keys.advantage for loss in losses.values()] == ["x", "y"]
    for keys in ({"a": "x"}, {"a": "x", "b": "y", "c": "z"}):
        with pytest.raises(ValueError, match=r"advantage: .*\['a', 'b'\]"):
            objective.set_keys(advantage=keys)
    assert list(objective.actor_network) == [loss.actor_network for loss in losses.values()]
    assert objective.critic_network is None
    one = HATRPOSequentialObjective(losses["a"])
    assert one.actor_network is losses["a"].actor_network


def test_gradient_of_the_first_agent_is_the_policy_gradient():
    actor = make_actor()
    data = make_data(actor)
    stats = TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(deepcopy(actor)), agent_order="fixed")).step(data)
    torch.testing.assert_close(stats["grad_norm"][0], dense_gradient(actor, data, True)[0].norm())


@pytest.mark.parametrize("name", ["hatrpo", "mappo", "happo"])
@pytest.mark.parametrize("shared", ["advantage", "value", "value_target"])
def test_groups_that_write_the_same_entry_are_refused(name, shared):
    """With the default keys the second group's estimator overwrote the first one's: a team trained on the other's."""
    losses, updaters = {}, {"mappo": ClippedUpdater, "happo": HAPPOUpdater}
    for group in ("cars", "trucks"):
        actor = make_actor()
        critic = TensorDictModule(nn.Linear(3, 1).double(), [OBSERVATION], [(group, "value")])
        losses[group] = TRPOLoss(actor, critic) if name == "hatrpo" else ClipPPOLoss(actor, critic)
        own = {key: (group, key) for key in ("advantage", "value", "value_target") if key != shared}
        losses[group].set_keys(action=ACTION, sample_log_prob=LOG_PROB, **own)
    updater = updaters[name](losses) if name != "hatrpo" else TrustRegionUpdater(HATRPOSequentialObjective(losses))
    legal = rf"{shared}: .* groups 'cars' and 'trucks'.*losses\['trucks'\].set_keys\({shared}=\('trucks', "
    with pytest.raises(ValueError, match=legal):
        updater.step(make_data(losses["cars"].actor_network))


def test_a_mask_and_an_estimator_are_those_of_the_losses():
    """A mask was an attribute that nothing read."""
    actor = make_actor()
    critic = TensorDictModule(nn.Linear(3, 1).double(), [OBSERVATION], [VALUE])
    objective = HATRPOSequentialObjective(TRPOLoss(actor, critic))
    objective.set_keys(value=VALUE)
    objective.loss_mask_key = (GROUP, "mask")
    assert objective.losses["agents"].loss_mask_key == objective.loss_mask_key == (GROUP, "mask")
    objective.make_value_estimator(gamma=0.5)
    assert objective.losses["agents"].value_estimator.gamma == 0.5


def test_without_critics_groups_may_share_what_only_critics_write():
    losses = {group: TRPOLoss(make_actor()) for group in ("cars", "trucks")}
    losses["trucks"].set_keys(advantage=("trucks", "advantage"))
    data = make_data(losses["cars"].actor_network)
    data["trucks", "advantage"] = data["advantage"]
    with pytest.warns(UserWarning, match="not collected"):  # by the trucks
        assert TrustRegionUpdater(HATRPOSequentialObjective(losses)).step(data)["accepted"].all()


@pytest.mark.parametrize("name", ["hatrpo", "mappo", "happo"])
def test_groups_that_share_a_policy_are_refused(name):
    """Each step was within max_kl of its own region, and their sum was not."""
    actor = make_actor()
    losses = {group: (TRPOLoss if name == "hatrpo" else ClipPPOLoss)(actor) for group in ("cars", "trucks")}
    for group, loss in losses.items():
        loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, advantage=(group, "advantage"))
    updaters = {"mappo": ClippedUpdater, "happo": HAPPOUpdater}
    updater = updaters[name](losses) if name != "hatrpo" else TrustRegionUpdater(HATRPOSequentialObjective(losses))
    with pytest.raises(ValueError, match="groups 'cars' and 'trucks' share the parameter"):
        updater.step(make_data(actor))
