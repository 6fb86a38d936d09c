"""What the comparison says of scores, against the definitions written out."""

from __future__ import annotations

import itertools

import pytest
import torch

from torchrl_trpo.numerics.statistics import percentile_bootstrap
from torchrl_trpo.recipes.studies.statistics import (
    aggregate,
    interquartile_mean,
    probability_of_improvement,
)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 40])
def test_a_quarter_is_left_out_at_each_end(n):
    values = torch.randn(3, n, dtype=torch.float64)
    for row, ours in zip(values.tolist(), interquartile_mean(values).tolist(), strict=True):
        kept = sorted(row)[n // 4 : n - n // 4]
        assert ours == pytest.approx(sum(kept) / len(kept), rel=1e-12)


def test_runs_are_drawn_within_their_task():
    scores = torch.tensor([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]])
    blocks = []
    percentile_bootstrap(lambda drawn: blocks.append(drawn) or drawn.mean((-2, -1)), scores, resamples=5000)
    resamples = torch.cat(blocks)
    assert resamples[:, 0].max() <= 2
    assert resamples[:, 1].min() >= 10
    assert resamples[:, 0].mean() == pytest.approx(1.0, abs=0.05)
    assert {tuple(row) for row in resamples[:, 0].int().tolist()} == set(itertools.product(range(3), repeat=3))


def test_the_interval_is_that_of_the_bootstrap():
    """All 27 resamples of three runs are equally probable, so that the percentiles of their means are known."""
    scores = torch.tensor([[0.0, 1.0, 5.0]], dtype=torch.float64)
    means = sorted(sum(row) / 3 for row in itertools.product([0.0, 1.0, 5.0], repeat=3))
    value, low, high = aggregate(scores, lambda values: values.mean(-1), level=0.8)
    assert value == pytest.approx(2.0)
    assert low == pytest.approx(means[2], abs=1e-9)
    assert high == pytest.approx(means[-4], abs=1e-9)


def test_the_probability_of_improvement_counts_pairs():
    scores = torch.tensor([[1.0, 2.0], [5.0, 5.0]])
    others = torch.tensor([[1.0, 0.0, 3.0], [5.0, 6.0, 7.0]])
    first, second = (0.5 + 1 + 0 + 1 + 1 + 0) / 6, (0.5 + 0.5) / 6
    value, low, high = probability_of_improvement(scores, others)
    assert value == pytest.approx((first + second) / 2)
    assert low < value < high
    back, _, _ = probability_of_improvement(others, scores)
    assert value + back == pytest.approx(1.0)


def test_the_same_scores_give_the_same_interval():
    scores = torch.randn(4, 5)
    assert aggregate(scores) == aggregate(scores)
    value, low, high = aggregate(torch.ones(4, 5))
    assert (value, low, high) == (1, 1, 1)
