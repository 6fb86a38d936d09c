"""TRPO: one agent on any Gymnasium task, with its critic V(o).

    python -m torchrl_trpo.recipes.trpo
    python -m torchrl_trpo.recipes.trpo env=gym/CartPole-v1 train.total_frames=100000

Schulman et al. 2015, arXiv:1502.05477. Settings: config/trpo.yaml and config/base.yaml.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.config.cli import run_recipe
from torchrl_trpo.config.schema import TRPO
from torchrl_trpo.config.validation import check_single_agent
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks.recurrent import carry_states
from torchrl_trpo.objectives import TRPOLoss
from torchrl_trpo.parallel.ranks import Ranks
from torchrl_trpo.training.collector import make_collector
from torchrl_trpo.training.critic_fit import critic_optimizer, fit_critic
from torchrl_trpo.training.estimators import attach_estimator, estimate_advantages, own_critic_estimator
from torchrl_trpo.training.policy import make_policy, make_training_env
from torchrl_trpo.training.run import Run, training_run


@training_run(TRPO)
def train(cfg: DictConfig, ranks: Ranks) -> dict[str, Any]:
    """Trains TRPO.

    Args:
        cfg: the config, see ``config/trpo.yaml``.
        ranks: the processes of the job, see ``docs/scaling.md``; one process unless started with torchrun.

    Returns:
        The run's summary.
    """
    # Environment and policy.
    env = make_training_env(cfg, ranks)
    keys = check_single_agent(cfg, group_keys(env))
    actor = make_policy(env, [keys], **cfg.actor)
    carry_states(env, actor)

    # Critic and objective, the policy's updater and the critic's optimiser.
    estimator = own_critic_estimator(
        env,
        keys,
        gamma=cfg.gamma,
        lmbda=cfg.lmbda,
        hidden=cfg.critic.hidden,
        network=cfg.critic.network,
        value_norm=cfg.critic.value_norm,
    )
    loss = TRPOLoss(
        actor,
        estimator.value_network,
        normalize_advantage=True,
        entropy_coeff=cfg.entropy_coeff,
        chunk_size=cfg.chunk_size,
        compiled=cfg.env.get("compiled", False),
        value_norm=estimator.value_norm,
        process_group=ranks.group,
    )
    attach_estimator(loss, estimator, keys)
    updater = TrustRegionUpdater(loss, **cfg.updater)
    critic_optim = critic_optimizer([loss], lr=cfg.critic.lr)

    collector = make_collector(env, actor, frames_per_batch=cfg.train.frames_per_batch, ranks=ranks, **cfg.collector)
    with Run(
        cfg,
        "TRPO",
        collector=collector,
        policy=actor,
        losses=loss,
        updaters=[updater],
        critic_optim=critic_optim,
        ranks=ranks,
    ) as run:
        for data in run.batches():  # [num_envs, T]
            run.lap("collect_s")

            estimate_advantages([loss], data)
            run.lap("critic_s")

            stats = updater.step(data)
            run.lap("policy_s")

            fit = fit_critic(
                loss,
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
