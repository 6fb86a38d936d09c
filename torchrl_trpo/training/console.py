"""What a training run prints: its start, a progress bar, warnings, and how to continue it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from torchrl_trpo.config.overrides import typed
from torchrl_trpo.envs import resolve_device
from torchrl_trpo.parallel.ranks import RankLostError, Ranks


class Console:
    """What a run prints. The first rank prints.

    It begins with what is trained and where. A terminal has a progress bar; elsewhere there is a line per iteration.

    Args:
        cfg: the recipe's config.
        algorithm: the algorithm's name.
        folder: the run's folder.
        frames: the frames done so far.
        device: the environment's device; None for the CPU.
        ranks: the processes of the run.
    """

    def __init__(
        self, cfg: DictConfig, algorithm: str, folder: Path, frames: int, device: torch.device | None, ranks: Ranks
    ) -> None:
        self._folder = folder
        self._ranks = ranks
        self._bar = tqdm(
            total=cfg.train.total_frames,
            initial=frames,
            unit="frame",
            desc=algorithm,
            smoothing=0.1,
            disable=None if ranks.is_first else True,  # None: where standard error is no terminal
        )
        processes = f" in {ranks.size} processes" if ranks.size > 1 else ""
        self.print(f"Training {algorithm} on {cfg.env.name}{processes}; everything goes to {folder}")
        asked, device = resolve_device(cfg.device), device or torch.device("cpu")
        if device.type != asked.type:
            self.print(
                f"device={asked}, but the environment is on {device}, and so is the training. A factory with an "
                "argument device can make it there."
            )

    def update(self, row: Mapping[str, Any], n_regions: int) -> None:
        """Moves the progress bar, or prints the iteration's line."""
        postfix = {
            "return": f"{row['episode_return']:.2f}",
            "kl": f"{row['kl']:.4f}",
            "accepted": f"{row['accepted']:.2f}",
        }
        if row["non_finite"]:
            postfix["non_finite"] = f"{row['non_finite']:.0f}/{n_regions}"
        if row["dropped"]:
            postfix["dropped"] = f"{row['dropped']} rows"
        if self._bar.disable:
            numbers = ", ".join(f"{name} {value}" for name, value in postfix.items())
            self.print(f"Iteration {row['iteration']}, {row['frames']} of {self._bar.total} frames: {numbers}")
            return
        self._bar.update(row["frames"] - self._bar.n)
        self._bar.set_postfix(postfix)

    def print(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self._ranks.is_first:
            tqdm.write(text)
            sys.stdout.flush()  # whoever follows a file sees it now

    def print_how_to_continue(self, error: BaseException, iteration: int, frames: int, saved_at: int | None) -> None:
        """Prints how to continue a run that an error or a signal has ended.

        The first rank prints it, and if that may be the lost one, the second rank prints it too.
        """
        if self._ranks.rank > isinstance(error, RankLostError):
            return
        stopped = f"Stopped by {type(error).__name__} in iteration {iteration + 1},"
        print(
            f"{'Stopped' if isinstance(error, SystemExit) else stopped} after {frames} frames. The checkpoint of "
            f"iteration {saved_at} is whole. To continue: {typed('resume', self._folder)}"
        )

    def close(self) -> None:
        """Closes the progress bar."""
        self._bar.close()
