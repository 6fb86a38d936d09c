"""Clipped updates with a compiled gradient against the same updates as PyTorch runs them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torchrl.objectives import ClipPPOLoss

from tests.cases import (
    ACTION,
    DISTRIBUTIONS,
    GROUP,
    LOG_PROB,
    PARTS,
    is_composite,
    make_actor,
    make_data,
    make_policy,
    needs_compiler,
)
from torchrl_trpo.objectives import ClippedUpdater, HAPPOUpdater
from torchrl_trpo.objectives.policy_member import MemberLoss

pytestmark = needs_compiler
SETTINGS = {"lr": 0.01, "epochs": 4, "minibatch_size": 15}  # 40 rows: 12 steps, of which each third has fewer rows


def make(kind="normal", updater=ClippedUpdater, dtype=torch.float32, **settings):
    """A policy's loss and its data."""
    torch.manual_seed(0)
    actor = make_actor(kind, share_params=updater is ClippedUpdater)
    data = make_data(actor).apply(lambda value: value.to(dtype) if value.is_floating_point() else value)
    loss = ClipPPOLoss(actor.to(dtype), **{"entropy_coeff": 0.01, "max_importance_ratio": 2.0, **settings})
    keys = {"action": ACTION, "sample_log_prob": LOG_PROB}
    if is_composite(actor):
        names = [(GROUP, name) for name in PARTS]
        keys = {"action": names, "sample_log_prob": [(GROUP, f"{name}_log_prob") for name in PARTS]}
    loss.set_keys(**keys)
    return loss, data


def steps(loss, data, updater=ClippedUpdater, *, compiled, change=lambda loss: None, monkeypatch):
    """The policy after two updates, their statistics, and how often the loss was called."""
    calls, forward = [], MemberLoss.forward
    monkeypatch.setattr(MemberLoss, "forward", lambda *args: calls.append(1) or forward(*args))
    own = updater(copy.deepcopy(loss), compiled=compiled, **SETTINGS)
    torch.manual_seed(5)
    stats = []
    for _ in range(2):
        stats.append(own.step(data))
        change(own.losses["agents"])
    monkeypatch.undo()
    parameters = own.losses["agents"].actor_network_params
    return [value.detach() for value in parameters.values(True, True)], torch.stack(stats), len(calls)


def both(loss, data, updater=ClippedUpdater, **settings):
    """The compiled updates and the plain ones; the compiled ones warn of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = steps(loss, data, updater, compiled=True, **settings)
    return ours, steps(loss, data, updater, compiled=False, **settings)


@pytest.mark.parametrize(
    ("kind", "updater"), [*((kind, ClippedUpdater) for kind in DISTRIBUTIONS), ("normal", HAPPOUpdater)]
)
def test_it_is_the_update_up_to_rounding(kind, updater, monkeypatch):
    (ours, stats, calls), (expected, expected_stats, all_calls) = both(
        *make(kind, updater), updater, monkeypatch=monkeypatch
    )
    assert calls <= 0.25 * all_calls
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(stats.to_dict(), expected_stats.to_dict(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda loss: loss.clip_epsilon.fill_(0.01),
        lambda loss: loss.entropy_coeff.fill_(0.5),
        lambda loss: loss.max_importance_ratio.fill_(1.01),
        lambda loss: loss.actor_network_params.apply_(lambda value: value.data.mul_(2)),
    ],
    ids=["clipping", "entropy", "cap", "policy"],
)
def test_what_changes_between_updates_is_heeded(change, monkeypatch):
    (ours, _, calls), (expected, _, all_calls) = both(*make(), change=change, monkeypatch=monkeypatch)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert calls <= all_calls / 2
    unchanged = steps(*make(), compiled=True, monkeypatch=monkeypatch)[0]
    assert not all(torch.allclose(*pair, rtol=1e-3, atol=1e-5) for pair in zip(ours, unchanged, strict=True))


def test_a_mask_leaves_it_as_it_is(monkeypatch):
    loss, data = make()
    data[GROUP, "mask"] = torch.rand(5, 8, 3) < 0.7
    loss.loss_mask_key = (GROUP, "mask")
    (ours, *_), (expected, *_) = both(loss, data, monkeypatch=monkeypatch)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_a_minibatch_with_a_nan_is_left_out(monkeypatch):
    """Also if it is the first, which is compared with what is compiled."""
    loss, data = make()
    torch.manual_seed(5)
    data["advantage"].view(40, 3)[torch.randperm(40)[0]] = torch.nan
    (ours, stats, calls), (expected, *_, all_calls) = both(loss, data, monkeypatch=monkeypatch)
    assert not stats["accepted"].any()
    assert calls < all_calls
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


class Layer(nn.Module):
    """A layer that computes with what compiled code does not know to change, or with parameters of one gradient."""

    scale = 1.0

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.long = torch.ones(300, 4)
        if kind == "biases":
            self.first, self.second, self.third = (nn.Parameter(torch.zeros(n)) for n in (4, 2, 2))

    def forward(self, x):
        if self.kind == "biases":
            return x + (self.first + torch.cat([self.second, self.third]))
        if self.kind == "rows":
            return x * (2 if len(x) < 3 else 1)
        if self.kind == "whole numbers":
            return x + ((x * 1e9).long() * 0.0)
        return x * self.scale * self.long[0]


def make_layered(kind, dtype=torch.float32):
    torch.manual_seed(0)
    actor = make_policy(nn.Sequential(nn.Linear(3, 4), Layer(kind), nn.Linear(4, 4)).double(), "normal")
    data = make_data(actor).apply(lambda value: value.to(dtype) if value.is_floating_point() else value)
    loss = ClipPPOLoss(actor.to(dtype))
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB)
    return loss, data


def halve_attribute(loss):
    Layer.scale = 0.5


def halve_long_tensor(loss):
    for module in loss.actor_network.modules():
        if isinstance(module, Layer):
            module.long.data.mul_(0.5)


@pytest.mark.parametrize("change", [halve_attribute, halve_long_tensor])
def test_a_change_that_is_not_seen_is_found_by_the_first_minibatch(change, monkeypatch):
    """What was compiled before went on."""
    results = []
    for compiled in (True, False):
        monkeypatch.setattr(Layer, "scale", 1.0)
        results.append(steps(*make_layered("scale"), compiled=compiled, change=change, monkeypatch=monkeypatch)[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["rows", "whole numbers"])
def test_python_that_depends_on_rows_is_not_compiled(kind, monkeypatch):
    """A last minibatch of one row took the others' way; numbers that are too large were an error."""
    monkeypatch.setitem(SETTINGS, "minibatch_size", 13)  # and 1
    loss, data = make_layered(kind)
    expected = steps(loss, data, compiled=False, monkeypatch=monkeypatch)[0]
    monkeypatch.setitem(SETTINGS, "minibatch_size", 13)
    with pytest.warns(UserWarning, match="The policy's update is not compiled"):
        ours = steps(loss, data, compiled=True, monkeypatch=monkeypatch)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_compiled_says_why_and_is_right(monkeypatch):
    """Parameters whose gradients have memory in common: it was shortened to ``max_grad_norm`` once for each."""
    loss, data = make_layered("biases", torch.float64)
    monkeypatch.setitem(SETTINGS, "max_grad_norm", 1e-3)
    expected = steps(loss, data, compiled=False, monkeypatch=monkeypatch)[0]
    monkeypatch.setitem(SETTINGS, "max_grad_norm", 1e-3)
    with pytest.warns(UserWarning, match="The policy's update is not compiled: it reads data of torch.float64"):
        ours, _, calls = steps(loss, data, compiled=True, monkeypatch=monkeypatch)
    assert calls < 24
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
