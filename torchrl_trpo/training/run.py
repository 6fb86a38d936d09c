"""A training run's folder: config, metrics, checkpoints, and what is left at the end."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl._utils import logger
from torchrl.collectors import Collector
from torchrl.modules import ProbabilisticActor
from torchrl.record.loggers import generate_exp_name
from tqdm import tqdm

from torchrl_trpo.config.checks import check_settings
from torchrl_trpo.config.schema import Recipe
from torchrl_trpo.distributions.divergence import entropy
from torchrl_trpo.envs import resolve_device
from torchrl_trpo.envs.checks import EnvironmentFault, find_non_finite
from torchrl_trpo.envs.normalization import observation_norm
from torchrl_trpo.errors import SettingError
from torchrl_trpo.keys import group_keys
from torchrl_trpo.numerics.statistics import read
from torchrl_trpo.parallel.ranks import ALONE, RankLostError, Ranks, agreed, check_same_bits
from torchrl_trpo.parallel.torchrun import is_job, job_id, job_name, job_ranks
from torchrl_trpo.reporting.diagnosis import RejectionWatch
from torchrl_trpo.reporting.loggers import RunLogger
from torchrl_trpo.reporting.plots import plot_diagnostics, plot_learning_curve
from torchrl_trpo.reporting.record import REPORTS, STATE, read_rows, read_run
from torchrl_trpo.reporting.symptoms import find_symptoms
from torchrl_trpo.seeding import rank_seed, untouched_generators
from torchrl_trpo.training.checkpoints import Checkpoints, check_continued, find_checkpoint, full_record, read_record
from torchrl_trpo.training.episodes import episode_statistics, evaluate
from torchrl_trpo.training.film import film_run
from torchrl_trpo.training.policy import on_raw_observations
from torchrl_trpo.training.signals import StopSignals

_SIGNALS = (SystemExit, KeyboardInterrupt)
_SETTINGS_IN_LOSSES = ("entropy_coeff", "clip_epsilon", "gamma", "lmbda")

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
    "expected_improvement",
    "step_fraction",
    "cg_residual",
    "grad_norm",
    "clip_fraction",
    "factor_std",
)
"""The columns of ``metrics.csv``; with several groups of agents, ``episode_return_<group>`` follow."""

_MEANS = (
    "kl",
    "accepted",
    "improvement",
    "expected_improvement",
    "step_fraction",
    "cg_residual",
    "grad_norm",
    "clip_fraction",
)
"""Those that are means over the regions of what an updater returns, as far as it does."""

_Result = TypeVar("_Result")
_ONE_AT_A_TIME = threading.Lock()


def training_run(
    settings: type[Recipe],
) -> Callable[[Callable[[DictConfig, Ranks], _Result]], Callable[[DictConfig], _Result]]:
    """Turns a training function into a run of its own.

    The settings are checked first. The global generators of Python, NumPy and PyTorch start at ``cfg.seed`` and are
    restored afterwards, so that runs in one process, one after another, do not affect each other.

    If torchrun has started several processes, they are one run. Its config means the same as in one process: the
    environments, the frames of a batch and the rows of a minibatch are spread over them. Each process draws its own
    random numbers.

    Args:
        settings: the settings that the config must have.

    Returns:
        A decorator of a function of the config and the run's ranks, which makes it a function of the config alone. That
        raises a :class:`~torchrl_trpo.errors.SettingError` if settings are invalid, and a ``RuntimeError`` if another
        thread is training, since both would draw from the same generators.
    """

    def decorate(train: Callable[[DictConfig, Ranks], _Result]) -> Callable[[DictConfig], _Result]:
        @functools.wraps(train)
        def run(cfg: DictConfig) -> _Result:
            check_settings(cfg, settings)
            if not _ONE_AT_A_TIME.acquire(blocking=False):
                raise RuntimeError(
                    "another training is running in this process, and both would draw from the same random numbers. "
                    "Legal: one after the other, or a process for each."
                )
            try:
                if is_job() and job_name() is None and Path(cfg.output_dir).name == "none":
                    raise SettingError(
                        "the job has no name, and so no folder of its own. Legal: torchrun --standalone, torchrun "
                        "--rdzv-id=<name>, or output_dir=<folder>."
                    )
                ranks = job_ranks(resolve_device(cfg.device))
                with untouched_generators(rank_seed(cfg.seed, ranks.rank)):
                    return train(cfg, ranks)
            finally:
                _ONE_AT_A_TIME.release()

        return run

    return decorate


class Run:
    """A training run: its records, its checkpoints and its end; the recipe does the learning.

    It is a context manager, to be entered around the training loop. Inside, the first SIGINT or SIGTERM ends the run
    after the iteration and a checkpoint; whatever ends it otherwise, it is said how to continue.

    Of several ranks the first one speaks and writes; the others take part in what all of them do: :meth:`log`, which
    counts the frames and episodes of all, and checkpoints. A job that torchrun has started anew, after a process of it
    was lost, goes on from the checkpoint in its output folder.

    Args:
        cfg: the recipe's config; ``cfg.resume`` names a run folder to continue.
        algorithm: the algorithm's name, for titles.

    Keyword Args:
        collector: what collects, without an end of its own (``total_frames=-1``).
        policy: the policy of all groups.
        losses: the losses of all groups, with their critics and value normalisers.
        updaters: the policy's updaters, with the settings in ``cfg.updater`` as attributes.
        critic_optim: the critics' optimiser.
        ranks: the processes of the run. Default: this one alone.

    Attributes:
        folder: the run's folder.

    Raises:
        SettingError: if ``cfg.resume`` has no checkpoint that can be read, is finished, is in use or had another
            algorithm, task, network or seed; or if the output folder holds another run.
    """

    def __init__(
        self,
        cfg: DictConfig,
        algorithm: str,
        *,
        collector: Collector,
        policy: TensorDictModuleBase,
        losses: nn.Module,
        updaters: Sequence[Any],
        critic_optim: torch.optim.Optimizer,
        ranks: Ranks = ALONE,
    ) -> None:
        self.cfg = cfg
        self.algorithm = algorithm
        self.env = collector.env
        self.policy = policy
        self.groups = group_keys(self.env)
        self.folder = Path(cfg.resume or cfg.output_dir)
        several = [f"episode_return_{keys.group}" for keys in self.groups] if len(self.groups) > 1 else []
        self.columns = (*COLUMNS, *several)
        self._collector = collector
        self._losses = losses
        self._updaters = updaters
        self._critic_optim = critic_optim
        self._ranks = ranks
        self._record = full_record(cfg, algorithm)
        self._progress: dict[str, Any] = {"iteration": 0, "frames": 0, "wall_s": 0.0, "cpu_s": 0.0, "best_return": None}
        self._watch = RejectionWatch(
            self.groups, max_kl=cfg.updater.get("max_kl"), damping=cfg.updater.get("damping"), ranks=self._ranks
        )
        components = {"policy": policy, "losses": losses, "critic_optim": critic_optim, "rejections": self._watch}
        components |= {f"updater_{index}": updater for index, updater in enumerate(updaters)}
        self._checkpoints = Checkpoints(self.folder, collector, components, cfg.checkpoint.keep, self._ranks)
        self._logger = RunLogger(None, {}, folder=self.folder, name="")
        self._saved_at: int | None = None
        self._signals = StopSignals()
        self._stack = contextlib.ExitStack()  # what the run holds until its end
        self._loop = contextlib.ExitStack()  # and what the training loop holds
        self._laps: dict[str, float] = {}

    def __enter__(self) -> Run:
        """Begins the run, or continues it."""
        with contextlib.ExitStack() as stack:
            latest, changed, rows = agreed(lambda: self._take_folder(stack), self._ranks)
            if latest is not None:
                self._continue(latest, changed)
            self._merge_statistics()
            self._returns = [float(row["episode_return"] or "nan") for row in rows]
            if self._ranks.is_first:
                replace_file(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self._record)))
                table = io.StringIO(newline="")
                writer = csv.DictWriter(table, self.columns)
                writer.writeheader()
                writer.writerows(rows)
                replace_file(self.folder / "metrics.csv", table.getvalue())
            agreed(self._open_logger, self._ranks)
            self._save()
            self._loop = stack.enter_context(contextlib.ExitStack())
            self._loop.enter_context(self._signals)
            self._open_metrics()
            self._last_lap = self._start = time.perf_counter()
            self._start -= self._progress["wall_s"]
            self._cpu_start, self._cpu_before = time.process_time(), self._progress["cpu_s"]
            self._stack = stack.pop_all()
        self._write_state(running=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the run, and says how to continue it if it did not come to its end."""
        try:
            with self._stack:
                self._logger.close(failed=error is not None)
        finally:  # a full disk lets the metrics not be closed
            self.env.close(raise_if_closed=False)
            self._write_state(error)
            if error is not None:
                self._say_how_to_continue(error)

    def batches(self) -> Iterator[TensorDictBase]:
        """The batches that remain to be collected, ``[num_envs, T]``.

        Yields:
            A batch; :meth:`log` must be called before the next one.

        Raises:
            EnvironmentFault: if anything in a batch is not finite and ``cfg.non_finite`` is ``stop``; environments of
                ``make_env`` raise one of themselves when they fail.
            RuntimeError: if :meth:`log` was not called after a batch, which would then be trained on without end.
        """
        batches = iter(self._collector)
        while self.frames < self.cfg.train.total_frames:
            iteration = self._progress["iteration"]
            data = next(batches)
            self._merge_statistics()
            found = find_non_finite(data, self.groups) if self.cfg.non_finite == "stop" else None
            if found is not None:
                index, step, key, count = found
                raise EnvironmentFault(
                    f"environment {index} of {self.env.batch_size[0]}, step {step} of the batch of iteration "
                    f"{self._progress['iteration'] + 1}: {key!r} is not finite, one of {count} such numbers in the "
                    "batch. Mend the environment, or set non_finite=drop to leave such rows out.",
                    index,
                    step,
                    key,
                )
            yield data
            if self._progress["iteration"] == iteration:
                raise RuntimeError(f"log() was not called after the batch of iteration {iteration + 1}.")

    @property
    def frames(self) -> int:
        """The environment steps done so far."""
        return int(self._progress["frames"])

    def lap(self, name: str) -> None:
        """Adds the time since the last lap to a column of the metrics.

        Args:
            name: ``"collect_s"``, ``"policy_s"`` or ``"critic_s"``.
        """
        if (device := self.env.device) is not None and device.type != "cpu":
            torch.accelerator.synchronize(device)
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last_lap
        self._last_lap = now

    def log(self, data: TensorDictBase, stats: TensorDictBase, critic: dict[str, float]) -> None:
        """Ends an iteration: a row of metrics, the progress bar, a checkpoint when due.

        Args:
            data: the iteration's batch.
            stats: what the updater returned.
            critic: what the critic's fit returned.

        Raises:
            SystemExit: after a checkpoint, if a signal asked to stop; with the code 128 + the signal, as shells do.
        """
        self._progress["iteration"] += 1
        self._progress["frames"] += data.numel() * self._ranks.size
        self._progress["wall_s"] = time.perf_counter() - self._start
        self._progress["cpu_s"] = self._cpu_before + self._cpu_of_all()
        row = {
            **self._progress,
            **episode_statistics(data, self.groups, self._ranks),
            **dict.fromkeys((*_MEANS, "factor_std"), math.nan),  # what this kind of update has not
            **read({**_of_regions(stats), "entropy": self._entropy(data)}),
            **critic,
            **self._laps,
        }
        if self._ranks.is_first:
            self._writer.writerow({name: _cell(row[name]) for name in self.columns})
            self._file.flush()
        self._logger.log({name: row[name] for name in self.columns if name != "frames"}, self.frames)
        self._returns.append(row["episode_return"])
        self._progress["best_return"] = max(filter(math.isfinite, self._returns), default=None)
        self._show(row, stats.numel())
        for report in self._watch.see(data, stats):
            self._report(report)
        last = self.frames >= self.cfg.train.total_frames
        asked = self._stop_signal()
        if last or asked or self._progress["iteration"] % self.cfg.checkpoint.every == 0:
            self._save()
        if asked and not last:
            raise SystemExit(128 + asked)
        self._laps = {}
        self._last_lap = time.perf_counter()

    def finish(self) -> dict[str, Any]:
        """Evaluates the policy, plots the curve, makes the film, writes the summary and says where it all is.

        Returns:
            What ``summary.json`` holds; nothing in ranks other than the first, which have nothing left to do.
        """
        self._loop.close()
        if not self._ranks.is_first:
            return {}
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
            "best_return": self._progress["best_return"],
            "evaluation_return": float(returns.mean()),
            "evaluation_episodes": returns.numel(),
        }
        title = f"{self.algorithm} on {cfg.env.name}, seed {cfg.seed}"
        record = read_run(self.folder)
        plot_learning_curve(record, self.folder / "learning_curve.png")
        plot_diagnostics(record, self.folder / "diagnostics.png")
        if cfg.film:
            policy = on_raw_observations(self.env, self.policy)
            film = film_run(self._record, policy, self.folder / "film.mp4", seed=cfg.seed, device=self.env.device)
            if film is not None:
                self._logger.log_film(film, self.frames)
        self._logger.log({"evaluation_return": summary["evaluation_return"]}, self.frames)
        finite = {name: _finite(value) for name, value in summary.items()}
        replace_file(self.folder / "summary.json", json.dumps(finite, indent=2) + "\n")  # last: the run is finished
        print(
            f"{title}: episode return {summary['episode_return']:.1f} (mean of the last {len(recent)} iterations "
            "with finished episodes), "
            f"{summary['evaluation_return']:.1f} acting deterministically, "
            f"{self.frames} frames in {summary['wall_s']:.0f} s."
        )
        for name in (
            "learning_curve.png",
            "diagnostics.png",
            "film.mp4",
            "metrics.csv",
            "summary.json",
            "config.yaml",
            "checkpoints",
        ):
            if (self.folder / name).exists():
                print(f"  {self.folder / name}")
        for symptom in find_symptoms(record):
            print(f"  {symptom.name}: {symptom.told} See docs/not-learning.md.")
        return summary

    def _entropy(self, data: TensorDictBase) -> Tensor:
        """The policy's entropy at collection in nats, the mean over the rows and agents that count."""
        total = count = torch.zeros((), device=self.env.device)
        actors = [module for module in self.policy.modules() if isinstance(module, ProbabilisticActor)]
        for keys, actor in zip(self.groups, actors, strict=True):
            values = entropy(actor.build_dist_from_params(data))
            counts = torch.ones_like(values) if keys.mask is None else data.get(keys.mask).to(values.dtype)
            total, count = total + torch.where(counts > 0, values, 0.0).sum(), count + counts.sum()
        total, count = self._ranks.sum_(torch.stack([total, count]))
        return total / count

    def _show(self, row: dict[str, Any], n_regions: int) -> None:
        self._bar.update(self.frames - self._bar.n)
        postfix = {
            "return": f"{row['episode_return']:.2f}",
            "kl": f"{row['kl']:.4f}",
            "accepted": f"{row['accepted']:.2f}",
        }
        if row["non_finite"]:
            postfix["non_finite"] = f"{row['non_finite']:.0f}/{n_regions}"
        if row["dropped"]:
            postfix["dropped"] = f"{row['dropped']} rows"
        self._bar.set_postfix(postfix)

    def _merge_statistics(self) -> None:
        """Of the observations, those of all ranks."""
        if (norm := observation_norm(self.env)) is not None:
            norm.merge(self._ranks)

    def _report(self, report: str) -> None:
        """Says what is wrong, and leaves it on record."""
        self._say(report)
        if self._ranks.is_first:
            with (self.folder / REPORTS).open("a") as file:
                file.write(f"{self._progress['iteration']}: {report}\n")

    def _write_state(self, error: BaseException | None = None, *, running: bool = False) -> None:
        """Leaves on record that the run goes on, or how it has ended."""
        state = "finished" if error is None else "stopped" if isinstance(error, _SIGNALS) else "failed"
        reason = "" if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
        said = {"state": "running" if running else state, "reason": reason}
        if self._ranks.is_first:
            with contextlib.suppress(OSError):  # a full disk
                replace_file(self.folder / STATE, json.dumps(said) + "\n")

    def _say(self, text: str) -> None:
        if self._ranks.is_first:
            self._bar.write(text)

    def _cpu_of_all(self) -> float:
        """The processor time of all ranks since the run was begun or continued, in seconds."""
        own = time.process_time() - self._cpu_start
        if self._ranks.size == 1:
            return own
        return float(self._ranks.sum_(torch.tensor(own, dtype=torch.float64, device=self.env.device)))

    def _stop_signal(self) -> int:
        """The signal that asked any of the ranks to stop, or 0."""
        received = int(self._signals.received or 0)
        if self._ranks.size == 1:
            return received
        return int(self._ranks.max_(torch.tensor(received, device=self.env.device)))

    def _open_metrics(self) -> None:
        """Opens what the first rank writes to."""
        total, first = self.cfg.train.total_frames, self._ranks.is_first
        bar = tqdm(
            total=total, initial=self.frames, unit="frame", desc=self.algorithm, smoothing=0.1, disable=not first
        )
        self._bar = self._loop.enter_context(bar)
        if first:
            self._file = self._loop.enter_context((self.folder / "metrics.csv").open("a", newline=""))
            self._writer = csv.DictWriter(self._file, self.columns)
        processes = f" in {self._ranks.size} processes" if self._ranks.size > 1 else ""
        self._say(f"Training {self.algorithm} on {self.cfg.env.name}{processes}; everything goes to {self.folder}")
        asked, device = resolve_device(self.cfg.device), self.env.device or torch.device("cpu")
        if device.type != asked.type:
            self._say(
                f"device={asked}, but the environment is on {device}, and so is the training. A factory with an "
                "argument device can make it there."
            )

    def _open_logger(self) -> None:
        """Opens the logger of the first rank."""
        name = generate_exp_name(self.algorithm, f"{self.cfg.env.name}_seed{self.cfg.seed}".replace("/", "-"))
        kwargs: Any = OmegaConf.to_container(self.cfg.logger.kwargs, resolve=True)
        self._logger = RunLogger(self.cfg.logger.backend, kwargs, folder=self.folder, name=name, frames=self.frames)
        self._logger.log_settings(self._record)

    def _take_folder(self, stack: contextlib.ExitStack) -> tuple[Path | None, list[str], list[dict[str, str]]]:
        """Takes the run's folder: gives its last checkpoint, the settings that have changed since, and its metrics."""
        if self.cfg.resume or self._was_begun_by_this_job():
            return self._resume(stack)
        self._begin(stack)
        return None, [], []

    def _was_begun_by_this_job(self) -> bool:
        """Whether torchrun, or a scheduler with the job's own number, has started the same job again."""
        if not list((self.folder / "checkpoints").glob("checkpoint-*")):
            return False
        before = read_record(find_checkpoint(self.folder)).get("job")
        return before is not None and before == job_id()

    def _begin(self, stack: contextlib.ExitStack) -> None:
        """Takes the folder of a new run."""
        if list((self.folder / "checkpoints").glob("checkpoint-*")):
            raise SettingError(
                f"output_dir: {str(self.folder)!r} holds a run already, which would be lost. Legal: another folder, or "
                f"resume={self.folder} to continue that run."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock(stack)
        self._checkpoints.clean()

    def _resume(self, stack: contextlib.ExitStack) -> tuple[Path, list[str], list[dict[str, str]]]:
        """Takes the folder of a run that is continued."""
        latest = find_checkpoint(self.folder)
        record = read_record(latest)
        changed = check_continued(record["config"], self._record, self.folder)
        self._lock(stack)
        self._checkpoints.clean()
        summary, frames = self.folder / "summary.json", record["progress"]["frames"]
        finished = summary.exists() and json.loads(summary.read_text())["frames"] == frames
        if frames >= self.cfg.train.total_frames and finished:
            raise SettingError(
                f"resume: {str(self.folder)!r} has done {frames} frames already, and train.total_frames="
                f"{self.cfg.train.total_frames}. Nearest that continues: "
                f"train.total_frames={frames + self.cfg.train.frames_per_batch}."
            )
        rows = self._kept_rows(record["progress"]["iteration"])
        self._keep_reports(record["progress"]["iteration"])
        return latest, changed, rows

    def _keep_reports(self, done: int) -> None:
        """Leaves out what was warned of after the checkpoint: it will be again."""
        if (path := self.folder / REPORTS).exists():
            lines = path.read_text().splitlines(keepends=True)
            replace_file(path, "".join(line for line in lines if int(line.partition(":")[0]) <= done))

    def _continue(self, latest: Path, changed: list[str]) -> None:
        """Puts the state of a checkpoint back, but for the settings that have changed."""
        given = {name: value.clone() for name, value in self._losses.named_buffers() if _is_setting(name)}
        self._progress |= self._checkpoints.load(latest)
        self._saved_at = self._progress["iteration"]
        for name, value in self._losses.named_buffers():
            if name in given:
                value.copy_(given[name])
        if "critic.lr" in changed:
            for group in self._critic_optim.param_groups:
                group["lr"] = self.cfg.critic.lr
        for name in changed:
            section, _, setting = name.partition(".")
            if section == "updater":
                for updater in self._updaters:
                    setattr(updater, setting, self.cfg.updater[setting])

    def _lock(self, stack: contextlib.ExitStack) -> None:
        """Keeps other processes out of the folder until the run ends, however it ends."""
        try:
            stack.enter_context(FileLock(self.folder / ".lock", timeout=0))
        except Timeout as error:
            raise SettingError(
                f"the run in {str(self.folder)!r} is going on in another process. Legal: another folder, or to wait."
            ) from error

    def _kept_rows(self, done: int) -> list[dict[str, str]]:
        """The rows of the metrics up to the checkpoint: what was done after it will be done again."""
        metrics = self.folder / "metrics.csv"
        if not metrics.exists():
            logger.warning(f"{metrics} is gone: it begins anew with iteration {done + 1}.")
            return []
        rows = [row for row in read_rows(metrics) if int(row["iteration"]) <= done]
        numbers = [int(row["iteration"]) for row in rows]
        if numbers != list(range(done - len(rows) + 1, done + 1)):
            missing = sorted(set(range(1, done + 1)) - set(numbers))
            raise SettingError(
                f"resume: {metrics} should have one row for each iteration up to {done}, in order; missing are "
                f"{missing or 'none'}. Put the file back as it was, or move it away to begin it anew."
            )
        return rows

    def _save(self) -> None:
        """Writes a checkpoint, unless this iteration has one."""
        if self._saved_at != self._progress["iteration"]:
            check_same_bits([*self.policy.parameters(), *self._losses.parameters()], self._ranks)
            self._checkpoints.save(self._progress, self._record, self._returns[-1] if self._returns else math.nan)
            self._saved_at = self._progress["iteration"]

    def _say_how_to_continue(self, error: BaseException) -> None:
        # Of several ranks the first one says it, and the second one too if the first may be the one that is lost.
        if self._ranks.rank > isinstance(error, RankLostError):
            return
        iteration, name = self._progress["iteration"], type(error).__name__
        how = "Stopped" if isinstance(error, SystemExit) else f"Stopped by {name} in iteration {iteration + 1},"
        print(
            f"{how} after {self.frames} frames. The checkpoint of iteration {self._saved_at} is whole. To continue: "
            f"resume={self.folder}"
        )


def _is_setting(name: str) -> bool:
    return name.rpartition(".")[2] in _SETTINGS_IN_LOSSES


def _of_regions(stats: TensorDictBase) -> dict[str, Tensor]:
    """What the columns say of a policy update, and how many of its regions had a gradient that is not finite."""
    numbers = {name: stats[name].float().mean() for name in _MEANS if name in stats.keys()}
    if "factor_std" in stats.keys():
        numbers["factor_std"] = stats["factor_std"].float()[stats["order"][-1:]].squeeze(0)  # of the last: M at its end
    return {**numbers, "non_finite": (~stats["grad_norm"].isfinite()).float().sum()}


def replace_file(path: Path, text: str) -> None:
    """Writes a file that at any time is the old one or the new one.

    Args:
        path: the file.
        text: what it is to hold.
    """
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", newline="") as file:
        file.write(text)
    os.replace(beside, path)


def _cell(value: float) -> str | float:
    return "" if isinstance(value, float) and math.isnan(value) else value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
