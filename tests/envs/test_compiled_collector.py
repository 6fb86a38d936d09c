"""Compiled rollouts against TorchRL's collector, in the same environment with the same random numbers."""

import warnings

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import (
    Compose,
    ExplorationType,
    InitTracker,
    ObservationNorm,
    RewardSum,
    StepCounter,
    Transform,
    TransformedEnv,
    VecNorm,
    VecNormV2,
)

from tests.cases import needs_compiler
from tests.envs.test_compiled import Push
from torchrl_trpo.envs import BatchedResetVmasEnv, CompiledCollector, CompiledVmasEnv
from torchrl_trpo.envs.many_steps import ManySteps
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor
from torchrl_trpo.networks.recurrent import carry_states

pytestmark = needs_compiler
N, STEPS, LIMIT = 20, 9, 7
KEY = ("agents", "observation")


def make(
    collector,
    *,
    traits=(),
    transforms=(),
    limit=LIMIT,
    scenario=None,
    env_settings=None,
    actor=None,
    wrap=None,
    **settings,
):
    torch.manual_seed(0)
    scenario = Push() if scenario is None else scenario
    arguments = {"traits": traits} if isinstance(scenario, Push) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = CompiledVmasEnv(scenario, num_envs=N, seed=0, **(env_settings or {}), **arguments)
    returns = [(*key[:-1], "episode_reward") for key in env.reward_keys]
    counted = [InitTracker(), StepCounter(limit), RewardSum(in_keys=env.reward_keys, out_keys=returns)]
    env = TransformedEnv(env, Compose(*counted, *(make_one() for make_one in transforms)), auto_unwrap=False)
    actors = [
        make_actor(env, keys, **{"share_params": False, "hidden": (20, 16), **(actor or {})})
        for keys in group_keys(env)
    ]
    policy = TensorDictSequential(*actors)
    if actor and "network" in actor:
        carry_states(env, policy)
    policy = policy if wrap is None else wrap(policy)
    return collector(env, policy, frames_per_batch=N * STEPS, **{"total_frames": -1, **settings})


def collect(collector, n_batches=2, change=lambda collector, number: None):
    torch.manual_seed(1)
    batches, iterator = [], iter(collector)
    for number in range(n_batches):
        change(collector, number)
        batches.append(next(iterator))
    return batches


def assert_same(ours, theirs):
    for batch, other in zip(ours, theirs, strict=True):
        assert batch.batch_size == other.batch_size
        assert batch.names == other.names
        assert set(batch.keys(True, True)) == set(other.keys(True, True))
        for key in other.keys(True, True):
            torch.testing.assert_close(batch[key], other[key], rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


def check(change=lambda collector, number: None, n_batches=2, **settings):
    """Both give the same; returns ours, and its batches."""
    ours, theirs = make(CompiledCollector, **settings), make(Collector, **settings)
    batches = collect(ours, n_batches, change)
    assert_same(batches, collect(theirs, n_batches, change))
    assert ours.why_not_compiled or all(value.is_contiguous() for value in batches[0].values(True, True))
    return ours, batches


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"actor": {"share_params": True}, "traits": ("noise", "memory")},
        {"env_settings": {"continuous_actions": False}, "track_traj_ids": False},
        {"env_settings": {"continuous_actions": False}, "actor": {"share_params": True}},
        {"scenario": "simple_tag", "limit": 5, "set_truncated": True},
        {"exploration_type": ExplorationType.DETERMINISTIC, "reset_at_each_iter": True},
    ],
    ids=["alone", "shared", "discrete", "discrete-shared", "groups", "deterministic"],
)
def test_batches_are_those_of_torchrl(settings):
    ours, batches = check(**settings)
    assert ours.why_not_compiled is None
    assert ours._fused.why_policy_not_compiled is None
    assert torch.cat(batches, 1)["next", "done"].any()


def test_resets_are_spread():
    """Some environments end at a step, and others go on."""
    _, batches = check(limit=10_000, n_batches=6)
    done = torch.cat(batches, 1)["next", "done"].sum(0)
    assert ((done > 0) & (done < N)).any()


def test_steps_that_vmas_takes_are_in_it(monkeypatch):
    """Where the scenario branches on the data, some steps are not as they were traced."""
    n_by_vmas = 0

    def counted(self, actions, take=CompiledVmasEnv._take_step):
        nonlocal n_by_vmas
        n_by_vmas += 1
        return take(self, actions)

    monkeypatch.setattr(CompiledVmasEnv, "_take_step", counted)
    ours = make(CompiledCollector, traits=("branch", "memory"), limit=10_000)
    n_by_vmas = 0
    batches = collect(ours, 8)
    assert 0 < n_by_vmas < 8 * STEPS
    assert_same(batches, collect(make(Collector, traits=("branch", "memory"), limit=10_000), 8))


@pytest.mark.filterwarnings("ignore:simple_push. ended environments are reset one by one")
def test_a_reset_that_draws_a_goal_for_all_is_in_it():
    """Each goal has a simulator that is compiled for it."""
    ours, _ = check(scenario="simple_push", limit=LIMIT, n_batches=6, reset_at_each_iter=True)
    assert len(ours.env.base_env._variants) > 1


def test_steps_are_taken_without_python(monkeypatch):
    """Nothing but the first resets, which fill the pool, needs Python."""
    taken, own = [], ManySteps.take
    monkeypatch.setattr(ManySteps, "take", lambda *arguments: taken.append(own(*arguments)) or taken[-1])
    check(n_batches=4, traits=(), limit=100)
    assert sum(n_taken for n_taken, _ in taken) >= 4 * STEPS - 3


def test_parameters_are_read_where_they_are():
    def change(collector, number):
        with torch.no_grad():
            for parameter in collector.policy.parameters():
                parameter.add_(0.1 * number)

    check(change)


@pytest.mark.parametrize("share_params", [True, False])
def test_parameters_that_to_module_puts_there_are_read(share_params):
    """A policy with ``TensorDictParams``, as ``MultiAgentMLP`` has them, acted with its first parameters."""

    def change(collector, number):
        parameters = TensorDict.from_module(collector.policy).data
        parameters.apply(lambda value: value + 0.1 * number).to_module(collector.policy)

    check(change, 3, actor={"share_params": share_params})


def test_what_has_changed_is_compiled_anew():
    def change(collector, number):
        collector.env.transform[1].max_steps = LIMIT - number
        collector.env.base_env._env.scenario.offset = torch.full((N,), 2.0 * number)

    _, batches = check(change, 3)
    for number, batch in enumerate(batches):
        assert batch["next", "step_count"].max() <= LIMIT - number + 1


def test_each_batch_has_memory_of_its_own():
    collector = make(CompiledCollector)
    torch.manual_seed(1)
    iterator = iter(collector)
    first = next(iterator)
    before = first.clone()
    next(iterator)
    for key in before.keys(True, True):
        assert torch.equal(first[key], before[key])


def test_vmas_objects_hold_what_the_batch_ends_with():
    collector = make(CompiledCollector, limit=10_000)
    collect(collector, 1)
    held = collector.env.base_env._env.agents[0].state.pos
    before = held.clone()
    *_, batch = collect(collector, 3)
    assert torch.equal(held, before)
    going = ~batch["next", "done"][:, -1, 0]
    positions = [agent.state.pos for agent in collector.env.base_env._env.agents]
    assert torch.equal(torch.stack(positions, 1)[going], batch["next", *KEY][going, -1, :, :2])


def test_a_saved_one_goes_on_to_the_bit():
    collector = make(CompiledCollector, traits=("noise",))
    collect(collector, 1)
    state, carrier = collector.env.base_env.state_dict(), collector._carrier.clone()
    expected = collect(collector, 2)
    other = make(CompiledCollector, traits=("noise",))
    other.env.base_env.load_state_dict(state)
    other._carrier = carrier
    for batch, right in zip(collect(other, 2), expected, strict=True):
        for key in right.exclude("collector").keys(True, True):
            assert torch.equal(batch[key], right[key]), key


class ReadsTheScenario(Transform):
    """Observations that have a number of the scenario in them."""

    def _call(self, next_tensordict):
        return next_tensordict.set(KEY, next_tensordict[KEY] * self.parent.base_env.scenario.bonus)

    def _reset(self, tensordict, tensordict_reset):
        return self._call(tensordict_reset)


@pytest.mark.filterwarnings(
    "ignore:Rollouts are not compiled",
    "ignore:Support of VecNormV2",
    "ignore:The VecNorm class",
    "ignore:This class is to be",
)
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"actor": {"network": "gru"}}, "its transforms refuse another number of environments"),
        ({"transforms": [lambda: VecNormV2(in_keys=[KEY], decay=0.9)]}, "VecNormV2 holds a lock, lock"),
        ({"transforms": [lambda: VecNorm(in_keys=[KEY], decay=0.9)]}, "VecNorm holds a lock, lock"),
        ({"init_random_frames": N * STEPS}, "random frames come first"),
        ({"replay_buffer": True}, "a replay buffer is written at each step"),
        ({"traits": ("batch",)}, "its simulator is not compiled: .*add over rows"),
        ({"transforms": [ReadsTheScenario]}, "a transform reads the simulator's objects: scenario.bonus"),
    ],
    ids=["recurrent", "running statistics", "lock", "random frames", "replay buffer", "simulator", "scenario"],
)
def test_what_is_not_compiled_is_torchrls_and_says_so(settings, reason):
    if "replay_buffer" in settings:
        settings = {"replay_buffer": ReplayBuffer(storage=LazyTensorStorage(N * STEPS)), "extend_buffer": False}
    with pytest.warns(UserWarning, match=f"^Rollouts are not compiled: .*({reason})"):
        ours = make(CompiledCollector, **settings)
    assert ours.why_not_compiled
    if "replay_buffer" not in settings:
        assert_same(collect(ours), collect(make(Collector, **settings)))


def test_another_environment_is_torchrls():
    env = BatchedResetVmasEnv("simple", num_envs=8, seed=0)
    with pytest.warns(UserWarning, match="the environment is a BatchedResetVmasEnv, and no CompiledVmasEnv"):
        collector = CompiledCollector(env, frames_per_batch=40, total_frames=40)
    assert [batch.shape for batch in collector] == [(8, 5)]


class Noise(nn.Module):
    """Random numbers that all environments share."""

    def forward(self, observation):
        return observation * (1 + 0.1 * torch.rand(observation.shape[-1]))


def test_a_policy_that_cannot_be_compiled_is_called_at_each_step():
    def change(collector, number):
        if number == 0:
            collector.policy.module.insert(0, TensorDictModule(Noise(), in_keys=[KEY], out_keys=[KEY]))

    with pytest.warns(UserWarning, match="called at each step, not compiled: random numbers that all rows share"):
        ours, _ = check(change)
    assert ours.why_not_compiled is None


@pytest.mark.filterwarnings("ignore:The policy is called at each step")
def test_a_policy_that_is_called_may_change_the_scenario():
    """What it changed took effect with the next batch."""
    envs = []

    def wrap(actor):
        def policy(data):
            if envs:
                envs[-1].base_env.scenario.bonus = 1.0 + data["step_count"].max().item()
            return actor(data)

        return policy

    check(lambda collector, number: envs.append(collector.env), wrap=wrap, trust_policy=True)


def test_frozen_statistics_are_constants_that_may_be_set():
    make_norm = [lambda: ObservationNorm(loc=0.5, scale=2.0, in_keys=[KEY])]

    def change(collector, number):
        collector.env.transform[-1].loc.fill_(0.1 * number)

    ours, _ = check(change, transforms=make_norm)
    assert ours.why_not_compiled is None


def test_it_is_a_drop_in_for_torchrls_collector():
    for collector_class in (Collector, CompiledCollector):
        env = CompiledVmasEnv("simple", num_envs=8, seed=0)
        collector = collector_class(env, frames_per_batch=40, total_frames=80)
        assert [batch.shape for batch in collector] == [(8, 5), (8, 5)]
        collector.shutdown()
