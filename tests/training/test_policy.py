"""A trained policy is taken out of its run's folder, acts as it did to the bit, and is played by the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import GlobalRNGState
from torchrl.envs.utils import ExplorationType, set_exploration_type

import torchrl_trpo
from tests.recipes.test_recipes import RECIPES, config
from tests.training.test_resume import differences
from torchrl_trpo import evaluate as command
from torchrl_trpo import load_policy
from torchrl_trpo.envs.normalization import observation_norm
from torchrl_trpo.errors import SettingError
from torchrl_trpo.evaluate import bootstrap_interval, evaluate_run
from torchrl_trpo.networks.recurrent import carry_states
from torchrl_trpo.training import film
from torchrl_trpo.training.episodes import evaluate
from torchrl_trpo.training.film import film_run
from torchrl_trpo.training.policy import make_run_env, on_raw_observations, settle_compilation
from torchrl_trpo.training.run import Run

# imageio's reader leaves the pipes of ffmpeg to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SMALL = ("film=false", "actor.hidden=[16]", "critic.hidden=[16]", "critic.epochs=1", "train.total_frames=160")
CUSTOM = "env=custom env.factory=tests.environments."
CASES = {
    "ITRPO, VMAS": ("itrpo", "env.kwargs.n_agents=3 checkpoint.every=1"),
    "ITRPO, two groups, normalised": ("itrpo", "env=vmas/simple_tag actor.sharing=none normalize_observations=true"),
    "ITRPO, one group of two teams' kind": (
        "itrpo",
        "env=vmas/give_way actor.sharing=all env.continuous_actions=false",
    ),
    "MATRPO, masked and continuous groups": ("matrpo", f"{CUSTOM}make_mixed critic.others_actions=true"),
    "MATRPO, MuJoCo, normalised": ("matrpo", "env=mamujoco/HalfCheetah critic.inputs=both normalize_observations=true"),
    "HATRPO, PettingZoo, GRU": (
        "hatrpo",
        "env=pettingzoo/simple_spread_v3 env.continuous_actions=true actor.network=gru team_reward=sum "
        "normalize_observations=true",
    ),
    "HATRPO, custom, LSTM": ("hatrpo", f"{CUSTOM}make_memory actor.network=lstm"),
    "HAPPO, VMAS": ("happo", "env.continuous_actions=false"),
    "TRPO, normalised": ("trpo", ""),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains each case once; gives its folder, its settings, and the policy and environment it ended with."""
    runs = {}

    def train(case):
        if case not in runs:
            name, overrides = CASES[case]
            folder = tmp_path_factory.mktemp("run")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Run, "finish", lambda self: self)
                run = RECIPES[name].train(config(name, folder, *SMALL, *overrides.split()))
            runs[case] = SimpleNamespace(folder=folder, config=run._record, policy=run.policy, env=run.env)
        return runs[case]

    return train


@pytest.fixture
def copied(trained, tmp_path):
    """The folder of a run, to be broken."""
    run = trained("ITRPO, VMAS")
    return shutil.copytree(run.folder, tmp_path / "run")


def rollout(run, policy, norm=None, sampled=False):
    """Eight steps in the run's environment, which is always the same; with a normaliser that does not move."""
    settings = {"num_envs": 4, "seed": 3, "device": torch.device("cpu")}
    env = carry_states(make_run_env(run.config, **settings, normalize_observations=norm is not None), policy)
    if norm is not None:
        observation_norm(env).load_state_dict(norm.state_dict())
        observation_norm(env).freeze()
    torch.manual_seed(4)
    env.set_seed(4)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM if sampled else ExplorationType.DETERMINISTIC):
        data = env.rollout(8, policy, break_when_any_done=False)
    env.close(raise_if_closed=False)
    return data


def actions(data):
    return {key: value for key, value in data.items(True, True) if str(key[-1]).startswith("action") or key == "action"}


# ------------------------------------------------------------------ the policy


@pytest.mark.parametrize(
    ("case", "sampled"), [*((case, False) for case in CASES), *((case, True) for case in list(CASES)[3:6])]
)
def test_the_loaded_policy_is_the_trained_one(case, sampled, trained):
    """To the bit, over steps: on raw observations as the trained one on those that the run's statistics normalise."""
    run = trained(case)
    ours = rollout(run, load_policy(run.folder), sampled=sampled)
    theirs = rollout(run, run.policy, observation_norm(run.env), sampled=sampled)
    assert ("state" in ours.keys()) == (run.config["critic"].get("inputs") == "both")
    assert actions(ours).keys() == actions(theirs).keys() != set()
    for key, value in actions(theirs).items():
        assert torch.equal(ours[key], value), key
    norm = observation_norm(run.env)
    if norm is not None:
        key = norm.in_keys[0]
        assert not torch.allclose(ours[key], theirs[key], atol=0.1), "one of them is normalised"


@pytest.mark.parametrize("case", ["ITRPO, two groups, normalised", "HATRPO, PettingZoo, GRU", "TRPO, normalised"])
def test_what_it_reads_is_not_changed(case, trained):
    run = trained(case)
    policy = load_policy(run.folder)
    assert not policy.training
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    data = rollout(run, policy)
    inputs = data.select(*[key for key in policy.in_keys if key in data.keys(True)])
    before = inputs.clone()
    entries = list(inputs.items(True, True))
    outputs = policy(inputs)
    assert outputs is inputs
    for key, value in entries:
        assert inputs[key] is value, key
        assert torch.equal(value, before[key])
    for key, value in actions(data).items():
        torch.testing.assert_close(outputs[key], value)  # not to the bit: now all steps are one batch


def test_the_shift_of_observations_counts(trained):
    """A policy whose statistics were lost once acted on raw observations as if they were normalised."""
    run = trained("TRPO, normalised")
    data = TensorDict({"observation": torch.randn(5, 3)}, [5])
    alone = run.policy(data.clone())["action"]
    assert not torch.allclose(load_policy(run.folder)(data.clone())["action"], alone, atol=1e-3)


def test_the_memory_is_carried(trained):
    run = trained("HATRPO, custom, LSTM")
    data = rollout(run, load_policy(run.folder))
    state = data["agents", "policy_state"]
    assert (state[~data["is_init"].squeeze(-1)] != 0).any()
    assert (state[data["is_init"].squeeze(-1)] == 0).all()


def test_doubles_are_read_as_in_training(trained):
    """MuJoCo gives float64, which an environment of one's own may not convert."""
    run = trained("MATRPO, MuJoCo, normalised")
    policy = load_policy(run.folder)
    raw = rollout(run, policy).select(*policy.in_keys)
    ours, theirs = policy(raw.double()), policy(raw.clone())
    for key, value in actions(theirs).items():
        assert torch.equal(ours[key], value)


def test_deterministic_or_sampled(trained):
    run = trained("ITRPO, VMAS")
    policy = load_policy(run.folder)
    data = rollout(run, policy).select(*policy.in_keys)

    def act():
        return policy(data.clone())["agents", "action"]

    with set_exploration_type(ExplorationType.RANDOM):
        assert not torch.equal(act(), act())
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        deterministic = act()
        assert torch.equal(act(), deterministic)
    assert torch.equal(act(), deterministic), "the default"


def test_best_and_latest(copied):
    first, *_, last = sorted((copied / "checkpoints").iterdir())
    for path, metric in ((first, 1e9), (last, -1e9)):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["metadata"]["best_metric"] = metric
        (path / "manifest.json").write_text(json.dumps(manifest))
    for which, path in (("best", first), ("latest", last)):
        (file,) = path.glob("components/*-policy/state.pt")
        saved, loaded = torch.load(file, weights_only=True), load_policy(copied, which).state_dict()
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert not torch.equal(*[next(load_policy(copied, which).parameters()) for which in ("best", "latest")])


@pytest.mark.parametrize("case", ["ITRPO, VMAS", "MATRPO, masked and continuous groups", "TRPO, normalised"])
def test_loading_draws_no_random_numbers(case, trained):
    folder = trained(case).folder
    states = []
    for load in (str, load_policy, lambda folder: evaluate_run(folder, episodes=1)):
        load(folder)
        states.append((GlobalRNGState().state_dict(), torch.initial_seed()))
    for state in states[1:]:
        assert differences(state, states[0]) == []


def test_it_is_on_its_device(trained):
    folder = trained("ITRPO, two groups, normalised").folder
    for device in (None, "cpu", torch.device("cpu"), *(["cuda"] if torch.cuda.is_available() else [])):
        policy = load_policy(folder, device=device)
        assert {tensor.device.type for tensor in policy.state_dict().values()} == {torch.device(device or "cpu").type}


def test_what_cannot_be_loaded(copied, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match=r"'.*nowhere' has no checkpoint\. Legal: the folder of a run"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(SettingError, match=r"'.*empty' has no checkpoint\. Legal: .*metrics\.csv"):
        load_policy(str(tmp_path / "empty"))
    with pytest.raises(SettingError, match=r"checkpoint: 'lates'\. Did you mean 'latest'\? Legal: 'latest', 'best'"):
        load_policy(copied, "lates")
    with pytest.raises(SettingError, match=r"device: 'cuda:99' is not there.*'cpu'"):
        load_policy(copied, device="cuda:99")
    last = max((copied / "checkpoints").iterdir())
    (file,) = last.glob("components/*-policy/state.pt")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        SettingError, match=rf"the checkpoint {last} cannot be read .*Move it elsewhere to use the one before"
    ):
        load_policy(copied)
    (last / "manifest.json").write_text("{")
    with pytest.raises(SettingError, match=rf"the checkpoint {last} cannot be read"):
        load_policy(copied)


def test_the_core_needs_no_extras(trained, tmp_path):
    """``import torchrl_trpo`` does without what only the recipes need, and load_policy says what it needs."""
    script = f"""
import sys

sys.modules |= dict.fromkeys(["hydra", "omegaconf", "matplotlib", "imageio", "filelock", "vmas", "gymnasium"])
from torchrl_trpo import *
try:
    load_policy({str(trained("ITRPO, VMAS").folder)!r})
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == (
        "env: 'vmas/balance' needs a simulator that is not installed. Use: pip install 'torchrl-trpo[recipes,vmas]'\n"
    )
    assert "load_policy" in torchrl_trpo.__all__
    with pytest.raises(AttributeError, match="no attribute 'load_polic'"):
        torchrl_trpo.load_polic  # noqa: B018


# ------------------------------------------------------------------ the command


def test_the_command_needs_no_display(copied):
    environ = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "OMP_NUM_THREADS"}}
    arguments = [str(copied), "--episodes", "6", "--checkpoint", "best", "--device", "cpu"]
    run = [sys.executable, "-m", "torchrl_trpo.evaluate", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, cwd=copied.parent, env=environ, check=True)
    record = json.loads((copied / "evaluation.json").read_text())
    assert (record["algorithm"], record["env"], record["checkpoint"]) == ("ITRPO", "vmas/balance", "best")
    assert (record["episodes"], record["seed"], record["deterministic"]) == (6, 1000, True)
    assert len(record["episode_returns"]) == len(record["episode_lengths"]) == 6
    assert record["episode_return"] == pytest.approx(np.mean(record["episode_returns"]))
    low, high = record["episode_return_ci95"]
    assert min(record["episode_returns"]) <= low <= record["episode_return"] <= high <= max(record["episode_returns"])
    assert len(record["groups"]["agents"]["agents"]) == 3
    frames = imageio.imread(copied / "evaluation.mp4")
    assert len(frames) > 1
    assert frames[0].std() > 1
    for told in (f"{low:.3f} to {high:.3f}", "percentile bootstrap", "evaluation.json", "evaluation.mp4"):
        assert told in done.stdout


def test_the_first_episodes_count(trained):
    """Not those that end first: of each round of four environments the first ones, whatever their length."""
    run = trained("HATRPO, custom, LSTM")
    settings = {"checkpoint": "latest", "seed": 8, "device": "cpu"}
    eight, six = (evaluate_run(run.folder, episodes=n, **settings) for n in (8, 6))
    assert len(set(eight["episode_lengths"])) > 1
    assert six["episode_returns"] == eight["episode_returns"][:6]
    assert six["episode_lengths"] == eight["episode_lengths"][:6]
    assert evaluate_run(run.folder, episodes=6, **settings) == six
    assert evaluate_run(run.folder, episodes=6, **{**settings, "seed": 9})["episode_lengths"] != six["episode_lengths"]


RETURNS = ["ITRPO, two groups, normalised", "HATRPO, PettingZoo, GRU", "HAPPO, VMAS", "TRPO, normalised"]


@pytest.mark.parametrize("case", RETURNS)
def test_returns_are_those_of_evaluate(case, trained):
    """Here on observations that the environment normalises, with the trained policy itself."""
    run = trained(case)
    settings = {"num_envs": 4, "seed": 1000, "device": torch.device("cpu")}
    norm = observation_norm(run.env)
    env = carry_states(make_run_env(run.config, **settings, normalize_observations=norm is not None), run.policy)
    if norm is not None:
        observation_norm(env).load_state_dict(norm.state_dict())
        observation_norm(env).freeze()
    torch.manual_seed(1000)
    env.set_seed(1000)
    returns = evaluate(env, run.policy, max_steps=10)
    record = evaluate_run(run.folder, episodes=4)
    assert record["episode_returns"] == pytest.approx(returns.tolist(), rel=1e-6)
    assert record["episode_lengths"] == [10] * 4
    agents = [mean for group in record["groups"].values() for mean in group["agents"]]
    assert np.mean(agents) == pytest.approx(record["episode_return"], rel=1e-6)
    assert record["episode_return_sum"] == pytest.approx(len(agents) * record["episode_return"], rel=1e-6)
    if len(record["groups"]) > 1:
        assert record["groups"]["adversary"]["episode_return"] != record["groups"]["agent"]["episode_return"]


def test_sampled_episodes(trained):
    run = trained("TRPO, normalised")
    sampled, again = (evaluate_run(run.folder, episodes=3, deterministic=False) for _ in range(2))
    assert sampled == again
    assert sampled["deterministic"] is False
    assert sampled["episode_returns"] != evaluate_run(run.folder, episodes=3)["episode_returns"]


def test_a_single_episode_has_no_interval(trained, capsys):
    run = trained("TRPO, normalised")
    command.main([str(run.folder), "--episodes", "1", "--no-film", "--seed", "5", "--sampled"])
    record = json.loads((run.folder / "evaluation.json").read_text())
    assert record["episode_return_ci95"] is None
    assert (record["seed"], record["deterministic"], record["film"]) == (5, False, None)
    said = capsys.readouterr().out
    assert "no confidence interval from one episode" in said
    assert "mp4" not in said


def test_a_film_costs_no_numbers(copied, monkeypatch):
    """The evaluation was lost with the film."""
    monkeypatch.setattr(command, "film_run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.main([str(copied), "--episodes", "1"])
    assert json.loads((copied / "evaluation.json").read_text())["film"] is None


def test_the_interval_covers_the_mean(monkeypatch):
    """Of 300 samples of 30 the interval holds the true mean as often as it says; it has the width of the textbook's."""
    values = torch.randn(4000, dtype=torch.float64)
    low, high = bootstrap_interval(values)
    middle, half = float(values.mean()), 1.96 * float(values.std()) / 4000**0.5
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.05 * half)
    monkeypatch.setattr(command, "RESAMPLES", 400)
    ends = [bootstrap_interval(torch.randn(30, dtype=torch.float64)) for _ in range(300)]
    covered = sum(low <= 0 <= high for low, high in ends) / 300
    assert 0.90 <= covered <= 0.98  # 0.95, less what the bootstrap loses with 30 values; standard error 0.013


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "0"], "error: episodes must be at least 1, got 0."),
        (["--checkpoint", "bets"], "error: checkpoint: 'bets'. Did you mean 'best'"),
        (["--seed", "-1"], "error: seed must be a whole number from 0 to 4294967295, got -1."),
        (["--device", "gpu"], "error: device: 'gpu' is not there"),
        (["--film", "film.mov"], "error: film: 'film.mov'. Legal: an .mp4 or .gif file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_ends_the_command_with_one_line(arguments, message, trained):
    with pytest.raises(SystemExit) as ended:
        command.main([str(trained("ITRPO, VMAS").folder), *arguments])
    assert str(ended.value).startswith(message)


def test_a_run_can_film_its_policy(trained, tmp_path, monkeypatch):
    """While it is there, without a checkpoint; a policy that samples is another film."""
    run = trained("ITRPO, two groups, normalised")
    policy = on_raw_observations(run.env, run.policy)
    settings = {"seed": 0, "device": torch.device("cpu")}
    films = [
        imageio.imread(film_run(run.config, policy, tmp_path / "film.gif", **settings, deterministic=deterministic))
        for deterministic in (True, False)
    ]
    assert all(len(film) > 5 for film in films)
    assert not np.array_equal(films[0][-1], films[1][-1])
    unseen = trained("HATRPO, custom, LSTM")
    assert film_run(unseen.config, unseen.policy, tmp_path / "none.gif", **settings) is None
    recurrent = trained("HATRPO, PettingZoo, GRU")
    monkeypatch.setattr(film, "film_episodes", lambda stage, *_, **__: stage.full_observation_spec["agents"].keys())
    assert "policy_state" in film_run(recurrent.config, load_policy(recurrent.folder), tmp_path / "x.gif", **settings)
    monkeypatch.setattr(film, "film_episodes", lambda *_, **__: 1 / 0)
    assert film_run(unseen.config, unseen.policy, tmp_path / "x.gif", **settings) is None, "the run goes on"


@pytest.mark.parametrize(
    ("overrides", "compiled"),
    [
        ([], False),
        (["train.total_frames=4000"], True),
        (["train.total_frames=4000", "env.compiled=false"], False),
        (["env.compiled=true"], True),
        (["env=gym/CartPole-v1", "train.total_frames=10000"], None),
    ],
)
def test_long_runs_on_the_cpu_are_compiled(overrides, compiled, tmp_path, monkeypatch):
    cfg = config("trpo" if "env=gym/CartPole-v1" in overrides else "hatrpo", tmp_path, *overrides)
    assert settle_compilation(cfg).env.get("compiled") is compiled
    if cfg.env.get("compiled") == "auto":
        monkeypatch.setattr("torchrl_trpo.training.policy.resolve_device", lambda device: torch.device("meta"))
        assert settle_compilation(cfg).env.compiled is False


def test_the_decision_is_recorded(tmp_path):
    RECIPES["hatrpo"].train(config("hatrpo", tmp_path, "film=false", "train.total_frames=80"))
    assert "compiled: false" in (tmp_path / "config.yaml").read_text()
