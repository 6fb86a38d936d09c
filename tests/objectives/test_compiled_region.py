"""Compiled updates against those that are not: the same step up to rounding, or a warning and the very same step."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.cases import bits, make_actor, make_data, make_loss, make_policy, needs_compiler, same_bits
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss

pytestmark = needs_compiler


def make_case(kind="normal", share_params=False, **actor_settings):
    torch.manual_seed(0)
    actor = make_actor(kind, share_params=share_params, hidden=20, **actor_settings).float()
    data = make_data(deepcopy(actor).double(), batch=(9, 8))
    return actor, data.apply(lambda value: value.float() if value.is_floating_point() else value)


def updates(
    actor,
    data,
    n=2,
    sequential=False,
    step=None,
    fisher_subsample=0.5,
    kl_budget="agent",
    agent_order="fixed",
    loss_mask_key=None,
    **settings,
):
    """The statistics and the parameters after some updates of a copy, with and without compiling."""
    results = []
    for compiled in (True, False):
        own = deepcopy(actor)
        loss = make_loss(own, compiled=compiled, **settings)
        if loss_mask_key is not None:
            loss.loss_mask_key = loss_mask_key
        objective = HATRPOSequentialObjective(loss, agent_order=agent_order) if sequential else loss
        budget = {"fisher_subsample": fisher_subsample, "kl_budget": kl_budget}
        updater = TrustRegionUpdater(objective, cg_iters=4, **budget)  # more steps would amplify rounding
        torch.manual_seed(1)
        for number in range(n):
            stats = updater.step(data)
            if step is not None:
                step(own, number)
        results.append((stats, torch.cat([value.flatten() for value in own.parameters()])))
        if compiled:
            assert all(functions is not None for functions in loss._compiler._functions.values())
    return results


def check_same(compiled, plain):
    stats, parameters = compiled
    expected, expected_parameters = plain
    for name in ("accepted", "kl", "improvement", "expected_improvement", "step_fraction", "grad_norm", "factor_std"):
        if name in expected.keys():
            torch.testing.assert_close(stats[name], expected[name], rtol=2e-3, atol=1e-6, msg=name)
    torch.testing.assert_close(parameters, expected_parameters, rtol=2e-3, atol=2e-4)


@pytest.mark.filterwarnings("ignore:The data was not collected by the policy")
@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ({}, {"sequential": True}),
        ({}, {"sequential": True, "kl_budget": "team"}),
        ({}, {"sequential": True, "kl_budget": "team", "agent_order": "greedy"}),
        ({}, {}),
        ({"share_params": True}, {"max_importance_ratio": 1.2}),
        ({"kind": "tanh_normal"}, {"sequential": True, "entropy_coeff": 0.01}),
        ({"kind": "categorical"}, {"sequential": True, "fisher_subsample": 1.0}),
    ],
    ids=["sequence", "team", "greedy", "agents", "shared", "bounded", "discrete"],
)
def test_compiled_update_is_the_update(case, settings):
    check_same(*updates(*make_case(**case), **settings))


@pytest.mark.filterwarnings("ignore:The data was not collected by the policy")
def test_masked_rows_do_not_count():
    actor, data = make_case()
    data["mask"] = torch.rand(9, 8) < 0.6
    data["advantage"][~data["mask"]] = torch.nan
    check_same(*updates(actor, data, sequential=True, loss_mask_key="mask"))


def test_agents_with_other_bounds():
    low = torch.tensor([[-1.0, -1.0], [-2.0, -1.0], [-1.0, -1.0]])
    actor, data = make_case("tanh_normal", low=low, high=-low)
    check_same(*updates(actor, data, n=1, sequential=True))


class Scale(nn.Module):
    """A module that holds an object, which is no module, and a closure; the class has an attribute too."""

    factor = 1.0

    def __init__(self, hidden=None):
        super().__init__()
        self.numbers, self.hidden = type("Numbers", (), {})(), hidden
        self.numbers.scale = 1.0

    def forward(self, x):
        x = x * self.numbers.scale * Scale.factor
        return x if self.hidden is None else x * self.hidden()


@pytest.mark.filterwarnings("ignore:The data was not collected by the policy")
def test_settings_that_change_are_heeded():
    net = nn.Sequential(nn.Linear(3, 20), nn.LeakyReLU(0.1), Scale(), nn.Linear(20, 4))
    torch.manual_seed(0)
    actor = make_policy(net, "normal")
    data = make_data(deepcopy(actor).double(), batch=(9, 8))
    data = data.apply(lambda value: value.float() if value.is_floating_point() else value)

    def change(own, number):
        next(module for module in own.modules() if isinstance(module, nn.LeakyReLU)).negative_slope = 0.9
        next(module for module in own.modules() if isinstance(module, Scale)).numbers.scale = 0.5

    check_same(*updates(actor, data, step=change, trust_region="shared"))

    def change_unseen(own, number):
        Scale.factor = (0.5, 1.0)[number]  # which no module holds

    check_same(*updates(actor, data, step=change_unseen, trust_region="shared"))


@pytest.mark.parametrize(
    ("settings", "dtype", "layer", "reason"),
    [
        ({"chunk_size": 16}, torch.float32, nn.Identity(), "chunk_size is given"),
        ({}, torch.float64, nn.Identity(), "float64"),
        ({}, torch.float32, Scale(torch.ones(4).clone), "a tensor of shape .4,. that is no parameter and no buffer"),
    ],
    ids=["chunks", "double", "hidden"],
)
def test_what_is_not_compiled_says_so_once_and_is_the_same(settings, dtype, layer, reason):
    actor, data = make_case()
    actor.module[0].module.insert(1, layer)
    data = data.apply(lambda value: value.to(dtype))
    steps = []
    for compiled in (True, False):
        own = deepcopy(actor).to(dtype)
        loss = TRPOLoss(own, compiled=compiled, **settings)
        if compiled:
            with pytest.warns(UserWarning, match=reason):
                TrustRegionUpdater(loss).step(data)
        else:
            TrustRegionUpdater(loss).step(data)
        steps.append(own)
    assert same_bits(steps[0], bits(steps[1]))


def test_a_copy_of_a_compiled_loss_updates_too():
    actor, data = make_case()
    loss = TRPOLoss(actor, compiled=True)
    loss.policy_region(loss.policy_rows(data))
    twin = deepcopy(loss)
    for each in (loss, twin):
        assert bool(TrustRegionUpdater(each).step(data)["accepted"].all())
    torch.testing.assert_close([*loss.parameters()], [*twin.parameters()], rtol=0, atol=0)
