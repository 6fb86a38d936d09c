"""HATRPO on balance in several processes: what they agree on to rounding, what they send, what it costs and saves.

The shares of a job's environments, updates and critic fits, as the recipe splits them; processes talk through gloo on
one machine. On two cores more than two processes take turns.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from tests.benchmarks.sampling import STEPS
from tests.benchmarks.update import DEFAULT_SUBSAMPLE
from tests.rank_processes import on_ranks
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.envs import make_env
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor, make_central_critic
from torchrl_trpo.objectives import CentralCriticValueEstimator, HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.parallel.ranks import Ranks
from torchrl_trpo.training.collector import make_collector
from torchrl_trpo.training.critic_fit import fit_critic

UPDATES, COMPARED_ENVS = 20, 20
"""After how many updates, with how many environments, parameters are compared; those of the ranks to the bit."""


def bench(repetitions: int, quick: bool) -> dict[str, float]:
    """Agreement, bytes, and times with 1, 2 and 4 processes.

    Args:
        repetitions: of an iteration.
        quick: whether the larger number of environments is left out.

    Returns:
        Figures by label.
    """
    results = agreement()
    for num_envs in (60,) if quick else (60, 600):
        one: dict[str, float] = {}
        for size in (1, 2, 4):
            own = on_ranks(size, measure, num_envs, repetitions if num_envs == 60 else min(repetitions, 3))
            label = f"{num_envs} environments, {size} processes"
            slowest = {name: max(figures[name] for figures in own) for name in own[0]}
            one = one or slowest
            results |= {f"{label}: {name}": value for name, value in slowest.items()}
            for part in ("sampling", "policy update", "critic fit", "iteration"):
                results[f"{label}: {part}, times faster than one"] = one[f"{part} [s]"] / slowest[f"{part} [s]"]
    for size in (2, 4):
        for numbers in (2, 10_000, 1_000_000):
            (seconds, *_) = on_ranks(size, all_reduce_seconds, numbers)
            results[f"{size} processes: sum of {numbers} float32 over all [ms]"] = 1000 * seconds
    return results


class _Parts:
    """The parts of the recipe's loop in this rank."""

    def __init__(self, num_envs: int, subsample: float) -> None:
        torch.manual_seed(0)
        self.ranks = Ranks(dist.group.WORLD)
        cpu = torch.device("cpu")
        self.env = make_env(
            "vmas/balance", num_envs=num_envs, max_steps=STEPS, kwargs={}, seed=0, device=cpu, ranks=self.ranks
        )
        (keys,) = group_keys(self.env)
        self.actor = make_actor(self.env, keys, share_params=False)
        self.critic = make_central_critic(self.env, keys)
        self.loss = TRPOLoss(
            self.actor,
            self.critic,
            normalize_advantage=True,
            normalize_advantage_exclude_dims=(-2,),
            process_group=self.ranks.group,
        )
        self.loss.set_keys(**keys.loss_keys)
        self.loss.make_value_estimator(
            CentralCriticValueEstimator,
            gamma=0.95,
            lmbda=0.9,
            value_network=self.critic,
            observation_keys=[keys.observation],
            central_key=keys.central,
        )
        self.updater = TrustRegionUpdater(HATRPOSequentialObjective(self.loss), fisher_subsample=subsample)
        self.optimizer = torch.optim.Adam(self.loss.critic_network_params.flatten_keys().values(), lr=1e-3)
        frames = num_envs * STEPS
        self.collector = make_collector(self.env, self.actor, frames_per_batch=frames, ranks=self.ranks)

    def learn(self, data: TensorDict) -> tuple[float, float]:
        """One iteration on a batch; gives the seconds of the policy's update and of the critic's fit."""
        with torch.no_grad():
            self.loss.value_estimator(data)
        start = time.perf_counter()
        self.updater.step(data)
        middle = time.perf_counter()
        group = self.ranks.group
        fit_critic(self.loss, self.optimizer, data, epochs=5, minibatch_size=300, process_group=group)
        return middle - start, time.perf_counter() - middle

    def parameters(self) -> dict[str, Tensor]:
        """The policy's and the critic's, as vectors."""
        networks = {"policy": self.actor, "critic": self.critic}
        return {name: torch.cat([p.detach().flatten() for p in net.parameters()]) for name, net in networks.items()}


def agreement() -> dict[str, float]:
    """How far the parameters are apart after the same updates on the same batches."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(1, record, folder)
        for dtype in (torch.float32, torch.float64):
            (alone,) = on_ranks(1, replay, folder, dtype)
            for size in (2, 4):
                ranks, name = on_ranks(size, replay, folder, dtype), f"{size} processes"
                same = all(torch.equal(own[network], ranks[0][network]) for own in ranks for network in own)
                if not same:
                    raise RuntimeError(f"{name}: the ranks' parameters are not the same to the bit.")
                label = f"{name}, {str(dtype).removeprefix('torch.')}"
                for network in ("policy", "critic"):
                    apart = ranks[0][network] - alone[network]
                    moved = alone[network] - alone[f"{network} before"]
                    results[f"{label}: {network}, largest difference"] = float(apart.abs().max())
                    results[f"{label}: {network}, difference / way moved"] = float(apart.norm() / moved.norm())
    return results


def record(folder: str) -> None:
    """Keeps the batches of twenty iterations of one process, with all rows in the Fisher matrix."""
    parts = _Parts(COMPARED_ENVS, subsample=1.0)
    for index, data in enumerate(parts.collector):
        torch.save(data.to_dict(), Path(folder) / f"batch-{index}")
        parts.learn(data)
        if index + 1 == UPDATES:
            break


def replay(folder: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same iterations on this rank's environments of the batches."""
    parts = _Parts(COMPARED_ENVS, subsample=1.0)
    parts.loss.to(dtype)
    before = {f"{name} before": value for name, value in parts.parameters().items()}
    for index in range(UPDATES):
        batch = TensorDict(torch.load(Path(folder) / f"batch-{index}"), [COMPARED_ENVS, STEPS])
        batch = batch.apply(lambda value: value.to(dtype) if value.is_floating_point() else value)
        torch.manual_seed(index + 1000 * parts.ranks.rank)
        parts.learn(batch.chunk(parts.ranks.size)[parts.ranks.rank].clone())
    return {**before, **parts.parameters()}


def measure(num_envs: int, repetitions: int) -> dict[str, float]:
    """The medians of this rank's times, and what it gives to others."""
    parts = _Parts(num_envs, DEFAULT_SUBSAMPLE)
    times: dict[str, list[float]] = {"sampling": [], "policy update": [], "critic fit": []}
    batches: Iterator[TensorDict] = iter(parts.collector)
    for _ in range(repetitions + 1):
        dist.barrier()
        start = time.perf_counter()
        data = next(batches)
        dist.barrier()
        times["sampling"].append(time.perf_counter() - start)
        update, fit = parts.learn(data)
        times["policy update"].append(update)
        times["critic fit"].append(fit)
    figures = {f"{name} [s]": statistics.median(values[1:]) for name, values in times.items()}
    figures["iteration [s]"] = sum(figures.values())
    sent = _count_bytes()
    with torch.no_grad():
        parts.loss.value_estimator(data)
    parts.updater.step(data)
    figures["policy update: collectives"] = len(sent)
    figures["policy update: bytes"] = sum(sent)
    figures["policy update: bytes / bytes of the policy"] = sum(sent) / (4 * len(parts.parameters()["policy"]))
    sent.clear()
    parts.learn(data)
    figures["whole update: collectives"] = len(sent)
    figures["whole update: bytes"] = sum(sent)
    return figures


def _count_bytes() -> list[int]:
    """The bytes of each collective call from here on."""
    count: list[int] = []
    call = Ranks._call

    def counted(self: Ranks, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        count.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        call(self, collective, *args, **kwargs)

    Ranks._call = counted  # type: ignore[method-assign]
    return count


def all_reduce_seconds(numbers: int) -> float:
    """The median time of a sum over all ranks."""
    ranks, vector, times = Ranks(dist.group.WORLD), torch.ones(numbers), []
    for _ in range(50):
        dist.barrier()
        start = time.perf_counter()
        ranks.sum_(vector)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
