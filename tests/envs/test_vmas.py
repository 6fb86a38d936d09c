"""Partial resets of VMAS: environments that go on are untouched to the bit, the others begin as the scenario says."""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import StepCounter, TransformedEnv, VmasEnv
from torchrl.envs.common import _EnvWrapper
from torchrl.envs.utils import check_env_specs
from vmas import make_env as make_vmas
from vmas.simulator.core import Agent, World
from vmas.simulator.scenario import BaseScenario

from torchrl_trpo.envs import BatchedResetVmasEnv, CompiledVmasEnv
from torchrl_trpo.envs.object_graph import InexactError, tensors_in
from torchrl_trpo.envs.snapshot import ObjectSnapshot

NUM_ENVS = 5
ENDED = torch.tensor([True, False, True, False, False])
# A reset changes what all environments share: a mass, the goal of the game, a clock, what scripted opponents remember.
SLOW = {"ball_passage", "football", "het_mass", "road_traffic"}
SLOW |= {"simple_adversary", "simple_push", "simple_reference", "simple_speaker_listener"}


class Keeper(BaseScenario):
    """A scenario that keeps its tensors in all kinds of places; ``shared`` has no environments in it."""

    def make_world(self, batch_dim: int, device: torch.device, shared: int = 0, **kwargs: object) -> World:
        self.shared = shared
        world = World(batch_dim, device)
        world.add_agent(Agent(name="agent_0"))
        self.in_dict = {"a": {"b": torch.zeros(batch_dim, 3)}}
        self.in_list = [torch.zeros(batch_dim), (torch.zeros(batch_dim, 2),)]
        self.in_object = SimpleNamespace(value=torch.zeros(batch_dim, 1))
        self.in_closure = partial(lambda scale, value: value.mul_(scale), 2.0, torch.ones(batch_dim))
        self.for_all = torch.zeros(max(shared, 1))
        self.view = self.in_dict["a"]["b"][:, 0]
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        rows = slice(None) if env_index is None else slice(env_index, env_index + 1)
        self.in_dict["a"]["b"][rows] = torch.rand_like(self.in_dict["a"]["b"][rows])
        self.in_list[0][rows] = torch.rand_like(self.in_list[0][rows])
        self.in_list[1][0][rows] = torch.rand_like(self.in_list[1][0][rows])
        if env_index is None:
            self.in_object.value = torch.rand_like(self.in_object.value)
        else:
            self.in_object.value[env_index] = torch.rand(1)
        self.in_closure.args[1][rows] = 1.0
        if self.shared:
            self.for_all = torch.rand(self.shared)

    def observation(self, agent: Agent) -> torch.Tensor:
        self.in_closure()
        parts = [self.in_dict["a"]["b"], self.in_list[1][0], self.in_object.value, self.view.unsqueeze(-1)]
        return torch.cat([*parts, self.in_list[0].unsqueeze(-1), self.in_closure.args[1].unsqueeze(-1)], -1)

    def reward(self, agent: Agent) -> torch.Tensor:
        return self.in_list[0]


def make(scenario: object, cls: type = BatchedResetVmasEnv, **kwargs: object) -> BatchedResetVmasEnv:
    """An environment; VMAS remarks on controllers without force limits, and on arguments it does not know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Force limits not specified")
        return cls(scenario, num_envs=NUM_ENVS, seed=0, **kwargs)


def reset(env: VmasEnv, ended: torch.Tensor = ENDED) -> TensorDict:
    done = {name: ended.unsqueeze(-1) for name in env.full_done_spec.keys()}
    return env.reset(TensorDict({"_reset": ended.unsqueeze(-1), **done}, [NUM_ENVS]))


def share_random_state(source: BatchedResetVmasEnv, *others: BatchedResetVmasEnv) -> None:
    for other in others:
        other._random_state = list(source._random_state)


def step_together(envs: list[BatchedResetVmasEnv], steps: int) -> list[list[TensorDict]]:
    """The same actions and the same random numbers in each environment."""
    results = []
    for _ in range(steps):
        share_random_state(*envs)
        action = envs[0].rand_action(TensorDict(batch_size=[NUM_ENVS]))
        results.append([env.step(action.clone())["next"] for env in envs])
    share_random_state(*envs)
    return results


def held(env: BatchedResetVmasEnv) -> dict[str, torch.Tensor]:
    """Every tensor with a row per environment that an environment holds, by where it is."""
    tensors = tensors_in((env._env.scenario, env._env.world))
    rows = {path: value for path, value in tensors.items() if value.shape[:1] == (NUM_ENVS,)}
    return {**rows, "steps": env._env.steps}


def assert_same_rows(left: dict, right: dict, rows: torch.Tensor) -> None:
    assert left.keys() == right.keys()
    for path, value in left.items():
        torch.testing.assert_close(value[rows], right[path][rows], rtol=0, atol=0, equal_nan=True, msg=str(path))


@pytest.mark.parametrize(
    "scenario",
    [
        *(
            # test_saved_state.py has the others; a step of sampling takes many seconds
            pytest.param(name, marks=[] if at % 2 and name != "sampling" else [pytest.mark.slow])
            for at, name in enumerate(VmasEnv.available_envs)
            if name not in SLOW
        ),
        Keeper,
    ],
)
def test_each_scenario_is_reset_exactly(scenario):
    """One twin is left alone, another is reset as a whole: the environment has the rows of the one and of the other."""
    torch.manual_seed(0)
    scenarios = [scenario if isinstance(scenario, str) else scenario() for _ in range(3)]
    env, untouched, renewed = envs = [make(each) for each in scenarios]
    for each in envs:
        each.reset()
    step_together(envs, 3)
    reset(env)
    renewed.reset()
    torch.testing.assert_close(env._random_state[0], renewed._random_state[0])
    assert_same_rows(held(env), held(untouched), ~ENDED)
    assert_same_rows(held(env), held(renewed), ENDED)
    for ours, theirs, fresh in step_together(envs, 3):
        leaves = list(ours.keys(True, True))
        assert_same_rows({k: ours[k] for k in leaves}, {k: theirs[k] for k in leaves}, ~ENDED)
        assert_same_rows({k: ours[k] for k in leaves}, {k: fresh[k] for k in leaves}, ENDED)


class GivenRows(BaseScenario):
    """It is given a goal for each environment."""

    def make_world(self, batch_dim: int, device: torch.device, goals: torch.Tensor, **kwargs: object) -> World:
        self.goals = goals
        world = World(batch_dim, device)
        world.add_agent(Agent(name="agent_0"))
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        size = (self.world.batch_dim, 2) if env_index is None else (2,)
        self.world.agents[0].set_pos(torch.rand(size), env_index)

    def observation(self, agent: Agent) -> torch.Tensor:
        return agent.state.pos - self.goals

    def reward(self, agent: Agent) -> torch.Tensor:
        return agent.state.pos[:, 0]


def test_an_argument_may_have_a_row_for_each_environment() -> None:
    """The constructor failed, since it made a simulator of another size."""
    with pytest.warns(UserWarning, match="reset one by one.*cannot be made with another number of environments"):
        env = BatchedResetVmasEnv(GivenRows(), num_envs=NUM_ENVS, seed=0, goals=torch.rand(NUM_ENVS, 2))
    data = env.reset()
    before = data["agents", "observation"].clone()
    after = env.reset(data.set("_reset", ENDED.unsqueeze(-1)))["agents", "observation"]
    assert torch.equal((before != after).flatten(1).any(1), ENDED)


@pytest.mark.parametrize(
    ("scenario", "continuous"),
    [
        pytest.param(scenario, continuous, marks=[] if continuous == bool(at % 2) else [pytest.mark.slow])
        for at, scenario in enumerate(name for name in VmasEnv.available_envs if name != "road_traffic")  # has a clock
        for continuous in (True, False)
    ],
)
def test_data_is_that_of_torchrls_wrapper(scenario, continuous):
    """The same keys, shapes, types and values at a reset and at steps, in groups of any kind."""
    env = make(scenario, continuous_actions=continuous)
    theirs = make(scenario, VmasEnv, continuous_actions=continuous)
    results = []
    for each in (env, theirs):
        torch.manual_seed(0)
        each.set_seed(0)
        data = [each.reset()]
        for _ in range(3):
            data.append(each.rand_step(data[-1].clone())["next"])
        results.append(data)
    for ours, expected in zip(*results, strict=True):
        assert set(ours.keys(True, True)) == set(expected.keys(True, True))
        for key in expected.keys(True, True):
            torch.testing.assert_close(ours[key], expected[key], rtol=0, atol=0, equal_nan=True)
    check_env_specs(env)


@pytest.mark.parametrize("scenario", sorted(SLOW))
def test_scenarios_that_share_state_are_reset_one_by_one_and_say_so_once(scenario):
    env, theirs = make(scenario), make(scenario, VmasEnv)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3 if scenario == "road_traffic" else 20):  # a goal that is drawn anew may be the old one
            torch.manual_seed(seed)
            action = env.rand_action(TensorDict(batch_size=[NUM_ENVS]))
            for each in (env, theirs):
                each.set_seed(seed)
                each.reset()
                each.step(action.clone())
            theirs._env.vmas_random_state[:] = env._random_state
            ours, expected = reset(env), reset(theirs)
            if caught and scenario != "road_traffic":
                leaves = list(ours.keys(True, True))
                assert_same_rows({k: ours[k] for k in leaves}, {k: expected[k] for k in leaves}, slice(None))
    (warning,) = [w for w in caught if "one by one" in str(w.message)]
    assert scenario in str(warning.message)


ARGUMENTS = {
    "continuous_actions": False,
    "max_steps": 7,
    "categorical_actions": False,
    "seed": 1,
    "group_map": {"outer": ["agent_0", "agent_2"], "inner": ["agent_1"]},
    "scenario_kwargs": {"n_agents": 2},
    "from_pixels": False,
    "pixels_only": True,
    "device": "cpu",
    "batch_size": (NUM_ENVS,),
    "spec_locked": False,
    "multidiscrete_actions": True,
    "clamp_actions": True,
    "grad_enabled": True,
    "wrapper_kwargs": {},
}
"""What VmasEnv takes: its own arguments, those of TorchRL's wrappers, and those of VMAS."""
NEVER = {"self", "scenario", "num_envs", "args", "kwargs"}
PIXELS = {"from_pixels", "pixels_only"}  # read out of its ``**kwargs``
NEVER |= {"wrapper", "allow_done_after_reset", "dict_spaces", "terminated_truncated"}  # VmasEnv raises


class Strict(Keeper):
    """A scenario that takes no arguments but its own."""

    def make_world(self, batch_dim: int, device: torch.device, n_agents: int = 3) -> World:
        world = super().make_world(batch_dim, device)
        for index in range(1, n_agents):
            world.add_agent(Agent(name=f"agent_{index}"))
        return world


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_of_torchrls_wrapper(name):
    """Discrete actions by dimension were refused: the world that tells what is shared was made of fewer arguments."""
    discrete = {"continuous_actions": False} if name in {"multidiscrete_actions", "categorical_actions"} else {}
    arguments = {"seed": 0, **discrete, name: ARGUMENTS[name]}
    envs = [cls(Strict(), num_envs=NUM_ENVS, **arguments) for cls in (BatchedResetVmasEnv, VmasEnv)]
    ours, theirs = envs
    for spec in ("input_spec", "observation_spec", "reward_spec"):
        assert getattr(ours, spec) == getattr(theirs, spec)
    assert set(ours.full_done_spec.keys()) - {"truncated"} == set(theirs.full_done_spec.keys())
    check_env_specs(ours)
    reset(ours)
    assert ours.rand_step(TensorDict(batch_size=[NUM_ENVS]))["next", "done"].shape == (NUM_ENVS, 1)


def test_no_argument_of_torchrls_wrapper_is_forgotten():
    takes = (VmasEnv.__init__, _EnvWrapper.__init__, make_vmas)
    assert {name for each in takes for name in inspect.signature(each).parameters} == ARGUMENTS.keys() - PIXELS | NEVER


def test_gradients_pass_through_the_resets_of_others():
    """What was put back after a reset of all had no graph: with ``grad_enabled``, gradients ended there."""
    gradients = []
    for cls in (BatchedResetVmasEnv, VmasEnv):
        env = make("balance", cls, grad_enabled=True)
        data = env.reset()
        data["agents", "action"] = action = torch.full((NUM_ENVS, 3, 2), 0.1, requires_grad=True)
        env.step(data)
        data = reset(env)
        data["agents", "action"] = torch.zeros(NUM_ENVS, 3, 2)
        observed = env.step(data)["next", "agents", "observation"].square().sum()
        gradients.append(torch.autograd.grad(observed, action)[0])
    assert torch.equal((gradients[0] != 0).any(-1).any(-1), ~ENDED)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_one_environment_alone():
    env = make("balance")
    env.reset()
    env.rand_step(TensorDict(batch_size=[NUM_ENVS]))
    before = held(env)
    alone = torch.arange(NUM_ENVS) == 3
    reset(env, alone)
    assert_same_rows(held(env), before, ~alone)
    assert env._env.steps.tolist() == [1, 1, 1, 0, 1]


def test_a_tensor_of_all_environments_that_looks_like_one_row_each():
    """Its first dimension is the number of environments by coincidence."""
    for size in (NUM_ENVS, NUM_ENVS + 1):
        env = make(Keeper(), shared=size)
        with pytest.warns(UserWarning, match=rf"for_all, of shape \({size},\), belongs to all"):
            reset(env)
        reset(env)  # said once


def test_time_limits_are_truncations():
    env = make("balance", max_steps=4)
    check_env_specs(env)
    done = env.rollout(8, break_when_any_done=False)["next"]
    assert done["truncated"][:, 3].all()
    assert not done["terminated"][~done["truncated"]].logical_xor(done["done"][~done["truncated"]]).any()
    assert (done["done"] == done["terminated"] | done["truncated"]).all()
    env.reset()
    for _ in range(3):
        result = env.step(env.full_action_spec.zero())["next"]
    reset(env, result["done"].squeeze(-1) | ENDED)
    result = env.step(env.full_action_spec.zero())["next"]
    assert result["truncated"].squeeze(-1).tolist() == (~ENDED).tolist()
    assert torch.equal(result["terminated"].squeeze(-1), env._env.scenario.done()), "the time limit is no end"
    assert not result["terminated"].all()


def test_without_a_limit_it_has_torchrls_keys():
    env = make("balance")
    assert set(env.full_done_spec.keys()) == set(VmasEnv("balance", num_envs=NUM_ENVS).full_done_spec.keys())


def collect(env: BatchedResetVmasEnv, meanwhile: BatchedResetVmasEnv | None = None) -> TensorDict:
    torch.manual_seed(0)
    batches = []
    env = TransformedEnv(env, StepCounter(20))
    for batch in Collector(env, frames_per_batch=20 * NUM_ENVS, total_frames=100 * NUM_ENVS, track_traj_ids=False):
        batches.append(batch)
        if meanwhile is not None:
            with torch.random.fork_rng():  # its actions are drawn from torch's generator
                meanwhile.rollout(3)
    return torch.cat(batches, 1)


def test_seeds_and_random_numbers_of_its_own():
    """The same seed gives the same run through many resets, whatever other environments of the process draw."""
    first, second = collect(make("balance")), collect(make("balance"), meanwhile=make("navigation"))
    assert first["next", "done"].sum() > 2 * NUM_ENVS
    assert (first == second).all()
    other = make("balance")
    other.set_seed(1)
    assert not (first == collect(other)).all()


def test_an_error_leaves_the_global_generators_alone():
    """After a step that failed, or Ctrl-C, a policy explored with the simulator's random numbers."""
    env = make("balance")
    before = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(env._env.scenario, "reward", lambda agent: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            env.rollout(1)
    with torch.random.fork_rng():
        torch.set_rng_state(before)
        env.rand_action(env.reset())  # what the rollout drew itself
        expected = torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), expected)


def test_environments_without_a_seed_differ():
    """A second one was the first, one reset later."""
    one, other = (BatchedResetVmasEnv("navigation", num_envs=NUM_ENVS) for _ in range(2))
    of_one, of_other = ([env.reset()["agents", "observation"] for _ in range(3)] for env in (one, other))
    assert not any(torch.equal(first, second) for first in of_one for second in of_other)


def test_an_environment_that_is_made_disturbs_no_other():
    """Those of VMAS have one generator in a process, which began at the new environment's seed."""
    drawn = []
    for make_another in (False, True):
        plain = VmasEnv("navigation", num_envs=NUM_ENVS, seed=3)
        if make_another:
            BatchedResetVmasEnv("navigation", num_envs=NUM_ENVS, seed=0)
        drawn.append(plain.reset()["agents", "observation"])
    assert torch.equal(*drawn)


def test_a_snapshot_merges_what_places_share_and_refuses_what_it_cannot_split():
    value = torch.zeros(3, 2)
    root = SimpleNamespace(first=value, second=value, count=0, items={1}, text="a")
    snapshot = ObjectSnapshot([root], 3)
    root.first = root.second = torch.ones(3, 2)
    snapshot.keep(torch.tensor([True, False, False]))
    assert root.first is root.second
    assert root.first[:, 0].tolist() == [0, 1, 1]
    for change in ({"count": 1}, {"items": {1, 2}}, {"text": None}, {"first": torch.ones(3, 3)}, {"third": 1}):
        snapshot = ObjectSnapshot([root], 3)
        before = dict(vars(root))
        value = root.second.clone()
        vars(root).update(change)
        root.second.add_(1)
        with pytest.raises(InexactError, match=next(iter(change)) if "third" not in change else "entries"):
            snapshot.keep(torch.tensor([True, False, False]))
        snapshot.restore()
        assert vars(root) == before
        torch.testing.assert_close(root.second, value)


@dataclass(slots=True)
class Hidden:
    last: torch.Tensor


class Outer(Hidden):
    """It has attributes too."""


class Delayed(BaseScenario):
    """Observes the last position, which it keeps in ``kind``."""

    def make_world(self, batch_dim: int, device: torch.device, kind: type = deque, **kwargs: object) -> World:
        world = World(batch_dim, device)
        world.add_agent(Agent(name="agent_0"))
        zeros = torch.zeros(batch_dim, 2)
        self.memory = deque([zeros, zeros], maxlen=2) if kind is deque else kind(zeros)
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        agent = self.world.agents[0]
        agent.set_pos(torch.rand(2) if env_index is not None else torch.rand(self.world.batch_dim, 2), env_index)
        self.remember(agent.state.pos, slice(None) if env_index is None else env_index)

    def remember(self, position: torch.Tensor, rows: slice | int = slice(None)) -> None:
        for key in ["last"] if isinstance(self.memory, Hidden) else [0, 1]:
            value = (self.memory.last if key == "last" else self.memory[key]).clone()
            value[rows] = position[rows]
            if key == "last":
                self.memory.last = value
            else:
                self.memory[key] = value

    def pre_step(self) -> None:
        position = self.world.agents[0].state.pos.clone()
        self.memory.append(position) if isinstance(self.memory, deque) else setattr(self.memory, "last", position)

    def reward(self, agent: Agent) -> torch.Tensor:
        return agent.state.pos[:, 0]

    def observation(self, agent: Agent) -> torch.Tensor:
        return (self.memory[0] if isinstance(self.memory, deque) else self.memory.last).clone()


@pytest.mark.parametrize("cls", [BatchedResetVmasEnv, CompiledVmasEnv])
@pytest.mark.parametrize("kind", [deque, Hidden, Outer])
def test_what_is_kept_in_a_deque_or_in_slots_goes_on_too(kind, cls):
    """A reset of one environment put the memory of all to its own state."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = make(Delayed(), cls, kind=kind)
        env.rollout(3)
        before = env._env.scenario.observation(None)
        reset(env)
        after = env._env.scenario.observation(None)
    assert torch.equal(before[~ENDED], after[~ENDED])
    assert not torch.equal(before[ENDED], after[ENDED])
    assert any("__slots__" in str(each.message) for each in caught) == (kind is not deque)


def test_what_is_nested_too_deeply_is_refused():
    root = SimpleNamespace(value=torch.zeros(3))
    deep = root
    for _ in range(2000):
        deep.next = deep = SimpleNamespace()
    deep.value = torch.zeros(3)
    snapshot = ObjectSnapshot([root], 3)
    root.value.add_(1)
    deep.value.add_(1)
    with pytest.raises(InexactError, match="too deeply"):
        snapshot.keep(torch.tensor([True, False, False]))
    snapshot.restore()
    assert not root.value.any()
    assert not deep.value.any()
    assert len(tensors_in([root])) == 2


def test_a_later_pass_sees_every_change_since_the_first():
    """A number that was dropped once left its identity to the one that took its place."""
    rows = torch.tensor([True, False, False])
    for change in ({"count": 2.5}, {"value": torch.ones(3)}):
        root = SimpleNamespace(value=torch.zeros(3), count=float("1.5"))
        snapshot = ObjectSnapshot([root], 3)
        snapshot.keep(rows)
        held = [part for value, parts in snapshot._held if value is root for part in parts]
        assert any(part is root.count for part in held)
        vars(root).update(change)
        if "count" in change:
            with pytest.raises(InexactError, match=r"count changed from 1.5 to 2.5"):
                snapshot.keep(rows)
        else:
            snapshot.keep(rows)
            assert root.value.tolist() == [0, 1, 1]
