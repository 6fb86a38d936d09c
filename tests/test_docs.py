"""The examples in the docs run, and say what happens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tensordict.nn import TensorDictSequential

from tests.recipes.test_combinations import ALGORITHMS, ENVIRONMENTS, ONE_GROUP
from torchrl_trpo.envs import make_env
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor, make_central_critic, make_critic

DOCS = Path(__file__).parents[1] / "docs"


def test_the_walk_through(capsys):
    text = (DOCS / "factor-groups-masks.md").read_text()
    code = text.split("<!-- walkthrough -->\n```python\n")[1].split("```")[0]
    settings = {"num_envs": 4, "max_steps": 50, "kwargs": {}, "seed": 0, "device": torch.device("cpu")}
    env = make_env("custom", factory="tests.environments.make_mixed", **settings)
    actors = {keys.group: make_actor(env, keys, share_params=False) for keys in group_keys(env)}
    data = env.rollout(6, TensorDictSequential(*actors.values()))
    for keys in group_keys(env):
        data[keys.advantage] = torch.randn(4, 6, keys.n_agents, 1)
    for name, shape in re.findall(r'^\| `\("(\w+", "\w+)"\)` \| `\[([\d, ]+)\]`', text, re.MULTILINE):
        key = tuple(name.split('", "'))
        if "mask" not in key:
            assert str(list(data[key].shape)) == f"[{shape}]", key
    scope = {"actors": actors, "data": data}
    exec(code, scope)
    assert scope["ratio"].shape == (24, 1, 1)
    torch.testing.assert_close(scope["first_driver"]._rows.factor.flatten(), scope["ratio"].flatten())
    assert capsys.readouterr().out == "[2, 0, 1] [True, True, True]\n"


def test_the_happo_example(capsys):
    code = (DOCS / "happo.md").read_text().split("<!-- happo -->\n```python\n")[1].split("```")[0]
    env = make_env("vmas/balance", num_envs=4, max_steps=10, kwargs={}, seed=0, device=torch.device("cpu"))
    (keys,) = group_keys(env)
    actor, critic = make_actor(env, keys, share_params=False), make_critic(env, keys, share_params=True)
    collector = [env.rollout(10, actor) for _ in range(2)]
    before = [parameter.detach().clone() for parameter in actor.parameters()]
    exec(code, {"actor": actor, "critic": critic, "collector": collector})
    assert not any(torch.equal(new, old) for new, old in zip(actor.parameters(), before, strict=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        order, kl = (json.loads(part) for part in re.findall(r"\[.*?\]", line))
        assert sorted(order) == list(range(keys.n_agents))
        assert len(kl) == keys.n_agents
        assert min(kl) > 0


@pytest.mark.parametrize("name", ["trpo", "itrpo", "matrpo", "hatrpo"])
def test_the_code_of_an_algorithms_page(name, capsys):
    code = (DOCS / "algorithms" / f"{name}.md").read_text().split("<!-- code -->\n```python\n")[1].split("```")[0]
    task = "gym/Pendulum-v1" if name == "trpo" else "vmas/balance"
    env = make_env(task, num_envs=4, max_steps=10, kwargs={}, seed=0, device=torch.device("cpu"))
    (keys,) = group_keys(env)
    actor = make_actor(env, keys, share_params=name != "hatrpo")
    central = name in {"matrpo", "hatrpo"}
    critic = make_central_critic(env, keys) if central else make_critic(env, keys, share_params=True)
    before = [parameter.detach().clone() for parameter in (*actor.parameters(), *critic.parameters())]
    exec(code, {"actor": actor, "critic": critic, "collector": [env.rollout(10, actor)]})
    after = (*actor.parameters(), *critic.parameters())
    assert not any(torch.equal(new, old) for new, old in zip(after, before, strict=True))
    accepted, kl = (json.loads(part.lower()) for part in re.findall(r"\[.*?\]", capsys.readouterr().out))
    assert accepted == [True] * (keys.n_agents if name == "hatrpo" else 1)
    assert 0 < min(kl) <= max(kl) <= 0.01


def test_the_table_is_what_is_tested():
    text = (DOCS / "combinations.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| (VMAS|PettingZoo|MaMuJoCo|custom)", line)]
    assert len(rows) == len(ENVIRONMENTS)
    for row, name in zip(rows, ENVIRONMENTS, strict=True):
        cells = row.replace(r"\|", "/").strip("|").split("|")[2:]
        assert len(cells) == len(ALGORITHMS)
        for cell, algorithm in zip(cells, ALGORITHMS, strict=True):
            tested = not algorithm.endswith("all") or name in ONE_GROUP
            assert cell.strip() == ("x" if tested else "–"), (name, algorithm)
