"""The learning results of docs/results, with the recipes' defaults; run with ``make test-slow``."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from torchrl_trpo.config.overrides import compose_settings
from torchrl_trpo.recipes import hatrpo, itrpo, matrpo, trpo

CONFIG_DIR = Path(hatrpo.__file__).parent / "config"


def returns(recipe, env, frames, folder, seeds):
    """The mean of the last five iterations' ``episode_return`` for each seed."""
    torch.set_num_threads(1)
    name = recipe.__name__.rpartition(".")[2]
    found = []
    for seed in seeds:
        overrides = [f"env={env}", f"seed={seed}", f"output_dir={folder / str(seed)}", "film=false"]
        cfg, _ = compose_settings([*overrides, f"train.total_frames={frames}"], CONFIG_DIR, name)
        found.append(recipe.train(cfg)["episode_return"])
    print(f"{name} on {env}: {[round(value, 1) for value in found]}")
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The agents' rewards differ")
@pytest.mark.parametrize(
    ("recipe", "env", "frames", "least"),
    [
        (itrpo, "vmas/balance", 240_000, 38),
        (matrpo, "vmas/balance", 240_000, 43),
        (hatrpo, "vmas/balance", 240_000, 45),
        (itrpo, "vmas/navigation", 240_000, 2),
        (matrpo, "vmas/navigation", 240_000, 2),
        (hatrpo, "vmas/navigation", 240_000, 2),
        (trpo, "gym/CartPole-v1", 100_000, 475),
        (trpo, "gym/Pendulum-v1", 100_000, -300),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "train") else str(value),
)
def test_mean_return_of_three_seeds(recipe, env, frames, least, tmp_path):
    """Seeds 0, 1 and 2, with the recipes' defaults."""
    assert statistics.mean(returns(recipe, env, frames, tmp_path, range(3))) >= least


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The agents' rewards differ")
@pytest.mark.parametrize(
    ("recipe", "task", "least"),
    [
        (matrpo, "simple_spread_v3", -21.5),
        (hatrpo, "simple_spread_v3", -21.5),
        (hatrpo, "simple_speaker_listener_v4", -18),
    ],
    ids=["matrpo-spread", "hatrpo-spread", "hatrpo-speaker-listener"],
)
def test_particle_tasks(recipe, task, least, tmp_path):
    """One seed, half the frames of docs/results; a random policy gets -27 and -41."""
    (found,) = returns(recipe, f"pettingzoo/{task}", 150_000, tmp_path, [0])
    assert found >= least
