"""The recipes end to end on real VMAS, with a tiny budget, and what they say to bad settings."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from omegaconf import OmegaConf

from tests.rank_processes import run_command
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.config.overrides import compose_settings, environments
from torchrl_trpo.config.schema import RECIPES as SETTINGS
from torchrl_trpo.config.validation import check_settings
from torchrl_trpo.envs import BatchedResetVmasEnv, make_env, resolve_device
from torchrl_trpo.envs.normalization import observation_norm
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor
from torchrl_trpo.recipes import happo, hatrpo, ippo, itrpo, mappo, matrpo, trpo
from torchrl_trpo.training.episodes import evaluate
from torchrl_trpo.training.metrics import COLUMNS
from torchrl_trpo.training.run import Run

# imageio's reader leaves the pipes of ffmpeg to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

RECIPES = {
    "itrpo": itrpo,
    "matrpo": matrpo,
    "hatrpo": hatrpo,
    "happo": happo,
    "mappo": mappo,
    "ippo": ippo,
    "trpo": trpo,
}
CONFIG_DIR = Path(hatrpo.__file__).parent / "config"
TINY = ("env.num_envs=4", "env.max_steps=10", "train.frames_per_batch=80", "train.total_frames=240", "device=cpu")


def config(name, folder, *overrides):
    """The config of a run in a folder; a run that is resumed stays in its own."""
    folder = next((each.removeprefix("resume=") for each in overrides if each.startswith("resume=")), folder)
    return compose_settings([*TINY, f"output_dir={folder}", *overrides], CONFIG_DIR, name)[0]


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


SLOW = pytest.mark.slow
SHOWN = pytest.mark.plots
"""A run that ends with its plots and its film."""


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        pytest.param("itrpo", [], marks=SLOW),
        pytest.param("itrpo", ["actor.sharing=none", "critic.share_params=false", "env=vmas/navigation"], marks=SLOW),
        pytest.param("matrpo", [], marks=SLOW),
        ("matrpo", ["critic.agent_one_hot=true", "critic.others_actions=true", "env=vmas/give_way"]),
        pytest.param(
            "matrpo",
            ["env.continuous_actions=false", "actor.sharing=none", "critic.others_actions=true"],
            marks=SLOW,
        ),
        pytest.param("hatrpo", ["env.continuous_actions=false", "agent_order=fixed"], marks=SLOW),
        pytest.param(
            "hatrpo",
            ["env=pettingzoo/simple_spread_v3", "critic.inputs=both", "actor.network=gru", "team_reward=sum"],
            marks=SHOWN,
        ),
        pytest.param(
            "itrpo",
            ["env=vmas/simple_tag", "actor.sharing=none", "actor.network=lstm", "critic.network=gru"],
            marks=SHOWN,
        ),
        (
            "happo",
            [
                "env=vmas/simple_tag",
                "actor.network=gru",
                "updater.epochs=2",
                "updater.minibatch_size=20",
                "entropy_coeff=0.01",
            ],
        ),
        ("mappo", ["critic.agent_one_hot=true"]),
        ("ippo", ["env=pettingzoo/simple_spread_v3", "actor.sharing=none", "entropy_coeff=0.01"]),
        pytest.param("trpo", [], marks=SLOW),
        pytest.param("trpo", ["env=gym/CartPole-v1", "actor.network=gru", "critic.network=gru"], marks=SHOWN),
        pytest.param(
            "hatrpo",
            ["env=vmas/transport", "critic.agent_one_hot=true", "env.kwargs.n_agents=2", "agent_order=[1,0]"],
            marks=SLOW,
        ),
        pytest.param("mappo", ["env=vmas/simple_tag", "actor.network=gru", "critic.agent_one_hot=true"], marks=SLOW),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "defaults",
)
def test_a_run_leaves_its_folder(name, overrides, tmp_path, request):
    shown = request.node.get_closest_marker("plots") is not None
    sizes = ["train.frames_per_batch=40", "train.total_frames=120", "critic.epochs=1"]
    cfg = config(name, tmp_path, *sizes, *overrides, f"film={str(shown).lower()}")
    summary = RECIPES[name].train(cfg)
    rows = metrics(tmp_path)
    assert tuple(rows[0])[: len(COLUMNS)] == COLUMNS
    n_agents = {"pettingzoo/simple_spread_v3": 3, "vmas/simple_tag": 4, "gym/Pendulum-v1": 1, "gym/CartPole-v1": 1}
    assert [int(row["frames"]) for row in rows] == [40, 80, 120]
    for row in rows:
        assert 0 <= float(row["kl"]) <= cfg.updater.get("max_kl", 1)
        assert 0 <= float(row["accepted"]) <= 1
        assert float(row["episode_length"]) <= 10
        assert math.isfinite(float(row["loss_critic"]))
        assert float(row["collect_s"]) > 0
        assert float(row["policy_s"]) > 0
        assert float(row["critic_s"]) > 0
        agents = cfg.env.kwargs.get("n_agents", n_agents.get(cfg.env.name, 2))
        assert float(row["episode_return_sum"]) == pytest.approx(agents * float(row["episode_return"]), abs=1e-3)
    assert json.loads((tmp_path / "summary.json").read_text())["frames"] == summary["frames"] == 120
    record = OmegaConf.load(tmp_path / "config.yaml")
    assert record.versions.torch == torch.__version__
    assert record.seed == 0
    if shown:
        assert len(imageio.imread(tmp_path / "film.mp4")) >= 2
        for picture in ("learning_curve.png", "diagnostics.png"):
            assert (tmp_path / picture).stat().st_size > 10_000
    assert list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("name", "observed", "overrides"),
    [
        pytest.param("itrpo", "nan", ["env.kwargs.groups=2", "normalize_observations=true"], marks=SLOW),
        ("matrpo", "1000", ["env.kwargs.kind=masked", "critic.others_actions=true", "env.kwargs.agent_flags=false"]),
        ("hatrpo", "nan", ["env.kwargs.groups=2", "team_reward=mean", "critic.value_norm=true"]),
        (
            "happo",
            "1000",
            ["env.kwargs.groups=2", "actor.network=gru", "env.kwargs.agent_flags=false", "updater.epochs=2"],
        ),
        pytest.param("mappo", "1000", ["normalize_observations=true", "env.kwargs.agent_flags=false"], marks=SLOW),
        ("ippo", "1000", ["env.kwargs.kind=continuous", "critic.network=gru", "env.kwargs.agent_flags=false"]),
        ("trpo", "nan", ["env.kwargs.groups=0", "normalize_observations=true"]),
    ],
    ids=RECIPES,
)
def test_padded_steps_change_nothing(name, observed, overrides, tmp_path):
    """Whatever they observe and pay, to the last digit.

    Of MAPPO, IPPO and HAPPO the value estimators had no mask: a reward of 1000 in a padded step was in the advantages
    of those before. In all recipes it was in the returns, and the statistics of normalised observations.
    """
    runs = []
    for index, padding in enumerate([[], [f"env.kwargs.observed={observed}", "env.kwargs.paid=1000"]]):
        task = ["env=custom", "env.factory=tests.environments.make_padded", "env.max_steps=6", "film=false"]
        sizes = ["train.frames_per_batch=48", "train.total_frames=96", "critic.epochs=1"]
        sizes += ["actor.hidden=[16]", "critic.hidden=[16]"]
        folder = tmp_path / str(index)
        summary = RECIPES[name].train(config(name, folder, *task, *sizes, *overrides, *padding))
        rows = [[row[column] for column in row if not column.endswith("_s")] for row in metrics(folder)]
        runs.append((rows, summary["evaluation_return"]))
    assert runs[0] == runs[1]
    assert float(metrics(folder)[-1]["kl"]) > 0


def test_the_seed_decides_everything(tmp_path):
    runs = []
    for folder, seed in [("a", 1), ("b", 1), ("c", 2)]:
        hatrpo.train(config("hatrpo", tmp_path / folder, f"seed={seed}", "film=false", "train.total_frames=160"))
        rows = metrics(tmp_path / folder)
        runs.append([[row[name] for name in COLUMNS if not name.endswith("_s")] for row in rows])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_resume_continues(tmp_path, capsys):
    """The metrics go on without a gap or a double row, also when rows were written after the checkpoint."""
    cfg = config("hatrpo", tmp_path, "film=false", "checkpoint.every=2", "updater.max_kl=0.02", "env.kwargs.n_agents=3")
    cfg.train.total_frames = 240
    hatrpo.train(cfg)
    before = metrics(tmp_path)
    longer = config("hatrpo", tmp_path / "unused", "film=false", "train.total_frames=400", f"resume={tmp_path}")
    assert longer.updater.max_kl == 0.02, "the settings of the run to continue count"
    assert longer.train.total_frames == 400, "unless they are given anew"
    summary = hatrpo.train(longer)
    rows = metrics(tmp_path)
    assert rows[:3] == before
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4, 5]
    assert summary["frames"] == 400
    assert float(rows[3]["wall_s"]) > float(rows[2]["wall_s"])
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ValueError, match=r"resume: .* has done 400 frames already.*total_frames=480"):
        hatrpo.train(config("hatrpo", tmp_path / "unused", "train.total_frames=400", f"resume={tmp_path}"))
    with pytest.raises(ValueError, match=r"resume: .* has env\.name=vmas/balance, and now it is vmas/navig"):
        hatrpo.train(config("hatrpo", tmp_path / "unused", "env=vmas/navigation", f"resume={tmp_path}"))
    with pytest.raises(ValueError, match=r"resume: .* has algorithm=HATRPO.*Use the recipe of HATRPO"):
        matrpo.train(config("matrpo", tmp_path / "unused", f"resume={tmp_path}"))
    with pytest.raises(ValueError, match=r"resume: .*nowhere.*no config\.yaml"):
        hatrpo.train(config("hatrpo", tmp_path, f"resume={tmp_path / 'nowhere'}"))


@pytest.mark.filterwarnings("ignore:The gradient of region")
def test_one_nan_costs_one_iteration(tmp_path, monkeypatch, capfd):
    """A single NaN reward once made the critic NaN, and with it every later advantage.

    With ``non_finite=drop`` the policy's step is rejected to the bit, the critic leaves the rows out, the iteration's
    line says so, and the next iteration is as if nothing had been.
    """
    calls, kept = [], []

    def step(self, data, original=BatchedResetVmasEnv._step):
        out = original(self, data)
        calls.append(None)
        if len(calls) == 25:  # in the second iteration of 20 steps
            out["agents", "reward"][0] = torch.nan
        return out

    def update(self, data, original=TrustRegionUpdater.step):
        actor = [p for n, p in self.objective.named_parameters() if ".actor_network_params" in n]
        before = [p.detach().clone() for p in actor]
        stats = original(self, data)
        kept.append(all(torch.equal(p, b) for p, b in zip(actor, before, strict=True)))
        return stats

    monkeypatch.setattr(BatchedResetVmasEnv, "_step", step)
    monkeypatch.setattr(TrustRegionUpdater, "step", update)
    hatrpo.train(config("hatrpo", tmp_path, "film=false", "env.kwargs.n_agents=3", "non_finite=drop"))
    first, broken, after = metrics(tmp_path)
    assert kept == [False, True, False]
    assert (float(first["accepted"]), float(broken["accepted"]), float(after["accepted"])) == (1, 0, 1)
    assert math.isfinite(float(after["loss_critic"]))
    shown = capfd.readouterr().out
    assert "non_finite 3/3" in shown
    assert re.search(r"dropped \d+ rows", shown)


def run_in_a_new_interpreter(module, arguments, folder):
    command = [sys.executable, "-m", module, *arguments]
    environ = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}  # which tells what is imported
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environ, check=False)


@pytest.mark.parametrize(
    "name", ["hatrpo", *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name != "hatrpo")]
)
def test_from_the_command_line(name, tmp_path):
    run = run_in_a_new_interpreter if name == "hatrpo" else run_command  # the others forked: an import takes seconds
    settings = [*TINY, "train.total_frames=80", f"output_dir={tmp_path}", "film=false"]
    done = run(f"torchrl_trpo.recipes.{name}", settings, tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "diagnostics.png") in done.stdout
    assert not [*tmp_path.glob("outputs/*/*")], "nothing is where the run would be without output_dir"
    assert "accepted " in done.stdout
    assert "Warning" not in done.stderr
    if name == "hatrpo":
        imported = set(re.findall(r"^import time: .*\| +(\w+)$", done.stderr, re.MULTILINE))
        assert "torchrl" in imported
        assert not imported & {"tensorboard", "wandb", "mlflow"}, "no logger was chosen"


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"hatrpo"}))
def test_each_is_a_command(name, tmp_path):
    done = run_command(f"torchrl_trpo.recipes.{name}", ["seed=3", "--cfg", "job"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "seed: 3\n" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env=vmas/balanc", r"env: 'vmas/balanc'\. Did you mean 'vmas/balance'"),
        ("env=smac/3m", r"env: 'smac/3m'\. .*Legal: .*'vmas/navigation'"),
        ("train.total_frame=10", r"'train\.total_frame' does not exist\. Did you mean 'train\.total_frames'"),
        ("updater.maxkl=1", r"Did you mean 'updater\.max_kl'"),
        ("sed=1", r"Did you mean 'seed'"),
    ],
)
def test_unknown_names(override, message):
    with pytest.raises(ValueError, match=message):
        compose_settings(["seed=1", override], CONFIG_DIR, "hatrpo")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env=vmas/balanc", "error: env: 'vmas/balanc'. Did you mean 'vmas/balance'"),
        ("train.frames_per_batch=61", "error: train.frames_per_batch=61 is not a multiple of env.num_envs=60"),
    ],
)
def test_what_cannot_be_ends_the_command_with_one_line(override, message, tmp_path):
    done = run_command("torchrl_trpo.recipes.hatrpo", [override], tmp_path)
    assert done.returncode != 0
    assert done.stderr.strip().startswith(message)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.frames_per_batch=81", r"frames_per_batch=81 .*num_envs=4.*Nearest: 80 or 84"),
        ("train.total_frames=250", r"total_frames=250 .*frames_per_batch=80.*Nearest: 240 or 320"),
        ("train.total_frames=0", r"train\.total_frames must be a whole number of at least 1, got 0"),
        ("train.total_frames=many", r"train\.total_frames.*'many'"),
        ("env.num_envs=-3", r"env\.num_envs.*-3"),
        ("critic.epochs=0", r"critic\.epochs.*0"),
        ("checkpoint.every=0", r"checkpoint\.every.*0"),
        ("actor.hidden=128", r"actor\.hidden must be a list.*128"),
        ("gamma=1.5", r"gamma must be a number from 0 to 1, got 1\.5"),
        ("lmbda=-1", r"lmbda.*-1"),
        ("critic.lr=fast", r"critic\.lr.*'fast'"),
    ],
)
def test_sizes_that_cannot_be(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_settings(config("hatrpo", tmp_path, override), SETTINGS["hatrpo"])


def test_unknown_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert resolve_device("auto") == (accelerator or torch.device("cpu"))
    with pytest.raises(ValueError, match=r"device: 'cuda:99' is not there, PyTorch sees .*'cpu'"):
        resolve_device("cuda:99")


def test_unknown_scenarios_and_bad_arguments():
    keywords = {"num_envs": 2, "max_steps": 5, "kwargs": {}, "seed": 0, "device": torch.device("cpu")}
    with pytest.raises(ValueError, match=r"env: 'vmas/navigatoin'.*Did you mean 'vmas/navigation'"):
        make_env("vmas/navigatoin", **keywords)
    with pytest.raises(ValueError, match=r"num_envs must be at least 1, got 0"):
        make_env("vmas/balance", **{**keywords, "num_envs": 0})
    with pytest.raises(ValueError, match=r"one_group=True: .*'speaker_0'.*Legal: one_group=False"):
        make_env("vmas/simple_speaker_listener", **keywords, one_group=True)
    with pytest.raises(ValueError, match=r"kwargs: 'n_agnts' is no argument.*Did you mean 'n_agents'"):
        make_env("vmas/balance", **{**keywords, "kwargs": {"n_agnts": 7}})


def test_every_scenario_is_a_choice():
    names = environments(CONFIG_DIR)["vmas"]
    assert {"vmas/balance", "vmas/navigation", "vmas/football", "vmas/simple_spread"} <= set(names)


def test_time_limits_truncate():
    """VmasEnv reports terminated = done also when max_steps ran out; ours tells them apart."""
    env = make_env("vmas/navigation", num_envs=3, max_steps=5, kwargs={}, seed=0, device=torch.device("cpu"))
    last = env.rollout(5)[:, -1]["next"]
    assert last["done"].all()
    assert last["truncated"].all()
    assert not last["terminated"].any()


def test_an_order_of_other_agents_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"agent_order=\[1, 0\] orders 2 agents, and env 'vmas/balance' has 4\. Legal: ran"
    ):
        hatrpo.train(config("hatrpo", tmp_path, "agent_order=[1,0]"))


@pytest.mark.parametrize("max_steps", [30, 10, 50])
def test_evaluation_plays_one_episode_per_environment(max_steps):
    """To its end, or as far as it may; the next one does not count."""
    env = make_env("vmas/balance", num_envs=6, max_steps=30, kwargs={}, seed=0, device=torch.device("cpu"))
    actor = make_actor(env, *group_keys(env), share_params=True)
    returns = evaluate(env, actor, max_steps=max_steps)
    assert returns.shape == (6,)
    by_hand = evaluate_by_hand(env, actor, max_steps)
    env.set_seed(0)
    torch.testing.assert_close(evaluate(env, actor, max_steps=max_steps), by_hand)


def test_an_evaluation_does_not_keep_its_data():
    """At the end of a run with 6 000 environments, episodes of 500 steps took 10 GB."""
    env = make_env("vmas/balance", num_envs=6, max_steps=30, kwargs={}, seed=0, device=torch.device("cpu"))
    seen, alive = [], []

    def act(data):
        seen.append(weakref.ref(data["agents", "observation"]))
        alive.append(sum(each() is not None for each in seen))
        return env.full_action_spec.rand()

    evaluate(env, act, max_steps=10)
    assert max(alive) < 4, alive


def evaluate_by_hand(env, actor, steps):
    """The same, step by step: rewards are summed until an environment is done for the first time."""
    env.set_seed(0)
    data = env.reset()
    total, alive = torch.zeros(6), torch.ones(6, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(steps):
            data, following = env.step_and_maybe_reset(actor(data))
            total += alive * data["next", "agents", "reward"].mean((-2, -1))
            alive &= ~data["next", "done"].squeeze(-1)
            data = following
    return total


@pytest.mark.parametrize(
    ("name", "task"),
    [
        pytest.param("trpo", ["env=gym/Pendulum-v1"], marks=SLOW),
        ("hatrpo", ["env=custom", "env.factory=tests.environments.make_memory", "actor.network=gru"]),
    ],
    ids=["normalised-observations", "custom"],
)
def test_resume_of_other_simulators(name, task, tmp_path):
    """The statistics of normalised observations, a factory and recurrent networks are part of what is continued."""
    first = RECIPES[name].train(config(name, tmp_path, "film=false", "train.total_frames=80", *task))
    resumed = config(name, tmp_path / "unused", "film=false", "train.total_frames=160", f"resume={tmp_path}")
    assert resumed.env.name == first["env"]
    summary = RECIPES[name].train(resumed)
    assert summary["frames"] == 160
    assert [int(row["iteration"]) for row in metrics(tmp_path)] == [1, 2]


def test_the_statistics_of_observations_are_in_the_checkpoint(tmp_path, monkeypatch):
    norms = []

    def capture(self, original=Run.__enter__):
        original(self)
        norm = observation_norm(self.env)
        norms.append((norm, norm.loc["observation"].clone(), norm._count["observation"].clone()))
        return self

    monkeypatch.setattr(Run, "__enter__", capture)
    trpo.train(config("trpo", tmp_path, "film=false", "train.total_frames=80"))
    trained, count = norms[0][0].loc["observation"].clone(), norms[0][0]._count["observation"].clone()
    trpo.train(config("trpo", tmp_path / "unused", "film=false", "train.total_frames=160", f"resume={tmp_path}"))
    assert torch.equal(norms[1][1], trained)
    assert torch.equal(norms[1][2], count)
    assert (norms[1][0]._count["observation"] > count).all(), "and they go on"


def test_an_iteration_that_is_not_logged_is_an_error(tmp_path, monkeypatch):
    """A loop that forgot it once trained without end."""
    monkeypatch.setattr(Run, "log", lambda self, *args: None)
    with pytest.raises(RuntimeError, match=r"log\(\) was not called after the batch of iteration 1\."):
        hatrpo.train(config("hatrpo", tmp_path, "film=false"))


def test_single_agent_recipes_refuse_teams(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"env: 'vmas/balance' has groups of agents, \['agents'\]\. Legal: the recipe of any other algorithm",
    ):
        trpo.train(config("trpo", tmp_path, "env=vmas/balance"))


@pytest.mark.parametrize("name", ["itrpo", "matrpo", "hatrpo", "happo", "mappo", "ippo"])
def test_recipes_for_teams_refuse_a_single_agent(name, tmp_path):
    """Advantages of a single agent were normalised over time alone, and so 0 in a batch of one environment."""
    with pytest.raises(
        ValueError, match=r"'gym/CartPole-v1' has a single agent, without a group\. Use the recipe trpo"
    ):
        RECIPES[name].train(config(name, tmp_path, "env=gym/CartPole-v1"))


def test_settings_of_the_resumed_environment_are_known(tmp_path):
    itrpo.train(config("itrpo", tmp_path, "env=pettingzoo/simple_spread_v3", "film=false", "train.total_frames=80"))
    _, overrides = compose_settings([f"resume={tmp_path}", "env.parallel=true"], CONFIG_DIR, "itrpo")
    assert "env=pettingzoo/simple_spread_v3" in overrides
