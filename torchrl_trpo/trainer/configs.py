"""Hydra configs for TorchRL's config store: ``loss=trpo``, ``loss=hatrpo``, ``trainer=trpo`` and their parts.

Importing this module registers them, beside those of ``torchrl.trainers.algorithms.configs``, whose style they follow:
each is a dataclass with the keywords of what it makes, and keys may be lists (``action_key: [agents, action]``).

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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import MultiAgentMLP
from torchrl.objectives import LossModule
from torchrl.trainers.algorithms.configs.common import ConfigBase, _normalize_hydra_key, _normalize_hydra_keys
from torchrl.trainers.algorithms.configs.envs_libs import EnvLibsConfig
from torchrl.trainers.algorithms.configs.modules import NetworkConfig
from torchrl.trainers.algorithms.configs.objectives import LossConfig
from torchrl.trainers.algorithms.configs.trainers import OnPolicyTrainerConfig

from torchrl_trpo.envs import make_env, resolve_device
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_central_critic, make_critic
from torchrl_trpo.objectives import AgentGAE, CentralCriticValueEstimator, HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.trainer.trainer import TRPOTrainer, critic_parameters, losses_by_group
from torchrl_trpo.training.policy import make_policy

_HERE = "torchrl_trpo.trainer.configs"
_KEYS = ("advantage", "value_target", "value", "sample_log_prob", "action", "reward", "done", "terminated")


@dataclass
class TRPOLossConfig(LossConfig):
    """Hydra configuration for :class:`~torchrl_trpo.objectives.TRPOLoss`, its keys and its value estimator.

    ``value_estimator`` is a config of the group ``value``; it gets the loss's critic and ``value_norm``. Default:
    ``AgentGAE`` with TorchRL's ``gamma`` and ``lmbda``.
    """

    actor_network: Any = None
    critic_network: Any = None
    trust_region: str | None = None
    agent_dim: int = -2
    entropy_coeff: Any = 0.0
    value_norm: Any = None
    chunk_size: int | None = None
    compile_policy: Any = False
    process_group: Any = None
    entropy_bonus: bool = True
    samples_mc_entropy: int = 1
    log_explained_variance: bool = True
    critic_coeff: float | None = None
    loss_critic_type: str = "smooth_l1"
    normalize_advantage: bool = False
    normalize_advantage_exclude_dims: Any = ()
    advantage_norm: Any = None
    separate_losses: bool = False
    functional: bool = True
    reduction: str | None = None
    clip_value: float | None = None
    delay_actor: bool = False
    max_importance_ratio: float | None = None
    device: Any = None
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
    loss_mask_key: Any = "auto",
    normalize_advantage_exclude_dims: Sequence[int] = (),
    **kwargs: Any,
) -> TRPOLoss:
    keys = {name: _normalize_hydra_key(kwargs.pop(f"{name}_key", None)) for name in _KEYS}
    loss = TRPOLoss(**kwargs, normalize_advantage_exclude_dims=tuple(normalize_advantage_exclude_dims))
    if value_estimator is not None:
        loss.make_value_estimator(value_estimator(value_network=loss.critic_network, value_norm=loss.value_norm))
    loss.set_keys(**{name: key for name, key in keys.items() if key is not None})
    loss.loss_mask_key = _normalize_hydra_key(loss_mask_key)
    return loss


@dataclass
class HATRPOLossConfig(LossConfig):
    """Hydra configuration for :class:`~torchrl_trpo.objectives.HATRPOSequentialObjective`.

    ``losses`` is the config of a TRPO loss, or a mapping from groups to such.
    """

    losses: Any = MISSING
    agent_order: Any = "random"
    _target_: str = f"{_HERE}._make_hatrpo_loss"


def _make_hatrpo_loss(losses: TRPOLoss | Mapping[str, TRPOLoss], agent_order: Any) -> HATRPOSequentialObjective:
    groups = losses if isinstance(losses, TRPOLoss) else dict(losses.items())
    order: Any = agent_order if isinstance(agent_order, str) else list(agent_order)
    return HATRPOSequentialObjective(groups, agent_order=order)


@dataclass
class AgentGAEConfig(LossConfig):
    """Hydra configuration for :class:`~torchrl_trpo.objectives.AgentGAE`, completed by the loss that it is given to."""

    gamma: float = 0.99
    lmbda: float = 0.95
    value_network: Any = None
    mask_key: Any = "auto"
    other_mask_keys: Any = ()
    team_reward: str | None = None
    reward_keys: Any = None
    value_norm: Any = None
    agent_dim: int = -2
    average_gae: bool = False
    differentiable: bool = False
    vectorized: bool | None = None
    skip_existing: bool | None = None
    advantage_key: Any = None
    value_target_key: Any = None
    value_key: Any = None
    shifted: bool = False
    device: Any = None
    time_dim: int | None = None
    auto_reset_env: bool = False
    deactivate_vmap: bool = False
    value_chunk_size: int | None = None
    num_chunks: int | None = None
    num_chunk: int | None = None
    value_chunk_dim: int = 0
    shifted_budget: int = 1
    group_key: Any = None
    _target_: str = f"{_HERE}._make_agent_gae"
    _partial_: bool = True


@dataclass
class CentralCriticConfig(AgentGAEConfig):
    """Hydra configuration for :class:`~torchrl_trpo.objectives.CentralCriticValueEstimator`."""

    observation_keys: Any = MISSING
    central_key: Any = MISSING
    state_key: Any = None
    n_agents: int | None = None
    action_keys: Any = None
    actor_network: Any = None
    agent_one_hot: bool = False
    _target_: str = f"{_HERE}._make_central_critic"


def _make_agent_gae(**kwargs: Any) -> AgentGAE:
    return AgentGAE(**_with_keys(kwargs))


def _make_central_critic(**kwargs: Any) -> CentralCriticValueEstimator:
    return CentralCriticValueEstimator(**_with_keys(kwargs))


def _with_keys(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with keys as TorchRL takes them."""
    normalize = {"_keys": _normalize_hydra_keys, "_key": _normalize_hydra_key}
    return {name: normalize.get(name[name.rfind("_") :], lambda value: value)(value) for name, value in kwargs.items()}


@dataclass
class TrustRegionUpdaterConfig(ConfigBase):
    """Hydra configuration for :class:`~torchrl_trpo.TrustRegionUpdater`; the trainer gives the objective."""

    objective: Any = None
    max_kl: float = 0.01
    damping: float = 0.1
    cg_iters: int = 10
    cg_tol: float = 1e-6
    backtrack_coeff: float = 0.8
    max_backtracks: int = 10
    accept_ratio: float = 0.5
    fisher_subsample: float = 1.0
    _target_: str = "torchrl_trpo.TrustRegionUpdater"
    _partial_: bool = True

    def __post_init__(self) -> None:
        """Nothing to do."""


@dataclass
class TRPOTrainerConfig(OnPolicyTrainerConfig):
    """Hydra configuration for :class:`~torchrl_trpo.trainer.TRPOTrainer`.

    ``updater`` is a config of the group ``policy_updater``. ``optimizer``, one of the group ``optimizer``, gets the
    critics' parameters. A collector that is partial and has no policy gets the loss's.
    """

    collector: Any = MISSING
    total_frames: int | None = None
    loss_module: Any = MISSING
    optimizer: Any = MISSING
    logger: Any = None
    save_trainer_file: Any = None
    replay_buffer: Any = None
    optim_steps_per_batch: int = 1
    updater: Any = None
    critic_epochs: int = 5
    minibatch_size: int = 300
    add_gae: bool = False
    gamma: float | None = None
    lmbda: float | None = None
    done_key: Any = None
    terminated_key: Any = None
    reward_key: Any = None
    episode_reward_key: Any = None
    action_key: Any = None
    observation_key: Any = None
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
    create_env_fn: Any = None,
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
    for name in [name for name in kwargs if name.endswith("_key")]:
        kwargs[name] = _normalize_hydra_key(kwargs[name])
    trainer = TRPOTrainer(
        collector=collector,
        total_frames=collector.total_frames if total_frames is None else total_frames,
        loss_module=loss_module,
        optimizer=optimizer,
        updater=updater,
        lr_scheduler=lr_scheduler,
        **kwargs,
    )
    for hook in hooks or ():
        hook.register(trainer)
    return trainer


def _made(network: Any) -> Any:
    """A network, of what may be its partial config."""
    return network() if isinstance(network, partial) else network


@dataclass
class MultiAgentMLPConfig(NetworkConfig):
    """Hydra configuration for :class:`~torchrl.modules.MultiAgentMLP`.

    With TorchRL's configs ``model=tanh_normal`` and ``model=value`` it makes policies and critics of agents, whose keys
    are lists: ``in_keys: [[agents, observation]]``.
    """

    n_agent_inputs: int | None = MISSING
    n_agent_outputs: int = MISSING
    n_agents: int = MISSING
    centralized: bool = False
    share_params: bool = True
    device: Any = None
    depth: int | None = None
    num_cells: Any = None
    activation_class: str = "torch.nn.Tanh"
    use_td_params: bool = True
    _target_: str = f"{_HERE}._make_multi_agent_mlp"


def _make_multi_agent_mlp(*, activation_class: str, num_cells: Any, **kwargs: Any) -> MultiAgentMLP:
    from hydra.utils import get_class

    cells = num_cells if num_cells is None or isinstance(num_cells, int) else list(num_cells)
    return MultiAgentMLP(**kwargs, num_cells=cells, activation_class=get_class(activation_class))


@dataclass
class AgentPolicyConfig(ConfigBase):
    """Hydra configuration for the recipes' policy, made for an environment of :func:`~torchrl_trpo.envs.make_env`.

    With several groups of agents it is the policy of all of them, or of the one that is named.
    """

    env: Any = MISSING
    group: str | None = None
    sharing: str = "group"
    hidden: Any = (128, 128)
    _target_: str = f"{_HERE}._make_agent_policy"
    _partial_: bool = False

    def __post_init__(self) -> None:
        """Nothing to do."""


def _make_agent_policy(env: EnvBase, group: str | None, sharing: str, hidden: Sequence[int]) -> TensorDictModuleBase:
    groups = [keys for keys in group_keys(env) if group in (None, keys.group)]
    policy = make_policy(env, groups, sharing=sharing, hidden=list(hidden))
    return policy[0] if len(groups) == 1 and groups[0].group is not None else policy


@dataclass
class AgentCriticConfig(ConfigBase):
    """Hydra configuration for the recipes' critics, made for an environment of :func:`~torchrl_trpo.envs.make_env`.

    ``inputs`` is ``own`` for each agent's ``V(o_i)``, or what the centralised critic ``V(s)`` reads: ``observations``
    (of all agents), ``state`` or ``both``.
    """

    env: Any = MISSING
    group: str | None = None
    inputs: str = "own"
    share_params: bool = True
    agent_one_hot: bool = False
    others_actions: bool = False
    hidden: Any = (128, 128)
    _target_: str = f"{_HERE}._make_agent_critic"
    _partial_: bool = False

    def __post_init__(self) -> None:
        """Nothing to do."""


def _make_agent_critic(
    env: EnvBase,
    group: str | None,
    inputs: str,
    share_params: bool,
    agent_one_hot: bool,
    others_actions: bool,
    hidden: Sequence[int],
) -> nn.Module:
    found = [keys for keys in group_keys(env) if group in (None, keys.group)]
    if len(found) != 1:
        raise ValueError(f"group: {group!r}. Legal: one of {[keys.group for keys in group_keys(env)]}.")
    if inputs == "own":
        return make_critic(env, found[0], share_params=share_params, hidden=list(hidden))
    return make_central_critic(
        env,
        found[0],
        inputs=inputs,
        agent_one_hot=agent_one_hot,
        others_actions=others_actions,
        hidden=list(hidden),
    )


@dataclass
class EnvConfig(EnvLibsConfig):
    """Hydra configuration for :func:`~torchrl_trpo.envs.make_env`; ``device`` is a name, or ``auto``."""

    name: str = "vmas/balance"
    num_envs: int = 60
    max_steps: int = 100
    kwargs: Any = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    continuous_actions: bool | None = None
    factory: str | None = None
    parallel: bool = False
    one_group: bool = False
    state: bool = False
    render: bool = False
    normalize_observations: bool = False
    _target_: str = f"{_HERE}._make_env"


def _make_env(*, device: str, **settings: Any) -> EnvBase:
    return make_env(**settings, device=resolve_device(device))


def _register() -> None:
    store = ConfigStore.instance()
    configs: dict[tuple[str, str], type[ConfigBase]] = {
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
        store.store(group=group, name=name, node=node)


_register()
