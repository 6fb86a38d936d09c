"""Hydra configs for TorchRL's config store: ``loss=trpo``, ``loss=hatrpo``, ``trainer=trpo`` and their parts.

Importing this module registers them, beside those of ``torchrl.trainers.algorithms.configs``. Each is a dataclass with
the keywords and defaults of what it makes; keys may be lists (``action_key: [agents, action]``).

======================  ===========================================================================
``loss``                ``trpo``, ``hatrpo``
``value``               ``agent_gae``, ``central_critic``: value estimators, for ``loss.value_estimator``
``policy_updater``      ``trust_region``
``trainer``             ``trpo``
``network``             ``multi_agent_mlp``
``model``               ``agent_policy``, ``agent_critic``: the recipes' networks, made for an environment
``env``                 ``trpo_vmas``: :func:`~torchrl_trpo.envs.make_env`, VMAS by default
======================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter, signature
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.utils import get_class
from omegaconf import MISSING
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import MultiAgentMLP
from torchrl.objectives import LossModule, PPOLoss
from torchrl.objectives.value import GAE, MultiAgentGAE
from torchrl.trainers.algorithms.configs.common import ConfigBase
from torchrl.trainers.algorithms.on_policy import OnPolicyTrainer

from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.envs import make_env, resolve_device
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_central_critic, make_critic
from torchrl_trpo.objectives import AgentGAE, CentralCriticValueEstimator, HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.trainer.trainer import TRPOTrainer, critic_parameters, losses_by_group
from torchrl_trpo.training.policy import make_policy

_HERE = "torchrl_trpo.trainer.configs"
_CHECKED = {f"{name}{none}" for name in ("bool", "int", "float", "str") for none in ("", " | None")}
"""The types that OmegaConf checks; a field of any other takes anything."""

_Config = TypeVar("_Config")


@dataclass
class _Base(ConfigBase):
    """What all configs are: other configs of TorchRL only take a ``ConfigBase``."""

    _partial_: bool = False
    _convert_: str = "all"  # lists and dicts rather than OmegaConf's

    def __post_init__(self) -> None:
        """Does nothing; ``ConfigBase`` asks for it."""


def _keywords_of(*made: Callable[..., Any], without: Collection[str] = ()) -> Callable[[type[_Config]], type[_Config]]:
    """Makes a class a dataclass with a field for each keyword of the callables.

    The first callable that has a keyword gives its type and default; a field that the class itself has stays.
    """

    def with_fields(config: type[_Config]) -> type[_Config]:
        annotations = config.__annotations__
        for parameter in (each for function in made for each in signature(function).parameters.values()):
            variable = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
            if variable or parameter.name in annotations or parameter.name in without:
                continue
            annotations[parameter.name] = parameter.annotation if parameter.annotation in _CHECKED else "Any"
            setattr(config, parameter.name, MISSING if parameter.default is Parameter.empty else parameter.default)
        return dataclass(config)

    return with_fields


_OF_THE_LOSS = ("value_norm", "mask_key")  # of a value estimator, which the loss gives to it


@_keywords_of(TRPOLoss, PPOLoss, without=("gamma", "actor", "critic"))  # which PPOLoss refuses
class TRPOLossConfig(_Base):
    """Hydra configuration for :class:`~torchrl_trpo.objectives.TRPOLoss`, its keys and its value estimator.

    ``value_estimator`` is a config of the group ``value``; it gets the loss's critic and ``value_norm``. Default:
    ``AgentGAE`` with TorchRL's ``gamma`` and ``lmbda``.
    """

    value_estimator: Any = None
    loss_mask_key: Any = "auto"
    advantage_key: Any = None
    value_target_key: Any = None
    value_key: Any = None
    sample_log_prob_key: Any = None
    action_key: Any = None
    reward_key: Any = None
    done_key: Any = None
    terminated_key: Any = None
    _target_: str = f"{_HERE}._make_trpo_loss"


def _make_trpo_loss(
    *,
    value_estimator: Callable[..., AgentGAE] | None = None,
    normalize_advantage_exclude_dims: Sequence[int] = (),
    **kwargs: Any,
) -> TRPOLoss:
    keys = {name: _plain_key(kwargs.pop(name)) for name in list(kwargs) if name.endswith("_key")}
    mask = keys.pop("loss_mask_key", "auto")
    loss = TRPOLoss(**kwargs, normalize_advantage_exclude_dims=tuple(normalize_advantage_exclude_dims))
    if value_estimator is not None:
        loss.make_value_estimator(value_estimator(value_network=loss.critic_network, value_norm=loss.value_norm))
    loss.set_keys(**{name.removesuffix("_key"): key for name, key in keys.items() if key is not None})
    loss.loss_mask_key = mask
    return loss


@_keywords_of(HATRPOSequentialObjective)
class HATRPOLossConfig(_Base):
    """Hydra configuration for :class:`~torchrl_trpo.objectives.HATRPOSequentialObjective`.

    ``losses`` is the config of a TRPO loss, or a mapping from groups to such.
    """

    _target_: str = "torchrl_trpo.objectives.HATRPOSequentialObjective"


@_keywords_of(AgentGAE, MultiAgentGAE, GAE, without=_OF_THE_LOSS)
class AgentGAEConfig(_Base):
    """Hydra configuration for :class:`~torchrl_trpo.objectives.AgentGAE`, completed by the loss that it is given to."""

    gamma: float = 0.99
    lmbda: float = 0.95
    value_network: Any = None
    _target_: str = f"{_HERE}._make_agent_gae"
    _partial_: bool = True


@_keywords_of(CentralCriticValueEstimator, AgentGAE, MultiAgentGAE, GAE, without=_OF_THE_LOSS)
class CentralCriticConfig(_Base):
    """Hydra configuration for :class:`~torchrl_trpo.objectives.CentralCriticValueEstimator`, completed by the loss."""

    gamma: float = 0.99
    lmbda: float = 0.95
    value_network: Any = None
    _target_: str = f"{_HERE}._make_central_critic"
    _partial_: bool = True


def _make_agent_gae(**kwargs: Any) -> AgentGAE:
    return AgentGAE(**_plain_keys(kwargs))


def _make_central_critic(**kwargs: Any) -> CentralCriticValueEstimator:
    return CentralCriticValueEstimator(**_plain_keys(kwargs))


def _plain_key(key: Any) -> Any:
    """A key as TorchRL takes it: a list of YAML becomes a tuple, or its one entry."""
    if not isinstance(key, list):
        return key
    return key[0] if len(key) == 1 else tuple(key)


def _plain_keys(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords whose keys, and lists of keys, are as TorchRL takes them."""
    plain = {name: _plain_key(value) if name.endswith("_key") else value for name, value in kwargs.items()}
    lists = {name: value for name, value in plain.items() if name.endswith("_keys") and value is not None}
    return plain | {name: [_plain_key(key) for key in keys] for name, keys in lists.items()}


@_keywords_of(TrustRegionUpdater)
class TrustRegionUpdaterConfig(_Base):
    """Hydra configuration for :class:`~torchrl_trpo.TrustRegionUpdater`; the trainer gives the objective."""

    objective: Any = None
    _target_: str = "torchrl_trpo.TrustRegionUpdater"
    _partial_: bool = True


@_keywords_of(TRPOTrainer, OnPolicyTrainer)
class TRPOTrainerConfig(_Base):
    """Hydra configuration for :class:`~torchrl_trpo.trainer.TRPOTrainer`.

    ``updater`` is a config of the group ``policy_updater``. ``optimizer``, one of the group ``optimizer``, gets the
    critics' parameters. A collector that is partial and has no policy gets the loss's.
    """

    total_frames: int | None = None
    num_epochs: int = 1
    add_gae: bool = False
    gamma: float | None = None
    lmbda: float | None = None
    hooks: Any = None
    actor_network: Any = None
    critic_network: Any = None
    create_env_fn: Any = None
    _target_: str = f"{_HERE}._make_trpo_trainer"


def _make_trpo_trainer(
    *,
    collector: Any,
    loss_module: Any,
    optimizer: Any,
    total_frames: int | None = None,
    updater: Any = None,
    lr_scheduler: Any = None,
    hooks: Sequence[Any] | None = None,
    actor_network: Any = None,
    critic_network: Any = None,
    create_env_fn: Any = None,  # as TorchRL's configs have it; only what refers to it reads it
    **kwargs: Any,
) -> TRPOTrainer:
    if not isinstance(loss_module, LossModule):
        loss_module = loss_module(actor_network=_made(actor_network), critic_network=_made(critic_network))
    losses = losses_by_group(loss_module)
    if isinstance(collector, partial):
        own = {"policy", "policy_factory"} & {name for name, value in collector.keywords.items() if value is not None}
        collector = collector() if own else collector(policy=loss_module.actor_network)
    if isinstance(optimizer, partial):
        optimizer = optimizer(params=[parameter for loss in losses.values() for parameter in critic_parameters(loss)])
    if isinstance(lr_scheduler, partial):
        lr_scheduler = lr_scheduler(optimizer)
    if isinstance(updater, partial):
        updater = updater(objective=loss_module)
    trainer = TRPOTrainer(
        collector=collector,
        total_frames=collector.total_frames if total_frames is None else total_frames,
        loss_module=loss_module,
        optimizer=optimizer,
        updater=updater,
        lr_scheduler=lr_scheduler,
        **_plain_keys(kwargs),
    )
    for hook in hooks or ():
        hook.register(trainer)
    return trainer


def _made(network: Any) -> Any:
    """A network, of what may be its partial config."""
    return network() if isinstance(network, partial) else network


@_keywords_of(MultiAgentMLP)
class MultiAgentMLPConfig(_Base):
    """Hydra configuration for :class:`~torchrl.modules.MultiAgentMLP`.

    With TorchRL's configs ``model=tanh_normal`` and ``model=value`` it makes policies and critics of agents, whose keys
    are lists: ``in_keys: [[agents, observation]]``.
    """

    centralized: bool = False
    share_params: bool = True
    activation_class: str = "torch.nn.Tanh"
    _target_: str = f"{_HERE}._make_multi_agent_mlp"


def _make_multi_agent_mlp(*, activation_class: str, **kwargs: Any) -> MultiAgentMLP:
    return MultiAgentMLP(**kwargs, activation_class=get_class(activation_class))


def _make_agent_policy(
    env: EnvBase, group: str | None = None, sharing: str = "group", hidden: Sequence[int] = (128, 128)
) -> TensorDictModuleBase:
    groups = [keys for keys in group_keys(env) if group in (None, keys.group)]
    policy = make_policy(env, groups, sharing=sharing, hidden=hidden)
    return policy[0] if len(groups) == 1 and groups[0].group is not None else policy


@_keywords_of(_make_agent_policy)
class AgentPolicyConfig(_Base):
    """Hydra configuration for the recipes' policy, made for an environment of :func:`~torchrl_trpo.envs.make_env`.

    With several groups of agents it is the policy of all of them, or of the one that is named.
    """

    _target_: str = f"{_HERE}._make_agent_policy"


def _make_agent_critic(
    env: EnvBase,
    group: str | None = None,
    inputs: str = "own",
    share_params: bool = True,
    agent_one_hot: bool = False,
    others_actions: bool = False,
    hidden: Sequence[int] = (128, 128),
) -> nn.Module:
    found = [keys for keys in group_keys(env) if group in (None, keys.group)]
    if len(found) != 1:
        raise ValueError(f"group: {group!r}. Legal: one of {[keys.group for keys in group_keys(env)]}.")
    if inputs == "own":
        return make_critic(env, found[0], share_params=share_params, hidden=hidden)
    return make_central_critic(
        env,
        found[0],
        inputs=inputs,
        agent_one_hot=agent_one_hot,
        others_actions=others_actions,
        hidden=hidden,
    )


@_keywords_of(_make_agent_critic)
class AgentCriticConfig(_Base):
    """Hydra configuration for the recipes' critics, made for an environment of :func:`~torchrl_trpo.envs.make_env`.

    ``inputs`` is ``own`` for each agent's ``V(o_i)``, or what the centralised critic ``V(s)`` reads: ``observations``
    (of all agents), ``state`` or ``both``.
    """

    _target_: str = f"{_HERE}._make_agent_critic"


@_keywords_of(make_env, without=("ranks",))  # the processes of a job
class EnvConfig(_Base):
    """Hydra configuration for :func:`~torchrl_trpo.envs.make_env`; ``device`` is a name, or ``auto``."""

    name: str = "vmas/balance"
    num_envs: int = 60
    max_steps: int = 100
    kwargs: Any = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    _target_: str = f"{_HERE}._make_env"


def _make_env(*, device: str, **settings: Any) -> EnvBase:
    return make_env(**settings, device=resolve_device(device))


def _register() -> None:
    configs: dict[tuple[str, str], type] = {
        ("loss", "trpo"): TRPOLossConfig,
        ("loss", "hatrpo"): HATRPOLossConfig,
        ("value", "agent_gae"): AgentGAEConfig,
        ("value", "central_critic"): CentralCriticConfig,
        ("policy_updater", "trust_region"): TrustRegionUpdaterConfig,
        ("trainer", "trpo"): TRPOTrainerConfig,
        ("network", "multi_agent_mlp"): MultiAgentMLPConfig,
        ("model", "agent_policy"): AgentPolicyConfig,
        ("model", "agent_critic"): AgentCriticConfig,
        ("env", "trpo_vmas"): EnvConfig,
    }
    for (group, name), node in configs.items():
        ConfigStore.instance().store(group=group, name=name, node=node)


_register()
