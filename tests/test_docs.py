"""The examples in README and docs run, and do what the pages say."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
import textwrap

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector

from tests.examples import PAGES, ROOT, RUN, commands, example, examples
from tests.recipes.test_combinations import ALGORITHMS, ENVIRONMENTS, ONE_GROUP
from tests.recipes.test_recipes import CONFIG_DIR, config
from tests.training.test_resume import metrics
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.config.overrides import compose_settings
from torchrl_trpo.config.schema import RECIPES as SETTINGS
from torchrl_trpo.envs import make_env
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor, make_central_critic, make_critic
from torchrl_trpo.objectives import CentralCriticValueEstimator, HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.recipes import hatrpo
from torchrl_trpo.trainer import TRPOTrainer
from torchrl_trpo.training.critic_fit import fit_critic
from torchrl_trpo.training.estimators import estimate_advantages

DOCS = ROOT / "docs"
IMPORTED = {
    "torch": torch,
    "CentralCriticValueEstimator": CentralCriticValueEstimator,
    "HATRPOSequentialObjective": HATRPOSequentialObjective,
    "TRPOLoss": TRPOLoss,
    "TrustRegionUpdater": TrustRegionUpdater,
    "estimate_advantages": estimate_advantages,
    "fit_critic": fit_critic,
}
"""What an example of a few lines takes as imported."""
RUN_FOLDER = "outputs/hatrpo/2026-01-31_12-00-00"


experimental = pytest.mark.filterwarnings("ignore:.*is an experimental/prototype feature:UserWarning")


class Parts(dict):
    """What an example starts with: an environment's actor, critic and collector; whether they all learn from it."""

    def __init__(self, task="vmas/balance", *, share_params=False, central=False, **kwargs):
        env = make_env(task, num_envs=4, max_steps=10, kwargs=kwargs, seed=0, device=torch.device("cpu"))
        (self.keys,) = group_keys(env)
        actor = make_actor(env, self.keys, share_params=share_params)
        critic = make_central_critic(env, self.keys) if central else make_critic(env, self.keys, share_params=True)
        super().__init__(env=env, actor=actor, critic=critic, collector=[env.rollout(10, actor)])
        self._before = copy.deepcopy([*actor.parameters(), *critic.parameters()])

    @property
    def data(self):
        return self["collector"][0]

    def add_loss(self):
        loss = self["loss"] = TRPOLoss(self["actor"], self["critic"])
        loss.set_keys(**self.keys.loss_keys)
        return loss

    def check_learning(self):
        after = [*self["actor"].parameters(), *self["critic"].parameters()]
        assert not any(torch.equal(new, old) for new, old in zip(after, self._before, strict=True))


def numbers(line):
    """The lists in a line that an example printed."""
    return [json.loads(part.lower()) for part in re.findall(r"\[.*?\]", line)]


@example("README.md", "drop-in")
def test_the_drop_in(code, capsys):
    statements = [line for line in code.splitlines() if line.strip() and "import" not in line]
    assert len(statements) <= 15
    parts = Parts()
    parts["collector"] = Collector(
        parts["env"], parts["actor"], frames_per_batch=120, total_frames=360, auto_register_policy_transforms=False
    )
    exec(code, parts)
    parts.check_learning()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("[True, True, True] [0.0") for line in lines)


def mixed_groups():
    """The drivers and callers of the page: their actors, and data with advantages."""
    settings = {"num_envs": 4, "max_steps": 50, "kwargs": {}, "seed": 0, "device": torch.device("cpu")}
    env = make_env("custom", factory="tests.environments.make_mixed", **settings)
    actors = {keys.group: make_actor(env, keys, share_params=False) for keys in group_keys(env)}
    data = env.rollout(6, TensorDictSequential(*actors.values()))
    for keys in group_keys(env):
        data[keys.advantage] = torch.randn(4, 6, keys.n_agents, 1)
    return {"actors": actors, "data": data}


@example("docs/factor-groups-masks.md", "walkthrough")
def test_the_walk_through(code, capsys):
    text = (DOCS / "factor-groups-masks.md").read_text()
    scope = mixed_groups()
    for name, shape in re.findall(r'^\| `\("(\w+", "\w+)"\)` \| `\[([\d, ]+)\]`', text, re.MULTILINE):
        key = tuple(name.split('", "'))
        if "mask" not in key:
            assert str(list(scope["data"][key].shape)) == f"[{shape}]", key
    exec(code, scope)
    assert scope["ratio"].shape == (24, 1, 1)
    torch.testing.assert_close(scope["first_driver"]._rows.factor.flatten(), scope["ratio"].flatten())
    assert capsys.readouterr().out == "[2, 0, 1] [True, True, True]\n"


@example("docs/factor-groups-masks.md", "groups")
def test_a_loop_with_several_groups(code, capsys):
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("[True, True]" in line and max(numbers(line)[1]) <= 0.01 for line in lines), lines


def factors(regions):
    """The factor of each region of a sequence, in which every agent takes a gradient step."""
    seen = []
    for region in regions:
        seen.append(region._rows.factor.flatten())
        region.write(region.parameters + 0.01 * region.gradient(), accepted=torch.ones(1, dtype=torch.bool))
    return torch.stack(seen)


@example("docs/factor-groups-masks.md", "sequence")
def test_the_sequence_is_that_of_the_objective(code):
    scope = mixed_groups()
    losses = {}
    for group, actor in scope["actors"].items():
        losses[group] = TRPOLoss(actor)
        losses[group].set_keys(
            action=(group, "action"), sample_log_prob=(group, "action_log_prob"), advantage=(group, "advantage")
        )
    objective = HATRPOSequentialObjective(copy.deepcopy(losses), agent_order=[2, 0, 1])
    expected = factors(objective.trust_regions(scope["data"]))
    rows = {group: loss.policy_rows(scope["data"]) for group, loss in losses.items()}
    agents = [("drivers", 0), ("drivers", 1), ("callers", 0)]
    scope = {"torch": torch, "losses": losses, "rows": rows, "order": [2, 0, 1], "agents": agents}
    exec(f"def regions():\n{textwrap.indent(code, '    ')}", scope)
    torch.testing.assert_close(factors(scope["regions"]()), expected)


@example("docs/happo.md", "happo")
def test_happo(code, capsys):
    parts = Parts()
    parts["collector"] *= 2
    before = copy.deepcopy(list(parts["actor"].parameters()))
    exec(code, parts)
    assert not any(torch.equal(new, old) for new, old in zip(parts["actor"].parameters(), before, strict=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        order, kl = numbers(line)
        assert sorted(order) == list(range(parts.keys.n_agents))
        assert len(kl) == parts.keys.n_agents
        assert min(kl) > 0


def check_algorithm(parts, code, n_regions, capsys):
    exec(code, parts)
    parts.check_learning()
    accepted, kl = numbers(capsys.readouterr().out)
    assert accepted == [True] * n_regions
    assert 0 < min(kl) <= max(kl) <= 0.01


@example("docs/algorithms/trpo.md", "code")
def test_trpo(code, capsys):
    check_algorithm(Parts("gym/Pendulum-v1", share_params=True), code, 1, capsys)


@example("docs/algorithms/itrpo.md", "code")
def test_itrpo(code, capsys):
    check_algorithm(Parts(share_params=True), code, 1, capsys)


@example("docs/algorithms/matrpo.md", "code")
def test_matrpo(code, capsys):
    check_algorithm(Parts(share_params=True, central=True), code, 1, capsys)


@example("docs/algorithms/hatrpo.md", "code")
def test_hatrpo(code, capsys):
    check_algorithm(Parts(central=True), code, 3, capsys)


@example("docs/drop-in.md", "discount")
def test_another_discount(code):
    parts = Parts()
    loss = parts.add_loss()
    exec(code, parts)
    torch.testing.assert_close([float(loss.value_estimator.gamma), float(loss.value_estimator.lmbda)], [0.95, 0.9])


@example("docs/drop-in.md", "central critic")
def test_a_central_critic(code):
    parts = Parts(central=True)
    parts["critic"] = TensorDictModule(
        parts["critic"].module, in_keys=[("agents", "central")], out_keys=[parts.keys.value]
    )
    loss = parts.add_loss()
    exec(code, IMPORTED | parts)
    estimate_advantages([loss], parts.data)
    assert parts.data["agents", "central"].shape[-1] == 3 * parts.data["agents", "observation"].shape[-1]
    assert parts.data["agents", "advantage"].isfinite().all()


@example("docs/team-budget.md", "team")
def test_one_region_for_the_team(code):
    parts = Parts()
    estimate_advantages([parts.add_loss()], parts.data)
    scope = IMPORTED | parts
    exec(code, scope)
    stats = scope["updater"].step(parts.data)
    torch.testing.assert_close(stats["max_kl"].sum(), torch.tensor(3 * 0.01))
    assert (stats["kl"] <= stats["max_kl"]).all()


@example("docs/team-budget.md", "greedy")
def test_a_greedy_order(code):
    parts = Parts()
    estimate_advantages([parts.add_loss()], parts.data)
    scope = IMPORTED | parts
    exec(code, scope)
    assert 0 < scope["updater"].step(parts.data)["kl"].sum() <= 3 * 0.01


@example("docs/scaling.md", "process group")
def test_a_process_group(code):
    parts = Parts()
    left_out = """
loss.set_keys(**keys.loss_keys)
estimate_advantages([loss], data)
updater = TrustRegionUpdater(HATRPOSequentialObjective(loss))
optim = torch.optim.Adam(loss.critic_network_params.flatten_keys().values())
"""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        exec(code.replace("\n...\n", left_out), IMPORTED | parts | {"keys": parts.keys, "data": parts.data})
        parts.check_learning()
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The folder above that of a run, from which the pages load its policy."""
    monkeypatch.chdir(tmp_path)
    settings = ("film=false", "env.kwargs.n_agents=4", "train.total_frames=160")
    hatrpo.train(config("hatrpo", tmp_path / RUN_FOLDER, *settings))


@pytest.mark.usefixtures("trained")
@example("docs/first-hour.md", "load")
def test_a_policy_is_loaded_and_plays(code, capsys):
    capsys.readouterr()
    exec(code, {})
    assert re.fullmatch(r"tensor\(-?\d+\.\d+\)\n", capsys.readouterr().out)


@pytest.mark.usefixtures("trained")
@example("docs/long-runs.md", "load")
def test_the_best_policy_is_loaded(code):
    scope = {}
    exec(code, scope)
    env = Parts(n_agents=4)["env"]
    assert env.rollout(5, scope["policy"])["agents", "action"].shape == (4, 5, 4, 2)


@example("docs/trainer.md", "program")
def test_the_program_is_the_whole_recipe(code):
    assert textwrap.indent(code, "    ") in (ROOT / "recipes" / "trainer.py").read_text()


def parts_of_a_trainer():
    parts = Parts()
    parts.add_loss()
    parts["collector"] = Collector(parts["env"], parts["actor"], frames_per_batch=40, total_frames=120)
    return parts


@experimental
@example("docs/trainer.md", "trainer")
def test_a_trainer(code):
    parts = parts_of_a_trainer()
    exec(code, IMPORTED | parts)
    parts.check_learning()


@experimental
@example("docs/trainer.md", "continued")
def test_a_trainer_is_continued(code, tmp_path, monkeypatch):
    """The default value estimator was made at the first batch: no new trainer could load a checkpoint that holds it."""
    monkeypatch.chdir(tmp_path)
    (path,) = re.findall(r'"(outputs/.*)"', code)

    def trainer(total_frames):
        parts = parts_of_a_trainer()
        options = {"checkpoint": Checkpoint(), "save_trainer_file": path, "progress_bar": False}
        optimizer = torch.optim.Adam(parts["critic"].parameters())
        options |= {"collector": parts["collector"], "loss_module": parts["loss"], "optimizer": optimizer}
        return TRPOTrainer(total_frames=total_frames, **options)

    trainer(40).train()
    second = trainer(80)
    exec(code, {"trainer": second})
    assert second.collected_frames == 80


def test_every_example_is_run_or_says_why_not():
    found = {(str(page.relative_to(ROOT)), name) for page in PAGES for name, _ in examples(page)}
    assert {(page, name) for page, name in found if not name.startswith("not run: ")} == RUN
    assert len(found) == sum(page.read_text().count("```python") for page in PAGES)  # none has the comment of another


@pytest.mark.slow  # Hydra composes each of them, 0.1 s
def test_every_command_has_settings_that_a_run_takes():
    """The SLURM script's batch once was no divisor of the default number of frames."""
    found = {(name, tuple(settings)) for page in PAGES for name, settings in commands(page) if name in SETTINGS}
    assert len(found) > 30
    for name, settings in found:
        compose_settings(settings, CONFIG_DIR, name)


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


def saved(code, name, tmp_path, monkeypatch):
    """Saves an example under its name, where Python finds it."""
    (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)


@example("docs/bring-your-own.md", "shelves.py")
@pytest.mark.filterwarnings("ignore:PettingZoo in TorchRL is tested using version:UserWarning")
def test_a_game_of_ones_own(code, tmp_path, monkeypatch):
    saved(code, "shelves.py", tmp_path, monkeypatch)
    settings = ["env=custom", "env.factory=shelves.make", "env.max_steps=10", "env.num_envs=2", "film=false"]
    hatrpo.train(config("hatrpo", tmp_path / "run", *settings, "train.frames_per_batch=40", "train.total_frames=80"))
    assert all(float(row["kl"]) > 0 for row in metrics(tmp_path / "run"))


@example("docs/bring-your-own.md", "meeting.py")
def test_an_environment_of_ones_own(code, tmp_path, monkeypatch):
    saved(code, "meeting.py", tmp_path, monkeypatch)
    settings = ["env=custom", "env.factory=meeting.Meeting", "env.kwargs.n_agents=2", "env.max_steps=7"]
    settings += ["env.num_envs=4", "film=false", "train.frames_per_batch=40", "checkpoint.every=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    hatrpo.train(config("hatrpo", whole, *settings, "train.total_frames=120"))
    hatrpo.train(config("hatrpo", parts, *settings, "train.total_frames=80"))
    hatrpo.train(config("hatrpo", tmp_path / "unused", *settings, "train.total_frames=120", f"resume={parts}"))
    assert metrics(parts) == metrics(whole), "a resumed run goes on where it was, as the page says"


@example("docs/bring-your-own.md", "attention.py")
def test_a_policy_of_ones_own(code, tmp_path, monkeypatch):
    saved(code, "attention.py", tmp_path, monkeypatch)
    train = importlib.import_module("attention").train
    before = None
    for loss, _ in train(num_envs=4, frames=80, batch=40):
        after = [parameter.detach().clone() for parameter in loss.parameters()]
        assert before is None or not any(map(torch.equal, after, before))
        before = after
