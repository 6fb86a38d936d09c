"""HATRPO: one policy per agent, updated in sequence, with a centralised critic V(s).

    python -m torchrl_trpo.recipes.hatrpo
    python -m torchrl_trpo.recipes.hatrpo env=vmas/navigation seed=1 updater.max_kl=0.02

Kuba et al. 2022, arXiv:2109.11251. Settings: config/hatrpo.yaml and config/base.yaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torchrl.collectors import Collector

from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.critic_fit import fit_critic
from torchrl_trpo.envs import make_env, resolve_device
from torchrl_trpo.networks import ACTION, CENTRAL, LOG_PROB, OBSERVATION, REWARD, VALUE, make_actor, make_central_critic
from torchrl_trpo.objectives import CentralCriticValueEstimator, HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.run import Run
from torchrl_trpo.settings import check_settings, plain_errors, run_recipe


def train(cfg: DictConfig) -> dict[str, Any]:
    """Trains HATRPO.

    Args:
        cfg: the config, see ``config/hatrpo.yaml``.

    Returns:
        The run's summary.
    """
    check_settings(cfg)
    device = resolve_device(cfg.device)
    torch.manual_seed(cfg.seed)

    # Environment, policies and critic.
    env = make_env(**cfg.env, seed=cfg.seed, device=device)
    actor = make_actor(env, share_params=False, hidden=cfg.actor.hidden)
    critic = make_central_critic(env, agent_one_hot=cfg.critic.agent_one_hot, hidden=cfg.critic.hidden)

    # Objective, and the two things that learn from it.
    loss = TRPOLoss(
        actor,
        critic,
        normalize_advantage=True,
        normalize_advantage_exclude_dims=(-2,),
        entropy_coeff=cfg.entropy_coeff,
    )
    loss.set_keys(action=ACTION, sample_log_prob=LOG_PROB, reward=REWARD, value=VALUE)
    loss.make_value_estimator(
        CentralCriticValueEstimator,
        gamma=cfg.gamma,
        lmbda=cfg.lmbda,
        value_network=critic,
        observation_keys=[OBSERVATION],
        central_key=CENTRAL,
        agent_one_hot=cfg.critic.agent_one_hot,
    )
    objective = HATRPOSequentialObjective(loss, agent_order=cfg.agent_order)
    updater = TrustRegionUpdater(objective, **cfg.updater)
    critic_optim = torch.optim.Adam(loss.critic_network_params.flatten_keys().values(), lr=cfg.critic.lr)

    run = Run(cfg, "HATRPO", policy=actor, loss=loss, critic_optim=critic_optim)
    collector = Collector(
        env,
        actor,
        frames_per_batch=cfg.train.frames_per_batch,
        total_frames=cfg.train.total_frames - run.frames,
        auto_register_policy_transforms=False,
    )
    for data in collector:  # [num_envs, T]
        run.lap("collect_s")

        with torch.no_grad():
            loss.value_estimator(
                data, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        run.lap("critic_s")

        stats = updater.step(data)
        run.lap("policy_s")

        fit = fit_critic(loss, critic_optim, data, epochs=cfg.critic.epochs, minibatch_size=cfg.critic.minibatch_size)
        run.lap("critic_s")

        run.log(data, stats, fit)
    return run.finish(env)


@hydra.main(version_base=None, config_path=str(Path(__file__).parent / "config"), config_name="hatrpo")
def main(cfg: DictConfig) -> None:
    """Runs the recipe from the command line."""
    with plain_errors():
        train(cfg)


if __name__ == "__main__":
    run_recipe(main, __file__)
