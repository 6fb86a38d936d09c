"""Recipes in the processes of a job, as torchrun starts them."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist

from tests.rank_processes import on_ranks
from tests.recipes.test_recipes import RECIPES, config, metrics
from tests.training.test_resume import check_same, components
from torchrl_trpo.errors import SettingError
from torchrl_trpo.numerics.updater import TrustRegionUpdater
from torchrl_trpo.parallel.ranks import RankLostError, Ranks, check_same_bits
from torchrl_trpo.parallel.torchrun import _agreed_name
from torchrl_trpo.training.checkpoints import find_checkpoint, read_record
from torchrl_trpo.training.run import Run

COMMON = ("film=false", "checkpoint.every=2", "train.total_frames=400")
OVERRIDES = ("critic.value_norm=true", "updater.fisher_subsample=0.5")


def train(name, folder, *overrides):
    """A run in this rank; gives its summary and what it printed."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        summary = RECIPES[name].train(config(name, folder, *COMMON, *overrides))
    return summary, told.getvalue()


@pytest.mark.parametrize("name", ["matrpo", pytest.param("trpo", marks=pytest.mark.slow)])
def test_processes_are_one_run(name, tmp_path):
    (summary, told), (other_summary, other_told) = on_ranks(2, train, name, tmp_path, job="job")
    assert summary["frames"] == 400
    assert "summary.json" in told
    assert (other_summary, other_told) == ({}, ""), "one of them speaks"
    rows = metrics(tmp_path)
    assert [int(row["frames"]) for row in rows] == [80, 160, 240, 320, 400]
    assert float(rows[-1]["episode_length"]) == 10
    assert read_record(find_checkpoint(tmp_path))["config"]["env"]["num_envs"] == 4


def resume_alone(folder):
    before = components(folder)
    cfg = config("itrpo", folder, *COMMON, f"resume={folder}", "train.total_frames=560")
    steps = []
    step = TrustRegionUpdater.step

    def first_parameters(self, data):
        if not steps:
            steps.append([value.detach().clone() for value in self.objective.parameters()])
        return step(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrustRegionUpdater, "step", first_parameters)
        RECIPES["itrpo"].train(cfg)
    return before, steps[0]


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_parameters(tmp_path, caplog):
    on_ranks(2, train, "itrpo", tmp_path, job="job")
    before, parameters = resume_alone(tmp_path)
    assert "The checkpoint is of 2 processes, and now there are 1: the run begins new episodes" in caplog.text
    (policy,) = (state for name, state in before.items() if name.endswith("-policy"))
    saved = [value for value in policy.values() if isinstance(value, torch.Tensor)]
    assert all(any(torch.equal(value, own) for own in parameters) for value in saved)
    rows = metrics(tmp_path)
    assert [int(row["iteration"]) for row in rows] == list(range(1, 8))
    assert rows[5]["episode_return"] != rows[0]["episode_return"], "not the first episodes again"


def refused(name, folder, *overrides):
    with pytest.raises(SettingError) as raised:
        train(name, folder, *overrides)
    return str(raised.value)


def test_environments_that_cannot_be_spread_are_refused(tmp_path):
    messages = on_ranks(2, refused, "hatrpo", tmp_path, "env.num_envs=5", "train.frames_per_batch=100", job="job")
    assert messages == ["env.num_envs=5 cannot be spread over 2 processes. Nearest: 4 or 6."] * 2


def test_the_folder_of_another_job_is_refused(tmp_path):
    """Also when torchrun starts that one again because it was refused."""
    on_ranks(2, train, "itrpo", tmp_path, "train.total_frames=80", job="one")
    messages = on_ranks(2, refused, "itrpo", tmp_path, job="other:1")
    assert all("holds a run already" in message for message in messages)


def test_a_job_without_a_name_needs_a_folder(tmp_path):
    messages = on_ranks(2, refused, "itrpo", tmp_path / "none", job="none")
    assert all("torchrun --standalone" in message for message in messages)


def test_the_living_agree_on_a_name_that_the_dead_do_not_know():
    """Restarts are counted differently by different machines, and the store keeps what those before have written."""
    store = dist.HashStore()
    for rank in (1, 2):
        store.set(f"asks/{rank}", f"of a process that has ended {rank}")
    names, found = [None] * 3, set()

    def meet(rank):
        names[rank] = _agreed_name(store, rank, 3)

    for _ in range(2):
        threads = [threading.Thread(target=meet, args=[rank]) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(names)) == 1
        found.add(names[0])
    assert len(found) == 2


def train_and_signal(folder):
    """The second rank alone is asked to stop, in the second iteration."""
    log = Run.log

    def log_or_signal(self, *args):
        if self._ranks.rank == 1 and self._progress["iteration"] == 1:
            for _ in range(2):  # in a job, a second signal changes nothing
                os.kill(os.getpid(), signal.SIGTERM)
        log(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log_or_signal)
        with pytest.raises(SystemExit) as raised:
            train("itrpo", folder)
    return raised.value.code


def test_a_signal_to_one_process_stops_all_after_the_iteration(tmp_path):
    assert on_ranks(2, train_and_signal, tmp_path, job="job") == [128 + signal.SIGTERM] * 2
    assert [row["iteration"] for row in metrics(tmp_path)] == ["1", "2"]
    assert read_record(find_checkpoint(tmp_path))["progress"]["iteration"] == 2


def train_and_die(folder):
    """The second rank is killed within the policy's fourth update."""
    sum_ = Ranks.sum_

    def sum_or_die(self, tensor):
        done = len(metrics(folder)) if (folder / "metrics.csv").exists() else 0
        if self.rank == 1 and done == 3 and tensor.ndim == 2 and tensor.numel() > 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return sum_(self, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "sum_", sum_or_die)
        told = io.StringIO()
        with contextlib.redirect_stdout(told), pytest.raises(RankLostError):
            RECIPES["hatrpo"].train(config("hatrpo", folder, *COMMON, *OVERRIDES))
    return told.getvalue()


@pytest.mark.slow
def test_a_job_that_has_lost_a_process_goes_on_when_it_is_started_anew(tmp_path):
    on_ranks(2, train, "hatrpo", tmp_path / "quiet", *OVERRIDES, job="job")
    (told,) = on_ranks(2, train_and_die, tmp_path / "disturbed", job="job", lost=[1])
    assert "Stopped by RankLostError in iteration 4, after 240 frames. The checkpoint of iteration 2 is whole." in told
    assert f"To continue: resume={tmp_path / 'disturbed'}" in told
    on_ranks(2, train, "hatrpo", tmp_path / "disturbed", *OVERRIDES, job="job")
    check_same(tmp_path / "quiet", tmp_path / "disturbed")
    (others,) = (state for name, state in components(tmp_path / "disturbed").items() if "other_ranks" in name)
    assert [list(state) for state in others["states"]] == [["collection", "generators"]]


def drift():
    ranks = Ranks(dist.group.WORLD)
    same, other = torch.ones(5), torch.ones(3, dtype=torch.float64)
    check_same_bits([same, other], ranks)
    if ranks.rank == 1:
        other[2] = other[2].nextafter(torch.tensor(2.0, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="not the same to the bit"):
        check_same_bits([same, other], ranks)


def test_ranks_that_drift_apart_are_noticed():
    on_ranks(2, drift)
