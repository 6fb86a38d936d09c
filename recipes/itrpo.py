"""ITRPO: independent agents, each with trust-region steps on its own critic V(o_i).

    python -m torchrl_trpo.recipes.itrpo
    python -m torchrl_trpo.recipes.itrpo env=vmas/navigation seed=1 updater.max_kl=0.02

Hu et al. 2023, arXiv:2210.13708. Settings: config/itrpo.yaml and config/base.yaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.config.checks import check_teams
from torchrl_trpo.config.cli import plain_errors, run_recipe
from torchrl_trpo.config.schema import ITRPO
from torchrl_trpo.envs import make_env, resolve_device
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_critic, make_value_norm
from torchrl_trpo.networks.recurrent import carry_states
from torchrl_trpo.objectives import TRPOLoss
from torchrl_trpo.parallel.ranks import Ranks
from torchrl_trpo.training.collector import make_collector
from torchrl_trpo.training.critic_fit import fit_critics
from torchrl_trpo.training.policy import make_policy
from torchrl_trpo.training.run import Run, training_run


@training_run(ITRPO)
def train(cfg: DictConfig, ranks: Ranks) -> dict[str, Any]:
    """Trains ITRPO.

    Args:
        cfg: the config, see ``config/itrpo.yaml``.
        ranks: the processes of the job, see ``docs/scaling.md``; mostly this one alone.

    Returns:
        The run's summary.
    """
    # Environment, and the policies of its groups of agents.
    env = make_env(
        **cfg.env,
        seed=cfg.seed,
        device=resolve_device(cfg.device),
        one_group=cfg.actor.sharing == "all",
        normalize_observations=cfg.normalize_observations,
        ranks=ranks,
    )
    groups = check_teams(cfg, group_keys(env))
    policy = make_policy(env, groups, **cfg.actor)
    carry_states(env, policy)

    # Each group's objective and critic, and the two things that learn from them.
    losses = {}
    for keys, actor in zip(groups, policy, strict=True):
        critic = make_critic(
            env, keys, share_params=cfg.critic.share_params, hidden=cfg.critic.hidden, network=cfg.critic.network
        )
        value_norm = make_value_norm(cfg.critic.value_norm, env.device)
        loss = TRPOLoss(
            actor,
            critic,
            normalize_advantage=True,
            normalize_advantage_exclude_dims=(-2,) if keys.agent_shape else (),
            entropy_coeff=cfg.entropy_coeff,
            chunk_size=cfg.chunk_size,
            compile_policy=cfg.compile_update,
            value_norm=value_norm,
            process_group=ranks.group,
        )
        loss.set_keys(**keys.loss_keys)
        loss.loss_mask_key = keys.mask or "auto"
        loss.make_value_estimator(
            gamma=cfg.gamma,
            lmbda=cfg.lmbda,
            other_mask_keys=[other.mask for other in groups if other.mask],
            value_norm=value_norm,
        )
        losses[str(keys.group)] = loss
    updaters = [TrustRegionUpdater(loss, **cfg.updater) for loss in losses.values()]
    critic_params = [p for loss in losses.values() for p in loss.critic_network_params.flatten_keys().values()]
    critic_optim = torch.optim.Adam(critic_params, lr=cfg.critic.lr, fused=True)

    collector = make_collector(env, policy, frames_per_batch=cfg.train.frames_per_batch, ranks=ranks, **cfg.collector)
    with Run(
        cfg,
        "ITRPO",
        collector=collector,
        policy=policy,
        losses=torch.nn.ModuleDict(losses),
        updaters=updaters,
        critic_optim=critic_optim,
        ranks=ranks,
    ) as run:
        for data in run.batches():  # [num_envs, T]
            run.lap("collect_s")

            with torch.no_grad():
                for loss in losses.values():
                    loss.value_estimator(
                        data, params=loss.critic_network_params, target_params=loss.target_critic_network_params
                    )
            run.lap("critic_s")

            stats = TensorDict.cat([updater.step(data) for updater in updaters])
            run.lap("policy_s")

            fit = fit_critics(
                losses.values(),
                critic_optim,
                data,
                epochs=cfg.critic.epochs,
                minibatch_size=cfg.critic.minibatch_size,
                process_group=ranks.group,
            )
            run.lap("critic_s")

            run.log(data, stats, fit)
        return run.finish()


@hydra.main(version_base=None, config_path=str(Path(__file__).parent / "config"), config_name="itrpo")
def main(cfg: DictConfig) -> None:
    """Runs the recipe from the command line."""
    with plain_errors():
        train(cfg)


if __name__ == "__main__":
    run_recipe(main, __file__)
