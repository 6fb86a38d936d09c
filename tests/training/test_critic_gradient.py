"""The recorded gradient of the critic's loss against the loss itself."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tests.cases import make_actor
from torchrl_trpo.networks.builders import TeamCritic
from torchrl_trpo.objectives import TRPOLoss
from torchrl_trpo.training import critic_gradient
from torchrl_trpo.training.critic_fit import critic_optimizer, fit_critic

CENTRAL, VALUE, TARGET = ("agents", "central"), ("agents", "state_value"), ("agents", "value_target")
MASK = ("collector", "mask")
FIT = {"epochs": 2, "minibatch_size": 10}


def make_loss(*layers, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), *layers, nn.Linear(8, 1)).double()
    loss = TRPOLoss(make_actor(), TensorDictModule(TeamCritic(net), [CENTRAL], [VALUE]), **settings)
    loss.set_keys(value=VALUE, value_target=TARGET)
    return loss


def make_batch(n_rows=300, masked=False):
    """Rows with a pooled input that is repeated, not copied, for each of two agents."""
    central = torch.randn(n_rows, 1, 3, dtype=torch.float64).expand(-1, 2, -1)
    values = {VALUE: torch.randn(n_rows, 2, 1, dtype=torch.float64), TARGET: torch.randn(n_rows, 2, 1).double()}
    data = TensorDict({CENTRAL: central, **values}, [n_rows])
    if masked:
        data[MASK] = torch.rand(n_rows) < 0.7
        data[TARGET][~data[MASK]] = torch.nan
    return data


def fit(loss, optimizer, data, *, recorded, monkeypatch):
    """What a fit returns, the parameters after it, and how often the loss was called."""
    monkeypatch.setattr(critic_gradient, "_FEWEST_STEPS", 0 if recorded else 10**9)
    calls, own = [], type(loss).loss_critic
    monkeypatch.setattr(type(loss), "loss_critic", lambda *args: calls.append(1) or own(*args))
    torch.manual_seed(1)
    result = fit_critic(loss, optimizer, data, **FIT)
    monkeypatch.undo()
    return result, [parameter.clone() for parameter in loss.critic_network_params.values(True, True)], len(calls)


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
        fast, own, calls = fit(loss, optimizers[0], data, recorded=True, monkeypatch=monkeypatch)
        slow, expected, all_calls = fit(twin, optimizers[1], data, recorded=False, monkeypatch=monkeypatch)
        assert calls <= 4 < all_calls
        torch.testing.assert_close((fast, own), (slow, expected), rtol=0, atol=0, equal_nan=True)


def test_recorded_again_when_the_loss_has_changed(monkeypatch):
    data, loss = make_batch(), make_loss()
    optimizer = critic_optimizer([loss], lr=0.01)
    fit(loss, optimizer, data, recorded=True, monkeypatch=monkeypatch)
    loss.loss_critic_type = "l2"
    twin = deepcopy(loss)
    optimizers = [critic_optimizer([each], lr=0.01) for each in (loss, twin)]
    fast, own, _ = fit(loss, optimizers[0], data, recorded=True, monkeypatch=monkeypatch)
    slow, expected, _ = fit(twin, optimizers[1], data, recorded=False, monkeypatch=monkeypatch)
    torch.testing.assert_close((fast, own), (slow, expected), rtol=0, atol=0)


def test_random_critic_is_never_recorded(monkeypatch):
    data, loss = make_batch(), make_loss(nn.Dropout(0.5))
    optimizer = critic_optimizer([loss], lr=0.01)
    for _ in range(2):
        *_, calls = fit(loss, optimizer, data, recorded=True, monkeypatch=monkeypatch)
        assert calls >= FIT["epochs"] * len(data) / FIT["minibatch_size"]


def test_data_without_value_targets_is_refused():
    loss = make_loss()
    data = make_batch().exclude(TARGET)
    with pytest.raises(
        KeyError, match=r"value_target, which loss\.value_estimator\(data\) writes: .* is not in the data"
    ):
        fit_critic(loss, critic_optimizer([loss], lr=1e-3), data, **FIT)
