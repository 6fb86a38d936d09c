"""Sampling from VMAS: TorchRL as it comes, ours, ours compiled, and the simulator alone."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import vmas
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import Compose, EnvBase, InitTracker, RewardSum, StepCounter, Transform, TransformedEnv, VmasEnv

from tests.benchmarks.timing import medians
from torchrl_trpo.envs import BatchedResetVmasEnv, CompiledVmasEnv, make_env
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor
from torchrl_trpo.training.collector import make_collector

STEPS, N_AGENTS = 100, 4
"""Steps in a batch, which are also an episode's limit; agents."""


def bench(repetitions: int, quick: bool) -> dict[str, float]:
    """Frames per second of all, and what ours spends its time on.

    Args:
        repetitions: of each task, fewer for the large ones.
        quick: whether the largest number of environments is left out.

    Returns:
        Figures by label.
    """
    results = {}
    for num_envs in (60, 600) if quick else (60, 600, 6000):
        env = our_env(num_envs)
        (keys,) = group_keys(env)
        policy = make_actor(env, keys, share_params=False)
        stock = _stock(num_envs, policy)
        ours = iter(make_collector(env, policy, frames_per_batch=num_envs * STEPS, total_frames=-1))
        stock_tasks = {"stock": lambda stock=stock: next(stock)}
        compiled = _compiled(num_envs, policy)
        our_tasks = {
            "ours": lambda ours=ours: next(ours),
            "compiled": lambda compiled=compiled: next(compiled),
            "floor": _floor(num_envs),
            **_steps(num_envs),
        }
        if num_envs > 1000:  # the first takes a minute or more
            cost = {**medians(stock_tasks, 1, warm_up=False), **medians(our_tasks, min(repetitions, 3))}
        else:
            cost = medians({**stock_tasks, **our_tasks}, repetitions)
        frames = num_envs * STEPS
        figures = {
            "TorchRL as it comes [frames/s]": frames / cost["stock"],
            "ours [frames/s]": frames / cost["ours"],
            "ours, compiled [frames/s]": frames / cost["compiled"],
            "the simulator alone [frames/s]": frames / cost["floor"],
            "time, TorchRL as it comes / ours": cost["stock"] / cost["ours"],
            "time, TorchRL as it comes / ours, compiled": cost["stock"] / cost["compiled"],
            "time, ours / the simulator alone": cost["ours"] / cost["floor"],
            "time, a step of VMAS / compiled": cost["VMAS"] / cost["compiled step"],
            **_parts(env, policy, ours),
        }
        results |= {f"{num_envs} environments: {label}": value for label, value in figures.items()}
    return results


class Stagger(Transform):
    """Spreads the episodes' first time limits over an episode, as they are later in a run."""

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        if "_reset" not in tensordict.keys():
            count = tensordict_reset["step_count"]
            tensordict_reset["step_count"] = torch.randint_like(count, STEPS)
        return tensordict_reset


def our_env(num_envs: int, compiled: bool = False) -> EnvBase:
    """The recipes' environment.

    Args:
        num_envs: the number of environments.
        compiled: whether the simulator is compiled.

    Returns:
        The environment, its episodes staggered.
    """
    env = make_env(
        "vmas/balance",
        num_envs=num_envs,
        max_steps=STEPS,
        kwargs={"n_agents": N_AGENTS},
        seed=0,
        device=torch.device("cpu"),
        compiled=compiled,
    )
    return env.append_transform(Stagger())


def _compiled(num_envs: int, policy: nn.Module) -> Iterator[TensorDictBase]:
    env = our_env(num_envs, compiled=True)
    return iter(make_collector(env, policy, frames_per_batch=num_envs * STEPS, total_frames=-1))


def _steps(num_envs: int) -> dict[str, Callable[[], None]]:
    """Steps of the simulator alone, by VMAS and compiled."""
    tasks = {}
    for name, env_class in (("VMAS", BatchedResetVmasEnv), ("compiled step", CompiledVmasEnv)):
        env = env_class("balance", num_envs=num_envs, seed=0, n_agents=N_AGENTS)
        data = env.rand_action(env.reset())

        def steps(env: Any = env, data: TensorDictBase = data) -> None:
            for _ in range(STEPS):
                env._step(data)

        tasks[name] = steps
    return tasks


def _stock(num_envs: int, policy: nn.Module) -> Iterator[TensorDictBase]:
    env = VmasEnv("balance", num_envs=num_envs, max_steps=None, device="cpu", seed=0, n_agents=N_AGENTS)
    returns = RewardSum(in_keys=env.reward_keys, out_keys=[("agents", "episode_reward")])
    env = TransformedEnv(env, Compose(InitTracker(), StepCounter(STEPS), returns, Stagger()))
    return iter(Collector(env, policy, frames_per_batch=num_envs * STEPS, total_frames=-1))


def _floor(num_envs: int) -> Callable[[], None]:
    """A step, a forward pass and a reset of all environments at once, of plain PyTorch and VMAS."""
    settings: dict[str, Any] = {"num_envs": num_envs, "device": "cpu", "continuous_actions": True, "seed": 0}
    simulator, spare = (vmas.make_env("balance", **settings, n_agents=N_AGENTS) for _ in range(2))
    observations = simulator.reset()
    sizes = [observations[0].shape[-1], 128, 128]
    policies = []
    for _ in range(N_AGENTS):
        hidden = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.Tanh())]
        policies.append(nn.Sequential(*hidden, nn.Linear(128, 4)))

    @torch.no_grad()
    def task() -> None:
        nonlocal observations
        for _ in range(STEPS):
            drawn = [_draw(policy, seen) for policy, seen in zip(policies, observations, strict=True)]
            observations, *_ = simulator.step([action for action, _ in drawn])
            spare.reset()  # another's, so that the first one's states stay those of running episodes

    return task


def _draw(policy: nn.Module, observation: Tensor) -> tuple[Tensor, Tensor]:
    """An action within (-1, 1) and its log-probability."""
    loc, raw = policy(observation).chunk(2, -1)
    scale = nn.functional.softplus(raw)
    noise = torch.randn_like(loc)
    action = (loc + scale * noise).tanh()
    log_prob = -noise.square() / 2 - scale.log() - math.log(2 * math.pi) / 2 - (1 - action.square() + 1e-6).log()
    return action, log_prob.sum(-1)


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
