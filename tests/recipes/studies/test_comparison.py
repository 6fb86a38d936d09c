"""The comparison and the search of settings, with tiny budgets, and their reports."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from omegaconf import OmegaConf

from torchrl_trpo.config.overrides import compose_settings
from torchrl_trpo.config.schema import RECIPES
from torchrl_trpo.config.validation import check_settings
from torchrl_trpo.errors import SettingError
from torchrl_trpo.recipes.studies import comparison, jobs, sensitivity, tuning
from torchrl_trpo.recipes.studies.report import Comparison, Curves, write_report

CONFIG_DIR = Path(comparison.__file__).parents[1] / "config"
TINY = {"env.num_envs": 4, "env.max_steps": 5, "train.frames_per_batch": 20, "train.total_frames": 80}
TINY |= {"actor.hidden": [8], "critic.hidden": [8], "critic.epochs": 1}
PLAN = {
    "algorithms": ["hatrpo", "mappo"],
    "seeds": [0],
    "tasks": ["vmas/balance"],
    "settings": {"vmas": TINY},
    "evaluation": {"points": 2, "episodes": {"vmas": 3}, "seed": 10000},
}


def test_a_comparison_trains_evaluates_and_goes_on(tmp_path, monkeypatch):
    by_cell = {cell.algorithm: comparison.run_cell(PLAN, tmp_path, cell) for cell in comparison.cells(PLAN)}
    assert list(by_cell) == ["hatrpo", "mappo", "random"]
    assert [row["frames"] for row in by_cell["hatrpo"]] == [40, 80]
    assert [row["frames"] for row in by_cell["random"]] == [0]
    for rows in by_cell.values():
        assert all(set(row) == set(comparison.COLUMNS) for row in rows)
    cell = comparison.cells(PLAN)[0]
    film = comparison.film_cell(PLAN, tmp_path, tmp_path, cell)
    assert film.name == "balance-hatrpo.gif"
    assert len(imageio.imread(film)) == 4, "every second picture of five steps, and the last"
    monkeypatch.setattr(comparison, "train", lambda *_: pytest.fail("it was done already"))
    assert comparison.run_cell(PLAN, tmp_path, cell) == by_cell["hatrpo"]
    others = {**PLAN, "evaluation": {**PLAN["evaluation"], "episodes": {"vmas": 4}}}
    shorter = {**PLAN, "settings": {"vmas": {**TINY, "env.max_steps": 4}}}
    with pytest.raises(SettingError, match=r"other settings: evaluation\.episodes was 3, now 4"):
        comparison.run_cell(others, tmp_path, cell)
    with pytest.raises(SettingError, match=r"random/seed-0' holds .*env\.max_steps was 5, now 4"):
        comparison.run_cell(shorter, tmp_path, comparison.cells(PLAN)[-1])


@pytest.mark.parametrize("name", ["Zürich", "a\\b", 'k="3",('])
def test_a_run_goes_to_its_folder(name, tmp_path):
    """One with letters of another alphabet went to another, and was taken for done without results."""
    assert jobs.config("hatrpo", [], tmp_path / name).output_dir == str(tmp_path / name)


def test_a_run_without_its_checkpoints_is_not_taken(tmp_path, monkeypatch):
    cell = comparison.cells(PLAN)[0]
    folder = cell.folder(tmp_path)
    monkeypatch.setattr(comparison, "train", lambda *_: folder.mkdir(parents=True, exist_ok=True))
    with pytest.raises(SettingError, match=r"hatrpo/seed-0' has no checkpoints of the iterations \[2, 4\]"):
        comparison.run_cell(PLAN, tmp_path, cell)
    settings = OmegaConf.to_container(jobs.config("hatrpo", ["gamma=0.5"], folder))
    OmegaConf.save(settings | {"algorithm": "HATRPO"}, folder / "config.yaml")
    (folder / "summary.json").touch()
    with pytest.raises(SettingError, match=r"other settings: .*gamma was 0\.5, now 0\.95"):
        comparison.run_cell(PLAN, tmp_path, cell)


def test_a_plan_has_settings_for_tasks_recipes_and_variants():
    parts = {"vmas": {"gamma": 0.9, "lmbda": 0.9}, "vmas/balance": {"lmbda": 0.8}, "matrpo": {"updater.max_kl": 0.1}}
    plan = {**PLAN, "algorithms": ["hatrpo", "matrpo-own"], "settings": parts | {"own": {"actor.sharing": "none"}}}
    own, random = comparison.cells(plan)[1:]
    settings = {"env": "vmas/balance", "seed": 0, "gamma": 0.9, "lmbda": 0.8}
    assert comparison.settings_of(plan, random) == ("hatrpo", settings)
    assert comparison.settings_of({**plan, "algorithms": ["mappo"]}, random) == ("hatrpo", settings)
    settings |= {"updater.max_kl": 0.1, "actor.sharing": "none"}
    assert comparison.settings_of(plan, own) == ("matrpo", settings)


@pytest.mark.parametrize("name", comparison.PLANS)
def test_the_plans_are_legal(name):
    plan = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"{name}.yaml"))
    known = {part for cell in comparison.cells(plan) for part in (cell.task, *cell.algorithm.split("-", 1))}
    assert set(plan["settings"]) <= known | {"vmas", "pettingzoo"}
    for cell in comparison.cells(plan | {"seeds": [0]}):
        if cell.task != plan["tasks"][0] and cell.algorithm != plan["algorithms"][0]:
            continue
        recipe, settings = comparison.settings_of(plan, cell)
        compose_settings([f"{key}={value}" for key, value in settings.items()], CONFIG_DIR, recipe)


def test_a_part_of_the_comparison_is_not_reported_as_the_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan = {**PLAN, "tasks": ["vmas/a", "vmas/b"], "seeds": [0, 1]}
    OmegaConf.save(plan, "comparison.yaml")
    monkeypatch.setattr(comparison, "CONFIG", tmp_path)
    results = {cell: [] for cell in comparison.cells(plan)}
    for row in rows(**FINALS):
        cell = comparison.Cell(row["task"], row["algorithm"], row["seed"])
        results[cell].append(row | {"settings": comparison.digest_of(plan, cell)})
    monkeypatch.setattr(comparison, "run_all", lambda _, ran, **__: {cell: results[cell] for cell in ran})
    comparison.main(["--seeds", "0", "--output", "runs"])
    assert not Path("docs").exists()
    assert Path("runs/comparison.md").exists()
    comparison.main([])
    whole = {name: Path(f"docs/results/comparison.{name}").read_text() for name in ("md", "csv")}
    for part in (["--seeds", "1"], ["--tasks", "vmas/b", "--seeds", "0"]):
        comparison.main([*part, "--report", "docs/results"])
    text, table = (Path(f"docs/results/comparison.{name}").read_text() for name in ("md", "csv"))
    assert "with seed 0, in" in text
    assert "vmas/a" not in text, "the report is of the part"
    assert sorted(table.splitlines()) == sorted(whole["csv"].splitlines()), "the table is of all that was run"
    monkeypatch.setattr(comparison, "run_all", lambda *_, **__: pytest.fail("the runs are not asked for"))
    comparison.main(["--redraw"])
    assert Path("docs/results/comparison.md").read_text() == whole["md"]
    for wrong, message in (
        (["--tasks", "vmas/c"], "'vmas/c' (choose from"),
        (["--redraw", "--seeds", "7"], "has none"),
        (["--seeds", "-1"], "--seeds: -1. Legal: from 0 to 4294957295"),
        (["--seeds", "4294967295"], "--seeds: 4294967295. Legal"),
        (["--workers", "0"], "argument --workers: '0'. Legal: a whole number of at least 1"),
        (["--report", "comparison.yaml"], "--report: 'comparison.yaml' cannot be made"),
    ):
        with pytest.raises(SystemExit):
            comparison.main(wrong)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        comparison.main(["--help"])
    assert "--tasks" in capsys.readouterr().out, "the help has the options that depend on the plan"
    OmegaConf.save(plan | {"settings": {"vmas": TINY, "mappo": {"gamma": 0.8}}}, "comparison.yaml")
    for command in (["--redraw"], ["--seeds", "0", "--report", "docs/results"]):
        with pytest.raises(SystemExit):
            comparison.main(command)
        n_kept, text = (2, "seed=1") if "--seeds" in command else (4, "seed=0")
        error = capsys.readouterr().err
        assert f"has {n_kept} runs with other settings" in error
        assert f"Cell(task='vmas/a', algorithm='mappo', {text})" in error


def test_a_run_that_was_stopped_is_resumed_to_the_same_evaluations(tmp_path):
    cell = comparison.cells(PLAN)[0]
    whole = comparison.run_cell(PLAN, tmp_path / "whole", cell)
    half = {**PLAN, "settings": {"vmas": {**TINY, "train.total_frames": 40}}, "evaluation": {**PLAN["evaluation"]}}
    half["evaluation"]["points"] = 1
    comparison.run_cell(half, tmp_path / "parts", cell)
    folder = cell.folder(tmp_path / "parts")
    for name in ("comparison.json", "summary.json"):
        (folder / name).unlink()
    config = folder / "config.yaml"
    with pytest.raises(SettingError, match=r"holds a run with other settings: .*train\.total_frames was 40, now 80"):
        comparison.run_cell(PLAN, tmp_path / "parts", cell)
    config.write_text(config.read_text().replace("total_frames: 40", "total_frames: 80").replace("keep: 2", "keep: 4"))
    resumed = comparison.run_cell(PLAN, tmp_path / "parts", cell)
    timeless = [{name: value for name, value in row.items() if name != "cpu_s"} for row in whole]
    assert [{name: value for name, value in row.items() if name != "cpu_s"} for row in resumed] == timeless


def rows(**finals):
    # Two evaluations of a run; from each algorithm and task its last returns by seed.
    for algorithm, tasks in finals.items():
        for task, returns in tasks.items():
            for seed, value in enumerate(returns):
                for point in (1, 2) if algorithm != "random" else (2,):
                    cost = 30 if algorithm == "mappo" else 10
                    yield {
                        "task": task,
                        "algorithm": algorithm,
                        "seed": seed,
                        "iteration": point,
                        "frames": 100 * point,
                        "cpu_s": cost * point,
                        "evaluation_return": value * point / 2,
                        "evaluation_std": 1.0,
                        "episode_return": value - 1.0,
                    }


FINALS = {
    "hatrpo": {"vmas/a": [4.0, 6.0], "vmas/b": [-3.0, -1.0]},
    "mappo": {"vmas/a": [10.0, 10.0], "vmas/b": [-5.0, -5.0]},
    "random": {"vmas/a": [0.0, 0.0], "vmas/b": [-10.0, -10.0]},
}


def test_scores_are_between_a_random_policy_and_the_best():
    compared = Comparison(list(rows(**FINALS)))
    assert compared.scores("hatrpo").tolist() == [[0.4, 0.6], [7 / 8, 9 / 8]]
    assert compared.scores("mappo").tolist() == [[1, 1], [5 / 8, 5 / 8]]
    assert compared.cpu_budget("vmas/a") == 20
    assert compared.scores("hatrpo", equal_cpu=True).tolist() == compared.scores("hatrpo").tolist()
    assert compared.scores("mappo", equal_cpu=True).tolist() == [[0, 0], [0, 0]]  # 30 seconds to its first evaluation


def test_at_equal_processor_seconds_a_run_is_between_its_evaluations():
    curves = Curves(
        frames=torch.tensor([100.0, 200.0]),
        cpu_s=torch.tensor([[10.0, 20.0], [12.0, 24.0], [30.0, 60.0]], dtype=torch.float64),
        returns=torch.tensor([[1.0, 2.0], [1.0, 3.0], [5.0, 6.0]], dtype=torch.float64),
        stds=torch.ones(3, 2),
        exploring=torch.ones(3, 2),
    )
    assert curves.at_cpu(22).tolist() == pytest.approx([2, 1 + 2 * 10 / 12, math.nan], nan_ok=True)
    assert curves.frames_to(3.0).tolist() == [math.inf, 200.0, 100.0]


def test_only_seeds_that_all_have_are_compared():
    data = [row for row in rows(**FINALS) if (row["task"], row["algorithm"], row["seed"]) != ("vmas/b", "mappo", 1)]
    assert Comparison(data).seeds == [0]
    with pytest.raises(ValueError, match=r"no seed has all algorithms on all tasks.*'vmas/b', 'mappo', 0"):
        Comparison([row for row in data if row["algorithm"] != "mappo" or row["task"] != "vmas/b"])
    with pytest.raises(ValueError, match=r"evaluation_return of .*'vmas/b'.* is not finite"):
        Comparison([row | {"evaluation_return": math.nan} if row["task"] == "vmas/b" else row for row in data])
    longer = [row | {"frames": 10 * float(row["frames"])} if row["algorithm"] == "mappo" else row for row in data]
    with pytest.raises(ValueError, match=r"vmas/a: .* have \[.*\] frames, not the same"):
        Comparison(longer)


def test_a_task_that_nobody_learns_has_no_score():
    """Runs above the random policy, but by little of what their episodes differ, have learned nothing either."""
    finals = {name: {**tasks, "vmas/c": [0.0, 9.0], "vmas/d": [0.3, 0.4]} for name, tasks in FINALS.items()}
    finals["random"] |= {"vmas/c": [0.1, 0.1], "vmas/d": [0.0, 0.0]}
    compared = Comparison(list(rows(**finals)))
    assert compared.learned == ["vmas/a", "vmas/b"]
    assert compared.scores("hatrpo").tolist() == [[0.4, 0.6], [7 / 8, 9 / 8]]


def test_the_report_has_a_table_and_figures(tmp_path):
    close = {"hatrpo": [1.0, 5.0], "mappo": [2.0, 3.0], "random": [0.0, 0.0]}
    returns = {name: {**FINALS[name], "vmas/c": finals} for name, finals in close.items()}
    paths = write_report(list(rows(**returns)), "comparison", tmp_path)
    assert all(path.stat().st_size > 0 for path in paths)
    text = (tmp_path / "comparison.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "| `vmas/a` | 200 | 0.0 | 5.0 [4.0, 6.0] | **10.0** |" in text
    assert "| `vmas/b` | 200 | -10.00 | **-2.00 [-3.00, -1.00]** | -5.00 |" in text
    assert "| `vmas/c` | 200 | 0.00 | **3.00 [1.00, 5.00]** | **2.50 [2.00, 3.00]** |" in text
    assert "| `vmas/a` | 4.00 | 9.00 |" in text, "returns as the policy explores"
    assert "| `vmas/a` | – | 200 |" in text, "frames to 90 % of the best"
    assert "| P(better than MAPPO), equal frames | 0.50 [0.33, 0.67] |  |" in text


def test_the_outcome_of_a_search_is_the_best_trial_of_each_task(tmp_path):
    plan = {"space": {"mappo": {"updater": [{"lr": 0.1}, {"lr": 0.2}], "gamma": [0.9, 0.8]}}}
    tried = tuning.trials(plan, "mappo")
    assert tried[:2] == [{"updater": {"lr": 0.1}, "gamma": 0.9}, {"updater": {"lr": 0.1}, "gamma": 0.8}]
    found = [
        {"task": "vmas/balance", "algorithm": "mappo", "settings": each, "evaluation_return": value, "cpu_s": 36.0}
        for each, value in zip(tried, [1.0, 5.0, 3.0, 2.0], strict=True)
    ]
    tuning.write_outcome(found, {"gamma": 0.9}, tmp_path, tmp_path / "finetuned")
    best = OmegaConf.load(tmp_path / "finetuned" / "mappo" / "vmas" / "balance.yaml")
    assert best == {"updater": {"lr": 0.2}, "gamma": 0.9}
    assert tuning.read_trials(tmp_path / "tuning.csv") == found
    text = (tmp_path / "tuning.md").read_text()
    assert "| mappo | lr=0.1 gamma=0.9 | lr=0.1 gamma=0.8 | lr=0.2 gamma=0.9 | lr=0.2 gamma=0.8 |" in text
    assert "| `vmas/balance` | 1 | 5 | **3** | 2 |\n| mean | 0.00 | 1.00 | 0.50 | 0.25 |" in text
    for trial in (found[0], found[2]):  # what is not finite was the best if it came first
        trial["evaluation_return"] = math.nan
    tuning.write_outcome(found, {}, tmp_path, tmp_path / "finetuned")
    assert OmegaConf.load(tmp_path / "finetuned" / "mappo" / "vmas" / "balance.yaml") == tried[1]
    assert "| `vmas/balance` | nan | **5** | nan | 2 |" in (tmp_path / "tuning.md").read_text()


def test_trials_of_another_search_are_not_taken_for_those_of_this_one(tmp_path):
    plan = {
        "space": {"itrpo": {"updater.max_kl": [0.01, 0.03], "gamma": [0.95]}},
        "settings": {"vmas": {"env.num_envs": 300}},
        "frames": {"vmas": 120000},
        "seed": 1000,
    }
    for number, max_kl in enumerate([0.01, 0.03]):
        folder = tmp_path / "vmas" / "balance" / "itrpo" / str(number)
        folder.mkdir(parents=True)
        done = {"env": {"num_envs": 300}, "train": {"total_frames": 120000}, "updater": {"max_kl": max_kl}}
        OmegaConf.save(OmegaConf.create(done | {"gamma": 0.95, "seed": 1000}), folder / "config.yaml")
        (folder / "summary.json").write_text(json.dumps({"evaluation_return": float(number), "cpu_s": 1.0}))
    found = tuning.run_search(plan, tmp_path, ("vmas/balance", "itrpo"))
    assert [(trial["settings"]["updater.max_kl"], trial["evaluation_return"]) for trial in found] == [
        (0.01, 0),
        (0.03, 1),
    ]
    (folder.parent / "notes.txt").touch()
    plan["space"]["itrpo"]["updater.max_kl"] = [0.01, 0.03, 0.1]
    with pytest.raises(SettingError, match=r"itrpo' holds 'notes\.txt', which no search wrote\. Legal: to move it"):
        tuning.run_search(plan, tmp_path, ("vmas/balance", "itrpo"))
    plan["space"]["itrpo"]["updater.max_kl"] = [0.01, 0.1]
    with pytest.raises(SettingError, match=r"itrpo/1' holds .*updater\.max_kl was 0\.03, now 0\.1"):
        tuning.run_search(plan, tmp_path, ("vmas/balance", "itrpo"))


FINETUNED = CONFIG_DIR / "hyperparameters" / "finetuned"


@pytest.mark.parametrize("task", ["vmas/balance", "pettingzoo/simple_spread_v3"])
@pytest.mark.parametrize("recipe", sorted(path.name for path in FINETUNED.iterdir()))
def test_tuned_settings_are_those_of_a_run(recipe, task):
    cfg, _ = compose_settings([f"env={task}", "hyperparameters=finetuned"], CONFIG_DIR, recipe)
    check_settings(cfg, RECIPES[recipe])
    for name, value in OmegaConf.to_container(OmegaConf.load(FINETUNED / recipe / f"{task}.yaml")).items():
        assert cfg[name] == value if not isinstance(value, dict) else value.items() <= dict(cfg[name]).items()


def test_tuned_settings_are_the_best_that_were_found(tmp_path):
    found = tuning.read_trials(CONFIG_DIR.parents[1] / "docs" / "results" / "tuning.csv")
    choose = OmegaConf.load(CONFIG_DIR / "tuning.yaml").choose
    tuning.write_outcome(found, choose, tmp_path, tmp_path)
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.glob("*/*/*.yaml")}
    assert written == {path.relative_to(FINETUNED): path.read_text() for path in FINETUNED.glob("*/*/*.yaml")}
    assert (tmp_path / "tuning.md").read_text() == (CONFIG_DIR.parents[1] / "docs/results/tuning.md").read_text()


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("hatrpo", ["hyperparameters=fine"], r"^hyperparameters: 'fine'\. Did you mean 'finetuned'"),
        (
            "hatrpo",
            ["env=vmas/wheel", "hyperparameters=finetuned"],
            r"hatrpo has not been tuned on 'vmas/wheel'\. Tuned:",
        ),
        ("happo", ["hyperparameters=finetuned"], r"^setting 'hyperparameters' does not exist"),
    ],
)
def test_settings_that_were_not_found_are_refused(recipe, overrides, message):
    with pytest.raises(SettingError, match=message):
        compose_settings(overrides, CONFIG_DIR, recipe)


def test_a_sensitivity_sweep_runs_each_setting_once(tmp_path):
    plan = {
        "recipe": "hatrpo",
        "tasks": ["vmas/balance"],
        "seeds": [0],
        "settings": TINY,
        "sweeps": {"damping": {"updater.damping": [0.1, 1.0]}, "cg": {"updater.cg_iters": [10], "lmbda": [0.9, 0.5]}},
    }
    tried = sensitivity.trials(plan)
    assert [dict(trial.changed) for trial in tried] == [{}, {"updater.damping": 1.0}, {"lmbda": 0.5}]
    measured = {trial: sensitivity.run_trial(plan, tmp_path / "runs", trial) for trial in tried[:2]}
    for values in measured.values():
        assert tuple(values) == sensitivity.MEASURED
        assert 0 <= values["kl_ratio"] <= 1
    paths = sensitivity.write_report(plan, measured, tmp_path)
    assert all(path.stat().st_size > 0 for path in paths)
    assert sensitivity.read_measured(paths[0]) == measured


def test_a_part_of_the_sensitivity_keeps_the_rest_of_the_table(tmp_path, monkeypatch):
    sweeps = {"damping": {"updater.damping": [0.1, 1.0]}, "cg": {"updater.cg_iters": [10, 3]}}
    plan = {"recipe": "hatrpo", "tasks": ["vmas/balance"], "seeds": [0], "settings": TINY, "sweeps": sweeps}
    OmegaConf.save(plan, tmp_path / "sensitivity.yaml")
    monkeypatch.setattr(sensitivity, "CONFIG", tmp_path)
    results = dict(zip(sensitivity.MEASURED, [1.0, 2.0, 0.5, 0.5, 0.5], strict=True))
    monkeypatch.setattr(sensitivity, "run_all", lambda _, ran, **__: dict.fromkeys(ran, results))
    for sweep in sweeps:
        sensitivity.main(["--sweeps", sweep, "--report", str(tmp_path)])
    measured = sensitivity.read_measured(tmp_path / "sensitivity.csv")
    assert [dict(trial.changed) for trial in measured] == [{}, {"updater.damping": 1.0}, {"updater.cg_iters": 3}]


@pytest.mark.usefixtures("quick_processes")
def test_results_come_in_the_order_of_their_jobs():
    results = jobs.run_all(math.sqrt, [9.0, 4.0], workers=2)
    assert list(results.items()) == [(9.0, 3.0), (4.0, 2.0)]


@pytest.mark.usefixtures("quick_processes")
def test_one_job_that_fails_does_not_stop_the_others(tmp_path, capfd):
    commands = [("touch", str(tmp_path / "a")), ("false",), ("touch", str(tmp_path / "b"))]
    with pytest.raises(SystemExit, match=r"error: 1 jobs failed, see above.*: \[\('false',\)\]"):
        jobs.run_all(subprocess.check_call, commands, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    said = "".join(capfd.readouterr())
    assert "('false',) failed:" in said
    assert "CalledProcessError" in said


@pytest.mark.usefixtures("quick_processes")
def test_an_interrupt_lets_no_other_job_begin(tmp_path):
    begun = tmp_path / "begun"
    commands = [("sh", "-c", f"echo {number} >> {begun}; sleep 0.5") for number in range(6)]

    def interrupt():
        while not begun.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            jobs.run_all(subprocess.check_call, commands, workers=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert begun.read_text() == "0\n"


SLEEPER = """
import os, pathlib, signal, time
def sleep(number):
    stopped = []
    if number == 2:  # heeds SIGTERM, as a run does
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    pathlib.Path(f"{number}.new").write_text(str(os.getpid()))
    pathlib.Path(f"{number}.new").rename(str(number))
    while not stopped:
        time.sleep(0.1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
"""


@pytest.mark.slow  # three processes that import everything
def test_the_processes_end_with_a_study_that_is_killed(tmp_path):
    """They went on, and waited for ever afterwards, so that nobody could continue their runs."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    code = (
        "from torchrl_trpo.recipes.studies import jobs; import sleeper; jobs.run_all(sleeper.sleep, [1, 2], workers=2)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    study = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    begun = [tmp_path / "1", tmp_path / "2"]
    while not all(path.exists() for path in begun):
        assert study.poll() is None
        time.sleep(0.05)
    study.kill()
    study.wait()
    ends = time.monotonic() + 10
    for path in begun:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(int(path.read_text()), 0)
                assert time.monotonic() < ends
                time.sleep(0.05)
