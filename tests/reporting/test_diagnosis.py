"""Rejected steps are reported with their likely causes; the metrics' symptoms have the names of the docs."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from tests.recipes.test_recipes import RECIPES, config
from tests.reporting.test_record import write_run
from torchrl_trpo.keys import GroupKeys
from torchrl_trpo.reporting.diagnosis import PATIENCE, RejectionWatch, find_symptoms
from torchrl_trpo.reporting.record import read_run

DOCS = Path(__file__).parents[2] / "docs"


def group(name, n_agents, mask=None):
    done = {"done": "done", "terminated": "terminated"}
    return GroupKeys(
        name, n_agents, observation=(name, "observation"), reward=(name, "reward"), **done, action_mask=None, mask=mask
    )


def data_of(advantage, group="agents"):
    return TensorDict({(group, "advantage"): advantage.unsqueeze(-1)}, advantage.shape[:-1])


def stats_of(accepted, **figures):
    healthy = {"grad_norm": 1.0, "cg_residual": 1e-3, "expected_improvement": 0.1}
    figures = {name: torch.full((len(accepted),), value) for name, value in (healthy | figures).items()}
    return TensorDict({"accepted": torch.tensor(accepted), **figures}, [len(accepted)])


def reports(watch, data, stats, times):
    return [report for _ in range(times) for report in watch.update(data, stats)]


ADVANTAGES = torch.randn(5, 20, 2, generator=torch.Generator().manual_seed(0))
OUTLIER = torch.zeros(40, 40, 2)
OUTLIER[3, 7] = 9e3


@pytest.mark.parametrize(
    ("figures", "advantage", "cause"),
    [
        ({"cg_residual": 0.7}, ADVANTAGES, "conjugate gradient has not converged.*updater.cg_iters.*cg_residual=0.7"),
        ({"grad_norm": math.nan}, ADVANTAGES, "not finite; non_finite=stop"),
        ({}, ADVANTAGES * math.nan, "not finite"),
        ({}, torch.full((5, 20, 2), 3.0), "advantages are all the same.*advantage_std=0"),
        ({"grad_norm": 0.0}, ADVANTAGES, "advantages are all the same"),
        ({"expected_improvement": 0.0}, ADVANTAGES, "not positive along the step: raise updater.damping"),
        ({"expected_improvement": 1.0, "grad_norm": 2.0}, ADVANTAGES, "the damping alone.*curvature=0.08"),
        ({}, OUTLIER, "single rows dominate"),
        ({"expected_improvement": 1e-2}, ADVANTAGES, "linear model does not hold.*lower updater.max_kl"),
    ],
)
def test_likely_causes(figures, advantage, cause):
    watch = RejectionWatch([group("agents", 2)], max_kl=0.01, damping=0.1)
    (report,) = reports(watch, data_of(advantage), stats_of([True, False], **figures), PATIENCE)
    assert report.startswith(f"Group 'agents', agent 1: the last {PATIENCE} policy steps were all rejected. Likely: ")
    assert re.search(cause, report)


def test_rejections_are_counted_in_a_row_and_reported_again_when_they_have_doubled():
    watch = RejectionWatch([group("a", 1), group("b", 1)], max_kl=0.01, damping=0.1)
    data = data_of(ADVANTAGES[..., :1], "a").update(data_of(ADVANTAGES[..., :1], "b"))
    rejected = stats_of([True, False])
    assert reports(watch, data, rejected, PATIENCE - 1) == []
    assert reports(watch, data, stats_of([False, True]), 1) == [], "one that is accepted begins the count anew"
    told = reports(watch, data, rejected, 8 * PATIENCE)
    assert [f"the last {k * PATIENCE} " in report for k, report in zip((1, 2, 4, 8), told, strict=True)] == [True] * 4
    assert all(report.startswith("Group 'b'") for report in told)


def test_entries_that_do_not_count_are_left_out():
    mask = torch.ones(5, 20, 1, dtype=torch.bool)
    mask[0] = False
    data = data_of(torch.where(mask, ADVANTAGES[..., :1], math.nan)).set(("agents", "mask"), mask)
    watch = RejectionWatch([group("agents", 1, ("agents", "mask"))], max_kl=0.01, damping=0.1)
    (report,) = reports(watch, data, stats_of([False], cg_residual=0.5), PATIENCE)
    assert "conjugate gradient" in report


def test_a_run_says_it(tmp_path, capsys):
    """With an acceptance that a quadratic surrogate cannot reach, and as it goes on after being resumed."""
    settings = ["film=false", "updater.accept_ratio=0.999999", "updater.max_backtracks=0", "checkpoint.every=1"]
    RECIPES["itrpo"].train(config("itrpo", tmp_path / "run", *settings, "train.total_frames=480"))
    assert "policy steps were all rejected" not in capsys.readouterr().err
    again = config("itrpo", tmp_path / "unused", f"resume={tmp_path / 'run'}", "train.total_frames=960")
    RECIPES["itrpo"].train(again)
    output = capsys.readouterr()
    assert "the last 10 policy steps were all rejected. Likely: " in output.out + output.err


def test_an_agent_that_never_takes_part_is_named():
    """The largest of no advantages ended the run, and each that resumed it."""
    watch = RejectionWatch([group("agents", 2, mask=("agents", "mask"))], max_kl=0.01, damping=0.1)
    data = data_of(ADVANTAGES).set(("agents", "mask"), torch.ones(5, 20, 2, dtype=torch.bool))
    data["agents", "mask"][..., 1] = False
    (report,) = reports(watch, data, stats_of([True, False]), PATIENCE)
    assert re.search(r"agent 1: the last 10 .* takes part in no row of the batch", report)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, None),
        ({"cg_residual": 0.2}, None),
        ({"episode_return": ""}, "No episode ends"),
        ({"accepted": 0.3}, "Steps are rejected"),
        ({"cg_residual": 0.5}, "The conjugate gradient has not converged"),
        ({"cg_residual": 0.2, "step_fraction": 0.8}, "The conjugate gradient has not converged"),
        ({"kl": 9e-6}, "The policy hardly moves"),
        ({"kl": 0.002}, "Steps end far inside the trust region"),
        ({"factor_std": 3.0}, "The agents' steps are too large for each other"),
        ({"clip_fraction": 0.7, "max_kl": None}, "Most rows are clipped"),
        ({"explained_variance": -0.4}, "The critic explains nothing"),
    ],
    ids=str,
)
def test_a_symptom_is_named_as_in_the_docs(values, name, tmp_path):
    symptoms = find_symptoms(read_run(write_run(tmp_path, **values)))
    assert [symptom.name for symptom in symptoms] == ([name] if name else [])
    assert find_symptoms(read_run(write_run(tmp_path, rows=19, **values))) == [], "too young"
    if name:
        assert f"## {name}\n" in (DOCS / "not-learning.md").read_text()
        assert symptoms[0].figures.startswith(f"{next(iter(values))} ")
