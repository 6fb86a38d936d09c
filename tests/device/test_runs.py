"""Runs on a device that is not the CPU: they train, go on elsewhere, and their policies act anywhere."""

from __future__ import annotations

import csv

import pytest

from tests.recipes.test_recipes import CONFIG_DIR, RECIPES
from torchrl_trpo import load_policy
from torchrl_trpo.config.overrides import compose_settings
from torchrl_trpo.evaluate import evaluate_run

TINY = ("film=false", "env.num_envs=6", "env.max_steps=5", "train.frames_per_batch=60", "checkpoint.every=1")
TINY += ("critic.epochs=1", "critic.hidden=[8]", "actor.hidden=[8]")
NORMALISED = ("normalize_observations=true", "critic.value_norm=true", "actor.network=gru", "env=vmas/navigation")
SERIAL = ("env.num_envs=2", "env.max_steps=5", "train.frames_per_batch=20")
SPREAD = ("env=pettingzoo/simple_spread_v3", *SERIAL)
TIMES = {"collect_s", "policy_s", "critic_s", "wall_s", "cpu_s"}


def train(name, folder, *overrides, iterations=2, device="fake"):
    """Trains, and gives the metrics."""
    settings = {o.partition("=")[0]: o for o in (*TINY, f"device={device}", f"output_dir={folder}", *overrides)}
    frames = int(settings["train.frames_per_batch"].partition("=")[2])
    settings["total"] = f"train.total_frames={iterations * frames}"
    RECIPES[name].train(compose_settings(list(settings.values()), CONFIG_DIR, name)[0])
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("hatrpo", ()),
        ("matrpo", ("critic.others_actions=true", "env=vmas/give_way")),
        ("itrpo", NORMALISED),
        ("mappo", ()),
        ("ippo", ("env=vmas/simple_tag",)),
        ("happo", ()),
        ("hatrpo", ("env.continuous_actions=false",)),
        ("hatrpo", ("critic.inputs=both", "team_reward=mean", *SPREAD)),
        ("hatrpo", ("env=mamujoco/Swimmer", "env.kwargs.agent_conf=2x1", *SERIAL)),
        ("trpo", ("env=gym/CartPole-v1", *SERIAL)),
        ("trpo", ("env=custom", "env.factory=torchrl.envs.GymEnv", "env.kwargs.env_name=CartPole-v1", *SERIAL)),
    ],
    ids=str,
)
def test_recipes(name, overrides, tmp_path):
    assert len(train(name, tmp_path, *overrides)) == 2


@pytest.mark.parametrize("overrides", [(), NORMALISED, SPREAD], ids=["plain", "normalised", "serial"])
@pytest.mark.parametrize("devices", ["fake fake", "cpu fake", "fake cpu"])
def test_resume(devices, overrides, tmp_path):
    first, second = devices.split()
    part = tmp_path / "part"
    train("itrpo", part, *overrides, device=first, iterations=1)
    rows = train("itrpo", part, *overrides, f"resume={part}", device=second)
    assert len(rows) == 2
    if first == second:
        assert rows == train("itrpo", tmp_path / "whole", *overrides, device=first)


@pytest.mark.parametrize("overrides", [(), NORMALISED], ids=["plain", "normalised"])
def test_policies_act_anywhere(overrides, tmp_path):
    train("itrpo", tmp_path, *overrides, iterations=1)
    for device in ("cpu", "fake"):
        record = evaluate_run(tmp_path, episodes=3, device=device, film=tmp_path / "film.gif")
        assert all(abs(value) < 1e6 for value in record["episode_returns"])
        assert (tmp_path / "film.gif").stat().st_size > 1000
        assert devices_of(load_policy(tmp_path, device=device)) == {device}


def devices_of(module):
    return {tensor.device.type for tensor in module.state_dict().values()}


def test_a_run_is_where_its_environment_is(tmp_path, capsys):
    """Part of it was where the settings said, and it crashed; nothing told that a GPU was not used."""
    custom = ("env=custom", "env.factory=tests.environments.make_copy", "critic.value_norm=true")
    custom += ("normalize_observations=true",)
    train("matrpo", tmp_path, *custom, iterations=1)
    assert "device=fake, but the environment is on cpu, and so is the training" in capsys.readouterr().out
    assert evaluate_run(tmp_path, episodes=3, device="fake")["device"] == "cpu"
    assert devices_of(load_policy(tmp_path, device="fake")) == {"fake"}, "a policy is where it is asked for"
