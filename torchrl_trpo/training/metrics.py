"""The metrics of a training run: the columns, the times, and the rows of ``metrics.csv``."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.modules import ProbabilisticActor

from torchrl_trpo.distributions.divergence import entropy
from torchrl_trpo.keys import GroupKeys
from torchrl_trpo.numerics.statistics import read
from torchrl_trpo.parallel.ranks import ALONE, Ranks
from torchrl_trpo.reporting.record import cell, write_rows
from torchrl_trpo.training.episodes import episode_statistics

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

_ROWS_FOR_ENTROPY = 2000
"""The entropy of a squashed normal is an integral, which takes a tenth of an iteration on all rows of a large batch."""
_MEANS_OVER_REGIONS = (
    "kl",
    "accepted",
    "improvement",
    "expected_improvement",
    "step_fraction",
    "cg_residual",
    "grad_norm",
    "clip_fraction",
)


class Metrics:
    """Measures the iterations of a run and writes ``metrics.csv``.

    All ranks compute a row together, and the first rank writes it.

    Args:
        path: the file; it is written anew, with ``rows``.
        rows: the rows of earlier iterations, by column; missing cells are left empty.

    Keyword Args:
        groups: the groups of agents.
        policy: the policy of all groups.
        device: the device whose work the times include; None for the CPU.
        ranks: the processes of the run. Default: this one alone.

    Attributes:
        columns: the columns of the file.
    """

    def __init__(
        self,
        path: Path,
        rows: Sequence[Mapping[str, Any]],
        *,
        groups: Sequence[GroupKeys],
        policy: TensorDictModuleBase,
        device: torch.device | None,
        ranks: Ranks = ALONE,
    ) -> None:
        returns_of_groups = [f"episode_return_{keys.group}" for keys in groups] if len(groups) > 1 else []
        self.columns = (*COLUMNS, *returns_of_groups)
        self._groups = groups
        self._actors = [module for module in policy.modules() if isinstance(module, ProbabilisticActor)]
        self._device = device
        self._ranks = ranks
        self._file = None
        if ranks.is_first:
            write_rows(path, self.columns, rows)
            self._file = path.open("a", newline="", encoding="utf-8")
        self._laps: dict[str, float] = {}
        self._last_lap = self._wall_start = self._cpu_start = self._cpu_before = 0.0

    def start_clocks(self, wall_s: float, cpu_s: float) -> None:
        """Starts to measure time.

        Args:
            wall_s: the seconds that the run has taken so far.
            cpu_s: the processor seconds that it has taken so far.
        """
        self._last_lap = time.perf_counter()
        self._wall_start = self._last_lap - wall_s
        self._cpu_start, self._cpu_before = time.process_time(), cpu_s

    def lap(self, name: str) -> None:
        """Adds the time since the last lap to a column.

        Args:
            name: the column.
        """
        if self._device is not None and self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last_lap
        self._last_lap = now

    def start_laps(self) -> None:
        """Begins the laps of the next iteration."""
        self._laps = {}
        self._last_lap = time.perf_counter()

    def times(self) -> dict[str, float]:
        """The seconds of the run so far, ``wall_s``, and processor seconds of its ranks (no workers), ``cpu_s``."""
        wall_s = time.perf_counter() - self._wall_start
        cpu_s = time.process_time() - self._cpu_start
        if self._ranks.size > 1:
            cpu_s = float(self._ranks.sum_(torch.tensor(cpu_s, dtype=torch.float64, device=self._device)))
        return {"wall_s": wall_s, "cpu_s": self._cpu_before + cpu_s}

    def row(
        self, data: TensorDictBase, stats: TensorDictBase, critic: Mapping[str, float], progress: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Computes the row of an iteration.

        Args:
            data: the batch.
            stats: what the updater returned.
            critic: what the critic's fit returned.
            progress: the iteration, the frames and the times.

        Returns:
            A number for each column, NaN where this kind of update has none. Besides, ``non_finite`` is the number of
            regions whose gradient is not finite, and ``dropped`` the number of rows that the critic's fit left out.
        """
        return {
            **progress,
            **episode_statistics(data, self._groups, self._ranks),
            **dict.fromkeys((*_MEANS_OVER_REGIONS, "factor_std"), math.nan),
            **read({**_statistics_of_update(stats), "entropy": self._entropy(data)}),
            **critic,
            **self._laps,
        }

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row to the file, on the first rank.

        Args:
            row: from :meth:`row`.
        """
        if self._file is not None:
            csv.DictWriter(self._file, self.columns).writerow({name: cell(row[name]) for name in self.columns})
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _entropy(self, data: TensorDictBase) -> Tensor:
        """The policy's mean entropy at collection, in nats, over rows and agents that the masks count.

        Those of the first environments, whole: agents may take turns.
        """
        data = data[: math.ceil(_ROWS_FOR_ENTROPY * len(data) / data.numel())]
        total = count = torch.zeros((), device=self._device)
        for keys, actor in zip(self._groups, self._actors, strict=True):
            values = entropy(actor.build_dist_from_params(data))
            counts = keys.counts(data, values)
            total, count = total + torch.where(counts, values, 0.0).sum(), count + counts.sum()
        total, count = self._ranks.sum_(torch.stack([total, count]))
        return total / count


def _statistics_of_update(stats: TensorDictBase) -> dict[str, Tensor]:
    """The columns that an updater's statistics give, and the number of regions with a non-finite gradient."""
    numbers = {name: stats[name].float().mean() for name in _MEANS_OVER_REGIONS if name in stats.keys()}
    if "factor_std" in stats.keys():
        last_agent = stats["order"][-1:]  # whose factor is the product over all agents before it
        numbers["factor_std"] = stats["factor_std"].float()[last_agent].squeeze(0)
    return {**numbers, "non_finite": (~stats["grad_norm"].isfinite()).float().sum()}
