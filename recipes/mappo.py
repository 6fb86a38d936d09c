"""MAPPO: clipped minibatch steps with a centralised critic V(s), to compare with.

    python -m torchrl_trpo.recipes.mappo
    python -m torchrl_trpo.recipes.mappo env=vmas/navigation seed=1 updater.lr=0.0003

Yu et al. 2022, arXiv:2103.01955, with TorchRL's ``MAPPOLoss``. Settings: config/mappo.yaml and config/base.yaml.
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from torchrl.objectives import MAPPOLoss

from torchrl_trpo.config.cli import run_recipe
from torchrl_trpo.config.schema import MAPPO
from torchrl_trpo.config.validation import check_teams
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks.recurrent import carry_states
from torchrl_trpo.objectives import ClippedUpdater
from torchrl_trpo.parallel.ranks import Ranks
from torchrl_trpo.training.collector import make_collector
from torchrl_trpo.training.critic_fit import critic_optimizer, fit_critics
from torchrl_trpo.training.estimators import attach_estimator, central_critic_estimator, estimate_advantages
from torchrl_trpo.training.policy import make_policy, make_training_env
from torchrl_trpo.training.run import Run, training_run


@training_run(MAPPO)
def train(cfg: DictConfig, ranks: Ranks) -> dict[str, Any]:
    """Trains MAPPO.

    Args:
        cfg: the config, see ``config/mappo.yaml``.
        ranks: the processes of the job, see ``docs/scaling.md``; one process unless started with torchrun.

    Returns:
        The run's summary.
    """
    # Environment, and a policy for each of its groups of agents.
    env = make_training_env(cfg, ranks)
    groups = check_teams(cfg, group_keys(env))
    policy = make_policy(env, groups, **cfg.actor)
    carry_states(env, policy)

    # Each group's critic and objective, the policies' updater and the critics' optimiser.
    losses = {}
    for keys, actor in zip(groups, policy, strict=True):
        estimator = central_critic_estimator(
            env,
            keys,
            gamma=cfg.gamma,
            lmbda=cfg.lmbda,
            inputs=cfg.critic.inputs,
            agent_one_hot=cfg.critic.agent_one_hot,
            hidden=cfg.critic.hidden,
            network=cfg.critic.network,
        )
        loss = MAPPOLoss(
            actor,
            estimator.value_network,
            clip_epsilon=cfg.clip_epsilon,
            entropy_coeff=cfg.entropy_coeff,
        )
        losses[str(keys.group)] = attach_estimator(loss, estimator, keys)
    updater = ClippedUpdater(losses, **cfg.updater, compiled=cfg.env.get("compiled", False), process_group=ranks.group)
    critic_optim = critic_optimizer(losses.values(), lr=cfg.critic.lr)

    collector = make_collector(env, policy, frames_per_batch=cfg.train.frames_per_batch, ranks=ranks, **cfg.collector)
    with Run(
        cfg,
        "MAPPO",
        collector=collector,
        policy=policy,
        losses=torch.nn.ModuleDict(losses),
        updaters=[updater],
        critic_optim=critic_optim,
        ranks=ranks,
    ) as run:
        for data in run.batches():  # [num_envs, T]
            run.lap("collect_s")

            estimate_advantages(losses.values(), data)
            run.lap("critic_s")

            stats = updater.step(data)
            run.lap("policy_s")

            fit = fit_critics(
                losses.values(),
                critic_optim,
                data,
                epochs=cfg.critic.epochs,
                minibatch_size=cfg.critic.minibatch_size,
                compiled=cfg.env.get("compiled", False),
                process_group=ranks.group,
            )
            run.lap("critic_s")

            run.log(data, stats, fit)
        return run.finish()


if __name__ == "__main__":
    run_recipe(train, __file__)
