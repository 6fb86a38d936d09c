"""A training run's folder: config, metrics, checkpoints, and what is left at the end."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl._utils import logger
from torchrl.checkpoint import Checkpoint, CheckpointRotation, GlobalRNGState
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor
from tqdm import tqdm

from torchrl_trpo.divergence import entropy
from torchrl_trpo.envs import make_env, observation_norm
from torchrl_trpo.evaluation import episode_statistics, evaluate
from torchrl_trpo.film import film_episodes
from torchrl_trpo.groups import group_keys
from torchrl_trpo.plots import plot_learning_curve
from torchrl_trpo.recurrent import carry_states
from torchrl_trpo.suggest import SettingError

COLUMNS = (
    "iteration",
    "frames",
    "episode_return",
    "episode_return_sum",
    "episode_length",
    "kl",
    "accepted",
    "improvement",
    "entropy",
    "loss_critic",
    "explained_variance",
    "collect_s",
    "policy_s",
    "critic_s",
    "wall_s",
    "cpu_s",
)
"""The columns of ``metrics.csv``; with several groups of agents, ``episode_return_<group>`` follow."""

_NETWORK_SETTINGS = (
    "actor.hidden",
    "actor.sharing",
    "actor.network",
    "critic.hidden",
    "critic.network",
    "critic.share_params",
    "critic.inputs",
    "critic.agent_one_hot",
    "critic.others_actions",
    "critic.value_norm",
    "normalize_observations",
)
_PACKAGES = ("torchrl-trpo", "torch", "torchrl", "tensordict", "vmas", "mpe2", "gymnasium", "hydra-core")


class Run:
    """Keeps a run's records; the recipe does the learning.

    Args:
        cfg: the recipe's config; ``cfg.resume`` names a run folder to continue.
        algorithm: the algorithm's name, for titles.

    Keyword Args:
        env: the environment.
        policy: the policy of all groups.
        **components: what a checkpoint must hold to continue, objects with ``state_dict`` and ``load_state_dict``.

    Attributes:
        folder: the run's folder.
        frames: the environment steps done so far.

    Raises:
        SettingError: if ``cfg.resume`` has no checkpoint, has done all its frames, or had another algorithm, task or
            network.
    """

    def __init__(
        self, cfg: DictConfig, algorithm: str, *, env: EnvBase, policy: TensorDictModuleBase, **components: Any
    ) -> None:
        self.cfg = cfg
        self.algorithm = algorithm
        self.env = env
        self.policy = policy
        self.groups = group_keys(env)
        several = [f"episode_return_{keys.group}" for keys in self.groups] if len(self.groups) > 1 else []
        self.columns = (*COLUMNS, *several)
        if (norm := observation_norm(env)) is not None:
            components["observation_norm"] = norm
        self.folder = Path(cfg.resume or cfg.output_dir)
        self._progress: dict[str, Any] = {"iteration": 0, "frames": 0, "wall_s": 0.0, "cpu_s": 0.0}
        self._optimizers = [c for c in components.values() if isinstance(c, torch.optim.Optimizer)]
        self._checkpoint = Checkpoint(progress=self._progress, generators=GlobalRNGState(), **components)
        self._rotation = CheckpointRotation(self.folder / "checkpoints", keep_last=cfg.checkpoint.keep)
        if cfg.resume:
            self._resume()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_config()
        rows = self._kept_rows()
        self._file = (self.folder / "metrics.csv").open("w", newline="")
        self._writer = csv.DictWriter(self._file, self.columns)
        self._writer.writeheader()
        self._writer.writerows(rows)
        self._returns = [float(row["episode_return"] or "nan") for row in rows]
        self._laps: dict[str, float] = {}
        self._last_lap = self._start = time.perf_counter()
        self._start -= self._progress["wall_s"]
        self._cpu_start = time.process_time() - self._progress["cpu_s"]
        self._bar = tqdm(total=cfg.train.total_frames, initial=self.frames, unit="frame", desc=algorithm, smoothing=0.1)
        self._bar.write(f"Training {algorithm} on {cfg.env.name}; everything goes to {self.folder}")

    @property
    def frames(self) -> int:
        """The environment steps done so far."""
        return int(self._progress["frames"])

    def lap(self, name: str) -> None:
        """Adds the time since the last lap to a column of the metrics.

        Args:
            name: ``"collect_s"``, ``"policy_s"`` or ``"critic_s"``.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last_lap
        self._last_lap = now

    def log(self, data: TensorDictBase, stats: TensorDictBase, critic: dict[str, float]) -> None:
        """Ends an iteration: a row of metrics, the progress bar, a checkpoint when due.

        Args:
            data: the iteration's batch.
            stats: what the updater returned.
            critic: what the critic's fit returned.
        """
        self._progress["iteration"] += 1
        self._progress["frames"] += data.numel()
        self._progress["wall_s"] = time.perf_counter() - self._start
        self._progress["cpu_s"] = time.process_time() - self._cpu_start
        row = {
            **self._progress,
            **episode_statistics(data, self.groups),
            **{name: float(stats[name].float().mean()) for name in ("kl", "accepted", "improvement")},
            "entropy": self._entropy(data),
            **critic,
            **self._laps,
        }
        self._writer.writerow({name: _cell(row[name]) for name in self.columns})
        self._file.flush()
        self._returns.append(row["episode_return"])
        self._show(data, stats, row)
        last = self.frames >= self.cfg.train.total_frames
        if last or self._progress["iteration"] % self.cfg.checkpoint.every == 0:
            self._rotation.save(self._checkpoint, step=self._progress["iteration"], metadata=dict(self._progress))
        self._laps = {}
        self._last_lap = time.perf_counter()

    def finish(self) -> dict[str, Any]:
        """Evaluates the policy, plots the curve, makes the film, writes the summary and says where it all is.

        Returns:
            What ``summary.json`` holds.
        """
        self._bar.close()
        self._file.close()
        cfg = self.cfg
        recent = [value for value in self._returns if math.isfinite(value)][-5:] or [math.nan]
        if (norm := observation_norm(self.env)) is not None:
            norm.freeze()
        returns = evaluate(self.env, self.policy, max_steps=cfg.env.max_steps)
        summary = {
            "algorithm": self.algorithm,
            "env": cfg.env.name,
            "seed": cfg.seed,
            "frames": self.frames,
            "wall_s": self._progress["wall_s"],
            "cpu_s": self._progress["cpu_s"],
            "frames_per_s": self.frames / self._progress["wall_s"],
            "episode_return": sum(recent) / len(recent),
            "evaluation_return": float(returns.mean()),
            "evaluation_episodes": returns.numel(),
        }
        (self.folder / "summary.json").write_text(
            json.dumps({k: _finite(v) for k, v in summary.items()}, indent=2) + "\n"
        )
        title = f"{self.algorithm} on {cfg.env.name}, seed {cfg.seed}"
        plot_learning_curve(
            self.folder / "metrics.csv",
            self.folder / "learning_curve.png",
            title=title,
            max_kl=cfg.updater.max_kl,
        )
        if cfg.film:
            self._film()
        print(
            f"{title}: episode return {summary['episode_return']:.1f} (mean of the last {len(recent)} iterations "
            "with finished episodes), "
            f"{summary['evaluation_return']:.1f} acting deterministically, "
            f"{self.frames} frames in {summary['wall_s']:.0f} s."
        )
        self.env.close(raise_if_closed=False)
        for name in ("learning_curve.png", "film.mp4", "metrics.csv", "summary.json", "config.yaml", "checkpoints"):
            if (self.folder / name).exists():
                print(f"  {self.folder / name}")
        return summary

    def _entropy(self, data: TensorDictBase) -> float:
        """The policy's entropy at collection in nats, the mean over the rows and agents that count."""
        total = count = torch.zeros((), device=self.env.device)
        actors = [module for module in self.policy.modules() if isinstance(module, ProbabilisticActor)]
        for keys, actor in zip(self.groups, actors, strict=True):
            values = entropy(actor.build_dist_from_params(data))
            counts = torch.ones_like(values) if keys.mask is None else data.get(keys.mask).to(values.dtype)
            total, count = total + (values * counts).sum(), count + counts.sum()
        return float(total / count)

    def _film(self) -> None:
        cfg = self.cfg
        settings = {**cfg.env, "num_envs": 4, "parallel": False}
        try:
            stage = make_env(
                **settings,
                seed=cfg.seed,
                device=self.env.device,
                one_group=cfg.actor.get("sharing") == "all",
                render=True,
                normalize_observations=cfg.normalize_observations,
            )
        except SettingError as error:  # a factory that makes other batches than four
            logger.warning(f"No film: {error}")
            return
        carry_states(stage, self.policy)
        if (norm := observation_norm(self.env)) is not None and (copy := observation_norm(stage)) is not None:
            copy.load_state_dict(norm.state_dict())
            copy.freeze()
        film_episodes(stage, self.policy, self.folder / "film.mp4", max_steps=cfg.env.max_steps)
        stage.close(raise_if_closed=False)

    def _show(self, data: TensorDictBase, stats: TensorDictBase, row: dict[str, Any]) -> None:
        self._bar.update(data.numel())
        postfix = {
            "return": f"{row['episode_return']:.2f}",
            "kl": f"{row['kl']:.4f}",
            "accepted": f"{row['accepted']:.2f}",
        }
        broken = sum(not math.isfinite(value) for value in stats["grad_norm"].tolist())
        if broken:
            postfix["non_finite"] = f"{broken}/{stats.numel()}"
        if row["dropped"]:
            postfix["dropped"] = f"{row['dropped']} rows"
        self._bar.set_postfix(postfix)

    def _resume(self) -> None:
        latest = self._rotation.latest()
        if latest is None:
            raise SettingError(
                f"resume: {str(self.folder)!r} has no checkpoint in {self._rotation.directory}. Legal: the folder of a "
                "run, the one that holds metrics.csv and checkpoints."
            )
        self._check_resumed()
        rates = [group["lr"] for optimizer in self._optimizers for group in optimizer.param_groups]
        self._checkpoint.load(latest)
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate  # the setting given now counts
        if self.frames >= self.cfg.train.total_frames:
            raise SettingError(
                f"resume: {str(self.folder)!r} has done {self.frames} frames already, and train.total_frames="
                f"{self.cfg.train.total_frames}. Nearest that continues: "
                f"train.total_frames={self.frames + self.cfg.train.frames_per_batch}."
            )

    def _check_resumed(self) -> None:
        """Refuses to continue a run with another algorithm, task or network."""
        record = OmegaConf.load(self.folder / "config.yaml")
        settings: Any = OmegaConf.to_container(self.cfg)
        given = OmegaConf.create({**settings, "algorithm": self.algorithm})
        for name in ("algorithm", "env.name", "env.kwargs", "env.continuous_actions", *_NETWORK_SETTINGS):
            before, now = OmegaConf.select(record, name), OmegaConf.select(given, name)
            if before != now:
                advice = f"Use the recipe of {before}." if name == "algorithm" else f"Leave {name} out to continue it."
                raise SettingError(
                    f"resume: the run in {str(self.folder)!r} has {name}={before}, and now it is {now}. {advice}"
                )

    def _kept_rows(self) -> list[dict[str, str]]:
        metrics = self.folder / "metrics.csv"
        if not self.cfg.resume or not metrics.exists():
            return []
        with metrics.open(newline="") as file:
            return [row for row in csv.DictReader(file) if int(row["iteration"]) <= self._progress["iteration"]]

    def _write_config(self) -> None:
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)}
        resolved: Any = OmegaConf.to_container(self.cfg, resolve=True)
        record = {
            **resolved,
            "algorithm": self.algorithm,
            "versions": {"python": platform.python_version(), **versions},
        }
        (self.folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(record)))


def _cell(value: float) -> str | float:
    return "" if isinstance(value, float) and math.isnan(value) else value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
