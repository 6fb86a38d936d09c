"""A compiled VMAS environment against VMAS itself."""

import dataclasses
import functools
import io
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from vmas.simulator.core import Agent, Landmark, Line, Sphere, World
from vmas.simulator.scenario import BaseScenario
from vmas.simulator.utils import ScenarioUtils

from tests.cases import needs_compiler
from torchrl_trpo.envs import BatchedResetVmasEnv, CompiledVmasEnv
from torchrl_trpo.envs.attribute_reads import attribute_reads
from torchrl_trpo.envs.compiled import find_difference
from torchrl_trpo.envs.compiled_vmas import _RESET_TOGETHER

pytestmark = needs_compiler
N = 20


class Push(BaseScenario):
    """Two agents, a ball, and whatever of ``traits`` makes it hard to compile."""

    def make_world(self, batch_dim, device, traits=(), **kwargs):
        self.traits = traits
        world = World(batch_dim, device)
        for index in range(2):
            noise = 0.1 if "noise" in traits else 0.0
            world.add_agent(Agent(name=f"agent_{index}", u_noise=noise, u_range=0.8))
            world.agents[-1].slow = torch.zeros(batch_dim, 2, device=device)
        self.ball = Landmark(name="ball", movable=True, shape=Sphere(0.1), mass=0.5)
        world.add_landmark(self.ball)
        self.bonus, self.n_steps, self.weights = 1.0, 0, np.ones(2)
        self.alias = self.settings = {"extra": (0.0,)}
        self.offset = torch.zeros(batch_dim, device=device)
        if "tuple" in traits:
            self.offset = (self.offset,)
        self.calls = torch.zeros(batch_dim, device=device)
        self.total, self.copy, self.seen = self.calls + 1.0, self.calls + 2.0, torch.zeros(batch_dim, 2)
        return world

    def reset_world_at(self, env_index=None):
        if "order" in self.traits:
            order = torch.randperm(len(self.world.entities)).tolist()
            self.order = [self.world.entities[index] for index in order]
            for index, entity in enumerate(self.order):
                entity.index = index
        if env_index is None and "goal" in self.traits:
            self.goal = self.world.agents[torch.randint(0, 2, (1,)).item()]
        for entity in self.world.entities:
            position = torch.rand(1 if env_index is not None else self.world.batch_dim, 2) - 0.5
            entity.set_pos(position if env_index is None else position[0], batch_index=env_index)
        if "sharing" in self.traits:
            self.seen = self.ball.state.pos
        self.cache = {}
        if env_index is None:
            self.calls = torch.zeros(self.world.batch_dim)
        else:
            self.calls[env_index] = 0

    def reward(self, agent):
        distance = torch.linalg.vector_norm(agent.state.pos - self.ball.state.pos, dim=-1)
        reward = (self.offset[0] if "tuple" in self.traits else self.offset) - distance
        reward[distance < 0.3] += self.bonus * float(self.weights[1])
        reward += self.settings["extra"][0]
        if "branch" in self.traits and (distance > 0.9).any():
            reward = reward * 2
        if "goal" in self.traits:
            reward = reward + self.goal.state.pos[:, 0]
        if "rare" in self.traits:
            if not (distance > 1.15).any():
                self.calls[distance < 0.7] += 1.0
                half = agent.state.vel / 2
                agent.slow = half
            if self.n_steps == 0 and self.world.collides(agent, self.ball):
                for each in self.world.agents:
                    each.slow = each.slow + 1.0
        if "sharing" in self.traits:  # with the state before a step, with another tensor afterwards
            reward = reward + (self.seen - self.ball.state.pos)[:, 0] + self.total + self.copy
            self.total += distance
            self.seen = agent.state.pos
        if "tries" in self.traits:
            found = ScenarioUtils.find_random_pos_for_entity(
                torch.stack([entity.state.pos for entity in self.world.entities], 1),
                None,
                self.world,
                0.4,
                (-1, 1),
                (-1, 1),
            )
            self.calls = found[:, 0, 0]
        if "order" in self.traits and self.bonus == 2.0:
            reward = reward + self.order[0].index + vars(agent)["index"]
        if "lookup" in self.traits:
            reward = reward + {1.0: 0.5, 3.0: 4.0}[self.bonus]
        if "cache" in self.traits and agent is self.world.agents[0]:
            self.cache = {}
            self.cache["distance",] = distance
        if "rows" in self.traits:
            reward = reward + self.sampled(agent, distance > 0.5)
        if "count" in self.traits:
            reward = reward + (agent.state.pos[distance > 0.3].shape[0] == 3)
        if "batch" in self.traits:
            reward = reward - reward.mean()
        if "counter" in self.traits:
            self.n_steps += 1
        return reward

    def sampled(self, agent, far):
        """The far environments choose among random positions, all of them among those of the first one."""
        positions = agent.state.pos[far]
        samples = torch.randn(positions.shape[0], 3, 2)
        samples[:, 1:] += positions[:, None]
        flat = samples.view(samples.shape[0] * samples.shape[1], 2)
        flat[flat[:, 1] > 0.2, 0] *= -2
        values = torch.stack([each.norm(dim=-1) for each in (samples, samples - positions[:, None])]).sum(0)
        chosen = values.argmax(1).unsqueeze(0).unsqueeze(-1).expand(-1, -1, 2)
        found = torch.zeros(self.world.batch_dim, 2)
        found[far] = torch.gather(samples, 1, chosen)[0] + torch.rand(positions.shape[0], 1)
        return found.sum(-1)

    def observation(self, agent):
        if "memory" in self.traits:
            self.calls = self.calls + 1
        return torch.cat([agent.state.pos, agent.state.vel, self.ball.state.pos, self.calls.unsqueeze(-1)], -1)

    def info(self, agent):
        return {"speed": torch.linalg.vector_norm(agent.state.vel, dim=-1), "slow": agent.slow}

    def done(self):
        return self.ball.state.pos[:, 0] > 0.45


def make(scenario=None, *, compiled=True, seed=0, n=N, **kwargs):
    scenario = Push() if scenario is None else scenario
    return (CompiledVmasEnv if compiled else BatchedResetVmasEnv)(scenario, num_envs=n, seed=seed, **kwargs)


def both(*args, **kwargs):
    return make(*args, **kwargs), make(*args, compiled=False, **kwargs)


def is_compiled(env):
    return env.why_not_compiled is None


def assert_same(ours, theirs, size=1.0):
    """Up to rounding of numbers of a size: a reward may be the difference of two large ones."""
    rounding = 4 * torch.finfo(torch.float32).eps * size
    assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
    for key in theirs.keys(True, True):
        scale = max(1.0, theirs[key].double().abs().max().item())
        torch.testing.assert_close(
            ours[key], theirs[key], rtol=1e-4, atol=max(2e-5 * scale, rounding), msg=lambda m, k=key: f"{k}: {m}"
        )


def go_on(ours, theirs, steps, change=lambda env, step: None, size=1.0):
    """Steps of both from a reset, until an environment ends; what both gave is the same."""
    data = theirs.reset()
    assert_same(ours.reset(), data)
    for step in range(steps):
        for env in (ours, theirs):
            change(env._env, step)
        data = theirs.rand_action(data)
        result = theirs.step(data.clone())
        assert_same(ours.step(data.clone())["next"], result["next"], size)
        data = result["next"].exclude("reward")
    return data


SCENARIOS = ["simple_spread", "transport", "balance", "dropout", "wheel"]


@pytest.mark.parametrize(
    ("scenario", "continuous"),
    [
        ("simple_spread", True),
        ("transport", False),
        *(pytest.param(s, c, marks=pytest.mark.slow) for s in SCENARIOS for c in (True, False)),
    ],
)
def test_it_gives_what_vmas_gives(scenario, continuous):
    ours, theirs = both(scenario, continuous_actions=continuous, max_steps=50)
    assert is_compiled(ours)
    go_on(ours, theirs, 15, size=150.0 if scenario == "balance" else 1.0)  # its reward subtracts 100 times distances


COMPILED = """
    asym_joint balance ball_passage ball_trajectory buzz_wire circle_trajectory diff_drive discovery dispersion drone
    dropout flocking football give_way goal het_mass joint_passage joint_passage_size kinematic_bicycle line_trajectory
    multi_give_way navigation passage reverse_transport sampling simple simple_adversary simple_crypto simple_push
    simple_reference simple_speaker_listener simple_spread simple_tag simple_world_comm transport vel_control wheel
    wind_flocking"""


@pytest.mark.slow
@pytest.mark.parametrize("scenario", COMPILED.split())
@pytest.mark.filterwarnings("ignore:Force limits not specified")
def test_scenarios_that_compile(scenario):
    """Each is compared with VMAS when it is compiled. After three steps, no step is left to VMAS."""
    env = make(scenario, n=60)
    assert is_compiled(env)
    data = env.reset()
    for _ in range(20):
        data = env.step(env.rand_action(data))["next"].exclude("reward")
    assert env.n_left_to_vmas == 0
    assert env.state.attach()


@pytest.mark.parametrize("traits", [(), ("memory",), ("noise",), ("branch",), ("tries",), ("rows",)])
def test_traits_that_compile(traits):
    """Branches on data, which go either way here, noise of the actions, and observations that change the scenario.

    And positions that are drawn again until none is too close: the random numbers that follow are VMAS's. And random
    numbers for the environments of a mask, of which all take those of the first one, as in VMAS's football.
    """
    ours, theirs = both(traits=traits)
    assert is_compiled(ours)
    go_on(ours, theirs, 40)


def test_numbers_are_vmas_s_after_as_many_tries_as_are_compiled(monkeypatch):
    """The numbers of the last try, which nothing read, were not counted: what followed was drawn one try too early."""
    monkeypatch.setattr("torchrl_trpo.envs.reads._MOST_TRIES", 4)
    ours, theirs = both(traits=("tries",))
    assert is_compiled(ours)
    go_on(ours, theirs, 40)


def test_only_an_environment_that_last_bits_decide_may_differ():
    """One of them excused all others; and two changes of last bits often missed it, so that VMAS took all steps."""
    exact, ours, turned = torch.zeros(3, 3, 2).unbind(0)
    ours[1], turned[1] = 1.0, -0.5
    assert find_difference(["force"], [ours], [exact], [[exact], [turned]]) is None
    assert find_difference(["force"], [ours], [exact], [[turned.roll(1, 0)]]) == "force is not what it should be"


def test_small_numbers_are_compared_too():
    """Numbers below 1e-4 were all equal."""
    exact = torch.full((3, 1), 1e-5)
    assert find_difference(["reward"], [exact * 1.1], [exact], floor=1e-3) == "reward is not what it should be"
    assert find_difference(["reward"], [exact * (1 + 1e-6)], [exact], floor=1e-3) is None


def test_what_a_reset_empties_and_a_step_fills_before_it_reads_it(monkeypatch):
    """After a reset VMAS took the next step, since the dict had no entries; and environments were reset one by one."""
    ours, theirs = both(traits=("cache",))
    assert ours.pool is not None
    go_on(ours, theirs, 2)
    monkeypatch.setattr(ours, "_advance", None)
    go_on(ours, theirs, 5)


class Rail(BaseScenario):
    """Spheres beyond the end of a line: its narrow phase begins 1/150 farther out than the broad phase."""

    def make_world(self, batch_dim, device, **kwargs):
        world = World(batch_dim, device, substeps=2)
        world.add_agent(Agent(name="agent", shape=Sphere(0.1), u_multiplier=0.02))
        world.add_landmark(Landmark(name="line", collide=True, rotatable=True, shape=Line(0.4)))
        return world

    def reset_world_at(self, env_index=None):
        agent = self.world.agents[0]
        agent.set_pos(torch.tensor([0.29, 0.0]) + 0.03 * torch.rand(self.world.batch_dim, 2), batch_index=env_index)

    def reward(self, agent):
        return agent.state.vel[:, 0]

    def observation(self, agent):
        return torch.cat([agent.state.pos, agent.state.vel, self.world.landmarks[0].state.rot], -1)


@pytest.mark.parametrize("n", [1, 3, 30])
def test_the_broad_phase_decides_over_all_environments(n):
    """The narrow phase pushed where VMAS does not ask it, because no environment is near."""
    ours, theirs = make(Rail(), n=n), make(Rail(), compiled=False, n=n)
    assert is_compiled(ours)
    for _ in range(4):
        go_on(ours, theirs, 10)


def test_attributes_may_share_a_tensor_at_one_time_and_another_at_one(monkeypatch):
    """Who shares a tensor changes in a step and in a reset. Someone writes to one, and so changes the other."""

    def change(simulator, step):
        if step in {2, 5}:
            simulator.agents[1].state.pos[3] = 0.1
        if step == 8:
            simulator.scenario.copy = simulator.scenario.total  # to which steps write

    ours, theirs = both(traits=("sharing",))
    assert is_compiled(ours)
    left, advance = [], CompiledVmasEnv._advance
    monkeypatch.setattr(CompiledVmasEnv, "_advance", lambda *args: (left.append(args[0] is ours), advance(*args))[1])
    go_on(ours, theirs, 8, change)
    assert sum(left) <= 1  # the first step makes attributes
    assert ours.pool is not None
    with pytest.warns(UserWarning, match="scenario.copy is the same tensor as scenario.total at one time"):
        go_on(ours, theirs, 12, change, size=30.0)


def test_what_a_reset_draws_for_all_is_compiled_for_each_outcome(monkeypatch):
    """VMAS takes the first two steps after such a reset at most, and none when all outcomes were there.

    Compiling in the middle of an episode once shortened it.
    """
    ours, theirs = both(traits=("goal",), max_steps=6)
    left, advance = [], CompiledVmasEnv._advance
    for episode in range(10):
        if episode == 8:
            monkeypatch.setattr(CompiledVmasEnv, "_advance", lambda *args: (left.append(1), advance(*args))[1])
        go_on(ours, theirs, 6)
    assert len(ours._variants) == 2
    assert len(left) <= 2


def test_a_reference_to_another_object_counts():
    """It was once taken for the same, if the object was held elsewhere too."""

    def change(simulator, step):
        if step in {3, 5}:
            simulator.scenario.goal = next(agent for agent in simulator.agents if agent is not simulator.scenario.goal)

    go_on(*both(traits=("goal",)), 8, change)


def test_an_if_that_changes_tensors_alone_goes_both_ways(monkeypatch):
    """VMAS decides it over all environments, so a step may be otherwise although nothing of a row has changed."""
    ours, theirs = both(traits=("rare",))
    left, advance = [], CompiledVmasEnv._advance
    assert is_compiled(ours)
    monkeypatch.setattr(CompiledVmasEnv, "_advance", lambda *args: (left.append(1), advance(*args))[1])
    changes, before = set(), [None]

    def change(simulator, step):
        calls = simulator.scenario.calls.clone()
        if before[0] is not None and simulator is theirs._env:
            changes.add(bool((calls != before[0]).any()))
        before[0] = calls if simulator is theirs._env else before[0]

    go_on(ours, theirs, 40, change)
    assert changes == {True, False}
    assert len(left) <= 1  # the first step makes attributes


@pytest.mark.parametrize(
    ("traits", "reason"),
    [
        (("batch",), "rows"),
        (("tuple",), "offset.0 changes, and is shared by all environments"),
        (("counter",), "n_steps changes from"),
        (("count",), "computes with the number of rows"),
        (("gradients",), "gradients are to pass through it"),
    ],
)
def test_traits_that_do_not(traits, reason):
    kwargs = {"traits": traits, "grad_enabled": "gradients" in traits}
    with pytest.warns(UserWarning, match=f"is stepped by VMAS, not compiled: .*{reason}"):
        ours = make(**kwargs)
    assert not is_compiled(ours)
    go_on(ours, make(compiled=False, **kwargs), 5)


class Walk(BaseScenario):
    """An agent that walks to the right, whatever its actions; it arrives after a dozen steps."""

    def make_world(self, batch_dim, device, **kwargs):
        world = World(batch_dim, device)
        world.add_agent(Agent(name="agent_0"))
        self.zeros = torch.zeros(batch_dim)
        self.begin(world, **kwargs)
        return world

    def begin(self, world):
        pass

    def reset_world_at(self, env_index=None):
        self.world.agents[0].set_pos(torch.zeros(self.world.batch_dim, 2), env_index)

    def process_action(self, agent):
        agent.action.u = torch.tensor([1.0, 0.0]).repeat(self.world.batch_dim, 1)

    def arrived(self):
        return self.world.agents[0].state.pos[:, 0] > 0.3

    def reward(self, agent):
        return self.world.agents[0].state.pos[:, 0]

    def observation(self, agent):
        return torch.cat([agent.state.pos, agent.state.vel], -1)


GENERATOR = np.random.default_rng(0)


class DrawsFromAGlobal(Walk):
    def reward(self, agent):
        return self.zeros + GENERATOR.random()


class Draws(Walk):
    def begin(self, world):
        self.generator = random.Random(0)

    def reward(self, agent):
        return self.zeros + self.generator.random()


class Iterates(Walk):
    def begin(self, world):
        self.count = itertools.count()

    def reward(self, agent):
        return self.zeros + next(self.count)


@dataclasses.dataclass(slots=True)
class Settings:
    scale: float = 1.0


class HasSlots(Walk):
    def begin(self, world):
        self.settings = Settings()


class HasViews(Walk):
    def begin(self, world):
        self.goals = torch.zeros(world.batch_dim, 2, 2)
        world.agents[0].goal = self.goals[:, 0]

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        self.goals[slice(None) if env_index is None else env_index] += 1.0

    def observation(self, agent):
        return agent.goal


class IsGivenRows(Walk):
    def begin(self, world, goal):
        self.goal = goal

    def reward(self, agent):
        return agent.state.pos[:, 0] - self.goal


class ReadsAnArray(Walk):
    def reward(self, agent):
        return agent.state.pos[:, 0] * float(np.sign(agent.state.pos.numpy()[0, 0]))


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        (DrawsFromAGlobal, "other numbers when it is called again"),
        (Draws, "generator, a Random, may change unseen"),
        (Iterates, "count, a count, may change unseen"),
        (HasSlots, "settings, a Settings, may change unseen"),
        (HasViews, "_goal shares its memory with scenario.goals"),
        (IsGivenRows, "with another number of environments"),
        (ReadsAnArray, "by numpy"),
    ],
)
def test_scenarios_that_do_not_compile(scenario, reason):
    """They were compiled, and gave other numbers; or an error came; or what they hold had moved on afterwards."""
    kwargs = {"goal": torch.linspace(0, 1, N)} if scenario is IsGivenRows else {}
    with pytest.warns(UserWarning, match=f"is stepped by VMAS, not compiled: .*{reason}"):
        ours = make(scenario(), **kwargs)
    if scenario is not DrawsFromAGlobal:
        go_on(ours, make(scenario(), compiled=False, **kwargs), 3)


class CountsInATest(Walk):
    def begin(self, world):
        self.hits, self.flag = self.zeros.clone(), self.zeros.clone()

    def hit(self):
        self.hits = self.hits + self.arrived()
        return self.arrived()

    def reward(self, agent):
        if self.hit().any():
            self.flag = self.flag + 1.0
        return self.hits + self.flag


class AddsUpInBodies(Walk):
    def begin(self, world):
        self.total = self.zeros.clone()

    def reward(self, agent):
        total, self.total = self.zeros.clone(), self.zeros.clone()
        for distance in (1.8, 0.3):
            if (agent.state.pos[:, 0] > distance).any():
                total = total + 1.0
                self.total = total
        return self.total


class FailsWhereNotDue(Walk):
    def begin(self, world):
        self.best, self.found = None, self.zeros.clone()

    def reward(self, agent):
        if (agent.state.pos[:, 0] > 50.0).any():
            self.found = self.best.clone()
        return self.found


class RefillsACache(Walk):
    def begin(self, world):
        self.cache = {}

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        self.cache = {}

    def reward(self, agent):
        self.cache = {"distance": agent.state.pos[:, 0] + 1.0}
        return self.cache["distance"]

    def observation(self, agent):
        return torch.stack([self.cache.get("distance", self.zeros - 1.0)], -1)


@pytest.mark.parametrize("scenario", [CountsInATest, AddsUpInBodies, FailsWhereNotDue, RefillsACache])
def test_scenarios_that_compile_with_care(scenario):
    """Tests ran twice, bodies that are not due were added to, and failed, and a cache was not empty after a reset."""
    ours, theirs = make(scenario()), make(scenario(), compiled=False)
    assert is_compiled(ours)
    go_on(ours, theirs, 20)
    assert_same(ours.reset(), theirs.reset())


class Ghost(World):
    """A world without collisions as long as nobody has arrived."""

    def collides(self, a, b):
        return bool((self.agents[0].state.pos[:, 0] > 0.3).any()) and super().collides(a, b)


class CollidesInItsOwnWay(Walk):
    def make_world(self, batch_dim, device, **kwargs):
        world = Ghost(batch_dim, device)
        for index in range(2):
            world.add_agent(Agent(name=f"agent_{index}", shape=Sphere(0.2)))
        return world

    def process_action(self, agent):
        super().process_action(agent)
        agent.action.u *= float(agent.name == "agent_0")

    def reset_world_at(self, env_index=None):
        for index, agent in enumerate(self.world.agents):
            agent.set_pos(torch.full((self.world.batch_dim, 2), 0.25 * index), env_index)

    def reward(self, agent):
        return self.world.collides(*self.world.agents) + self.world.agents[0].state.pos[:, 0]


@pytest.mark.filterwarnings("ignore:.*VMAS takes the steps")
def test_a_world_may_have_collisions_of_its_own():
    """They were taken to be VMAS's broad phase, which a trace passes."""
    go_on(make(CollidesInItsOwnWay()), make(CollidesInItsOwnWay(), compiled=False), 20)


def scaled(values, scale=1.0, offset=0.0):
    return values * scale + offset


def variable():
    value = 1.0

    def get():
        return value

    def put(new):
        nonlocal value
        value = new

    return get, put


class Holds(Walk):
    """What is changed while it runs, each thing of another kind."""

    def begin(self, world):
        self.off, self.scale, self.bonus = set(), functools.partial(scaled, scale=2.0), 1.0
        self.get, self.put = variable()
        self.given, self.table = self.zeros.clone(), torch.arange(6.0).reshape(2, 3)
        self.transposed = self.table.T

    def reward(self, agent):
        reward = self.scale(agent.state.pos[:, 0]) + self.given + self.transposed[1, 0]
        bonus = self.bonus if isinstance(self.bonus, float) else 0.0
        return reward * self.get() * bonus * (0.0 if "a" in self.off else 1.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda scenario, outside: scenario.off.add("a"),
        lambda scenario, outside: setattr(scenario, "scale", functools.partial(scaled, offset=2.0)),
        lambda scenario, outside: scenario.put(3.0),
        lambda scenario, outside: setattr(scenario, "bonus", 3.0),
        lambda scenario, outside: scenario.table.add_(1.0),
        lambda scenario, outside: outside.add_(1.0),
    ],
    ids=["set", "partial", "closure", "number", "transposed", "outside"],
)
@pytest.mark.filterwarnings("ignore:.*VMAS takes the steps")
def test_what_is_changed_in_parts_counts(change):
    """Each was read once, when the step was compiled; and a number was no tensor in a comparison of calls."""

    def change_both(simulator, step):
        if step == 2:
            outside[simulator] = simulator.scenario.given = torch.zeros(N)
        if step in {4, 6}:
            change(simulator.scenario, outside[simulator])

    ours, theirs, outside = make(Holds()), make(Holds(), compiled=False), {}
    assert is_compiled(ours)
    go_on(ours, theirs, 9, change_both)


def test_what_someone_changes_counts():
    """Constants, tensors that are replaced, and tensors and NumPy arrays that are written to."""

    def change(simulator, step):
        if step == 3:
            simulator.scenario.bonus = 5.0
        if step == 5:
            simulator.scenario.bonus = 1.0
        if step == 8:
            simulator.agents[0].set_pos(torch.full((N, 2), 0.2), batch_index=None)
        if step == 10:
            simulator.world.landmarks[0].state.pos[3] = -0.4
        if step == 11:
            simulator.scenario.offset[2] = 0.5
        if step == 12:
            simulator.scenario.weights[1] = 3.0
        if step == 13:
            simulator.scenario.weights[1] = 1.0
        if step == 14:
            simulator.agents[1].shape.some_note = "new"
        if step in {15, 16}:  # what is read is in another attribute too, which is not read
            simulator.scenario.settings["extra"] = (16.0 - step,)

    ours, theirs = both()
    go_on(ours, theirs, 18, change)


def test_a_change_that_lasts_is_told():
    ours, theirs = both()
    ours._env.scenario.weights[1] = theirs._env.scenario.weights[1] = 3.0
    with pytest.warns(UserWarning, match="VMAS takes the steps.*weights changes from"):
        go_on(ours, theirs, 4)


def test_numbers_that_change_are_inputs(monkeypatch):
    """A Python float of the scenario changes with a curriculum: the step is compiled once more, for all its values."""
    ours, theirs = both()
    left, advance = [], CompiledVmasEnv._advance
    for bonus in (3.0, 0.25, -1.5):
        ours._env.scenario.bonus = theirs._env.scenario.bonus = bonus
        go_on(ours, theirs, 4)
        assert type(ours._env.scenario.bonus) is float
        monkeypatch.setattr(
            CompiledVmasEnv, "_advance", lambda *args: (left.append(args[0] is ours), advance(*args))[1]
        )
    assert len(ours._variants) == 2
    assert sum(left) <= 2  # the first step of an episode makes attributes


def test_a_number_that_cannot_be_an_input_is_told():
    """What looks it up in a dict finds no tensor there."""
    ours, theirs = both(traits=("lookup",))
    ours._env.scenario.bonus = theirs._env.scenario.bonus = 3.0
    with pytest.warns(UserWarning, match="VMAS takes the steps.*bonus changes from 1.0 to 3.0"):
        go_on(ours, theirs, 4)


def test_attributes_that_no_step_reads_may_change(monkeypatch):
    """A reset draws an order of the entities, which the rewards depend on if the bonus is 2, and not otherwise."""
    ours, theirs = both(traits=("order",))
    assert is_compiled(ours)
    left, advance = [], CompiledVmasEnv._advance
    monkeypatch.setattr(CompiledVmasEnv, "_advance", lambda *args: (left.append(args[0] is ours), advance(*args))[1])
    for _ in range(4):
        go_on(ours, theirs, 3)
    assert sum(left) <= 1  # the first step makes attributes

    def change(simulator, step):
        simulator.scenario.bonus = 2.0

    with pytest.warns(UserWarning, match="VMAS takes the steps.*bonus changes from 1.0 to 2.0"):
        go_on(ours, theirs, 4, change)


def test_attributes_that_a_step_reads():
    class Thing:
        def __init__(self):
            self.a, self.b, self.c = 1, 2, 3

        @property
        def through(self):
            return self.b

    things, found = [Thing() for _ in range(3)], set()
    with attribute_reads({f"thing{number}": thing for number, thing in enumerate(things)}, found):
        things[0].c = getattr(things[0], "a") + things[1].through  # noqa: B009
        vars(things[2])
        hasattr(things[0], "d")
    things[0].b  # noqa: B018
    names = {name for name in found if name.rpartition(".")[2] in "abcd"}
    assert names == {"thing0.a", "thing0.d", "thing1.b", "thing2.a", "thing2.b", "thing2.c"}
    assert "__getattribute__" not in vars(Thing)


def test_what_someone_holds_stays():
    env = make()
    data = env.reset()
    held = env._env.agents[0].state.pos
    before = held.clone()
    results = [env.step(env.rand_action(data))["next"]]
    observed = results[0]["agents", "observation"].clone()
    for _ in range(3):
        results.append(env.step(env.rand_action(data))["next"])
    assert torch.equal(held, before)
    assert torch.equal(results[0]["agents", "observation"], observed)
    assert torch.equal(env._env.agents[0].state.pos, results[-1]["agents", "observation"][:, 0, :2])


def test_vmas_raises_its_own_errors():
    ours, theirs = both()
    data = go_on(ours, theirs, 3)
    state = ours._env.agents[0].state.pos.clone()
    for wrong in (float("nan"), 0.9):
        bad = ours.rand_action(data.clone())
        bad["agents", "action"][7, 1, 0] = wrong
        messages = []
        for env in (ours, theirs):
            with pytest.raises(AssertionError) as error:
                env.step(bad.clone())
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    assert torch.equal(ours._env.agents[0].state.pos, state)


@pytest.mark.parametrize("traits", [(), ("memory",)])
def test_ended_environments_take_fresh_ones(traits):
    """Those of a reset of many by VMAS, one after the other; those that go on keep their bits."""
    ours, theirs = both(traits=traits)
    data = go_on(ours, theirs, 3)
    many = make(traits=traits, compiled=False, n=N * (_RESET_TOGETHER // N))
    many._random_state = list(ours._random_state)
    many.reset()
    fresh = [entity.state.pos.clone() for entity in many._env.world.entities]
    used = 0
    for ended in ([2, 5], [7], list(range(10))):
        going = [entity.state.pos.clone() for entity in ours._env.world.entities]
        calls = ours._env.scenario.calls.clone()
        reset = torch.zeros(N, 1, dtype=torch.bool)
        reset[ended] = True
        after = ours.reset(data.clone().set("_reset", reset))
        for entity, before, new in zip(ours._env.world.entities, going, fresh, strict=True):
            expected = before.clone()
            expected[ended] = new[used : used + len(ended)]
            assert torch.equal(entity.state.pos, expected)
        used += len(ended)
        if "memory" in traits:
            expected_calls = calls.clone()
            expected_calls[ended] = 2
            assert torch.equal(ours._env.scenario.calls, expected_calls)
        position = ours._env.agents[0].state.pos
        assert torch.equal(after["agents", "observation"][ended, 0, :2], position[ended])
        assert not after["done"][ended].any() or (ours._env.world.landmarks[0].state.pos[ended, 0] > 0.45).any()


def test_more_environments_end_than_wait():
    env = make()
    data = env.reset()
    seen = set()
    n_ended = N - 1
    for _ in range(_RESET_TOGETHER // n_ended + 3):
        reset = torch.zeros(N, 1, dtype=torch.bool)
        reset[:n_ended] = True
        data = env.reset(data.set("_reset", reset))
        seen |= {tuple(row.tolist()) for row in env._env.agents[0].state.pos[:n_ended]}
    assert len(seen) == (_RESET_TOGETHER // n_ended + 3) * n_ended, "each fresh environment is used once"


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("traits", [(), ("noise", "memory"), ("goal",)])
@pytest.mark.filterwarnings("ignore:.*are reset one by one")
def test_a_saved_one_goes_on_to_the_bit(traits):
    env, other = (make(traits=traits, max_steps=12, seed=seed) for seed in (0, 5))
    torch.manual_seed(0)
    data = env.reset()
    for _ in range(30):
        _, data = env.step_and_maybe_reset(env.rand_action(data))
    other.load_state_dict(through_file(env.state_dict()))
    results = []
    for each in (env, other):
        torch.manual_seed(1)
        steps, now = [], data.clone()
        for _ in range(30):
            step, now = each.step_and_maybe_reset(each.rand_action(now))
            steps.append(step)
        results.append(torch.stack(steps))
    assert results[0]["next", "done"].any()
    for key in results[0].keys(True, True):
        assert torch.equal(results[0][key], results[1][key]), key


def test_a_rollout_of_torchrl():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make("simple_spread", max_steps=7)
        data = env.rollout(20, break_when_any_done=False)
    assert data["next", "truncated"].sum() == 2 * N
    assert torch.equal(data["next", "truncated"], data["next", "done"])


def test_actions_that_have_a_graph():
    """They were an error outside of ``torch.no_grad``, or left their graph in the environment."""
    env = CompiledVmasEnv("navigation", num_envs=6, seed=0, n_agents=2)
    weight = torch.ones((), requires_grad=True)

    def policy(data):
        return data.set(("agents", "action"), weight * torch.full((6, 2, 2), 0.5))

    data = env.rollout(3, policy)
    assert data.shape == (6, 3)
    assert not data["next", "agents", "observation"].requires_grad
