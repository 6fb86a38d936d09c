"""From a hand-written MAPPO loop to trust-region steps: all loops run, and few lines differ."""

from __future__ import annotations

import difflib
import itertools
import re
import socket
from pathlib import Path

import pytest
import torch
from torchrl.collectors import Collector

from tests.loops import data_parallel, distributed_sampling, hatrpo, itrpo, mappo, matrpo
from tests.rank_processes import on_ranks

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "drop-in.md").read_text()
LOOPS = {"mappo": mappo, "itrpo": itrpo, "matrpo": matrpo, "hatrpo": hatrpo}
SMALL = {"num_envs": 6, "max_steps": 10, "frames": 360, "batch": 120, "epochs": 1, "minibatch": 60}


def check_training(steps):
    """Three updates: each moves every parameter, and the next batch is sampled by the policy that it left."""
    policies, parameters = [], []
    for loss, data in steps:
        if policies:
            with torch.no_grad(), policies[-1].to_module(loss.actor_network):
                own = loss.actor_network.get_dist_params(data.clone())
            torch.testing.assert_close(own["agents", "loc"], data["agents", "loc"])
        policies.append(loss.actor_network_params.data.clone())
        parameters.append([param.detach().clone() for param in loss.parameters()])
    assert len(parameters) == 3
    for before, after in itertools.pairwise(parameters):
        assert not any(torch.equal(new, old) for new, old in zip(after, before, strict=True))
    return data


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_loop_trains(loop):
    data = check_training(loop.train(**SMALL))
    assert data["next", "agents", "episode_reward"].shape == (6, 20, 4, 1)
    assert data["next", "truncated"][:, 9::10].all()


def check_two_samplers(data):
    assert data.shape == (2, 3, 20)
    first, second = data["agents", "action"]
    assert torch.isclose(first, second).float().mean() < 0.1  # seeds differ


@pytest.mark.usefixtures("quick_processes")
def test_two_processes_may_sample():
    check_two_samplers(check_training(matrpo.train(workers=2, backend="process", sync=True, **SMALL)))


def collector_without_shared_memory(envs, actor, **options):
    """As on other machines: the workers see new parameters only if they are sent."""
    collector = Collector(envs, actor, **options)
    for param in actor.parameters():
        param.data = param.data.clone()
    return collector


@pytest.mark.slow  # processes that import everything anew
@pytest.mark.usefixtures("quick_processes")
def test_other_machines_may_sample(monkeypatch):
    monkeypatch.setattr(hatrpo, "Collector", collector_without_shared_memory)
    with socket.create_server(("localhost", 0)) as server:
        monkeypatch.setenv("TCP_PORT", str(server.getsockname()[1]))
    check_two_samplers(check_training(distributed_sampling.train(**SMALL)))
    assert not torch.distributed.is_initialized()


def train_in_parallel():
    """The actions of the last batch, and the parameters at the end."""
    for loss, data in data_parallel.train(**SMALL):
        last = data["agents", "action"], [param.detach().clone() for param in loss.parameters()]
    return last


def test_several_processes_may_update_together():
    (actions, parameters), (other_actions, other_parameters) = on_ranks(2, train_in_parallel)
    assert actions.shape == (3, 20, 4, 2)
    assert torch.isclose(actions, other_actions).float().mean() < 0.1  # seeds differ
    assert all(torch.equal(one, other) for one, other in zip(parameters, other_parameters, strict=True))


def n_changed(old, new):
    """A changed line counts once; the docstring and blank lines do not count."""
    old, new = ([line for line in lines[1:] if line] for lines in (old, new))
    opcodes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return sum(max(j - i, m - k) for kind, i, j, k, m in opcodes if kind != "equal")


@pytest.mark.parametrize("name", ["itrpo", "matrpo", "hatrpo"])
def test_few_lines_change_and_the_page_shows_them(name):
    old, new = (Path(loop.__file__).read_text().splitlines() for loop in (mappo, LOOPS[name]))
    assert n_changed(old, new) <= 10
    assert re.search(rf"^\| \[`{name}.py`\].* \| {n_changed(old, new)} \|", PAGE, re.MULTILINE)
    diff = difflib.unified_diff(old, new, "mappo.py", f"{name}.py", lineterm="", n=0)
    shown = re.findall(rf"```diff\n(--- mappo.py\n\+\+\+ {name}.py\n.*?)```", PAGE, re.DOTALL)
    assert shown == ["\n".join(diff) + "\n"]


def test_the_migration_goes_through_the_changed_lines():
    old, new = (Path(loop.__file__).read_text().splitlines()[1:] for loop in (mappo, hatrpo))
    _, _, *diff = difflib.unified_diff(old, new, lineterm="", n=0)
    changed = [line for line in diff if line[0] in "-+" and line[1:]]
    text = (ROOT / "docs" / "migrating.md").read_text()
    shown = "".join(re.findall(r"```diff\n(.*?)```", text, re.DOTALL)).splitlines()
    assert shown == changed


def test_the_readme_gives_the_largest_count():
    old, *others = (Path(loop.__file__).read_text().splitlines() for loop in LOOPS.values())
    assert f"{max(n_changed(old, new) for new in others)} changed lines" in (ROOT / "README.md").read_text()
