"""MATRPO: the loop of `mappo.py` with trust-region steps on the policy."""

from functools import partial

import torch
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import Compose, InitTracker, RewardSum, StepCounter, TransformedEnv, VmasEnv
from torchrl.modules import MultiAgentMLP, NormalParamExtractor, PopArtValueNorm, ProbabilisticActor, TanhNormal

from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import TRPOLoss


def make_env(num_envs, max_steps, seed):
    env = VmasEnv("balance", num_envs=num_envs, n_agents=4, seed=seed)
    reward_sum = RewardSum(in_keys=[env.reward_key], out_keys=[("agents", "episode_reward")])
    return TransformedEnv(env, Compose(InitTracker(), StepCounter(max_steps), reward_sum))


def make_networks(env):
    n_obs = env.full_observation_spec_unbatched["agents", "observation"].shape[-1]
    action_spec = env.full_action_spec_unbatched["agents", "action"]
    layers = {"n_agents": env.n_agents, "num_cells": 128, "depth": 2, "activation_class": torch.nn.Tanh}
    policy = MultiAgentMLP(n_obs, 2 * action_spec.shape[-1], centralized=False, share_params=True, **layers)
    actor = ProbabilisticActor(
        TensorDictModule(
            torch.nn.Sequential(policy, NormalParamExtractor()),
            in_keys=[("agents", "observation")],
            out_keys=[("agents", "loc"), ("agents", "scale")],
        ),
        in_keys=[("agents", "loc"), ("agents", "scale")],
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": action_spec.space.low, "high": action_spec.space.high},
        return_log_prob=True,
        log_prob_key=("agents", "action_log_prob"),
    )
    value = MultiAgentMLP(n_obs, 1, centralized=True, share_params=True, **layers)
    critic = TensorDictModule(value, in_keys=[("agents", "observation")], out_keys=[("agents", "state_value")])
    return actor, critic


def train(
    num_envs=60, max_steps=100, frames=120_000, batch=6_000, epochs=5, minibatch=300, seed=0, workers=1, **options
):
    envs = [partial(make_env, num_envs // workers, max_steps, seed + worker) for worker in range(workers)]
    torch.manual_seed(seed)
    actor, critic = make_networks(envs[0]())
    collector = Collector(envs, actor, frames_per_batch=batch, total_frames=frames, **options)
    replay_buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(batch), sampler=SamplerWithoutReplacement(), batch_size=minibatch
    )
    norm = PopArtValueNorm()
    loss = TRPOLoss(actor, critic, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,), value_norm=norm)
    loss.set_keys(
        action=("agents", "action"),
        sample_log_prob=("agents", "action_log_prob"),
        reward=("agents", "reward"),
        value=("agents", "state_value"),
    )
    loss.make_value_estimator(gamma=0.95, lmbda=0.9)
    updater = TrustRegionUpdater(loss, max_kl=0.01)
    optim = torch.optim.Adam(loss.critic_network_params.flatten_keys().values(), lr=1e-3)
    for data in collector:  # [num_envs, T]
        with torch.no_grad():
            loss.value_estimator(
                data, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        updater.step(data)
        replay_buffer.extend(data.reshape(-1))
        for _ in range(epochs):
            for rows in replay_buffer:
                loss_value = loss.mean_critic_loss(rows)
                optim.zero_grad()
                loss_value.backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
                optim.step()
        collector.update_policy_weights_()
        yield loss, data
    collector.shutdown()


if __name__ == "__main__":
    for _, data in train():
        returns = data["next", "agents", "episode_reward"][data["next", "done"].squeeze(-1)]
        print(f"episode return {returns.mean():.1f}")
