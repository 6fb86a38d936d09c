"""Sampling from VMAS: TorchRL as it comes, ours, ours compiled, and the simulator alone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import Compose, EnvBase, InitTracker, RewardSum, StepCounter, Transform, TransformedEnv, VmasEnv

from tests.benchmarks.timing import medians
from torchrl_trpo.envs import BatchedResetVmasEnv, CompiledVmasEnv, make_env
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor
from torchrl_trpo.training.collector import make_collector

STEPS, N_AGENTS = 100, 4
"""Steps in a batch, which are also an episode's limit; agents."""


SCENARIOS: dict[str, dict[str, Any]] = {
    "balance": {"n_agents": N_AGENTS},
    "navigation": {},
    "simple_spread": {},
    "transport": {},
}
"""The scenarios with their arguments; of the first, everything is measured."""


def bench(repetitions: int, quick: bool) -> dict[str, float]:
    """Frames per second of all, and what ours spends its time on.

    Args:
        repetitions: of each task, fewer for the large ones.
        quick: whether only the first scenario is measured, without the largest number of environments.

    Returns:
        Figures by label.
    """
    results = {}
    for scenario in list(SCENARIOS)[: 1 if quick else None]:
        for num_envs in (60, 600) if quick else (60, 600, 6000):
            figures = _of_scenario(scenario, num_envs, repetitions if num_envs < 1000 else min(repetitions, 3))
            results |= {f"{scenario}, {num_envs} environments: {label}": value for label, value in figures.items()}
    return results


def _of_scenario(scenario: str, num_envs: int, repetitions: int) -> dict[str, float]:
    env = our_env(num_envs, scenario=scenario)
    policy = make_actor(env, group_keys(env)[0], share_params=False)
    eager = iter(make_collector(env, policy, frames_per_batch=num_envs * STEPS, total_frames=-1))
    compiled_env = our_env(num_envs, compiled=True, scenario=scenario)
    collector: Any = make_collector(compiled_env, policy, frames_per_batch=num_envs * STEPS, total_frames=-1)
    compiled = iter(collector)
    tasks: dict[str, Callable[[], Any]] = {
        "eager": lambda: next(eager),
        "compiled": lambda: next(compiled),
        "matrix products": _matrix_products(policy, num_envs),
        **_steps(scenario, num_envs, collector),
    }
    stock = _stock(scenario, num_envs, policy)
    if num_envs > 1000:  # TorchRL's takes a minute or more
        cost = {**medians({"stock": lambda: next(stock)}, 1, warm_up=False), **medians(tasks, repetitions)}
    else:
        cost = medians({"stock": lambda: next(stock), **tasks}, repetitions)
        short = ("compiled", "compiled step alone", "matrix products")  # and so more easily disturbed
        cost |= medians({name: tasks[name] for name in short}, 10 * repetitions)
    frames = num_envs * STEPS
    limit = cost["compiled step alone"] + cost["matrix products"]
    figures = {
        "TorchRL as it comes [frames/s]": frames / cost["stock"],
        "ours [frames/s]": frames / cost["eager"],
        "ours, compiled [frames/s]": frames / cost["compiled"],
        "the compiled step alone [frames/s]": frames / cost["compiled step alone"],
        "time, TorchRL as it comes / ours": cost["stock"] / cost["eager"],
        "time, TorchRL as it comes / ours, compiled": cost["stock"] / cost["compiled"],
        "time, ours, compiled / the compiled step alone and the policy's matrix products": cost["compiled"] / limit,
        "time, a step of VMAS / compiled, in TorchRL's environment": cost["VMAS"] / cost["compiled step"],
        "time, a step of VMAS / the compiled step alone": cost["VMAS"] / cost["compiled step alone"],
    }
    if scenario == next(iter(SCENARIOS)):
        figures |= _parts(env, policy, eager)
    return figures


class Stagger(Transform):
    """Spreads the episodes' first time limits over an episode, as they are later in a run."""

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        if "_reset" not in tensordict.keys():
            count = tensordict_reset["step_count"]
            tensordict_reset["step_count"] = torch.randint_like(count, STEPS)
        return tensordict_reset


def our_env(num_envs: int, compiled: bool = False, scenario: str = "balance") -> EnvBase:
    """The recipes' environment.

    Args:
        num_envs: the number of environments.
        compiled: whether the simulator is compiled.
        scenario: one of :data:`SCENARIOS`.

    Returns:
        The environment, its episodes staggered.
    """
    env = make_env(
        f"vmas/{scenario}",
        num_envs=num_envs,
        max_steps=STEPS,
        kwargs=SCENARIOS[scenario],
        seed=0,
        device=torch.device("cpu"),
        compiled=compiled,
    )
    return env.append_transform(Stagger())


def _steps(scenario: str, num_envs: int, collector: Any) -> dict[str, Callable[[], None]]:
    """Steps of the simulator alone: by VMAS, compiled, and compiled without TorchRL's environment."""
    tasks: dict[str, Callable[[], None]] = {}
    for name, env_class in (("VMAS", BatchedResetVmasEnv), ("compiled step", CompiledVmasEnv)):
        env = env_class(scenario, num_envs=num_envs, seed=0, **SCENARIOS[scenario])
        data = env.rand_action(env.reset())

        def steps(env: Any = env, data: TensorDictBase = data) -> None:
            for _ in range(STEPS):
                env._step(data)

        tasks[name] = steps

    def alone() -> None:
        for _ in range(STEPS):
            collector._fused._simulate()

    return {**tasks, "compiled step alone": alone}


def _stock(scenario: str, num_envs: int, policy: nn.Module) -> Iterator[TensorDictBase]:
    env = VmasEnv(scenario, num_envs=num_envs, max_steps=None, device="cpu", seed=0, **SCENARIOS[scenario])
    returns = RewardSum(in_keys=env.reward_keys, out_keys=[("agents", "episode_reward")])
    env = TransformedEnv(env, Compose(InitTracker(), StepCounter(STEPS), returns, Stagger()))
    return iter(Collector(env, policy, frames_per_batch=num_envs * STEPS, total_frames=-1))


def _matrix_products(policy: nn.Module, num_envs: int) -> Callable[[], None]:
    """The products of the policy's forward passes, with nothing between them."""
    weights = [p for name, p in policy.named_parameters() if name.endswith("weight")]  # [n_agents, outputs, inputs]
    inputs = [torch.randn(weight.shape[0], num_envs, weight.shape[2]) for weight in weights]

    @torch.no_grad()
    def products() -> None:
        for _ in range(STEPS):
            for weight, each in zip(weights, inputs, strict=True):
                torch.bmm(each, weight.mT)

    return products


def _parts(env: EnvBase, policy: nn.Module, collector: Iterator[TensorDictBase]) -> dict[str, float]:
    """The shares of ours, from one more batch with timers in it, and how many episodes end."""
    base: Any = env.base_env
    spent: dict[str, float] = defaultdict(float)
    _time(base, "_step", spent)
    _time(base, "_advance", spent)
    _time(base, "_reset", spent)
    _time(policy, "forward", spent)
    start = time.perf_counter()
    data = next(collector)
    total = time.perf_counter() - start
    shares = {
        "step of the environment": spent["_step"] / total,
        "step of the simulator, within that": spent["_advance"] / total,
        "policy": spent["forward"] / total,
        "resets": spent["_reset"] / total,
        "storage and the rest": 1 - (spent["_step"] + spent["forward"] + spent["_reset"]) / total,
    }
    figures = {f"ours, {part} [% of time]": 100 * share for part, share in shares.items()}
    return {**figures, "episodes that end at a step [%]": 100 * float(data["next", "done"].float().mean())}


def _time(owner: Any, method: str, spent: dict[str, float]) -> None:
    """Adds the time that an object's method takes to ``spent``, from now on."""
    original = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, **kwargs)
        spent[method] += time.perf_counter() - start
        return result

    setattr(owner, method, timed)
