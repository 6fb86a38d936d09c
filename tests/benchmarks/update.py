"""Costs of the policy update, as ratios inside one run.

    make bench

Every figure is a median of repetitions taken in turn, so that a drift of the machine's speed hits all alike. The policy
is that of the recipes (2 x 128, tanh), a region has 6 000 rows. Written to ``outputs/bench/update.json`` too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MultiAgentMLP, NormalParamExtractor, ProbabilisticActor, TanhNormal

from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.critic_fit import fit_critic
from torchrl_trpo.envs import make_env
from torchrl_trpo.groups import group_keys
from torchrl_trpo.networks import make_actor, make_central_critic
from torchrl_trpo.objectives import CentralCriticValueEstimator, HATRPOSequentialObjective, PolicyRows, TRPOLoss

NUM_ENVS, STEPS, N_OBS, N_ACT = 60, 100, 16, 2


def medians(tasks: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """The median duration of each task in seconds; tasks take turns."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for repetition in range(repetitions + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if repetition:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def policy_and_data(n_agents: int, share_params: bool) -> tuple[TRPOLoss, TensorDict]:
    """A policy like the recipes', and a batch of its actions with random advantages."""
    net = MultiAgentMLP(
        N_OBS,
        2 * N_ACT,
        n_agents=n_agents,
        centralized=False,
        share_params=share_params,
        num_cells=[128, 128],
        depth=2,
        activation_class=nn.Tanh,
    )
    keys = [("agents", "loc"), ("agents", "scale")]
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(net, NormalParamExtractor()), in_keys=[("agents", "observation")], out_keys=keys
        ),
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    data = TensorDict({("agents", "observation"): torch.randn(NUM_ENVS, STEPS, n_agents, N_OBS)}, [NUM_ENVS, STEPS])
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        actor(data)
    data["advantage"] = torch.randn(NUM_ENVS, STEPS, n_agents, 1)
    return TRPOLoss(actor, entropy_bonus=False), data


def forward_backward(loss: TRPOLoss, rows: PolicyRows, **region: int) -> Callable[[], object]:
    """One forward and backward pass of the surrogate."""
    return lambda: loss.policy_region(rows, **region).gradient()


def fisher(loss: TRPOLoss, rows: PolicyRows, **region: int) -> Callable[[], object]:
    """One product with the Fisher matrix on all rows, once its graph is built."""
    problem = loss.policy_region(rows, **region)
    product, vector = problem.fisher_product(), torch.randn_like(problem.parameters)
    return lambda: product(vector)


def kept(updater: TrustRegionUpdater, data: TensorDict) -> Callable[[], object]:
    """A whole update at the same parameters each time: what it writes is taken back."""
    parameters = [value.data for value in updater.objective.parameters()]
    start = [value.clone() for value in parameters]

    def task() -> object:
        stats = updater.step(data)
        for value, old in zip(parameters, start, strict=True):
            value.copy_(old)
        return stats

    return task


def bench_update(repetitions: int) -> dict[str, float]:
    """Fisher product and whole updates against one forward and backward pass."""
    results = {}
    for name, share_params in (("shared", True), ("per_agent", False)):
        loss, data = policy_and_data(4, share_params)
        rows = loss.policy_rows(data)
        tasks = {
            "forward_backward": forward_backward(loss, rows),
            "fisher": fisher(loss, rows),
            "exact": kept(TrustRegionUpdater(loss), data),
            "default": kept(TrustRegionUpdater(loss, fisher_subsample=0.1), data),
        }
        if not share_params:
            tasks["one_forward_backward"] = forward_backward(loss, rows, agent=0)
            tasks["one_fisher"] = fisher(loss, rows, agent=0)
            tasks["hatrpo"] = kept(TrustRegionUpdater(HATRPOSequentialObjective(loss), fisher_subsample=0.1), data)
        cost = medians(tasks, repetitions)
        unit = cost.pop("forward_backward")
        if not share_params:
            results["one agent: Fisher product / forward+backward"] = cost.pop("one_fisher") / cost.pop(
                "one_forward_backward"
            )
        results[f"{name}: forward+backward, 4 agents x 6000 rows [ms]"] = 1e3 * unit
        labels = {
            "fisher": "Fisher product",
            "exact": "whole update, all rows in F",
            "default": "whole update, 1/10 of the rows in F",
            "hatrpo": "HATRPO update, 1/10 of the rows in F",
        }
        for task, seconds in cost.items():
            results[f"{name}: {labels[task]} / forward+backward"] = seconds / unit
    return results


def bench_agents(repetitions: int) -> dict[str, float]:
    """HATRPO's update with 16 agents against 4, at equal rows per agent."""
    tasks = {}
    for n_agents in (4, 16):
        loss, data = policy_and_data(n_agents, share_params=False)
        tasks[str(n_agents)] = kept(TrustRegionUpdater(HATRPOSequentialObjective(loss), fisher_subsample=0.1), data)
    cost = medians(tasks, repetitions)
    return {"HATRPO update, 16 agents / 4 agents": cost["16"] / cost["4"]}


def bench_iteration(repetitions: int) -> dict[str, float]:
    """The parts of one HATRPO iteration on balance: 4 agents, 60 environments, 100 steps."""
    env = make_env(
        "vmas/balance",
        num_envs=NUM_ENVS,
        max_steps=STEPS,
        kwargs={"n_agents": 4},
        seed=0,
        device=torch.device("cpu"),
    )
    (keys,) = group_keys(env)
    actor, critic = make_actor(env, keys, share_params=False), make_central_critic(env, keys)
    loss = TRPOLoss(actor, critic)
    loss.set_keys(**keys.loss_keys)
    loss.make_value_estimator(
        CentralCriticValueEstimator,
        gamma=0.99,
        lmbda=0.9,
        value_network=critic,
        observation_keys=[keys.observation],
        central_key=keys.central,
    )
    updater = TrustRegionUpdater(HATRPOSequentialObjective(loss), fisher_subsample=0.1)
    optimizer = torch.optim.Adam(loss.critic_network_params.flatten_keys().values(), lr=1e-3)
    collector = iter(
        Collector(env, actor, frames_per_batch=NUM_ENVS * STEPS, total_frames=-1, auto_register_policy_transforms=False)
    )
    state: dict[str, TensorDict] = {}
    cost = medians(
        {
            "sampling": lambda: state.update(data=next(collector)),
            "advantages": lambda: loss.value_estimator(state["data"]),
            "policy update": lambda: updater.step(state["data"]),
            "critic fit": lambda: fit_critic(loss, optimizer, state["data"], epochs=5, minibatch_size=300),
        },
        repetitions,
    )
    results = {f"iteration: {name} [ms]": 1e3 * seconds for name, seconds in cost.items()}
    return {**results, "iteration: policy update / sampling": cost["policy update"] / cost["sampling"]}


def main() -> None:
    """Runs all benchmarks and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/update.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {}
    for bench in (bench_update, bench_agents, bench_iteration):
        results |= bench(arguments.repetitions)
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"Medians of {arguments.repetitions} repetitions on {machine}")
    for name, value in results.items():
        print(f"  {name:<72} {value:8.2f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine, **results}, indent=2) + "\n")
    print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()
