"""Checks the project on a GPU within some ten minutes and prints a table, a line for each check: ``make gpu-check``.

    python -m tests.gpu_check --out outputs/gpu_check

The folder gets the table (``gpu_check.txt``), whole errors (``errors.txt``), what waits for the GPU by line
(``waits.txt``) and what pytest said (``pytest.txt``). ``--device cpu --small`` rehearses it without a GPU. Where pip
has no network and the project is not installed, ``tests/gpu_check.sh`` runs it from wheels.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import io
import itertools
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import torch
from torchrl.collectors import Collector
from torchrl.envs import VmasEnv
from vmas.scenarios.mpe.simple_spread import Scenario

from tests.benchmarks.problems import policy_and_data
from tests.recipes.test_recipes import RECIPES, config, metrics
from torchrl_trpo import TrustRegionUpdater, load_policy
from torchrl_trpo.envs import BatchedResetVmasEnv, CompiledVmasEnv, make_env, resolve_device
from torchrl_trpo.errors import SettingError
from torchrl_trpo.evaluate import evaluate_run
from torchrl_trpo.keys import group_keys
from torchrl_trpo.objectives import HATRPOSequentialObjective
from torchrl_trpo.reporting import plots
from torchrl_trpo.training.collector import make_collector
from torchrl_trpo.training.policy import make_policy

ROOT = Path(__file__).parents[1]
SIZES = ("film=false", "env.num_envs=60", "env.max_steps=10", "train.frames_per_batch=600", "checkpoint.every=1")
SMALL_SIZES = (*SIZES, "env.num_envs=4", "env.max_steps=5", "train.frames_per_batch=40", "actor.hidden=[8]")
SERIAL = ("env.num_envs=4", "env.max_steps=20", "train.frames_per_batch=160")
NORMALISED = ("env=vmas/navigation", "actor.network=gru", "normalize_observations=true", "critic.value_norm=true")
ENVS = CompiledVmasEnv, BatchedResetVmasEnv
SUITE = (
    *(f"tests/numerics/test_{name}.py" for name in ("line_search", "conjugate_gradient", "fisher", "updater")),
    *(f"tests/objectives/test_{name}.py" for name in ("hatrpo", "clipped", "trpo", "agent_gae", "central_critic")),
    "tests/objectives/test_value_estimator_conformance.py",
)


class Table:
    """The lines, which are printed and kept in a file as they come.

    Args:
        out: the folder.
        seconds: after which no check is begun.
    """

    def __init__(self, out, seconds):
        self.out, self.seconds = out, seconds
        self.start = time.perf_counter()
        self.lines = []
        self.failed = 0

    def say(self, line):
        self.lines.append(line)
        print(line, flush=True)
        (self.out / "gpu_check.txt").write_text("\n".join(self.lines) + "\n")

    def check(self, title, function):
        """A line with what a function tells, or with the error that it ends in."""
        before = time.perf_counter()
        if before - self.start > self.seconds:
            self.say(f"SKIP {title:60s} no time left")
            return
        state, said = "ok", io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                told = function()
        except Exception as error:
            state, told = "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.failed += 1
            with (self.out / "errors.txt").open("a") as file:
                file.write(f"### {title}\n{traceback.format_exc()}\n")
        self.say(f"{state:4s} {title:60s} {time.perf_counter() - before:6.1f} s  {told}")


class Runs:
    """Short trainings, each in a folder of its own.

    Args:
        device: where they train.
        work: where the folders are.
        sizes: what all of them are like.
    """

    def __init__(self, device, work, sizes):
        self.device, self.sizes = device, sizes
        self.folders = (work / str(index) for index in itertools.count())

    def train(self, name, *overrides, device=None, iterations=2):
        """Trains anew; gives the folder and the metrics without times."""
        folder = next(self.folders)
        return folder, self.go_on(name, folder, *overrides, device=device, iterations=iterations)

    def go_on(self, name, folder, *overrides, device=None, iterations=2):
        settings = {setting.partition("=")[0]: setting for setting in (*self.sizes, *overrides)}
        frames = iterations * int(settings["train.frames_per_batch"].partition("=")[2])
        placed = f"device={device or self.device}"
        RECIPES[name].train(config(name, folder, *settings.values(), placed, f"train.total_frames={frames}"))
        return [{key: cell for key, cell in row.items() if not key.endswith("_s")} for row in metrics(folder)]

    def recipe(self, name, *overrides):
        _, rows = self.train(name, *overrides)
        return f"kl {rows[-1]['kl']}, accepted {rows[-1]['accepted']}"

    def twice(self, name, *overrides):
        return same(*(self.train(name, *overrides)[1] for _ in range(2)))

    def resumed(self, name, *overrides, first=None, second=None):
        """Whether a run that is continued is the uninterrupted one; from device to device, whether it goes on."""
        folder, _ = self.train(name, *overrides, device=first)
        rows = self.go_on(name, folder, *overrides, f"resume={folder}", device=second, iterations=4)
        if first == second:
            return same(rows, self.train(name, *overrides, iterations=4)[1])
        return f"{len(rows)} iterations"

    def played(self, *overrides):
        folder, _ = self.train("itrpo", *overrides)
        devices = dict.fromkeys(["cpu", self.device])
        for device in devices:
            load_policy(folder, device=device)
        returns = {device: evaluate_run(folder, episodes=60, device=device)["episode_return"] for device in devices}
        return f"returns {returns}"

    def waits(self, out):
        """What PyTorch itself says waits for the GPU in a run of one iteration."""
        if not self.device.startswith("cuda"):
            return "not told by PyTorch on this device"
        seen = collections.Counter()

        def count(message, category, filename, line, *_):
            if "synchroniz" in str(message):
                seen[f"{'/'.join(Path(filename).parts[-2:])}:{line}"] += 1

        with warnings.catch_warnings(), mock.patch.object(warnings, "showwarning", count):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.train("hatrpo", iterations=1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        (out / "waits.txt").write_text("".join(f"{n:6d} {where}\n" for where, n in seen.most_common()))
        return f"{seen.total()} in 10 steps, an update, checkpoints and an evaluation; by line in waits.txt"


def same(rows, others):
    for row, other in zip(rows, others, strict=True):
        for key, cell in row.items():
            assert cell == other[key], f"different in iteration {row['iteration']}: {key} {cell} and {other[key]}"
    return "the same to the last digit"


def undisturbed(device):
    """Whether a second environment, made in between with the same seed, changes what the first one draws."""

    def draw(*, disturb):
        settings = {"num_envs": 8, "max_steps": 10, "kwargs": {}, "seed": 0, "device": torch.device(device)}
        torch.manual_seed(1)
        env = make_env("vmas/navigation", **settings)
        env.reset()
        if disturb:
            make_env("vmas/navigation", **settings).reset()
        return env.reset()["agents", "observation"], torch.rand(4, device=device)

    for what, one, other in zip(("resets", "generator"), draw(disturb=False), draw(disturb=True), strict=True):
        assert torch.equal(one, other), f"the first one's {what} are others"
    return "undisturbed"


class Noisy(Scenario):
    """Rewards with random numbers, and with a branch. A compiled step that is not taken must put the generator back."""

    def reward(self, agent):
        reward = super().reward(agent) + torch.rand(self.world.batch_dim, device=self.world.device)
        if (agent.state.pos[:, 0] > 1.05).any():
            reward = 2 * reward
        return reward


def compiled(device, scenario, steps=20):
    """Whether a compiled environment gives what VMAS gives there, with the same random numbers."""
    settings = {"num_envs": 60, "device": torch.device(device), "seed": 0, "max_steps": 1000}
    start = time.perf_counter()
    envs = [make(scenario(), **settings) if callable(scenario) else make(scenario, **settings) for make in ENVS]
    seconds = time.perf_counter() - start
    assert envs[0].why_not_compiled is None, envs[0].why_not_compiled
    largest = 0.0
    for _ in range(2):
        data = [env.reset() for env in envs][1]
        for _ in range(steps):
            data = envs[1].rand_action(data)
            ours, theirs = (env.step(data.clone())["next"] for env in envs)
            for key in theirs.keys(True, True):
                scale = max(1.0, theirs[key].double().abs().max().item())
                largest = max(largest, (ours[key].double() - theirs[key].double()).abs().max().item() / scale)
            data = theirs.exclude("reward")
    assert largest < 1e-3, f"largest difference {largest:.1e}"
    return f"largest difference {largest:.1e}, made in {seconds:.0f} s, VMAS's steps in a row {envs[0].n_left_to_vmas}"


def sampling(device, num_envs, steps, kind, task="balance", limit=100):
    """Frames per second of the recipes' collector, of TorchRL's environment, or of a step alone, VMAS's or compiled."""
    placed = {"num_envs": num_envs, "device": torch.device(device), "seed": 0}
    env = make_env(f"vmas/{task}", max_steps=limit, kwargs={}, compiled=kind == "compiled", **placed)
    if kind == "compiled":
        base = env.base_env
        actions = base._actions(base.rand_action(base.reset()))
        task = functools.partial(repeat, steps, lambda: base._take_step(actions))
    elif kind == "simulator":
        simulator = env.base_env._env
        actions = [simulator.get_random_action(agent) for agent in simulator.agents]
        task = functools.partial(repeat, steps, lambda: simulator.step(actions))
    else:
        policy = make_policy(env, group_keys(env))
        if kind == "recipes":
            collector = make_collector(env, policy, frames_per_batch=num_envs * steps)
        else:
            env = VmasEnv(task, max_steps=limit, **placed)
            collector = Collector(env, policy, frames_per_batch=num_envs * steps, total_frames=-1)
        task = functools.partial(next, iter(collector))
    seconds = timed(task, device)
    return f"{num_envs * steps / seconds:12,.0f} frames/s, {1e3 * seconds / steps:7.2f} ms a step{memory(device)}"


def repeat(times, function):
    for _ in range(times):
        function()


def update(device, rows, sequential, subsample, chunk_size=None):
    """An update of four agents on a batch."""
    with torch.device(device):
        loss, data = policy_and_data(share_params=not sequential, rows=rows, chunk_size=chunk_size)
    updater = TrustRegionUpdater(HATRPOSequentialObjective(loss) if sequential else loss, fisher_subsample=subsample)
    seconds = timed(lambda: updater.step(data), device)
    return f"{seconds:.3f} s{memory(device)}"


def timed(task, device):
    """The seconds that a task takes the second time."""
    task()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    wait(device)
    start = time.perf_counter()
    task()
    wait(device)
    return time.perf_counter() - start


def wait(device):
    if device != "cpu":
        torch.accelerator.synchronize()


def memory(device):
    return f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.startswith("cuda") else ""


def suite(device, files, out, seconds):
    """The tests of some files on the device."""
    workers = ["-n", "6"] if len(files) > 1 and device.startswith("cuda") else []
    command = [sys.executable, "-m", "pytest", "-p", "tests.on_device", "-q", "--tb=short", "-W", "ignore", *workers]
    with (out / "pytest.txt").open("w") as file:
        process = subprocess.run(  # what puts tests on the device cannot be compiled
            [*command, "-k", "not compiled", "-o", "filterwarnings=", *files],
            env=os.environ | {"TEST_DEVICE": device},
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=max(seconds, 60),
        )
    told = (out / "pytest.txt").read_text().splitlines()[-1]
    assert process.returncode == 0, told
    return f"{told}; see pytest.txt"


def checks(device, *, small, runs, out):
    """The checks; of those that are alike the first one alone, if it is to be small.

    Yields:
        A title and a function.
    """
    some = (lambda *cases: cases[:1]) if small else (lambda *cases: cases)
    recipes = [(name,) for name in RECIPES if name != "trpo"] + [
        ("itrpo", *NORMALISED),
        ("matrpo", "env=vmas/give_way", "critic.others_actions=true", "critic.agent_one_hot=true"),
        ("hatrpo", "env.continuous_actions=false"),
        ("hatrpo", "chunk_size=200"),
        ("hatrpo", "env=pettingzoo/simple_spread_v3", *SERIAL),
        ("trpo", "env=gym/CartPole-v1", *SERIAL),
    ]
    if device.startswith("cuda"):
        captured = ("hatrpo", "collector.cudagraph_policy=true")
        recipes += [captured, (*captured, "env.continuous_actions=false")]
    for case in some(*recipes):
        yield f"recipe {' '.join(case)}"[:60], functools.partial(runs.recipe, *case)
    for case in some(("hatrpo",), ("itrpo", *NORMALISED)):
        yield f"the same run twice, {' '.join(case)}"[:60], functools.partial(runs.twice, *case)
    for case in some(("hatrpo",), ("matrpo", "env=vmas/discovery", "critic.value_norm=true"), ("itrpo", *NORMALISED)):
        yield f"resume {' '.join(case)}"[:60], functools.partial(runs.resumed, *case)
    for first, second in [] if device == "cpu" else [("cpu", device), (device, "cpu")]:
        yield f"resume from {first} to {second}", functools.partial(runs.resumed, "itrpo", first=first, second=second)
    for case in some((), ("normalize_observations=true",)):
        yield f"load_policy and evaluate {' '.join(case)}", functools.partial(runs.played, *case)
    yield "a second environment disturbs nothing", functools.partial(undisturbed, device)
    for scenario in some("simple_spread", "navigation", "balance", Noisy):
        yield f"compiled {getattr(scenario, '__name__', scenario)}", functools.partial(compiled, device, scenario)
    steps, sizes = (2, [8]) if small else (20, [60, 6000, 60_000])
    for num_envs, kind in itertools.product(sizes, ["simulator", "compiled", "recipes", "VmasEnv"]):
        if kind != "VmasEnv" or num_envs < 1000:  # which resets them one by one
            task = functools.partial(sampling, device, num_envs, steps, kind)
            yield f"sampling balance, {num_envs} environments, {kind}", task
    for kind, limit in [] if small else [("recipes", 10), ("VmasEnv", 10)]:
        task = functools.partial(sampling, device, sizes[1], steps, kind, limit=limit)
        yield f"sampling balance, {sizes[1]} environments of 10 steps, {kind}", task
    rows = 400 if small else 1_000_000
    cases = [(rows, 0.1), (rows, 1.0), (rows, 0.1, rows // 10), (6000, 0.1)]
    for sequential, (count, *settings) in itertools.product((True, False), some(*cases)):
        title = f"{'HATRPO' if sequential else 'shared'} update, {count:,} rows, {settings}"
        yield title, functools.partial(update, device, count, sequential, *settings)
    yield "what waits for the GPU", functools.partial(runs.waits, out)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="where: cuda, cuda:1, cpu, ...")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu_check", help="the folder of the table")
    parser.add_argument("--seconds", type=float, default=360, help="after which no check is begun; the suite has half")
    parser.add_argument("--small", action="store_true", help="one check of each kind, on little data")
    settings = parser.parse_args(arguments)
    device, out = settings.device, settings.out
    try:
        resolve_device(device)
    except SettingError as error:
        parser.error(str(error))
    out.mkdir(parents=True, exist_ok=True)
    (out / "errors.txt").unlink(missing_ok=True)
    table = Table(out, settings.seconds)
    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else device
    table.say(f"torch {torch.__version__}, {hardware}, Python {platform.python_version()}")
    no_plots = mock.patch.multiple(plots, plot_learning_curve=mock.DEFAULT, plot_diagnostics=mock.DEFAULT)
    with tempfile.TemporaryDirectory() as work, no_plots, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            runs = Runs(device, Path(work), SMALL_SIZES if settings.small else SIZES)
            for title, task in checks(device, small=settings.small, runs=runs, out=out):
                table.check(title, task)
            files = SUITE[:1] if settings.small else SUITE
            table.check("tests", functools.partial(suite, device, files, out, settings.seconds / 2))
        finally:
            logging.disable(logging.NOTSET)
    table.say(f"{table.failed} failed, {time.perf_counter() - table.start:.0f} s in all; files in {out}")
    return table.failed


if __name__ == "__main__":
    sys.exit(main() > 0)
