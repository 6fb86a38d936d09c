"""The line search on functions whose answer is known by hand."""

from __future__ import annotations

import pytest
import torch

from torchrl_trpo import backtrack
from torchrl_trpo.numerics import line_search


def search(evaluate, expected=1.0, **keywords):
    expected = torch.as_tensor(expected, dtype=torch.float64).reshape(-1)
    return backtrack(evaluate, expected, max_kl=keywords.pop("max_kl", 1.0), **keywords)


def test_takes_the_full_step_when_it_is_good():
    result = search(lambda s: (0.9 * s, s**2))
    assert result.accepted.item()
    assert result.fraction.item() == 1
    assert result.improvement.item() == pytest.approx(0.9)
    assert result.kl.item() == 1


def test_shrinks_until_the_kl_fits():
    """kl(s) = 2 s² ≤ 1 first holds at j = 2: 0.8² = 0.64."""
    result = search(lambda s: (s, 2 * s**2))
    assert result.fraction.item() == pytest.approx(0.64)
    assert result.kl.item() == pytest.approx(2 * 0.64**2)


def test_the_improvement_must_reach_its_share_of_the_prediction_at_that_step():
    """Skrl compounds the ratio: from its third try on it is too lax.

    Here improvement(s) = 0.45 s for s > 0.3, else 0.6 s: below κ = 0.5 of the prediction until s = 0.8⁶ ≈ 0.26.
    """
    result = search(lambda s: (torch.where(s > 0.3, 0.45 * s, 0.6 * s), 0 * s))
    assert result.fraction.item() == pytest.approx(0.8**6)


def test_stops_at_the_first_accepted_try():
    calls = []
    search(lambda s: (calls.append(s) or s, 2 * s**2))
    assert len(calls) == 3


def test_gives_up_after_max_backtracks():
    """Tianshou logs the KL of the candidate it refused; a rejected step reports zeros."""
    calls = []
    result = search(lambda s: (calls.append(s) or -s, s), max_backtracks=4)
    assert len(calls) == 5
    assert not result.accepted.item()
    assert (result.fraction.item(), result.improvement.item(), result.kl.item()) == (0, 0, 0)


def test_regions_decide_independently():
    limits = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)  # the largest good fraction of each
    result = search(lambda s: (s, torch.where(s <= limits, 0.0, 9.0)), expected=[1.0, 1.0, 1.0])
    assert result.accepted.tolist() == [True, True, False]
    assert result.fraction.tolist() == pytest.approx([1, 0.8**4, 0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["improvement", "kl", "expected"])
def test_non_finite_is_never_accepted(where, bad):
    values = {"improvement": 1.0, "kl": 0.0, "expected": 1.0, where: bad}

    def evaluate(s):
        return torch.full_like(s, values["improvement"]), torch.full_like(s, values["kl"])

    result = search(evaluate, expected=values["expected"])
    assert not result.accepted.item()
    assert result.kl.item() == 0


@pytest.mark.parametrize("expected", [0.0, -1.0])
def test_without_an_ascent_direction_nothing_is_tried_but_the_present(expected):
    fractions = []

    def evaluate(s):
        fractions.append(s.item())
        return torch.ones_like(s), torch.zeros_like(s)

    assert not search(evaluate, expected=expected).accepted.item()
    assert fractions == [0]


def test_the_host_waits_once_per_try_and_not_after_the_last(monkeypatch):
    waits = []
    monkeypatch.setattr(line_search, "_all_decided", lambda decided: waits.append(bool(decided.all())) or waits[-1])
    search(lambda s: (s, s), max_kl=0.6)  # first holds at 0.8³ = 0.512
    assert waits == [False, False, False, True]
    waits.clear()
    search(lambda s: (s, s + 1))
    assert waits == 10 * [False]


def test_meta_device(monkeypatch):
    """The accept decision is the only host wait; without it all tries run on any device."""
    monkeypatch.setattr(line_search, "_all_decided", lambda decided: False)
    result = backtrack(lambda s: (s, s**2), torch.ones(3, device="meta"), max_kl=0.01)
    assert result.accepted.shape == (3,)
