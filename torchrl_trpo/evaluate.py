"""Plays the trained policy of a run in environments it has not seen, and films it.

python -m torchrl_trpo.evaluate outputs/hatrpo/2026-01-31_12-00-00
python -m torchrl_trpo.evaluate outputs/hatrpo/2026-01-31_12-00-00 --checkpoint best --episodes 500 --sampled
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from torchrl_trpo.arguments import plain_number
from torchrl_trpo.envs import resolve_device
from torchrl_trpo.errors import SettingError, require
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks.recurrent import carry_states
from torchrl_trpo.numerics.statistics import percentile_bootstrap
from torchrl_trpo.reporting.record import replace_file
from torchrl_trpo.seeding import untouched_generators
from torchrl_trpo.training.checkpoints import WHICH
from torchrl_trpo.training.episodes import play_episodes
from torchrl_trpo.training.film import film_run
from torchrl_trpo.training.policy import find_run, make_run_env, policy_at

RESAMPLES = 10_000
"""The number of resamples of the bootstrap."""


def evaluate_run(
    run_folder: str | Path,
    *,
    episodes: int = 100,
    checkpoint: str = "latest",
    deterministic: bool = True,
    seed: int | None = None,
    device: str = "auto",
    film: str | Path | None = None,
) -> dict[str, Any]:
    """Plays episodes with the policy of a run, and writes ``evaluation.json`` into the run's folder.

    Each environment of a batch plays one episode to its end. If the last batch has more episodes than are needed, the
    first environments count, so that the length of an episode does not decide whether it counts. The global random
    generators are restored.

    Args:
        run_folder: the run's folder.

    Keyword Args:
        episodes: the number of episodes.
        checkpoint: ``"latest"`` or ``"best"``.
        deterministic: whether the policy acts deterministically, or samples.
        seed: the seed of the environments and of sampled actions. Default: the run's + 1000.
        device: the device, see :func:`~torchrl_trpo.envs.resolve_device`.
        film: an ``.mp4`` or ``.gif`` file for a film of four episodes; None for no film.

    Returns:
        What ``evaluation.json`` holds: the settings; ``episode_return``, the mean over episodes of the return averaged
        over agents, and ``episode_return_ci95``, its 95 % confidence interval by the percentile bootstrap over
        episodes, None of a single episode; ``episode_return_sum``, summed over agents; ``episode_length``; the mean
        returns of the ``groups`` and their agents; and each episode's return and length. A number that is not finite
        is None.

    Raises:
        SettingError: if an argument is invalid, or the run cannot be read.
    """
    path, config = find_run(run_folder, checkpoint)
    episodes, seed = plain_number(episodes), plain_number(seed)
    if episodes < 1:
        raise SettingError(f"episodes must be at least 1, got {episodes}.")
    if seed is not None and not 0 <= seed < 2**32:
        raise SettingError(f"seed must be a whole number from 0 to 4294967295, got {seed}.")
    if film is not None and (Path(film).suffix not in {".mp4", ".gif"} or not Path(film).parent.is_dir()):
        raise SettingError(f"film: {str(film)!r}. Legal: an .mp4 or .gif file in a folder that exists.")
    if film is not None:
        require("recipes", "imageio", "imageio_ffmpeg", "matplotlib", importer=__name__)
    where = resolve_device(device)
    seed = (config["seed"] + 1000) % 2**32 if seed is None else seed
    with untouched_generators(seed):
        num_envs = min(episodes, config["env"]["num_envs"])
        parallel = config["env"].get("parallel", False)
        env = make_run_env(config, num_envs=num_envs, seed=seed, device=where, parallel=parallel)
        try:
            policy = policy_at(path, config, env.device)
            carry_states(env, policy)
            groups = {keys.group or "agent": keys.n_agents for keys in group_keys(env)}
            settings: dict[str, Any] = {"max_steps": config["env"]["max_steps"], "deterministic": deterministic}
            rounds = math.ceil(episodes / env.batch_size[0])
            played = torch.cat([play_episodes(env, policy, **settings) for _ in range(rounds)])[:episodes].cpu()
        finally:
            env.close(raise_if_closed=False)
        record = {
            "algorithm": config["algorithm"],
            "env": config["env"]["name"],
            "checkpoint": checkpoint,
            "checkpoint_path": str(path),
            "iteration": int(path.name.rpartition("-")[2]),
            "episodes": episodes,
            "seed": seed,
            "deterministic": deterministic,
            "device": str(env.device),
            **_statistics(played, groups),
            "film": None,
        }
        written = Path(run_folder) / "evaluation.json"
        replace_file(written, json.dumps(record, indent=2, allow_nan=False) + "\n")
        if film is not None:
            filmed = film_run(config, policy, Path(film), seed=seed, device=where, deterministic=deterministic)
            record["film"] = None if filmed is None else str(filmed)
            replace_file(written, json.dumps(record, indent=2, allow_nan=False) + "\n")
    return record


def bootstrap_interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """A confidence interval of the mean by the percentile bootstrap (Efron 1979), the same for the same values.

    Args:
        values: independent values, ``[N]``.
        level: the share of intervals that hold the true mean.

    Returns:
        Its two ends.
    """
    return percentile_bootstrap(lambda drawn: drawn.mean(-1), values, resamples=RESAMPLES, level=level)


def _statistics(played: TensorDict, groups: dict[str, int]) -> dict[str, Any]:
    """What there is to say about episodes, with None for what is not finite."""
    by_agent = played["episode_return"].double()  # [episodes, n_agents]
    returns, lengths = by_agent.mean(-1), played["episode_length"]
    interval = bootstrap_interval(returns) if len(returns) > 1 else (math.nan, math.nan)
    parts = zip(groups, by_agent.mean(0).split(list(groups.values())), strict=True)
    return {
        "episode_return": _finite(returns.mean()),
        "episode_return_ci95": None if None in (ends := [_finite(end) for end in interval]) else ends,
        "ci_method": f"percentile bootstrap over episodes, {RESAMPLES} resamples",
        "episode_return_sum": _finite(by_agent.sum(-1).mean()),
        "episode_length": float(lengths.double().mean()),
        "groups": {
            group: {"episode_return": _finite(part.mean()), "agents": [_finite(value) for value in part]}
            for group, part in parts
        },
        "episode_returns": [_finite(value) for value in returns],
        "episode_lengths": lengths.tolist(),
    }


def _finite(value: Tensor | float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _print(record: dict[str, Any], folder: Path) -> None:
    acting = "acting deterministically" if record["deterministic"] else "sampling its actions"
    print(
        f"{record['algorithm']} on {record['env']}, checkpoint {record['checkpoint']} (iteration "
        f"{record['iteration']}), {record['episodes']} episodes, seed {record['seed']}, {acting}:"
    )
    interval = "no confidence interval from one episode"
    if (ends := record["episode_return_ci95"]) is not None:
        interval = f"95 % confidence interval {ends[0]:.3f} to {ends[1]:.3f} ({record['ci_method']})"
    elif record["episodes"] > 1:
        interval = "there are returns that are not finite"
    print(f"  episode return {_shown(record['episode_return'])}, {interval}")
    print(f"  episode length {record['episode_length']:.1f} steps")
    for group, means in record["groups"].items():
        if len(record["groups"]) > 1 or len(means["agents"]) > 1:
            agents = ", ".join(_shown(mean) for mean in means["agents"])
            print(f"  group {group}: episode return {_shown(means['episode_return'])}, by agent {agents}")
    for path in (folder / "evaluation.json", record["film"]):
        if path is not None:
            print(f"  {path}")


def _shown(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: of the command line; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        "python -m torchrl_trpo.evaluate", description="Plays the trained policy of a run, and films it."
    )
    parser.add_argument("run_folder", type=Path, help="the run's folder, which holds metrics.csv and checkpoints")
    parser.add_argument("--episodes", type=int, default=100, help="how many episodes are played (default: 100)")
    parser.add_argument("--checkpoint", default="latest", metavar="|".join(WHICH), help="default: latest")
    parser.add_argument("--sampled", action="store_true", help="sample actions, not deterministically")
    parser.add_argument("--seed", type=int, help="of environments and actions (default: the run's + 1000)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    films = parser.add_mutually_exclusive_group()
    films.add_argument("--film", type=Path, metavar="PATH", help="default: evaluation.mp4 in the run's folder")
    films.add_argument("--no-film", action="store_true", help="do not film the policy")
    given = parser.parse_args(arguments)
    film = None if given.no_film else given.film or given.run_folder / "evaluation.mp4"
    try:
        record = evaluate_run(
            given.run_folder,
            episodes=given.episodes,
            checkpoint=given.checkpoint,
            deterministic=not given.sampled,
            seed=given.seed,
            device=given.device,
            film=film,
        )
    except SettingError as error:
        sys.exit(f"error: {error}")
    _print(record, given.run_folder)


if __name__ == "__main__":
    main()
