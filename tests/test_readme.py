"""The README's example runs as it stands there, and its scores are those that were measured."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torchrl.collectors import Collector

import torchrl_trpo
from torchrl_trpo.envs import make_env
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor, make_critic

README = Path(__file__).parents[1] / "README.md"
COMPARISON = README.parent / "docs" / "results" / "comparison.md"


def test_the_drop_in_example(capsys):
    code = README.read_text().split("<!-- drop-in -->\n```python\n")[1].split("```")[0]
    statements = [line for line in code.splitlines() if line.strip() and "import" not in line]
    assert len(statements) <= 15
    env = make_env("vmas/balance", num_envs=10, max_steps=20, kwargs={}, seed=0, device=torch.device("cpu"))
    (keys,) = group_keys(env)
    actor, critic = make_actor(env, keys, share_params=False), make_critic(env, keys, share_params=True)
    collector = Collector(env, actor, frames_per_batch=500, total_frames=1500, auto_register_policy_transforms=False)
    before = [p.detach().clone() for p in (*actor.parameters(), *critic.parameters())]
    exec(code, {"actor": actor, "critic": critic, "collector": collector})
    after = (*actor.parameters(), *critic.parameters())
    assert not any(torch.equal(new, old) for new, old in zip(after, before, strict=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("[True, True, True] [0.0") for line in lines)


def test_its_scores_are_those_of_the_comparison():
    table = COMPARISON.read_text().split("\n| score | ")[1].splitlines()
    names = [name.strip() for name in table[0].strip("|").split("|")]
    for score, time in (("equal frames", "equal frames"), ("equal time", "equal processor seconds")):
        (row,) = (line for line in README.read_text().splitlines() if line.startswith(f"| score at {score} |"))
        (measured,) = (line for line in table if line.startswith(f"| interquartile mean, {time} |"))
        means = [cell.split()[0] for cell in measured.strip("|").split("|")[1:]]
        assert sorted(re.findall(r"[A-Z]+ \d\.\d\d", row)) == sorted(map(" ".join, zip(names, means, strict=True)))


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) < 120


def test_the_citation_names_the_version():
    assert f"\nversion: {torchrl_trpo.__version__}\n" in (README.parent / "CITATION.cff").read_text()
