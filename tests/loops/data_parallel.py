"""The HATRPO loop in several processes: `torchrun --standalone --nproc-per-node 2 -m tests.loops.data_parallel`."""

import torch
import torch.distributed as dist
from torchrl.collectors import Collector
from torchrl.modules import PopArtValueNorm

from tests.loops.hatrpo import make_env, make_networks
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.training.critic_fit import fit_critic


def train(num_envs=60, max_steps=100, frames=120_000, batch=6_000, epochs=5, minibatch=300, seed=0):
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed + 1000 * rank)
    env = make_env(num_envs // size, max_steps, seed + 1000 * rank)
    actor, critic = make_networks(env)
    collector = Collector(env, actor, frames_per_batch=batch // size, total_frames=frames // size)
    loss = TRPOLoss(
        actor,
        critic,
        normalize_advantage=True,
        normalize_advantage_exclude_dims=(-2,),
        value_norm=PopArtValueNorm(),
        process_group=group,  # all processes begin with the first one's parameters, and update together
    )
    loss.set_keys(
        action=("agents", "action"),
        sample_log_prob=("agents", "action_log_prob"),
        reward=("agents", "reward"),
        value=("agents", "state_value"),
    )
    loss.make_value_estimator(gamma=0.95, lmbda=0.9)
    updater = TrustRegionUpdater(HATRPOSequentialObjective(loss), max_kl=0.01)
    optim = torch.optim.Adam(loss.critic_network_params.flatten_keys().values(), lr=1e-3)
    for data in collector:  # [num_envs / processes, T]
        with torch.no_grad():
            loss.value_estimator(
                data, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        updater.step(data)
        fit_critic(loss, optim, data, epochs=epochs, minibatch_size=minibatch, process_group=group)
        yield loss, data
    collector.shutdown()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for _, data in train():
        returns = data["next", "agents", "episode_reward"][data["next", "done"].squeeze(-1)]
        print(f"process {dist.get_rank()}: episode return {returns.mean():.1f}")
    dist.destroy_process_group()
