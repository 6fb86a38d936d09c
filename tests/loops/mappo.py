"""A hand-written MAPPO loop in TorchRL's style: collector, ClipPPOLoss, minibatches, Adam."""

import torch
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.objectives import ClipPPOLoss, ValueEstimators


def train(env: EnvBase, actor, critic, total_frames=2_000, frames_per_batch=500, epochs=2, minibatch_size=250):
    collector = Collector(
        env,
        actor,
        frames_per_batch=frames_per_batch,
        total_frames=total_frames,
        auto_register_policy_transforms=False,
    )
    loss = ClipPPOLoss(actor, critic, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
    loss.set_keys(
        action=("agents", "action"),
        sample_log_prob=("agents", "action_log_prob"),
        reward=("agents", "reward"),
        value=("agents", "state_value"),
    )
    loss.make_value_estimator(ValueEstimators.MAGAE, gamma=0.95, lmbda=0.9)
    optim = torch.optim.Adam(loss.parameters(), lr=3e-4)
    for data in collector:  # [num_envs, T]
        with torch.no_grad():
            loss.value_estimator(
                data, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        rows = data.reshape(-1)
        for _ in range(epochs):
            for index in torch.randperm(len(rows)).split(minibatch_size):
                losses = loss(rows[index])
                optim.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
                optim.step()
        yield data
