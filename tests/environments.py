"""Small vectorised environments, as a user would write them for ``env=custom env.factory=...``."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, OneHot, Unbounded
from torchrl.envs import (
    EnvBase,
    FlattenObservation,
    ObservationNorm,
    PettingZooWrapper,
    TransformedEnv,
    VecNormV2,
    VmasEnv,
)
from torchrl.envs.utils import MarlGroupMapType

from torchrl_trpo.envs.replay import ReplayedGymEnv


def shape_of(size):
    return (size,) if isinstance(size, int) else size


class Copy(EnvBase):
    """Every agent is paid for copying its observation: its largest entry, or its values.

    Args:
        groups: the number of agents, the size or shape of their observations and their actions, by group. Actions are
            ``("discrete", n)``, ``("masked", n)``, ``("multi", [n, m])``, ``("continuous", n)``, ``("unbounded", n)``.
        num_envs: the number of environments.
        death: the share of agents that die each step: their ``"mask"`` goes off, and they observe and earn 0.
    """

    def __init__(self, groups, num_envs, death=0.0):
        super().__init__(batch_size=(num_envs,))
        self.groups, self.death = groups, death
        observation, action, reward = {}, {}, {}
        for group, (n, n_obs, (kind, size)) in groups.items():
            entries = {"observation": Unbounded((num_envs, n, *shape_of(n_obs)))}
            if kind == "masked":
                entries["action_mask"] = Categorical(2, (num_envs, n, size), dtype=torch.bool)
            if death:
                entries["mask"] = Categorical(2, (num_envs, n), dtype=torch.bool)
            observation[group] = Composite(entries, shape=(num_envs, n))
            action[group] = Composite({"action": self._action_spec(num_envs, n, kind, size)}, shape=(num_envs, n))
            reward[group] = Composite({"reward": Unbounded((num_envs, n, 1))}, shape=(num_envs, n))
        self.observation_spec = Composite(observation, shape=(num_envs,))
        self.action_spec = Composite(action, shape=(num_envs,))
        self.reward_spec = Composite(reward, shape=(num_envs,))
        self.done_spec = Composite({"done": Categorical(2, (num_envs, 1), dtype=torch.bool)}, shape=(num_envs,))

    @staticmethod
    def _action_spec(num_envs, n, kind, size):
        if kind == "multi":
            return MultiCategorical(torch.tensor(size).expand(num_envs, n, len(size)), (num_envs, n, len(size)))
        if kind in {"discrete", "masked"}:
            return Categorical(size, (num_envs, n))
        if kind == "unbounded":
            return Unbounded((num_envs, n, size))
        return Bounded(-1, 1, (num_envs, n, size))

    def _observe(self, alive):
        out = TensorDict({}, self.batch_size)
        for group, (n, n_obs, (kind, size)) in self.groups.items():
            observation = torch.rand(*self.batch_size, n, *shape_of(n_obs), generator=self.generator) * 2 - 1
            entries = {"observation": observation}
            if kind == "masked":
                entries["action_mask"] = observation[..., :size] > observation[..., :size].mean(-1, keepdim=True)
            if self.death:
                entries["observation"] = torch.where(alive[group].unsqueeze(-1), observation, 0.0)
                entries["mask"] = alive[group]
            out[group] = TensorDict(entries, (*self.batch_size, n))
        return out

    def _reset(self, tensordict):
        everyone = {group: torch.ones(*self.batch_size, n, dtype=torch.bool) for group, (n, *_) in self.groups.items()}
        return self._observe(everyone)

    def _step(self, tensordict):
        alive, rewards = {}, {}
        for group, (n, _, (kind, size)) in self.groups.items():
            action, observation = tensordict[group, "action"], tensordict[group, "observation"].flatten(2)
            if kind == "multi":
                parts = observation[..., : sum(size)].split(size, -1)
                right = [a == part.argmax(-1) for a, part in zip(action.unbind(-1), parts, strict=True)]
                reward = torch.stack(right).float().mean(0)
            elif kind in {"discrete", "masked"}:
                reward = (action == observation[..., :size].argmax(-1)).float()
                if kind == "masked":
                    allowed = tensordict[group, "action_mask"].gather(-1, action.unsqueeze(-1))
                    assert allowed.all(), "an action that is not allowed"
            else:
                reward = -(action - observation[..., :size]).square().mean(-1)
            if self.death:
                was = tensordict[group, "mask"]
                reward = torch.where(was, reward, 0.0)
                alive[group] = was & (torch.rand(*self.batch_size, n, generator=self.generator) > self.death)
            rewards[group] = reward.unsqueeze(-1)
        out = self._observe(alive)
        for group, reward in rewards.items():
            out[group, "reward"] = reward
        return out.update({"done": torch.zeros(*self.batch_size, 1, dtype=torch.bool)})

    def _set_seed(self, seed):
        self.generator = torch.Generator().manual_seed(seed)


class Padded(Copy):
    """All agents end after 1 to 4 steps; padded steps follow until the time limit.

    Args:
        groups: as of :class:`Copy`.
        num_envs: the number of environments.
        observed: the observations of padded steps.
        paid: the rewards of padded steps.
        agent_flags: whether each agent has its own done and terminated flags.
    """

    def __init__(self, groups, num_envs, observed=0.0, paid=0.0, agent_flags=True):
        super().__init__(groups, num_envs, death=1e-9)
        self.observed, self.paid, self.agent_flags = observed, paid, agent_flags
        self.left = torch.zeros(num_envs, dtype=torch.int64)
        if agent_flags:
            spec = self.full_done_spec
            for group, (n, *_) in groups.items():
                flags = {name: Categorical(2, (num_envs, n, 1), dtype=torch.bool) for name in ("done", "terminated")}
                spec[group] = Composite(flags, shape=(num_envs, n))
            self.done_spec = spec

    def _reset(self, tensordict):
        starts = torch.ones(self.batch_size, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict.keys():
            starts = tensordict["_reset"].squeeze(-1)
        self.left = torch.where(starts, torch.randint(1, 5, self.batch_size, generator=self.generator), self.left)
        return super()._reset(tensordict)

    def _step(self, tensordict):
        counted = self.left > 0
        self.left = self.left - 1
        counts = self.left > 0
        out = super()._step(tensordict)
        for group, (n, *_) in self.groups.items():
            out[group, "mask"] = counts.unsqueeze(-1).expand(-1, n).clone()
            reward, observation = out[group, "reward"], out[group, "observation"]
            out[group, "reward"] = torch.where(counted.view(-1, 1, 1), reward, self.paid)
            out[group, "observation"] = torch.where(counts.view(-1, 1, 1), observation, self.observed)
            for name in ("done", "terminated") if self.agent_flags else ():
                out[group, name] = (~counts).view(-1, 1, 1).expand(-1, n, 1).clone()
        return out


class Alone(EnvBase):
    """The agent of an environment with one group of one agent, without the group."""

    def __init__(self, env):
        super().__init__(batch_size=env.batch_size)
        self.env = env
        (self.group,) = env.groups
        for name in ("full_observation_spec", "full_action_spec", "full_reward_spec"):
            setattr(self, name, getattr(env, name)[self.group][:, 0].clone())
        self.full_done_spec = env.full_done_spec.clone()

    def _alone(self, data):
        return data.select("done", "terminated", strict=False).update(data[self.group][:, 0])

    def _reset(self, tensordict):
        return self._alone(self.env._reset(tensordict))

    def _step(self, tensordict):
        return self._alone(self.env._step(TensorDict({self.group: tensordict.unsqueeze(1)}, self.batch_size)))

    def _set_seed(self, seed):
        self.env._set_seed(seed)


class Specified(EnvBase):
    """Gives random entries of its specs.

    Args:
        num_envs: the number of environments.
        observation: the specs of one environment; an ``"action_mask"`` always allows the first action.
        action: likewise.
        reward: likewise. Default: one of the team.
        done: likewise.
    """

    def __init__(self, num_envs, observation, action, reward=None, done=None):
        super().__init__(batch_size=(num_envs,))
        self.observation_spec = Composite(observation).expand(num_envs)
        self.action_spec = Composite(action).expand(num_envs)
        self.reward_spec = Composite(reward or {"reward": Unbounded((1,))}).expand(num_envs)
        self.done_spec = Composite(done or {"done": Categorical(2, (1,), dtype=torch.bool)}).expand(num_envs)

    def _reset(self, tensordict):
        data = self.observation_spec.rand()
        for key in data.keys(True, True):
            if key[-1] == "action_mask":
                data[key][..., 0] = True
        return data

    def _step(self, tensordict):
        return self._reset(tensordict).update(self.full_reward_spec.rand()).update(self.full_done_spec.zero())

    def _set_seed(self, seed):
        torch.manual_seed(seed)


class Memory(EnvBase):
    """Each agent sees a cue in the first step of an episode, and is asked for it in the last, 3 to 6 steps later.

    The observation is ``[cue, asked]``, the cue -1 or 1, and 0 after the first step. The team is paid the share of the
    agents that answer right: 0.5 by chance, 1 with a memory.

    Args:
        num_envs: the number of environments.
        n_agents: the number of agents.
    """

    def __init__(self, num_envs, n_agents=2):
        super().__init__(batch_size=(num_envs,))
        shape = (num_envs, n_agents)
        agents = Composite({"observation": Unbounded((*shape, 2))}, shape=shape)
        self.observation_spec = Composite({"agents": agents}, shape=(num_envs,))
        actions = Composite({"action": Categorical(2, shape)}, shape=shape)
        self.action_spec = Composite({"agents": actions}, shape=(num_envs,))
        self.reward_spec = Composite({"reward": Unbounded((num_envs, 1))}, shape=(num_envs,))
        self.done_spec = Composite({"done": Categorical(2, (num_envs, 1), dtype=torch.bool)}, shape=(num_envs,))
        self.cue = torch.zeros(shape)
        self.left = torch.zeros(num_envs, dtype=torch.int64)

    def _reset(self, tensordict):
        starts = torch.ones(self.batch_size, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict.keys():
            starts = tensordict["_reset"].squeeze(-1)
        cue = torch.randint(2, self.cue.shape, generator=self.generator) * 2.0 - 1
        left = torch.randint(3, 7, self.batch_size, generator=self.generator)
        self.cue = torch.where(starts.unsqueeze(-1), cue, self.cue)
        self.left = torch.where(starts, left, self.left)
        observation = torch.stack([self.cue, torch.zeros_like(self.cue)], -1)
        return TensorDict({"agents": TensorDict({"observation": observation}, self.cue.shape)}, self.batch_size)

    def _step(self, tensordict):
        ends = self.left == 0
        self.left = self.left - 1
        asked = (self.left == 0).float().unsqueeze(-1).expand_as(self.cue)
        right = (tensordict["agents", "action"] == (self.cue > 0)).float().mean(-1)
        observation = torch.stack([torch.zeros_like(self.cue), asked], -1)
        out = TensorDict({"agents": TensorDict({"observation": observation}, self.cue.shape)}, self.batch_size)
        out["reward"] = torch.where(ends, right, 0.0).unsqueeze(-1)
        out["done"] = ends.unsqueeze(-1)
        return out

    def _set_seed(self, seed):
        self.generator = torch.Generator().manual_seed(seed)


HARL_BREAKS = {
    "agent_0": (1, 17, ("discrete", 5)),
    "agent_1": (1, 18, ("discrete", 6)),
    "agent_2": (1, 19, ("discrete", 7)),
}
"""Three agents with 17, 18 and 19 observations and 5, 6 and 7 actions."""


def make_memory(num_envs=20):
    return Memory(num_envs)


def make_copy(num_envs=4, kind="discrete", death=0.0):
    sizes = {"multi": [3, 2]}
    return Copy({"agents": (3, 6, (kind, sizes.get(kind, 4)))}, num_envs, death)


def make_padded(num_envs=4, kind="discrete", groups=1, observed=0.0, paid=0.0, agent_flags=True):
    """Groups of agents, or with ``groups=0`` a single agent."""
    sizes = {"drivers": (2, 5, (kind, 4)), "callers": (1, 4, ("discrete", 3))}
    settings = {"observed": float(observed), "paid": float(paid), "agent_flags": agent_flags and groups > 0}
    if groups == 0:
        return Alone(Padded({"agent": (1, 5, (kind, 4))}, num_envs, **settings))
    return Padded(dict(list(sizes.items())[:groups]), num_envs, **settings)


def make_different(num_envs=4):
    return Copy(HARL_BREAKS, num_envs)


def make_mixed(num_envs=4):
    """Discrete and continuous agents in one team."""
    return Copy({"drivers": (2, 5, ("continuous", 2)), "callers": (1, 7, ("masked", 4))}, num_envs)


def make_specified(num_envs=4, name="nested"):
    """Two agents, or one, whose entries are at the places of ``SPECIFIED``."""
    return Specified(num_envs, *SPECIFIED[name]())


def make_one_group_of_all(num_envs=4):
    """Agents that observe vectors of different lengths."""
    return VmasEnv("simple_tag", num_envs=num_envs, group_map=MarlGroupMapType.ALL_IN_ONE_GROUP)


def make_far(offset=0.0, learns=False):
    """CartPole, whose episodes do not end together, seen from a distance, or with statistics of its own."""
    moved = VecNormV2(["observation"]) if learns else ObservationNorm(offset, 1.0, ["observation"])
    return TransformedEnv(ReplayedGymEnv("CartPole-v1", device="cpu"), moved)


def make_tictactoe():
    """Two players by turns, each a group: ``{"observation", "action_mask"}``, small integers in a 3 by 3 by 2 board."""
    from pettingzoo.classic import tictactoe_v3

    env = PettingZooWrapper(tictactoe_v3.env(), use_mask=True)
    boards = [(group, "observation", "observation") for group in env.group_map]
    return TransformedEnv(env, FlattenObservation(-3, -1, in_keys=boards))


ONE_OF_3, FLAGS = {"agents": {"action": Categorical(3, (2,))}}, {"dtype": torch.bool}
SEEN = {"agents": {"observation": Unbounded((2, 5))}}
SPECIFIED = {
    "nested": lambda: (
        {"agents": {"observation": {"own": Unbounded((2, 5)), "action_mask": Categorical(2, (2, 3), **FLAGS)}}},
        ONE_OF_3,
    ),
    "integers": lambda: ({"agents": {"observation": Bounded(0, 9, (2, 5), dtype=torch.int64)}}, ONE_OF_3),
    "flags": lambda: ({"agents": {"observation": OneHot(6, (2, 6))}}, ONE_OF_3),
    "two observations": lambda: (
        {"agents": {"observation": {"pos": Unbounded((2, 5)), "vel": Unbounded((2, 3))}}},
        ONE_OF_3,
    ),
    "another observation": lambda: ({"agents": {"obs": Unbounded((2, 5))}}, ONE_OF_3),
    "no observation": lambda: ({"state": Unbounded((5,))}, ONE_OF_3),
    "an index": lambda: ({"agents": {"observation": Categorical(6, (2,))}}, ONE_OF_3),
    "a matrix": lambda: ({"agents": {"observation": Unbounded((2, 4, 7))}}, ONE_OF_3),
    "a tiny picture": lambda: ({"agents": {"observation": Unbounded((2, 3, 6, 7))}}, ONE_OF_3),
    "other agents": lambda: ({"agents": {"observation": Unbounded((3, 5))}}, ONE_OF_3),
    "agents at the root": lambda: (
        {"p1": Unbounded((5,)), "p2": Unbounded((5,))},
        {"p1": Categorical(3), "p2": Categorical(3)},
    ),
    "no agent dimension": lambda: (
        {"p1": {"observation": Unbounded((5,))}, "p2": {"observation": Unbounded((5,))}},
        {"p1": {"action": Categorical(3)}, "p2": {"action": Categorical(3)}},
    ),
    "another action": lambda: (SEEN, {"agents": {"move": Categorical(3, (2,))}}),
    "two actions": lambda: (SEEN, {"agents": {"action": Categorical(3, (2,)), "say": Categorical(3, (2,))}}),
    "another reward": lambda: (SEEN, ONE_OF_3, {"agents": {"payoff": Unbounded((2, 1))}}),
    "a flat reward": lambda: (SEEN, ONE_OF_3, {"agents": {"reward": Unbounded((2,))}}),
    "ends of agents alone": lambda: (SEEN, ONE_OF_3, None, {"agents": {"done": Categorical(2, (2, 1), **FLAGS)}}),
    "a wide mask": lambda: (
        {"agents": {"observation": Unbounded((2, 5)), "action_mask": Categorical(2, (2, 4), **FLAGS)}},
        ONE_OF_3,
    ),
    "a number": lambda: (SEEN, {"agents": {"action": Bounded(-1, 1, (2,))}}),
    "a matrix of numbers": lambda: (SEEN, {"agents": {"action": Unbounded((2, 2, 2))}}),
    "a column of choices": lambda: (SEEN, {"agents": {"action": Categorical(3, (2, 1))}}),
    "other choices": lambda: (SEEN, {"agents": {"action": MultiCategorical(torch.tensor([[2, 2], [4, 5]]))}}),
    "a mask of numbers": lambda: ({"agents": {**SEEN["agents"], "mask": Unbounded((2,))}}, ONE_OF_3),
}
"""Observations, actions, rewards and ends of one environment."""


def make_pictures(num_envs=4):
    """Observations [1, 7, 7], which a convolutional network reads."""
    return Copy({"agents": (2, (1, 7, 7), ("discrete", 3))}, num_envs)
