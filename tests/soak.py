"""A long training that is killed, interrupted and fed with faults, against the same one left in peace.

    python -m tests.soak --iterations 6000 --kills 40

Both run at once, in a process each. The disturbed one is resumed after each disturbance, and must end as the quiet one
does: the same metrics to the last digit, the same checkpoint to the last bit. Of the quiet one, memory and open files
are watched.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.training.test_resume import components, differences, heed_sigint, metrics
from torchrl_trpo.envs import BatchedResetVmasEnv

ROWS = 800
FAULTS = ("nan", "error")
SAYS = {
    "nan": r"AssertionError|EnvironmentFault: environment 5 .*\('agents', 'observation'\) is not finite",
    "error": r"RuntimeError: the simulator broke down",
}


class FaultyEnv(BatchedResetVmasEnv):
    """The scenario "balance", with the fault that a file names, once; then the file is removed."""

    def __init__(self, order: str, **kwargs) -> None:
        super().__init__("balance", max_steps=None, scenario_kwargs={"n_agents": 2}, **kwargs)
        self.order = Path(order)

    def _step(self, tensordict):
        data = super()._step(tensordict)
        if self.order.exists():
            fault = self.order.read_text()
            self.order.unlink()
            if fault == "error":
                raise RuntimeError("the simulator broke down")
            if fault == "nan":
                data["agents", "observation"][5, 1, 3] = torch.nan
        return data


def make_env(order, num_envs, device, seed):
    return FaultyEnv(order, num_envs=num_envs, device=device, seed=seed, continuous_actions=True)


@dataclass
class Training:
    """A training in a process of its own, and what was seen of it."""

    folder: Path
    iterations: int
    output: str = ""
    starts: int = 0
    process: subprocess.Popen | None = None
    inode_at_start: int | None = None  # of the metrics
    watched: list[tuple[int, int]] = field(default_factory=list)  # resident KiB and open files

    def start(self) -> None:
        command = [sys.executable, "-m", "torchrl_trpo.recipes.hatrpo"]
        if (self.folder / "config.yaml").exists() and list((self.folder / "checkpoints").glob("checkpoint-*")):
            command += [f"resume={self.folder}"]
        else:  # it was killed before there was anything to continue
            command += ["env=custom", "env.factory=tests.soak.make_env", f"env.kwargs.order={self.folder}.order"]
            command += ["env.num_envs=16", "env.max_steps=50", f"train.frames_per_batch={ROWS}", "film=false"]
            command += ["critic.minibatch_size=200", "critic.value_norm=true", "normalize_observations=true"]
            command += [f"train.total_frames={ROWS * self.iterations}", "checkpoint.every=3"]
            command += [f"output_dir={self.folder}"]
        self.inode_at_start = self._inode()
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=heed_sigint)
        self.starts += 1

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def done(self) -> int:
        """The iterations in the metrics."""
        path = self.folder / "metrics.csv"
        return max(0, len(path.read_bytes().splitlines()) - 1) if path.exists() else 0

    def wait_until(self, iteration: int, other: Training) -> bool:
        """Waits until it has done an iteration, and says whether it still runs."""
        while self.process.poll() is None and self.done < iteration:
            other.look_after()
            time.sleep(0.1)
        return self.process.poll() is None

    def look_after(self) -> None:
        """Notes memory and open files, while it trains."""
        if self.process.poll() is None and time.monotonic() % 0.5 < 0.15 and 0 < self.done < self.iterations:
            proc = Path(f"/proc/{self.process.pid}")
            if resident := re.search(r"VmRSS:\s+(\d+)", (proc / "status").read_text()):
                self.watched.append((int(resident[1]), len(list((proc / "fd").iterdir()))))

    def wait_for_a_row(self, other: Training) -> None:
        """Waits until it has written the metrics anew and logged an iteration: from then on it heeds signals."""
        while self.process.poll() is None and self._inode() in {None, self.inode_at_start}:
            other.look_after()
            time.sleep(0.1)
        self.wait_until(self.done + 1, other)

    def _inode(self) -> int | None:
        path = self.folder / "metrics.csv"
        return path.stat().st_ino if path.exists() else None

    def ended(self, other: Training, seconds: float = 120) -> int:
        """Waits for the end, and gives the exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            other.look_after()
            time.sleep(0.1)
        if self.process.poll() is None:
            self.process.kill()
            raise AssertionError(f"{self.folder} did not end in {seconds} s; see {self.log}")
        return self.process.wait()


@dataclass
class Outcome:
    """What the soak showed."""

    disturbances: Counter
    starts: int
    differences: list[str]
    memory_growth: float
    file_growth: int
    seconds: float

    def __str__(self) -> str:
        survived = ", ".join(f"{count} {name}" for name, count in sorted(self.disturbances.items()))
        return (
            f"survived: {survived} ({self.starts} starts, {self.seconds / 60:.1f} min)\n"
            f"differences from the quiet run in metrics and last checkpoint: {self.differences or 'none'}\n"
            f"growth of the quiet run: {self.memory_growth:+.1%} of its memory, {self.file_growth:+d} open files"
        )


def soak(folder: Path, *, iterations: int, kills: int, signals: int, faults: int, early: int, seed: int = 0) -> Outcome:
    """Runs both trainings.

    Args:
        folder: where everything goes.
        iterations: the length of the training.
        kills: SIGKILLs at random moments of the training.
        signals: SIGTERMs and SIGINTs, in turn.
        faults: faults of the environment, in turn.
        early: SIGKILLs while the process starts.
        seed: of the moments.

    Returns:
        What it showed.
    """
    began = time.monotonic()
    draw = random.Random(seed)
    plan = ["SIGKILL"] * kills + ["SIGKILL early"] * early
    plan += [["SIGTERM", "SIGINT"][index % 2] for index in range(signals)]
    plan += [FAULTS[index % len(FAULTS)] for index in range(faults)]
    draw.shuffle(plan)
    moments = sorted(draw.uniform(0, 0.97 * iterations) for _ in plan)
    quiet, disturbed = Training(folder / "quiet", iterations), Training(folder / "disturbed", iterations)
    survived: Counter = Counter()
    quiet.start()
    disturbed.start()
    for what, moment in zip(plan, moments, strict=True):
        assert disturbed.wait_until(int(moment), quiet), f"it ended by itself; see {disturbed.log}"
        time.sleep(draw.uniform(0, 0.5))
        said = disturbed.log.stat().st_size
        if what == "SIGKILL early":
            disturbed.process.kill()
            disturbed.ended(quiet)
            disturbed.start()
            time.sleep(draw.uniform(0, 6))
        if what.startswith("SIGKILL"):
            disturbed.process.kill()
            assert disturbed.ended(quiet) == -signal.SIGKILL
        elif what.startswith("SIG"):
            disturbed.wait_for_a_row(quiet)
            disturbed.process.send_signal(signal.Signals[what])
            assert disturbed.ended(quiet) == 128 + signal.Signals[what]
        else:
            Path(f"{disturbed.folder}.order").write_text(what)
            assert disturbed.ended(quiet) == 1
            tail = disturbed.log.read_bytes()[said:].decode()
            assert re.search(SAYS[what], tail), tail[-3000:]
            assert "To continue: resume=" in tail
        survived[what] += 1
        print(f"[{time.monotonic() - began:6.0f} s] {what} at iteration {disturbed.done} of {iterations}", flush=True)
        disturbed.start()
    for training, other in ((disturbed, quiet), (quiet, disturbed)):
        assert training.ended(other, seconds=7200) == 0, f"see {training.log}"
    differing = differences(components(quiet.folder), components(disturbed.folder))
    differing += differences(metrics(quiet.folder), metrics(disturbed.folder), "metrics")
    memory, files = zip(*quiet.watched, strict=True)
    tenth = len(memory) // 10 + 1
    early, late = slice(tenth, 2 * tenth + 1), slice(-tenth, None)
    return Outcome(
        survived,
        disturbed.starts,
        differing,
        statistics.median(memory[late]) / statistics.median(memory[early]) - 1,
        statistics.median_low(files[late]) - statistics.median_low(files[early]),
        time.monotonic() - began,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=6000)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=None)
    chosen = parser.parse_args()
    place = chosen.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"Everything goes to {place}")
    place.mkdir(parents=True, exist_ok=True)
    outcome = soak(place, iterations=chosen.iterations, kills=chosen.kills, signals=6, faults=9, early=6)
    print(outcome)
    sys.exit(bool(outcome.differences or outcome.memory_growth > 0.05 or outcome.file_growth > 0))
