"""A training run: what surrounds the learning loop of a recipe, from the run's folder to its summary."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.record.loggers import generate_exp_name

from torchrl_trpo.config.schema import Recipe
from torchrl_trpo.config.validation import check_settings, in_terms_of_settings
from torchrl_trpo.envs import resolve_device
from torchrl_trpo.envs.checks import EnvironmentFault, find_non_finite
from torchrl_trpo.envs.normalization import observation_norm
from torchrl_trpo.errors import SettingError
from torchrl_trpo.keys import group_keys
from torchrl_trpo.parallel.ranks import ALONE, Ranks, agreed, check_same_bits
from torchrl_trpo.parallel.torchrun import is_job, job_name, job_ranks
from torchrl_trpo.reporting.diagnosis import RejectionWatch
from torchrl_trpo.reporting.loggers import RunLogger
from torchrl_trpo.reporting.plots import Pictures
from torchrl_trpo.seeding import rank_seed, untouched_generators
from torchrl_trpo.training.checkpoints import Checkpoints
from torchrl_trpo.training.console import Console
from torchrl_trpo.training.continuation import full_record
from torchrl_trpo.training.metrics import Metrics
from torchrl_trpo.training.policy import settle_compilation
from torchrl_trpo.training.run_folder import RunFolder
from torchrl_trpo.training.signals import StopSignals
from torchrl_trpo.training.summary import summarize

_LOSS_SETTINGS = ("entropy_coeff", "clip_epsilon", "gamma", "lmbda")

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
            cfg = settle_compilation(cfg)
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
            except SettingError as error:
                raise type(error)(in_terms_of_settings(str(error))) from error
            finally:
                _ONE_AT_A_TIME.release()

        return run

    return decorate


class Run:
    """A training run: its batches, metrics, checkpoints and summary. The recipe does the learning.

    A run is a context manager around the training loop. Inside, the first SIGINT or SIGTERM ends the run after the
    current iteration and a checkpoint. A run that ends early prints how to continue it.

    The first rank prints and writes. The other ranks take part in the collective calls: :meth:`log`, which counts the
    frames and episodes of all ranks, and checkpoints. If torchrun restarts a job that has lost a process, the job goes
    on from the checkpoint in its output folder.

    Args:
        cfg: the recipe's config; ``cfg.resume`` names a run folder to continue.
        algorithm: the algorithm's name, for titles.

    Keyword Args:
        collector: the collector, without an end of its own (``total_frames=-1``).
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
        self._collector = collector
        self._losses = losses
        self._updaters = updaters
        self._critic_optim = critic_optim
        self._ranks = ranks
        self._record = full_record(cfg, algorithm)
        self._progress: dict[str, Any] = {"iteration": 0, "frames": 0, "wall_s": 0.0, "cpu_s": 0.0, "best_return": None}
        self._saved_at: int | None = None  # the iteration of the last checkpoint
        self._rejections = RejectionWatch(
            self.groups, max_kl=cfg.updater.get("max_kl"), damping=cfg.updater.get("damping"), ranks=ranks
        )
        components = {"policy": policy, "losses": losses, "critic_optim": critic_optim, "rejections": self._rejections}
        components |= {f"updater_{index}": updater for index, updater in enumerate(updaters)}
        self._checkpoints = Checkpoints(self.folder, collector, components, cfg.checkpoint.keep, ranks)
        self._files = RunFolder(self.folder)
        self._pictures = Pictures(self.folder)
        self._logger = RunLogger(None, {}, folder=self.folder, name="")
        self._signals = StopSignals()

    def __enter__(self) -> Run:
        """Begins the run, or continues it."""
        with contextlib.ExitStack() as stack:  # closes everything if the run cannot begin
            stack.callback(self._files.release)
            start = agreed(lambda: self._files.take(self._record), self._ranks)
            if start.checkpoint is not None:
                self._restore(start.checkpoint, start.changed)
            self._merge_observation_statistics()
            if self._ranks.is_first:
                self._files.write_config(self._record)
            self._metrics = Metrics(
                self.folder / "metrics.csv",
                start.rows,
                groups=self.groups,
                policy=self.policy,
                device=self.env.device,
                ranks=self._ranks,
            )
            stack.enter_context(contextlib.closing(self._metrics))
            agreed(self._open_logger, self._ranks)
            self._save(math.nan)
            self._signals.install()
            stack.callback(self._signals.restore)
            self._console = Console(self.cfg, self.algorithm, self.folder, self.frames, self.env.device, self._ranks)
            stack.enter_context(contextlib.closing(self._console))
            self._metrics.start_clocks(self._progress["wall_s"], self._progress["cpu_s"])
            self._stack = stack.pop_all()  # from here on, __exit__ closes it
        self._write_state("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the run, and prints how to continue it if an error or a signal ended it."""
        try:
            with self._stack:
                self._logger.close(failed=error is not None)
        finally:  # closing the metrics fails on a full disk
            self.env.close(raise_if_closed=False)
            if error is None:
                self._write_state("finished")
            else:
                stopped = isinstance(error, SystemExit | KeyboardInterrupt)
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self._write_state("stopped" if stopped else "failed", reason)
                iteration = self._progress["iteration"]
                self._console.print_how_to_continue(error, iteration, self.frames, self._saved_at)

    def batches(self) -> Iterator[TensorDictBase]:
        """The batches that remain to be collected, ``[num_envs, T]``.

        Yields:
            A batch; :meth:`log` must be called before the next one.

        Raises:
            EnvironmentFault: if anything in a batch is not finite and ``cfg.non_finite`` is ``stop``.
            RuntimeError: if :meth:`log` was not called after a batch, which would then be trained on without end.
        """
        batches = iter(self._collector)
        while self.frames < self.cfg.train.total_frames:
            iteration = self._progress["iteration"]
            data = next(batches)
            self._merge_observation_statistics()
            found = find_non_finite(data, self.groups) if self.cfg.non_finite == "stop" else None
            if found is not None:
                index, step, key, count = found
                raise EnvironmentFault(
                    f"environment {index} of {self.env.batch_size[0]}, step {step} of the batch of iteration "
                    f"{iteration + 1}: {key!r} is not finite, one of {count} such numbers in the batch. Mend the "
                    "environment, or set non_finite=drop to leave such rows out.",
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
        self._metrics.lap(name)

    def log(self, data: TensorDictBase, stats: TensorDictBase, critic: dict[str, float]) -> None:
        """Ends an iteration: a row of metrics, the progress bar, a checkpoint and the pictures when due.

        Args:
            data: the iteration's batch.
            stats: what the updater returned.
            critic: what the critic's fit returned.

        Raises:
            SystemExit: after a checkpoint, if a signal asked to stop; with the code 128 + the signal, as shells do.
        """
        self._progress["iteration"] += 1
        self._progress["frames"] += data.numel() * self._ranks.size
        self._progress |= self._metrics.times()
        row = self._metrics.row(data, stats, critic, self._progress)
        self._metrics.write(row)
        self._logger.log({name: row[name] for name in self._metrics.columns if name != "frames"}, self.frames)
        episode_return, best = row["episode_return"], self._progress["best_return"]
        if math.isfinite(episode_return) and (best is None or episode_return > best):
            self._progress["best_return"] = episode_return
        self._console.update(row, stats.numel())
        for report in self._rejections.update(data, stats):
            self._warn(report)
        is_last = self.frames >= self.cfg.train.total_frames
        signal = self._stop_signal()
        if is_last or signal or self._progress["iteration"] % self.cfg.checkpoint.every == 0:
            self._save(episode_return)
            if self._ranks.is_first and not is_last:  # finish() draws the last ones
                self._pictures.draw_now_and_then()
        if signal and not is_last:
            raise SystemExit(128 + signal)
        self._metrics.start_laps()

    def finish(self) -> dict[str, Any]:
        """Draws the pictures, evaluates and films the policy, writes ``summary.json`` and prints where everything is.

        Returns:
            What ``summary.json`` holds; nothing in ranks other than the first, which have nothing left to do.
        """
        self._metrics.close()
        self._console.close()
        self._signals.restore()
        if not self._ranks.is_first:
            return {}
        self._pictures.draw()
        return summarize(
            self.folder,
            self._record,
            self._progress,
            env=self.env,
            policy=self.policy,
            logger=self._logger,
        )

    def _restore(self, checkpoint: Path, changed: Sequence[str]) -> None:
        """Restores a checkpoint; settings that have changed since keep their new values."""
        settings = {
            name: value.clone()
            for name, value in self._losses.named_buffers()
            if name.rpartition(".")[2] in _LOSS_SETTINGS
        }
        self._progress |= self._checkpoints.load(checkpoint)
        self._saved_at = self._progress["iteration"]
        for name, value in self._losses.named_buffers():
            if name in settings:
                value.copy_(settings[name])
        if "critic.lr" in changed:
            for group in self._critic_optim.param_groups:
                group["lr"] = self.cfg.critic.lr
        for name in changed:
            section, _, setting = name.partition(".")
            if section == "updater":
                for updater in self._updaters:
                    setattr(updater, setting, self.cfg.updater[setting])

    def _save(self, episode_return: float) -> None:
        """Writes a checkpoint, unless this iteration has one; ``episode_return`` is the iteration's."""
        if self._saved_at != self._progress["iteration"]:
            check_same_bits([*self.policy.parameters(), *self._losses.parameters()], self._ranks)
            self._checkpoints.save(self._progress, self._record, episode_return)
            self._saved_at = self._progress["iteration"]

    def _merge_observation_statistics(self) -> None:
        """Merges the statistics of the observations across ranks."""
        if (norm := observation_norm(self.env)) is not None:
            norm.merge(self._ranks)

    def _stop_signal(self) -> int:
        """The signal that asked any of the ranks to stop, or 0."""
        received = int(self._signals.received or 0)
        if self._ranks.size == 1:
            return received
        return int(self._ranks.max_(torch.tensor(received, device=self.env.device)))

    def _open_logger(self) -> None:
        name = generate_exp_name(self.algorithm, f"{self.cfg.env.name}_seed{self.cfg.seed}".replace("/", "-"))
        kwargs: Any = OmegaConf.to_container(self.cfg.logger.kwargs, resolve=True)
        self._logger = RunLogger(self.cfg.logger.backend, kwargs, folder=self.folder, name=name, frames=self.frames)
        self._logger.log_settings(self._record)

    def _warn(self, text: str) -> None:
        """Prints a warning and writes it to ``warnings.txt``."""
        self._console.print(text)
        if self._ranks.is_first:
            self._files.add_warning(self._progress["iteration"], text)

    def _write_state(self, state: str, reason: str = "") -> None:
        if self._ranks.is_first:
            with contextlib.suppress(OSError):  # a full disk
                self._files.write_state(state, reason)
