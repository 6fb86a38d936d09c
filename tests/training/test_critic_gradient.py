"""The recorded gradient of the critic's loss against the loss itself."""

from __future__ import annotations

import contextlib
from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import MultiAgentMLP

from tests.cases import make_actor, needs_compiler
from torchrl_trpo.networks.builders import TeamCritic
from torchrl_trpo.objectives import TRPOLoss
from torchrl_trpo.training import critic_fit
from torchrl_trpo.training.critic_fit import critic_optimizer, fit_critic, trained_parameters

CENTRAL, VALUE, TARGET = ("agents", "central"), ("agents", "state_value"), ("agents", "value_target")
MASK = ("collector", "mask")
FIT = {"epochs": 2, "minibatch_size": 10}


def make_loss(*layers, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), *layers, nn.Linear(8, 1)).to(dtype)
    loss = TRPOLoss(make_actor(), TensorDictModule(TeamCritic(net), [CENTRAL], [VALUE]), **settings)
    loss.set_keys(value=VALUE, value_target=TARGET)
    return loss


def make_batch(n_rows=300, masked=False, dtype=torch.float64):
    """Rows with a pooled input that is repeated, not copied, for each of two agents."""
    central = torch.randn(n_rows, 1, 3, dtype=dtype).expand(-1, 2, -1)
    values = {VALUE: torch.randn(n_rows, 2, 1, dtype=dtype), TARGET: torch.randn(n_rows, 2, 1).to(dtype)}
    data = TensorDict({CENTRAL: central, **values}, [n_rows])
    if masked:
        data[MASK] = torch.rand(n_rows) < 0.7
        data[TARGET][~data[MASK]] = torch.nan
    return data


def fit(loss, optimizer, data, *, recorded, monkeypatch, compiled=False, minibatch_size=10):
    """What a fit returns, the parameters after it, and how often the loss was called."""
    monkeypatch.setattr(critic_fit, "_FEWEST_STEPS", 0 if recorded else 10**9)
    calls, own = [], type(loss).loss_critic
    monkeypatch.setattr(type(loss), "loss_critic", lambda *args: calls.append(1) or own(*args))
    torch.manual_seed(1)
    result = fit_critic(loss, optimizer, data, epochs=2, minibatch_size=minibatch_size, compiled=compiled)
    monkeypatch.undo()
    return result, [parameter.clone() for parameter in loss.critic_network_params.values(True, True)], len(calls)


def compare(losses, optimizers, data, *, monkeypatch, compiled=False, minibatch_size=10, **close):
    """Fits one loss by what is recorded and the other as it is, and compares; how often each is called."""
    how = {"monkeypatch": monkeypatch, "minibatch_size": minibatch_size}
    fast, own, calls = fit(losses[0], optimizers[0], data, recorded=True, compiled=compiled, **how)
    slow, expected, all_calls = fit(losses[1], optimizers[1], data, recorded=False, **how)
    torch.testing.assert_close((fast, own), (slow, expected), **close)
    return calls, all_calls


@pytest.mark.parametrize(
    ("settings", "batch"),
    [
        ({}, {}),
        ({"clip_value": 0.1, "loss_critic_type": "l2"}, {}),
        ({"log_explained_variance": False}, {"masked": True}),
        ({}, {"n_rows": 305}),  # an epoch's last minibatch has another shape
    ],
    ids=["default", "clipped", "masked", "remainder"],
)
def test_recorded_fit_is_the_fit_to_the_bit(settings, batch, monkeypatch):
    data, loss = make_batch(**batch), make_loss(**settings)
    twin = deepcopy(loss)
    optimizers = [critic_optimizer([each], lr=0.01) for each in (loss, twin)]
    for _ in range(2):  # the second fit uses the graph of the first
        close = {"rtol": 0, "atol": 0, "equal_nan": True}
        calls, all_calls = compare((loss, twin), optimizers, data, monkeypatch=monkeypatch, **close)
        assert calls <= 5 < all_calls


def test_recorded_again_when_the_loss_has_changed(monkeypatch):
    data, loss = make_batch(), make_loss()
    optimizer = critic_optimizer([loss], lr=0.01)
    fit(loss, optimizer, data, recorded=True, monkeypatch=monkeypatch)
    loss.loss_critic_type = "l2"
    twin = deepcopy(loss)
    optimizers = [critic_optimizer([each], lr=0.01) for each in (loss, twin)]
    compare((loss, twin), optimizers, data, monkeypatch=monkeypatch, rtol=0, atol=0)


def test_recorded_again_when_a_setting_has_changed_that_the_first_minibatch_does_not_show(monkeypatch):
    data, loss = make_batch(), make_loss()
    fit(loss, critic_optimizer([loss], lr=0.01), data, recorded=True, monkeypatch=monkeypatch)
    torch.manual_seed(1)
    first = torch.randperm(len(data))[: FIT["minibatch_size"]]  # of the next fit, whose loss is 0 of whatever kind
    with torch.no_grad(), loss.critic_network_params.to_module(loss.critic_network):
        data[TARGET][first] = loss.critic_network(data[first].clone())[VALUE]
    loss.loss_critic_type = "l2"
    twin = deepcopy(loss)
    optimizers = [critic_optimizer([each], lr=0.01) for each in (loss, twin)]
    compare((loss, twin), optimizers, data, monkeypatch=monkeypatch, rtol=0, atol=0)


class Aware(nn.Module):
    """A layer with Python that depends on what is in a minibatch, or on earlier calls."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.n_calls = kind, 0

    def forward(self, x):
        if self.kind == "checks":
            assert x.isfinite().all()
        elif self.kind == "reads":
            return x * float(x.detach().numpy().max())
        elif self.kind == "selects":
            return x * len(x[x > 0.5])
        elif self.kind == "counts":
            self.n_calls += 1
            return x * min(self.n_calls, 9)
        return x


@pytest.mark.parametrize("kind", ["checks", "reads", "selects", "counts", "hook"])
def test_a_critic_that_depends_on_its_minibatch_is_not_recorded(kind, monkeypatch):
    """The first minibatch's numbers stood for all, or what cannot be recorded was an error."""

    def clamp(parameter):
        parameter.grad.clamp_(-0.01, 0.01)

    data, results = make_batch(), []
    for recorded in (True, False):
        loss = make_loss(Aware(kind))
        if kind == "hook":
            trained_parameters(loss)[0].register_post_accumulate_grad_hook(clamp)
        optimizer = critic_optimizer([loss], lr=0.01)
        results.append([fit(loss, optimizer, data, recorded=recorded, monkeypatch=monkeypatch)[:2] for _ in range(2)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_random_critic_is_never_recorded(monkeypatch):
    data, loss = make_batch(), make_loss(nn.Dropout(0.5))
    optimizer = critic_optimizer([loss], lr=0.01)
    for warned in (True, False):
        with pytest.warns(UserWarning, match="do not give its results again") if warned else contextlib.nullcontext():
            *_, calls = fit(loss, optimizer, data, recorded=True, compiled=True, monkeypatch=monkeypatch)
        assert calls >= FIT["epochs"] * len(data) / FIT["minibatch_size"]


@needs_compiler
@pytest.mark.parametrize("settings", [{}, {"loss_critic_type": "l2"}, {"loss_critic_type": "l1", "clip_value": 0.1}])
def test_compiled_fit_is_the_fit_up_to_rounding(settings, monkeypatch):
    data = make_batch(305, dtype=torch.float32)
    losses = [make_loss(dtype=torch.float32, **settings) for _ in range(2)]
    optimizers = [torch.optim.SGD(trained_parameters(loss), lr=0.1) for loss in losses]
    # The second fit uses what the first has compiled, and the third must not. Called are the loss itself, the recorders
    # of the graph and the function, and twice more to compare; not in an epoch's last minibatch, of another size.
    for critic_coeff, most_calls in ((1.0, 5), (1.0, 1), (0.5, 5)):
        for loss in losses:
            loss.critic_coeff.fill_(critic_coeff)
        how = {"compiled": True, "monkeypatch": monkeypatch, "rtol": 1e-4, "atol": 1e-6}
        calls, _ = compare(losses, optimizers, data, **how)
        assert calls == most_calls


@needs_compiler
def test_what_is_compiled_serves_minibatches_of_all_sizes(monkeypatch):
    data = make_batch(dtype=torch.float32)
    losses = [make_loss(dtype=torch.float32) for _ in range(2)]
    optimizers = [critic_optimizer([loss], lr=0.01) for loss in losses]
    for number in range(6):  # the first size differs from fit to fit, as that of one process of several
        how = {"compiled": True, "monkeypatch": monkeypatch, "rtol": 1e-3, "atol": 1e-5}
        calls, _ = compare(losses, optimizers, data, minibatch_size=10 + number, **how)
        assert calls <= 5


@needs_compiler
def test_settings_that_come_back_are_not_compiled_anew(monkeypatch):
    data = make_batch(dtype=torch.float32)
    losses = [make_loss(dtype=torch.float32) for _ in range(2)]
    optimizers = [critic_optimizer([loss], lr=0.01) for loss in losses]
    for kind, most_calls in (("l2", 5), ("l1", 5), ("l2", 1), ("l1", 1)):
        for loss in losses:
            loss.loss_critic_type = kind
        how = {"compiled": True, "monkeypatch": monkeypatch, "rtol": 1e-3, "atol": 1e-5}
        calls, _ = compare(losses, optimizers, data, **how)
        assert calls == most_calls


class ScaledLoss(TRPOLoss):
    """A loss that divides the critic's by a tensor of a part of it."""

    def __init__(self, scale, *networks):
        super().__init__(*networks)
        self.part = nn.Module()
        self.part.scale = scale
        self.set_keys(value=VALUE, value_target=TARGET)

    def loss_critic(self, tensordict):
        distance, *others = super().loss_critic(tensordict)
        return distance / self.part.scale, *others


@needs_compiler
def test_compiled_anew_when_a_tensor_has_changed_that_the_loss_reads(monkeypatch):
    data = make_batch(dtype=torch.float32)
    losses = []
    for _ in range(2):
        plain = make_loss(dtype=torch.float32)
        losses.append(ScaledLoss(torch.ones(()), plain.actor_network, plain.critic_network))
    optimizers = [critic_optimizer([loss], lr=0.01) for loss in losses]
    for scale in (1.0, 1.0, 5.0):
        for loss in losses:
            loss.part.scale.fill_(scale)
        compare(losses, optimizers, data, compiled=True, monkeypatch=monkeypatch, rtol=1e-3, atol=1e-5)


def test_a_loss_with_trained_parameters_of_its_own_is_never_recorded(monkeypatch):
    data, results = make_batch(), []
    for recorded in (True, False):
        plain = make_loss()
        loss = ScaledLoss(nn.Parameter(torch.ones((), dtype=torch.float64)), plain.actor_network, plain.critic_network)
        optimizer = torch.optim.Adam([*trained_parameters(loss), loss.part.scale], lr=0.01)
        results.append(fit(loss, optimizer, data, recorded=recorded, monkeypatch=monkeypatch)[:2])
        assert loss.part.scale != 1
        results[-1] += (loss.part.scale.detach(),)
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_agents_with_critics_of_their_own(compiled, monkeypatch):
    """Their gradients come in another layout than the parameters, which a fused optimiser does not look at."""
    data = TensorDict({("agents", "observation"): torch.randn(300, 2, 3)}, [300]).update(
        make_batch(dtype=torch.float32).exclude(CENTRAL)
    )
    results = []
    for recorded in (True, False):
        torch.manual_seed(0)
        net = MultiAgentMLP(3, 1, n_agents=2, centralized=False, share_params=False, depth=2, num_cells=32)
        loss = TRPOLoss(make_actor(), TensorDictModule(net, [("agents", "observation")], [VALUE]))
        loss.set_keys(value=VALUE, value_target=TARGET)
        optimizer = critic_optimizer([loss], lr=0.01)
        how = {"compiled": compiled and recorded, "monkeypatch": monkeypatch}
        results.append(fit(loss, optimizer, data, recorded=recorded, **how)[:2])
    torch.testing.assert_close(*results, rtol=1e-3 if compiled else 0, atol=1e-4 if compiled else 0)


@needs_compiler
def test_fit_that_cannot_be_compiled_says_why(monkeypatch):
    data, loss = make_batch(), make_loss(log_explained_variance=False)
    twin = deepcopy(loss)
    optimizers = [critic_optimizer([each], lr=0.01) for each in (loss, twin)]
    with pytest.warns(UserWarning, match="The critic's fit is not compiled: it reads data of torch.float64"):
        compare((loss, twin), optimizers, data, compiled=True, monkeypatch=monkeypatch, rtol=0, atol=0)


def test_data_without_value_targets_is_refused():
    loss = make_loss()
    data = make_batch().exclude(TARGET)
    with pytest.raises(
        KeyError, match=r"value_target, which loss\.value_estimator\(data\) writes: .* is not in the data"
    ):
        fit_critic(loss, critic_optimizer([loss], lr=1e-3), data, **FIT)
