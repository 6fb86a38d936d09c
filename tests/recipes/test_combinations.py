"""The table of docs/combinations.md: every kind of action, way of sharing, algorithm and simulator takes updates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from torchrl_trpo.config.overrides import compose_settings
from torchrl_trpo.errors import SettingError
from torchrl_trpo.recipes import hatrpo, itrpo, matrpo
from torchrl_trpo.training.run import Run

CONFIG_DIR = Path(hatrpo.__file__).parent / "config"
TINY = [
    "env.num_envs=4",
    "env.max_steps=10",
    "train.frames_per_batch=80",
    "train.total_frames=160",
    "device=cpu",
    "film=false",
    "updater.fisher_subsample=1",
    "actor.hidden=[16]",
    "critic.hidden=[16]",
    "critic.epochs=1",
    "critic.minibatch_size=40",
]
COPY = "env=custom env.factory=tests.environments.make_copy env.kwargs.kind="
ENVIRONMENTS = {
    "VMAS, continuous": "env=vmas/balance",
    "VMAS, discrete": "env=vmas/balance env.continuous_actions=false",
    "VMAS, two groups": "env=vmas/simple_tag",
    "VMAS, with communication": "env=vmas/simple_crypto env.continuous_actions=false",
    "PettingZoo MPE, discrete": "env=pettingzoo/simple_spread_v3",
    "PettingZoo MPE, continuous, two groups": "env=pettingzoo/simple_speaker_listener_v4 env.continuous_actions=true",
    "Multi-agent MuJoCo": "env=mamujoco/HalfCheetah",
    "Multi-agent MuJoCo, different agents": "env=mamujoco/Humanoid env.kwargs.agent_conf='9|8'",
    "custom, masked discrete": COPY + "masked",
    "custom, multi-discrete": COPY + "multi",
    "custom, unbounded": COPY + "unbounded",
    "custom, agents that die": COPY + "discrete env.kwargs.death=0.1",
    "custom, 17/18/19 observations, 5/6/7 actions": "env=custom env.factory=tests.environments.make_different",
    "custom, pictures": "env=custom env.factory=tests.environments.make_pictures",
    "custom, continuous and masked discrete": "env=custom env.factory=tests.environments.make_mixed",
}
ONE_GROUP = {name for name in ENVIRONMENTS if "simple_" not in ENVIRONMENTS[name] or "spread" in ENVIRONMENTS[name]}
ONE_GROUP -= {name for name in ENVIRONMENTS if "different" in ENVIRONMENTS[name] or "Humanoid" in ENVIRONMENTS[name]}
ONE_GROUP -= {name for name in ENVIRONMENTS if "mixed" in ENVIRONMENTS[name]}
ALGORITHMS = {
    "ITRPO, all": (itrpo, "actor.sharing=all"),
    "ITRPO, group": (itrpo, "actor.sharing=group"),
    "ITRPO, none": (itrpo, "actor.sharing=none critic.share_params=false"),
    "MATRPO, all": (matrpo, "actor.sharing=all critic.agent_one_hot=true"),
    "MATRPO, group": (matrpo, "actor.sharing=group critic.value_norm=true"),
    "MATRPO, none": (matrpo, "actor.sharing=none critic.others_actions=true"),
    "HATRPO, none": (hatrpo, "team_reward=mean"),
}


def config(recipe, folder, *settings):
    name = recipe.__name__.rpartition(".")[2]
    overrides = [*TINY, f"output_dir={folder}", *[part for text in settings for part in text.split()]]
    return compose_settings(overrides, CONFIG_DIR, name)[0]


SLOW = pytest.mark.slow
CELLS = [
    pytest.param(environment, algorithm, marks=SLOW if (row + column) % 5 else [])
    for row, environment in enumerate(ENVIRONMENTS)
    for column, algorithm in enumerate(ALGORITHMS)
]
"""Every fifth one of a row and of a column is in the fast suite."""


@pytest.mark.parametrize(("environment", "algorithm"), CELLS)
def test_updates(environment, algorithm, tmp_path, monkeypatch):
    """Two updates of each cell: the KL within the radius, steps accepted, every parameter finite and moved."""
    if algorithm.endswith("all") and environment not in ONE_GROUP:
        pytest.skip("agents with different spaces cannot share one policy; test_all_needs_equal_spaces")
    recipe, settings = ALGORITHMS[algorithm]
    before, logged = [], []

    def log(self, data, stats, critic, original=Run.log):
        logged.append((stats.clone(), critic))
        original(self, data, stats, critic)

    def capture(self, *args, original=Run.__init__, **kwargs):
        original(self, *args, **kwargs)
        before.extend([self, [p.detach().clone() for p in self.policy.parameters()]])

    monkeypatch.setattr(Run, "__init__", capture)
    monkeypatch.setattr(Run, "log", log)
    monkeypatch.setattr(Run, "finish", lambda self: self)
    recipe.train(config(recipe, tmp_path, ENVIRONMENTS[environment], settings))
    run, parameters = before
    assert len(logged) == 2
    for stats, critic in logged:
        assert (stats["kl"] <= 0.01).all()
        assert ((stats["kl"] > 0) == stats["accepted"]).all()
        assert (stats["improvement"] >= 0).all()
        assert math.isfinite(critic["loss_critic"])
        assert critic["dropped"] == 0
    accepted, slope = (torch.stack([stats[name] for stats, _ in logged]) for name in ("accepted", "grad_norm"))
    assert (slope > 0).any()
    assert accepted[slope > 0].float().mean() > 0.5  # a prey that was never touched has nothing to learn from
    changed = [not torch.equal(new, old) for new, old in zip(run.policy.parameters(), parameters, strict=True)]
    assert any(changed)
    assert all(parameter.isfinite().all() for parameter in run.policy.parameters())


UNEQUAL = [
    pytest.param(name, marks=[] if name in ("VMAS, two groups", "Multi-agent MuJoCo, different agents") else SLOW)
    for name in sorted(set(ENVIRONMENTS) - ONE_GROUP)
]


@pytest.mark.parametrize("environment", UNEQUAL)
def test_all_needs_equal_spaces(environment, tmp_path):
    with pytest.raises(SettingError, match=r"actor\.sharing=all: .*Legal: actor\.sharing=group or none"):
        itrpo.train(config(itrpo, tmp_path, ENVIRONMENTS[environment], "actor.sharing=all"))
