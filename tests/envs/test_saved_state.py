"""A saved environment goes on bit for bit, in another object or process: what its scenario holds, and what it draws."""

from __future__ import annotations

import collections
import copy
import enum
import functools
import io
import itertools
import random
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import EnvCreator, SerialEnv, StepCounter, TransformedEnv, VmasEnv
from vmas.simulator.core import Agent, World
from vmas.simulator.scenario import BaseScenario

from torchrl_trpo.envs import BatchedResetVmasEnv
from torchrl_trpo.envs.object_graph import InexactError, tensors_in
from torchrl_trpo.envs.saved_state import ObjectState
from torchrl_trpo.errors import SettingError

NUM_ENVS = 3
ENDED = torch.tensor([True, False, True])
IN_A_NEW_PROCESS = ("football", "simple_reference")  # opponents that remember, drawn goals
CPU = torch.device("cpu")


def make(scenario: object, seed: int, **kwargs: object) -> BatchedResetVmasEnv:
    """An environment that has been used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Force limits not specified")
        env = BatchedResetVmasEnv(scenario, **{"num_envs": NUM_ENVS, "seed": seed, "max_steps": 4, **kwargs})
    env.reset()
    run(env, steps=2 + seed, seed=seed)
    return env


def run(env: BatchedResetVmasEnv, steps: int, seed: int) -> list[TensorDict]:
    """Random actions, with some environments reset after the first step."""
    torch.manual_seed(seed)
    results = []
    for step in range(steps):
        results.append(env.step(env.rand_action(TensorDict(batch_size=[NUM_ENVS])))["next"])
        if step == 0:
            done = {name: ENDED.unsqueeze(-1) for name in ["_reset", *env.full_done_spec.keys()]}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*reset one by one")
                results.append(env.reset(TensorDict(done, [NUM_ENVS])))
    return results


def go_on(env: BatchedResetVmasEnv) -> list[dict]:
    """What it gives and holds from here on."""
    results = [*run(env, 2, seed=5), env.reset(), *run(env, 1, seed=6)]
    outputs = [{str(key): result[key] for key in result.keys(True, True)} for result in results]
    held = tensors_in((env._env.scenario, env._env.world))
    return [*outputs, {path: tensor.clone() for path, tensor in held.items()}, {"steps": env._env.steps.clone()}]


def through_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stored(env: BatchedResetVmasEnv) -> dict[int, torch.Tensor]:
    """The memory of all its tensors."""
    return dict(enumerate(env.state_dict()["_extra_state"]["storages"]))


def assert_same(left: list[dict], right: list[dict]) -> None:
    for ours, theirs in zip(left, right, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(name, marks=[pytest.mark.slow] if at % 2 else [])  # test_vmas.py has the others
        for at, name in enumerate(VmasEnv.available_envs)
        if name not in IN_A_NEW_PROCESS
    ],
)
def test_each_scenario_goes_on_bit_for_bit(scenario):
    env, other = make(scenario, 0), make(scenario, 1)
    state, why_slowly = env.state_dict(), env._why_slowly
    expected = go_on(env)  # which leaves the state as it was
    other.load_state_dict(through_file(state))
    assert other._why_slowly == why_slowly
    assert_same(go_on(other), expected)


def test_it_goes_on_in_a_new_process(tmp_path):
    envs = {name: make(name, 0) for name in IN_A_NEW_PROCESS}
    torch.save({name: env.state_dict() for name, env in envs.items()}, tmp_path / "states.pt")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_saved_state import *
results = dict()
for name, state in torch.load("states.pt", weights_only=True).items():
    env = make(name, 1)
    env.load_state_dict(state)
    results[name] = go_on(env)
torch.save(results, "results.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for name, env in envs.items():
        assert_same(results[name], go_on(env))


class Inertia(BaseScenario):
    """A scenario whose physics is in closures, with random numbers of its own."""

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: object) -> World:
        world = World(batch_dim, device)
        world.add_agent(Agent(name="agent_0"))
        memory, calls, draw = torch.zeros(batch_dim, 2, device=device), 0, random.Random(0)

        def remember(value: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return memory.mul_(0.5).add_(value).clone() + calls + draw.random()

        self.remember = remember
        self.trace = [memory[:, 0]]
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        position = torch.rand(self.world.batch_dim, 2)
        self.world.agents[0].set_pos(position if env_index is None else position[env_index], batch_index=env_index)

    def observation(self, agent: Agent) -> torch.Tensor:
        self.trace = [*self.trace[-2:], agent.state.pos[:, 1]]
        return torch.cat([self.remember(agent.state.pos), *(each.unsqueeze(-1) for each in self.trace[:1])], -1)

    def reward(self, agent: Agent) -> torch.Tensor:
        return agent.state.pos[:, 0]


@pytest.mark.parametrize("scenario", ["navigation", Inertia])
def test_objects_for_scenarios_and_discrete_actions(scenario):
    scenarios = [scenario if isinstance(scenario, str) else scenario() for _ in range(2)]
    env, other = (make(each, seed, continuous_actions=False) for seed, each in enumerate(scenarios))
    other.load_state_dict(through_file(env.state_dict()))
    assert_same(go_on(other), go_on(env))


def test_torchrls_ways_with_a_state():
    """Transforms have a state of their own, a SerialEnv has one per environment, a creator leaves each its own."""
    env, other = make("balance", 0), make("balance", 1)
    assert not TransformedEnv(env, StepCounter()).state_dict()
    assert set(env.state_dict()) == {"_extra_state"}
    serial = SerialEnv(2, [lambda: make("balance", 0), lambda: make("balance", 1)])
    serial.reset()
    serial.load_state_dict({"worker0": other.state_dict(), "worker1": env.state_dict()})
    assert torch.equal(serial._envs[0]._random_state[0], other._random_state[0])
    assert torch.equal(serial._envs[1]._env.steps, env._env.steps)

    creator = EnvCreator(functools.partial(make, "balance"), create_env_kwargs={"seed": 0})
    assert torch.equal(creator()._random_state[0], make("balance", 0)._random_state[0])


def test_a_copy_has_a_state_of_its_own():
    env = make("balance", 0)
    twin = copy.deepcopy(env)
    state = twin.state_dict()
    go_on(twin)
    before = stored(env)
    twin.load_state_dict(state)
    assert_same([stored(env)], [before])
    assert_same(go_on(twin), go_on(env))


@pytest.mark.parametrize(
    ("scenario", "kwargs", "message"),
    [
        ("balance", {"num_envs": 4}, r"\[4\] here, and tensor .* \[3\] there"),
        ("balance", {"n_agents": 4}, "agent_3 is object .*missing"),
        ("navigation", {}, "scenario 'balance', and this is 'navigation'"),
    ],
)
def test_a_state_of_other_arguments_is_refused_and_changes_nothing(scenario, kwargs, message):
    state = make("balance", 0).state_dict()
    env = BatchedResetVmasEnv(scenario, **{"num_envs": NUM_ENVS, "seed": 0, **kwargs})
    before = stored(env)
    with pytest.raises(SettingError, match=message):
        env.load_state_dict(state)
    assert_same([stored(env)], [before])


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


Pair = collections.namedtuple("Pair", ["left", "right"])


class Thing:
    def __init__(self, value: object) -> None:
        self.value = value

    def double(self) -> object:
        return self.value * 2


def build() -> SimpleNamespace:
    """Something of each kind."""
    shared, captured, count = torch.zeros(4), torch.zeros(2), 0

    def call(step: int = 1) -> tuple[int, torch.Tensor]:
        nonlocal count
        count += step
        return count, captured.add_(step)

    root = SimpleNamespace(shared=shared, again=[shared], view=shared[1:3], grown=None, call=call, thing=Thing(1))
    root.generators = [torch.Generator(), random.Random(), np.random.default_rng(), np.random.RandomState()]
    root.queue, root.pair, root.colour = collections.deque([1]), Pair(0, 0), Colour.RED
    root.layer, root.tools = torch.nn.Linear(2, 1), [max, abs]
    root.array = np.zeros(3)
    root.counts, root.ordered = collections.Counter(), collections.OrderedDict()
    return root


def use(root: SimpleNamespace, value: int) -> None:
    """Changes all of it."""
    root.shared += value
    root.call(value)
    root.array += value
    root.thing.value = torch.full((2,), value)
    root.grown = {(value, "a"): [root.thing, Thing(root.thing.value)]}
    root.grown["other"] = (root.thing, {1, value}, frozenset({2}))
    root.grown["itself"] = root.grown
    root.new_view, root.expanded, root.transposed = root.shared[:2], torch.ones(1).expand(3), torch.rand(2, 3).T
    root.method, root.partial = root.thing.double, functools.partial(max, value, key=abs)
    root.pair, root.colour = Pair(value, [value]), Colour.BLUE
    root.queue.append(value)
    root.call.label = value
    root.values = [1j, b"ab", range(3), slice(1, None), torch.float64, torch.Size([2]), CPU, np.float32(0.1), np.pi]
    root.values += [None, float("inf"), -0.0, 2**70, np.arange(6).reshape(2, 3).copy()]
    root.counts[value] += 1
    root.ordered = collections.OrderedDict(b=1, a=2)
    with torch.no_grad():
        root.layer.weight.fill_(value)
    draws(root)


def draws(root: SimpleNamespace) -> list[float]:
    ours, pythons, numpys, old = root.generators
    return [torch.rand(1, generator=ours).item(), pythons.gauss(0, 1), numpys.random(), old.normal()]


def test_every_kind_of_object_and_what_they_share():
    source, target = build(), build()
    source_state, target_state = (ObjectState({"root": root}, CPU) for root in (source, target))
    parameter, shared = target.layer.weight, target.shared
    use(source, 3)
    use(target, 5)
    use(target, 7)
    assert target_state.load(through_file(source_state.save("more", [source.thing])))[0] == "more"

    assert target.shared is target.again[0] is shared
    assert target.shared.tolist() == [3, 3, 3, 3]
    target.shared[1] = 9
    assert target.view.tolist() == [9, 3]
    assert target.new_view.tolist() == [3, 9]
    assert target.layer.weight is parameter
    assert parameter.tolist() == [[3, 3]]
    assert parameter.requires_grad
    assert target.array.tolist() == [3, 3, 3]
    assert target.thing is target.grown[3, "a"][0] is target.grown["other"][0]
    assert target.grown[3, "a"][1].value is target.thing.value
    assert target.grown["itself"] is target.grown
    assert target.grown["other"][1:] == ({1, 3}, frozenset({2}))
    assert target.expanded.stride() == (0,)
    assert target.transposed.stride() == (1, 3)
    assert torch.equal(target.transposed, source.transposed)
    assert target.method.__self__ is target.thing
    assert target.partial(-4) == -4
    assert (target.pair, type(target.pair), target.colour) == (Pair(3, [3]), Pair, Colour.BLUE)
    assert list(target.queue) == [1, 3]
    assert target.call.label == 3
    assert [type(value) for value in target.values] == [type(value) for value in source.values]
    assert repr(target.values) == repr(source.values)
    assert target.counts == {3: 1}
    assert list(target.ordered.items()) == [("b", 1), ("a", 2)]
    assert draws(target) == draws(source)
    for count, captured in (target.call(), source.call()):
        assert (count, captured.tolist()) == (4, [4, 4])


def test_a_state_can_be_loaded_twice():
    """What the first has made of it does not reach the second."""
    source, *targets = build(), build(), build()
    source_state, *states = (ObjectState({"root": root}, CPU) for root in (source, *targets))
    use(source, 3)
    state = source_state.save()
    for target, its_state in zip(targets, states, strict=True):
        its_state.load(state)
        assert torch.equal(target.transposed, source.transposed)
        target.transposed.zero_()
        target.shared.zero_()
    assert source.shared.all()


class Numbered(Thing):
    def __hash__(self) -> int:
        return self.value


class Other(Numbered):
    pass


def test_members_of_sets_in_any_order():
    source = SimpleNamespace(crew={Numbered(1), Other(2)})
    target = SimpleNamespace(crew={Other(1), Numbered(2)})
    assert [type(each) for each in source.crew] != [type(each) for each in target.crew]
    (state, target_state) = (ObjectState({"root": root}, CPU) for root in (source, target))
    members = sorted(target.crew, key=hash)
    target_state.load(state.save())
    assert [each.value for each in members] == [2, 1]
    assert all(each in target.crew for each in members)


class Slotted:
    __slots__ = ("value",)


def test_what_cannot_be_saved_is_named():
    class Unknown(Thing):
        pass

    leaf = torch.ones(2, requires_grad=True)
    unknown = [Unknown(1), Slotted(), itertools.count(), lambda: 1, [].append, np.zeros(4)[1:], leaf * 2]
    unknown += [torch.eye(2).to_sparse(), torch.Generator(), collections.defaultdict(list), np.array([None]), Unknown]
    for value in unknown:
        root = SimpleNamespace(held=Thing(None))
        state = ObjectState({"root": root}, CPU)
        root.held.value = [0, (value,)]
        with pytest.raises(InexactError, match=r"root\.held\.value\.1\.0, an? .*, cannot be saved"):
            state.save()
    root = SimpleNamespace(held=itertools.count())  # from the beginning, but what it holds cannot be read
    with pytest.raises(InexactError, match=r"root\.held, an? count, cannot be saved"):
        ObjectState({"root": root}, CPU).save()
