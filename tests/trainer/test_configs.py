"""The configs in TorchRL's config store, and training from them alone."""

from __future__ import annotations

import functools
import inspect
import statistics
from pathlib import Path

import hydra
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torchrl.modules import MultiAgentMLP, PopArtValueNorm
from torchrl.objectives import PPOLoss
from torchrl.objectives.value import GAE, MultiAgentGAE
from torchrl.trainers.algorithms.configs.trainers import OnPolicyTrainerConfig
from torchrl.trainers.algorithms.on_policy import OnPolicyTrainer

from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.envs import make_env
from torchrl_trpo.errors import SettingError
from torchrl_trpo.objectives import AgentGAE, CentralCriticValueEstimator, HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.recipes import trainer as recipe
from torchrl_trpo.trainer import TRPOTrainer, configs

YAML = Path(recipe.__file__).parent / "config" / "trainer"
TINY = ["env.num_envs=4", "env.max_steps=5", "collector.frames_per_batch=24", "trainer.total_frames=48"]
TINY += [
    "env.kwargs.n_agents=2",
    "trainer.minibatch_size=12",
    "trainer.progress_bar=false",
    "actor.hidden=[8]",
    "critic.hidden=[8]",
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is an experimental/prototype feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:The agents' rewards differ"),
]


@functools.cache
def composed(name):
    with hydra.initialize_config_dir(str(YAML), version_base=None):
        return hydra.compose(name)


def compose(name, folder, *overrides):
    return OmegaConf.merge(composed(name), OmegaConf.from_dotlist([f"output_dir={folder}", *overrides]))


def compose_two_groups(folder):
    cfg = compose("itrpo", folder, *TINY, "env.name=custom", "env.factory=tests.environments.make_mixed")
    del cfg.env.kwargs.n_agents
    return cfg


def keywords(*callables):
    parameters = [p for made in callables for p in inspect.signature(made).parameters.values()]
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"}


def fields(config):
    return {name for name in config.__dataclass_fields__ if name not in {"_target_", "_partial_", "_convert_"}}


def logged_at(folder, column):
    """The frames at which the log has an entry."""
    return [int(row.split(",")[0]) for row in (folder / "log" / "scalars" / f"{column}.csv").read_text().split()]


@pytest.mark.parametrize("name", ["matrpo", "hatrpo"])
def test_the_algorithms_train_from_their_yaml_alone(name, tmp_path):
    cfg = compose(name, tmp_path, *TINY, "updater.max_kl=0.02")
    learner = instantiate(cfg.trainer)
    assert isinstance(learner, TRPOTrainer)
    assert learner.optimization_stepper.updater.max_kl == 0.02
    assert isinstance(learner.loss_module, HATRPOSequentialObjective if name == "hatrpo" else TRPOLoss)
    before = learner.loss_module.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    learner.train()
    after = learner.loss_module.state_dict()
    for part in ("actor", "critic"):
        assert any(not torch.equal(before[key], value) for key, value in after.items() if part in key), part
    for column in ("episode_return", "kl", "accepted", "loss_critic"):
        assert logged_at(tmp_path, column) == [24, 48], column
    if name == "matrpo":
        return
    again = instantiate(cfg.trainer)
    again.load_from_file(tmp_path / "checkpoint")
    for key, value in again.loss_module.state_dict().items():
        assert torch.equal(value, after[key]), key


def test_settings_that_cannot_be_are_refused(tmp_path):
    recipe.check(compose("itrpo", tmp_path))
    (tmp_path / "log").mkdir()
    cfg = compose("itrpo", tmp_path, "seed=4294967296", "value.gamma=.nan", "trainer.total_frames=-5")
    with pytest.raises(SettingError) as caught:
        recipe.check(cfg)
    first, *lines = str(caught.value).splitlines()
    assert first == "4 settings are wrong:"
    expected = ["seed must be", "value.gamma must be", "trainer.total_frames must be", "output_dir: "]
    assert all(line.startswith(f"  - {start}") for line, start in zip(lines, expected, strict=True))


@pytest.mark.parametrize("name", ["itrpo", "matrpo", "hatrpo"])
def test_the_yaml_has_the_recipes_settings(name):
    files = ("base.yaml", "trust_region.yaml", f"{name}.yaml", "env/vmas/balance.yaml")
    base, trust_region, own, env = (OmegaConf.load(YAML.parent / file) for file in files)
    theirs = OmegaConf.merge(base, trust_region, own, {"env": env})
    ours = composed(name)
    assert {key: ours.updater[key] for key in theirs.updater} == dict(theirs.updater)
    of_recipes = {"continuous_actions", "compiled"}  # which those decide for themselves
    assert {key: ours.env[key] for key in theirs.env if key not in of_recipes} == {
        key: value for key, value in theirs.env.items() if key not in of_recipes
    }
    assert (ours.value.gamma, ours.value.lmbda) == (theirs.gamma, theirs.lmbda)
    assert (ours.actor.hidden, ours.critic.hidden) == (theirs.actor.hidden, theirs.critic.hidden)
    assert ours.actor.sharing == theirs.actor.get("sharing", "none")
    assert ours.critic.inputs == theirs.critic.get("inputs", "own")
    assert ours.optimizer.lr == theirs.critic.lr
    assert ours.optimizer.eps == 1e-8
    assert (ours.trainer.critic_epochs, ours.trainer.minibatch_size) == (
        theirs.critic.epochs,
        theirs.critic.minibatch_size,
    )
    assert ours.collector.frames_per_batch == theirs.train.frames_per_batch
    assert ours.trainer.total_frames == theirs.train.total_frames
    assert ours.loss.entropy_coeff == theirs.entropy_coeff


def test_fields_are_the_keywords_of_what_is_made():
    gone = {"gamma", "actor", "critic"}  # PPOLoss takes them only to say that they have gone
    own = {f"{key}_key" for key in PPOLoss._AcceptedKeys.__dataclass_fields__} | {"loss_mask_key", "value_estimator"}
    assert fields(configs.TRPOLossConfig) == keywords(TRPOLoss, PPOLoss) - gone | own
    assert fields(configs.HATRPOLossConfig) == keywords(HATRPOSequentialObjective)
    given = {"mask_key", "value_norm"}  # which the loss gives to its estimator
    gae = keywords(AgentGAE, MultiAgentGAE, GAE) - given
    assert fields(configs.AgentGAEConfig) == gae
    assert fields(configs.CentralCriticConfig) == gae | keywords(CentralCriticValueEstimator) - given
    assert fields(configs.TrustRegionUpdaterConfig) == keywords(TrustRegionUpdater)
    assert fields(configs.MultiAgentMLPConfig) == keywords(MultiAgentMLP)
    assert fields(configs.EnvConfig) == keywords(make_env) - {"ranks"}  # no setting: the processes of a job
    for_the_factory = fields(OnPolicyTrainerConfig) - keywords(OnPolicyTrainer)
    assert fields(configs.TRPOTrainerConfig) == keywords(TRPOTrainer, OnPolicyTrainer) | for_the_factory


def test_defaults_are_those_of_what_is_made():
    for config, made in [
        (configs.TrustRegionUpdaterConfig, TrustRegionUpdater),
        (configs.TRPOLossConfig, TRPOLoss),
        (configs.HATRPOLossConfig, HATRPOSequentialObjective),
        (configs.TRPOTrainerConfig, TRPOTrainer),
    ]:
        for name, parameter in inspect.signature(made).parameters.items():
            if parameter.default is not parameter.empty:
                assert config.__dataclass_fields__[name].default == parameter.default, (config, name)


def test_networks_of_agents_in_torchrls_own_models():
    """A squashed normal policy and its critic by sizes alone, in TorchRL's models, and a loss on them."""
    network = {"_target_": "torchrl_trpo.trainer.configs._make_multi_agent_mlp", "n_agent_inputs": 6, "n_agents": 3}
    network = OmegaConf.merge(OmegaConf.structured(configs.MultiAgentMLPConfig), network, {"num_cells": [8]})
    models = "torchrl.trainers.algorithms.configs.modules"
    actor = {
        "_target_": f"{models}._make_tanh_normal_model",
        "network": OmegaConf.merge(network, {"n_agent_outputs": 4, "share_params": False}),
        "in_keys": [["agents", "observation"]],
        "param_keys": [["agents", "loc"], ["agents", "scale"]],
        "out_keys": [["agents", "action"]],
        "return_log_prob": True,
    }
    critic = {
        "_target_": f"{models}._make_value_model",
        "network": OmegaConf.merge(network, {"n_agent_outputs": 1}),
        "in_keys": [["agents", "observation"]],
        "out_keys": [["agents", "state_value"]],
    }
    loss = OmegaConf.merge(OmegaConf.structured(configs.TRPOLossConfig), {
        "actor_network": actor,
        "critic_network": critic,
        "value_norm": {"_target_": "torchrl.modules.PopArtValueNorm"},
        "value_estimator": OmegaConf.merge(OmegaConf.structured(configs.AgentGAEConfig), {"gamma": 0.8}),
        "loss_mask_key": ["agents", "mask"],
        "value_key": ["agents", "state_value"],
        "reward_key": ["agents", "reward"],
        "action_key": ["agents", "action"],
    })  # fmt: skip
    objective = instantiate(
        OmegaConf.merge(OmegaConf.structured(configs.HATRPOLossConfig), {"losses": loss, "agent_order": [2, 0, 1]})
    )
    made = objective.losses["agents"]
    assert objective.agent_order == (2, 0, 1)
    assert made.trust_region == "per_agent"
    assert isinstance(made.value_norm, PopArtValueNorm)
    assert made.value_estimator.value_norm is made.value_norm
    assert made.value_estimator.value_network is made.critic_network
    assert made.value_estimator.gamma == pytest.approx(0.8)
    assert made.value_estimator.tensor_keys.reward == made.tensor_keys.reward == ("agents", "reward")
    assert made.value_estimator.mask_keys == (("agents", "mask"),)


def test_groups_of_agents_from_a_config(tmp_path):
    """Each group has its policy, its critic and its loss; a policy of both collects."""
    yaml = compose_two_groups(tmp_path)
    groups, keys = ("drivers", "callers"), ("action", "reward", "value", "advantage", "value_target")
    names = {"value": "state_value", "sample_log_prob": "action_log_prob"}
    losses = {}
    for group in groups:
        losses[group] = OmegaConf.merge(yaml.loss, {
            "actor_network": {**yaml.actor, "group": group, "sharing": "none"},
            "critic_network": {**yaml.critic, "group": group},
            **{f"{key}_key": [group, names.get(key, key)] for key in (*keys, "sample_log_prob")},
        })  # fmt: skip
    yaml.trainer.loss_module = OmegaConf.merge(OmegaConf.structured(configs.HATRPOLossConfig), {"losses": losses})
    yaml.actor.sharing = "none"
    learner = instantiate(yaml.trainer)
    learner.train()
    assert list(learner.loss_module.losses) == list(groups)
    assert learner.loss_module.n_agents == 3
    assert {"episode_return_drivers", "episode_return_callers", "kl"} <= set(learner._log_dict)


def test_parts_may_be_partial_configs(tmp_path):
    """As in TorchRL's own trainer configs; a collector without a policy gets the loss's, a schedule the optimiser."""
    cfg = compose("itrpo", tmp_path, *TINY, "collector._partial_=true", "collector.policy=null", "trainer.logger=null")
    cfg.loss._partial_ = True
    cfg.loss.actor_network = cfg.loss.critic_network = None
    cfg.trainer.actor_network, cfg.trainer.critic_network = "${actor}", "${critic}"
    cfg.trainer.lr_scheduler = {
        "_target_": "torch.optim.lr_scheduler.StepLR",
        "_partial_": True,
        "step_size": 1,
        "gamma": 0.5,
    }
    cfg.trainer.hooks = [{"_target_": "torchrl.trainers.trainers.CountFramesLog", "frame_skip": 1}]
    cfg.trainer.reward_key = ["agents", "reward"]
    learner = instantiate(cfg.trainer)
    assert learner.collector.policy is learner.loss_module.actor_network
    learner.train()
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)
    assert learner._log_dict["n_frames"] == [24, 48]


def test_a_group_must_be_named_where_there_are_several(tmp_path):
    with pytest.raises(InstantiationException, match=r"group: None. Legal: one of \['drivers', 'callers'\]"):
        instantiate(compose_two_groups(tmp_path).critic)


def test_the_program(tmp_path, monkeypatch):
    """Trains ITRPO; everything goes to Hydra's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trainer", "--config-name", "itrpo", *TINY, "hydra.run.dir=run", "seed=3"])
    recipe.main()
    assert (tmp_path / "run" / "checkpoint" / "manifest.json").exists()
    for column in ("episode_return", "kl", "accepted", "loss_critic"):
        assert logged_at(tmp_path / "run", column) == [24, 48], column


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("itrpo", 30), ("matrpo", 35), ("hatrpo", 38)])
def test_episode_returns_rise(name, least, tmp_path):
    """Balance with the YAML's defaults, seed 0; a random policy gets about -6."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    instantiate(compose(name, tmp_path, "trainer.progress_bar=false").trainer).train()
    rows = (tmp_path / "log" / "scalars" / "episode_return.csv").read_text().split()
    returns = [float(row.split(",")[1]) for row in rows]
    print(f"{name}: {returns[0]:.1f}, {statistics.mean(returns[-5:]):.1f}")
    assert returns[0] < 0
    assert statistics.mean(returns[-5:]) >= least
