"""The learning results of the README, with the recipes' defaults; run with ``make test-slow``."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from torchrl_trpo.recipes import hatrpo, itrpo, matrpo

CONFIG_DIR = Path(hatrpo.__file__).parent / "config"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "env", "least"),
    [
        (itrpo, "balance", 38),
        (matrpo, "balance", 43),
        (hatrpo, "balance", 45),
        (itrpo, "navigation", 2),
        (matrpo, "navigation", 2),
        (hatrpo, "navigation", 2),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "train") else str(value),
)
def test_mean_return_of_three_seeds(recipe, env, least, tmp_path):
    """The mean of the last five iterations' ``episode_return`` at 240 000 frames, seeds 0, 1 and 2."""
    torch.set_num_threads(1)
    name = recipe.__name__.rpartition(".")[2]
    returns = []
    for seed in range(3):
        overrides = [f"env=vmas/{env}", f"seed={seed}", f"output_dir={tmp_path / str(seed)}", "film=false"]
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            cfg = compose(name, overrides)
        returns.append(recipe.train(cfg)["episode_return"])
    print(f"{name} on {env}: {[round(value, 1) for value in returns]}")
    assert statistics.mean(returns) >= least
