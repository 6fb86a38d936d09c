"""Bad settings are refused before anything is built, all at once, each with what would be legal."""

from __future__ import annotations

import functools
import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from tests.rank_processes import run_command
from tests.recipes.test_recipes import CONFIG_DIR, RECIPES
from torchrl_trpo.config.overrides import compose_settings
from torchrl_trpo.config.schema import RECIPES as SETTINGS
from torchrl_trpo.config.validation import check_settings
from torchrl_trpo.errors import SettingError
from torchrl_trpo.numerics.updater import TrustRegionUpdater
from torchrl_trpo.objectives import HAPPOUpdater
from torchrl_trpo.parallel.ranks import ALONE
from torchrl_trpo.training.console import Console
from torchrl_trpo.training.continuation import full_record
from torchrl_trpo.training.run_folder import RunFolder


def config(name, *overrides):
    return compose_settings(["output_dir=unused", "device=cpu", *overrides], CONFIG_DIR, name)[0]


def message(name, *overrides):
    with pytest.raises(SettingError) as caught:
        RECIPES[name].train(config(name, *overrides))
    return str(caught.value)


@pytest.fixture(autouse=True)
def _nothing_is_built(monkeypatch):
    for recipe in RECIPES.values():
        monkeypatch.setattr(recipe, "make_training_env", lambda *_: pytest.fail("an environment was built"))


VALUES = [
    ("hatrpo", "seed=-1", r"^seed must be .*, got -1\.$"),
    ("hatrpo", "seed=4294967296", r"^seed must be .*, got 4294967296\.$"),
    ("hatrpo", "seed=true", r"^seed must be .*, got true\.$"),
    ("hatrpo", "film=3", r"^film must be true or false, got 3\.$"),
    ("hatrpo", "film=null", r"^film must be true or false, got null\.$"),
    ("hatrpo", "gamma=null", r"^gamma must be a number from 0 to 1, got null\.$"),
    ("hatrpo", "gamma=nan", r"^gamma must be a number from 0 to 1, got nan\.$"),
    ("hatrpo", "lmbda=true", r"^lmbda must be a number from 0 to 1, got true\.$"),
    ("hatrpo", "entropy_coeff=null", r"^entropy_coeff must be a number, got null\.$"),  # was PPOLoss's 0.01, silently
    ("hatrpo", "entropy_coeff=inf", r"^entropy_coeff must be a number, got inf\.$"),
    ("hatrpo", "chunk_size=0", r"^chunk_size must be null or a whole number of at least 1, got 0\.$"),
    ("hatrpo", "collector.cudagraph_policy=2", r"^collector\.cudagraph_policy must be .* mapping of options, got 2\.$"),
    ("trpo", "normalize_observations=2", r"^normalize_observations must be true or false, got 2\.$"),
    ("hatrpo", "updater.max_kl=-1", r"^updater\.max_kl must be a positive number, got -1\.$"),
    ("hatrpo", "updater.max_kl=null", r"^updater\.max_kl must be a positive number, got null\.$"),
    ("hatrpo", "updater.cg_iters=2.5", r"^updater\.cg_iters must be a whole number of at least 1, got 2\.5\.$"),
    ("hatrpo", "updater.cg_iters=true", r"^updater\.cg_iters must be .*, got true\.$"),
    ("hatrpo", "updater.fisher_subsample=0", r"^updater\.fisher_subsample must be .*above 0 and at most 1, got 0\.$"),
    ("hatrpo", "updater.damping=nan", r"^updater\.damping must be a number of at least 0, got nan\.$"),
    ("hatrpo", "critic.lr=nan", r"^critic\.lr must be a number of at least 0, got nan\.$"),
    ("hatrpo", "critic.lr=inf", r"^critic\.lr must be a number of at least 0, got inf\.$"),
    ("hatrpo", "critic.value_norm=no thanks", r"^critic\.value_norm must be true or false, got 'no thanks'\.$"),
    ("hatrpo", "critic.hidden=[128,0]", r"^critic\.hidden must be a list .*, got \[128, 0\]\.$"),
    ("hatrpo", "train.total_frames=1e6", r"^train\.total_frames must be a whole number .*, got 1000000\.0\.$"),
    ("hatrpo", "env.kwargs=3", r"^env\.kwargs must be a mapping of arguments such as {n_agents: 3}, got 3\.$"),
    ("hatrpo", "env.kwargs=[1]", r"^env\.kwargs must be a mapping .*, got \[1\]\.$"),
    ("hatrpo", "env.continuous_actions=null", r"^env\.continuous_actions must be true or false, got null\.$"),
    ("happo", "clip_epsilon=1", r"^clip_epsilon must be a number between 0 and 1, both excluded, got 1\.$"),
    ("happo", "updater.lr=-1", r"^updater\.lr must be a number of at least 0, got -1\.$"),
    ("happo", "updater.epochs=0", r"^updater\.epochs must be a whole number of at least 1, got 0\.$"),
    ("happo", "updater.minibatch_size=2.5", r"^updater\.minibatch_size must be a whole number .*, got 2\.5\.$"),
    ("happo", "updater.max_grad_norm=null", r"^updater\.max_grad_norm must be a positive number, got null\.$"),
    ("hatrpo", "critic.inputs=staet", r"^critic\.inputs: 'staet'\. Did you mean 'state'\?"),
    ("itrpo", "actor.sharing=null", r"^actor\.sharing: null\. .*Legal: 'all', 'group', 'none'\.$"),
    ("itrpo", "actor.network=[gru]", r"^actor\.network: \['gru'\]\. .*Legal: 'mlp', 'gru', 'lstm'\.$"),
    ("itrpo", "critic.share_params=none", r"^critic\.share_params must be true or false, got 'none'\.$"),
    ("matrpo", "critic.others_actions=1", r"^critic\.others_actions must be true or false, got 1\.$"),
    ("hatrpo", "agent_order=[false,true]", r"^agent_order must be .*, got \[False, True\]\.$"),
    ("hatrpo", "agent_order=backwards", r"^agent_order must be .*, got 'backwards'\.$"),
]

ONE = [
    # Values.
    ("hatrpo", "seed=x", r"^seed must be a whole number from 0 to 4294967295, got 'x'\.$"),
    ("hatrpo", "output_dir=null", r"^output_dir must be a folder, got null\.$"),
    ("hatrpo", "resume=[1]", r"^resume.*'\[1\]' has no config\.yaml"),
    ("hatrpo", "team_reward=max", r"^team_reward: 'max'\. Did you mean 'mean'\? Legal: 'mean', 'sum', 'null'\.$"),
    ("hatrpo", "agent_order=[0,0]", r"^agent_order must be random, fixed, greedy, or a list .*, got \[0, 0\]\.$"),
    ("happo", "agent_order=greedy", r"^agent_order must be random, fixed, or a list .*, got 'greedy'\.$"),
    ("hatrpo", "device=tpu", r"^device: 'tpu' is not there.* Did you mean 'cpu'\? Legal: 'auto', 'cpu'"),
    ("hatrpo", "device=null", r"^device: None is not there.* Legal: 'auto', 'cpu'"),
    ("hatrpo", "env.name=vmas/balanc", r"^env: 'vmas/balanc'\. Did you mean 'vmas/balance'"),
    ("hatrpo", "env.name=smac/3m", r"^env: 'smac/3m'\. .*Legal: 'vmas', 'pettingzoo', 'mamujoco', 'gym', 'custom'\.$"),
    # Sections, and names that are missing or new.
    ("hatrpo", "updater=3", r"^updater: 3\. Legal: a section with updater\.max_kl, .*kl_budget\.$"),
    ("hatrpo", "actor=[1]", r"^actor: \[1\]\. Legal: a section with actor\.network, actor\.hidden"),
    ("happo", "updater=3", r"^updater: 3\. Legal: a section with updater\.lr, updater\.epochs, .*max_grad_norm\.$"),
    ("happo", "updater.max_kl=0.01", r"^setting 'updater\.max_kl' does not exist\. .*Legal: .*'updater\.lr'"),
    ("happo", "updater.epoch=2", r"^setting 'updater\.epoch' does not exist\. Did you mean 'updater\.epochs'"),
    ("happo", "critic.value_norm=true", r"^setting 'critic\.value_norm' does not exist"),
    ("mappo", "updater.max_kl=0.01", r"^setting 'updater\.max_kl' does not exist\. .*Legal: .*'updater\.lr'"),
    ("ippo", "critic.inputs=state", r"^setting 'critic\.inputs' does not exist"),
    ("happo", "~updater.lr", r"^updater\.lr is missing\. Legal: a number of at least 0\.$"),
    ("hatrpo", "updater.lr=1", r"^setting 'updater\.lr' does not exist"),
    ("hatrpo", "updater={maxkl: 1}", r"^setting 'updater\.maxkl' does not exist\. Did you mean 'updater\.max_kl'"),
    ("hatrpo", "updater={max_kl: -1}", r"^updater\.max_kl must be a positive number, got -1\.$"),
    ("hatrpo", "+sed=1", r"^setting 'sed' does not exist\. Did you mean 'seed'"),
    ("hatrpo", "lr=1", r"^setting 'lr' does not exist\. Did you mean 'critic\.lr'\? Legal: what --help lists\.$"),
    ("hatrpo", "trainer.max_kl=1", r"^setting 'trainer\.max_kl' does not exist\. Did you mean 'updater\.max_kl'\? "),
    ("hatrpo", "checkpoint.x=3", r"^setting 'checkpoint\.x' does not exist\. Legal: 'checkpoint\.every', 'checkpoint"),
    ("hatrpo", "+env.parallel=true", r"^setting 'env\.parallel' does not exist\."),
    ("itrpo", "+team_reward=sum", r"^setting 'team_reward' does not exist\."),
    ("hatrpo", "~critic.lr", r"^critic\.lr is missing\. Legal: a number of at least 0\.$"),
    ("hatrpo", "~critic.network", r"^critic\.network is missing\. Legal: 'mlp', 'gru', 'lstm'\.$"),
    ("hatrpo", "~critic", r"^critic is missing\. Legal: a section with critic\.network"),
    ("hatrpo", "seed=???", r"^seed: Missing mandatory value"),
    ("hatrpo", "~env", r"^~env: a run needs an environment\. Legal: env="),
    ("hatrpo", "algorithm=matrpo", r"^setting 'algorithm' does not exist"),
    ("hatrpo", "versions.torch=3", r"^setting 'versions\.torch' does not exist"),
    ("hatrpo", "--config-name=matrpo", r"^--config-name: a recipe has one config\. Legal: the recipe of another"),
    # Settings that cannot be together.
    ("hatrpo", "env.num_envs=7", r"^train\.frames_per_batch=6000 .*env\.num_envs=7: .*Nearest: 5999 or 6006\.$"),
    ("hatrpo", "train.total_frames=6001", r"^train\.total_frames=6001 .*Nearest: 6000 or 12000\.$"),
    ("hatrpo", "collector.cudagraph_policy=true", r"^collector\.cudagraph_policy=true needs device=cuda, got cpu"),
    ("hatrpo", "critic.inputs=both", r"^env: 'vmas/balance' has no global state\. Use critic\.inputs=observations\.$"),
    ("itrpo", "env=gym/CartPole-v1", r"^env: 'gym/CartPole-v1' has a single agent.*Use the recipe trpo\.$"),
    ("mappo", "env=gym/CartPole-v1", r"^env: 'gym/CartPole-v1' has a single agent.*Use the recipe trpo\.$"),
    ("hatrpo", "env=gym/CartPole-v1", r"^env: 'gym/CartPole-v1' has a single agent.*Use the recipe trpo\.$"),
    ("hatrpo", "env=custom", r"^env\.factory must be 'package\.module\.function', .*, got null\.$"),
]


def together(cases):
    """Puts cases of the same recipe and of different settings together: recipes, and for each its cases by setting."""
    groups = []
    for name, override, expected in cases:
        setting = override.partition("=")[0]
        fitting = (group for recipe, group in groups if recipe == name and setting not in group)
        group = next(fitting, None)
        if group is None:
            groups.append((name, group := {}))
        group[setting] = (override, expected)
    return groups


@pytest.mark.parametrize(("name", "cases"), together(VALUES), ids=str)
def test_each_value_that_cannot_be_has_its_line(name, cases):
    said = message(name, *[override for override, _ in cases.values()])
    lines = [line.removeprefix("  - ") for line in said.splitlines()]
    if len(cases) > 1:
        assert lines.pop(0) == f"{len(cases)} settings are wrong:"
    assert len(lines) == len(cases)
    for _, expected in cases.values():
        assert sum(bool(re.search(expected, line)) for line in lines) == 1, expected


@pytest.mark.parametrize(("name", "override", "expected"), ONE, ids=lambda value: str(value)[:40])
def test_one_line_says_what_cannot_be(name, override, expected):
    said = message(name, override)
    assert re.search(expected, said)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["actor.network=gru", "actor.hidden=[]"], r"^actor\.network=gru needs actor\.hidden, .* Legal: \[128\]\.$"),
        (["critic.network=lstm", "critic.hidden=[]"], r"^critic\.network=lstm needs critic\.hidden"),
        (["critic.value_norm=true", "critic.hidden=[16,1]"], r"^critic\.hidden=\[16, 1\] with critic\.value_norm=true"),
        (
            ["env.num_envs=1", "train.frames_per_batch=1"],
            r"^train\.frames_per_batch must be a whole number of at least 2, got 1\.$",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_two_settings_that_cannot_be_together(overrides, expected):
    assert re.search(expected, message("hatrpo", *overrides))


def test_all_at_once():
    """Wrong values, and those settings against each other that are right for themselves."""
    first, *lines = message("hatrpo", "seed=x", "film=3", "updater.max_kl=-1", "env.num_envs=7").splitlines()
    assert first == "4 settings are wrong:"
    assert [re.match(r"  - ([\w.]+)", line)[1] for line in lines] == [
        "seed",
        "film",
        "updater.max_kl",
        "train.frames_per_batch",
    ]


def test_unknown_names_and_wrong_values_at_once():
    first, *lines = message("hatrpo", "sed=1", "gama=2", "+foo=1", "gamma=null", "env.num_envs=7").splitlines()
    assert first == "5 settings are wrong:"
    expected = [
        "gamma must be",
        "'sed' does not exist.",
        "'gama' does not exist.",
        "'foo' does not exist.",
        "num_envs=7",
    ]
    for line, part in zip(lines, expected, strict=True):
        assert part in line


def test_an_unknown_environment_leaves_its_settings_open():
    """Which names ``env.*`` has, and what fits ``num_envs``, only the right environment tells."""
    said = message("hatrpo", "env=vmas/balanc", "env.parallel=true", "sed=1", "resume=nowhere")
    first, *lines = said.splitlines()
    assert first == "3 settings are wrong:"
    assert [line.split()[1] for line in lines] == ["env:", "resume:", "setting"]


def test_a_value_that_is_wrong_is_not_compared():
    assert message("hatrpo", "env.num_envs=0") == "env.num_envs must be a whole number of at least 1, got 0."
    said = message("hatrpo", "train.frames_per_batch=61")
    assert re.search(r"^train\.frames_per_batch=61 .*Nearest: 60 or 120\.$", said), (
        "what total_frames is then, who knows"
    )


@pytest.mark.parametrize("name", ["itrpo", "matrpo", "hatrpo", "trpo"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["actor.network=gru", "critic.network=lstm", "critic.hidden=[1]", "critic.value_norm=true", "chunk_size=3"],
        [
            "actor.hidden=[]",
            "updater.fisher_subsample=1e-9",
            "critic.minibatch_size=1000000",
            "critic.lr=0",
            "entropy_coeff=-1",
        ],
        ["env=custom", "env.factory=a.b", "env.kwargs={any: 1}", "+env.kwargs.other=2", "env.parallel=true"],
    ],
    ids=["defaults", "recurrent", "small", "custom"],
)
def test_what_can_be_passes(name, overrides):
    check_settings(config(name, *overrides), SETTINGS[name])


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("hatrpo", "team_reward=sum"),
        ("hatrpo", "agent_order=[1,0,2]"),
        ("hatrpo", "agent_order=fixed"),
        ("hatrpo", "agent_order=greedy"),
        ("itrpo", "actor.sharing=all"),
        ("matrpo", "critic.others_actions=true"),
        ("matrpo", "env=pettingzoo/simple_spread_v3"),
        ("happo", "updater={lr: 0, epochs: 1, minibatch_size: 1, max_grad_norm: 0.5}"),
        ("happo", "clip_epsilon=0.3"),
        ("mappo", "actor.sharing=all"),
        ("ippo", "critic.share_params=false"),
    ],
)
def test_what_only_some_recipes_have(name, override):
    check_settings(config(name, override), SETTINGS[name])


def test_a_sweep_is_left_to_hydra():
    assert compose_settings(["-m", "seed=1,2"], CONFIG_DIR, "hatrpo")[1] == ["-m", "++seed=1,2"]
    with pytest.raises(SettingError, match=r"^setting 'sed' does not exist"):
        compose_settings(["-m", "seed=1,2", "sed=1"], CONFIG_DIR, "hatrpo")
    with pytest.raises(SettingError, match=r"^updater\.max_kl must be a positive number, got -1\.$"):
        compose_settings(["-m", "updater.max_kl=0.01,-1"], CONFIG_DIR, "hatrpo")


@functools.cache
def composed():
    return config("hatrpo", "logger.backend=csv", "train.frames_per_batch=60")


def recorded(folder, **kwargs):
    """The folder of a run, with other ``kwargs`` in the sections of its ``config.yaml``."""
    record = full_record(composed(), "HATRPO")
    for section, values in kwargs.items():
        record[section]["kwargs"] = values
    folder.mkdir()
    RunFolder(folder).write_config(record)
    return folder


def resumed(*overrides):
    """What a run is resumed with."""
    return composed_twice("hatrpo", *overrides)


def composed_twice(name, *overrides):
    """A config as it is checked, and as Hydra composes it for a run."""
    cfg, checked = compose_settings(overrides, CONFIG_DIR, name)
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        assert compose(name, ["++output_dir=.", *checked]) == cfg
    return cfg


@pytest.mark.parametrize(
    "command",
    [
        "matrpo",
        "hatrpo agent_order=[1,0] actor.hidden=[16] env.kwargs.n_agents=2 train.frames_per_batch=60",
        "hatrpo env=vmas/transport env.kwargs={n_agents:2}",
        "hatrpo env=pettingzoo/simple_push_v3 ~env.kwargs env.kwargs={}",
        "itrpo hyperparameters=finetuned env=vmas/balance seed=3",
        "trpo env=gym/Acrobot-v1 critic.lr=1e-4 output_dir=a",
    ],
)
def test_what_is_checked_is_what_hydra_composes(command):
    composed_twice(*command.split())


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "text": "Zürich",
            "path": "C:\\temp",
            "list": [{"a": 1}, 'ü"b\\'],
            "none": {},
            "a b": "1",
            "a.b": None,
            "a=,": 1e-5,
        },
    ],
    ids=str,
)
def test_a_resumed_run_has_the_settings_that_it_had(values, tmp_path):
    """Text in other alphabets was changed, and what was not in a mapping any more came back."""
    folder = recorded(tmp_path / "run", env=values, logger={"video_format": "ü"})
    cfg = resumed(f"resume={folder}")
    assert cfg.env.kwargs == values
    assert cfg.logger.kwargs == {"video_format": "ü"}


@pytest.mark.parametrize("name", ["plain", "k=3,(b", "Zürich", "it's a\\b"])
def test_a_run_can_be_resumed_in_any_folder(name, tmp_path, capsys):
    """As it is told when the run ends."""
    folder = recorded(tmp_path / name)
    settings = OmegaConf.create({"train": {"total_frames": 400}, "env": {"name": "vmas/balance"}, "device": "cpu"})
    console = Console(settings, "HATRPO", folder, 0, None, ALONE)
    console.print_how_to_continue(SystemExit(143), 1, 80, 1)
    console.close()
    override = shlex.split(capsys.readouterr().out.partition("To continue: ")[2])
    assert resumed(*override).resume == str(folder)


def test_what_cannot_be_beside_resume(tmp_path):
    folder = recorded(tmp_path / "run")
    assert compose_settings(["-m", f"resume={folder}", "train.total_frames=120"], CONFIG_DIR, "hatrpo")[1][0] == "-m"
    compose_settings([f"resume={folder}", f"output_dir='{folder}'"], CONFIG_DIR, "hatrpo")
    with pytest.raises(SettingError, match=r"^resume=a,b: a sweep resumes no runs\. Legal: one folder\.$"):
        compose_settings(["-m", "resume=a,b"], CONFIG_DIR, "hatrpo")
    with pytest.raises(SettingError, match=r"^output_dir=a,b with resume=.*Legal: without output_dir\.$"):
        compose_settings(["-m", f"resume={folder}", "output_dir=a,b"], CONFIG_DIR, "hatrpo")
    with pytest.raises(SettingError, match=r"^output_dir=other with resume=.*Legal: without output_dir\.$"):
        compose_settings([f"resume={folder}", "output_dir=other"], CONFIG_DIR, "hatrpo")
    for damage in ("", "a: [", "seed: 0\n"):
        (folder / "config.yaml").write_text(damage)
        with pytest.raises(SettingError) as caught:  # and nothing of settings that the run would have had
            compose_settings([f"resume={folder}", "train.total_frames=120"], CONFIG_DIR, "hatrpo")
        assert str(caught.value).startswith(f"resume: {folder / 'config.yaml'} is not the config.yaml of a run: ")


def test_a_config_made_by_hand():
    cfg = OmegaConf.create(OmegaConf.to_container(config("hatrpo")))
    check_settings(cfg, SETTINGS["hatrpo"])
    cfg.updater.maxkl = 1
    cfg.typo = {"a": 1}
    cfg.env.parallel = True
    del cfg.seed
    with pytest.raises(SettingError) as caught:
        check_settings(cfg, SETTINGS["hatrpo"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 settings are wrong:"
    for part in (
        "'updater.maxkl' does not exist. Did you mean 'updater.max_kl'",
        "'typo.a' does not exist. Legal: what --help lists.",
        "'env.parallel'",
        "seed is",
    ):
        assert sum(part in line for line in lines) == 1, part


def test_the_record_of_a_run_is_a_config():
    cfg = config("hatrpo")
    with open_dict(cfg):
        cfg.algorithm = "HATRPO"
        cfg.versions = {"torch": "2"}
    check_settings(cfg, SETTINGS["hatrpo"])


def test_hydras_folder_is_only_there_when_hydra_runs():
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose("hatrpo")
    with pytest.raises(SettingError, match=r"^output_dir: .*HydraConfig was not set"):
        check_settings(cfg, SETTINGS["hatrpo"])


@pytest.mark.parametrize("value", ["stop", "drop"])
def test_what_to_do_with_what_is_not_finite(value):
    cfg = config("hatrpo")
    with open_dict(cfg):
        cfg.non_finite = value
        check_settings(cfg, SETTINGS["hatrpo"])
        cfg.non_finite = f"{value}s"
    with pytest.raises(SettingError, match=rf"^non_finite: '{value}s'\. Did you mean '{value}'.*Legal: 'stop', 'drop'"):
        check_settings(cfg, SETTINGS["hatrpo"])


def test_the_settings_of_an_updater_have_its_ranges():
    for name, updater in {"hatrpo": TrustRegionUpdater, "happo": HAPPOUpdater}.items():
        titles = {
            name: field.title for name, field in SETTINGS[name].model_fields["updater"].annotation.model_fields.items()
        }
        choices = dict.fromkeys(updater.CHOICES)  # pydantic knows them by their type
        assert titles == {name: legal for name, (legal, _) in updater.RANGES.items()} | choices
        assert set(config(name).updater) == set(titles)


def test_the_command_line_says_it_all(tmp_path):
    """No folder is left behind."""
    done = run_command("torchrl_trpo.recipes.hatrpo", ["seed=x", "film=3", "device=tpu"], tmp_path)
    assert done.returncode == 1
    first, *lines = done.stderr.strip().splitlines()
    assert first == "error: 3 settings are wrong:"
    assert {line.split()[1] for line in lines} == {"seed", "film", "device:"}
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_simulator_that_is_not_installed_is_no_misspelt_task(monkeypatch):
    monkeypatch.setattr("torchrl_trpo.envs.tasks.known_tasks", lambda library: [])
    with pytest.raises(SettingError, match=r"not installed\. Use: pip install 'torchrl-trpo\[recipes,gym\]'"):
        compose_settings(["env=gym/Acrobot-v1"], CONFIG_DIR, "trpo")


def test_flags_of_hydra_are_no_settings():
    flags = ["--cfg", "job", "--config-dir=.", "~critic.lr"]
    assert compose_settings(flags[:3], CONFIG_DIR, "hatrpo")[1] == flags[:3]
    with pytest.raises(SettingError, match=r"^critic\.lr is missing"):
        compose_settings(flags, CONFIG_DIR, "hatrpo")


def test_wrong_syntax_is_one_of_the_problems():
    with pytest.raises(SettingError, match=r"2 settings are wrong:.*\n  - env: 'vmas/balanc'.*\n  - .*gamma=\["):
        compose_settings(["gamma=[", "env=vmas/balanc"], CONFIG_DIR, "hatrpo")
