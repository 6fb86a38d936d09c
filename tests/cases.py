"""Small policies and batches in float64, and the dense truth that the numerics are compared with."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    IndependentNormal,
    MultiAgentMLP,
    NormalParamExtractor,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
)

GROUP = "agents"
OBSERVATION, ACTION = (GROUP, "observation"), (GROUP, "action")
LOG_PROB, REWARD, VALUE = (GROUP, "action_log_prob"), (GROUP, "reward"), (GROUP, "state_value")
DISTRIBUTIONS = {
    "normal": IndependentNormal,
    "tanh_normal": TanhNormal,
    "categorical": Categorical,
    "one_hot": OneHotCategorical,
}


def make_actor(
    kind="normal", *, share_params=False, n_agents=3, n_obs=3, n_act=2, hidden=4, device=None, **distribution_kwargs
):
    continuous = "normal" in kind
    net = MultiAgentMLP(
        n_obs,
        2 * n_act if continuous else n_act + 1,
        n_agents=n_agents,
        centralized=False,
        share_params=share_params,
        num_cells=[hidden],
        depth=1,
        device=device,
    ).double()
    keys = [(GROUP, name) for name in (["loc", "scale"] if continuous else ["logits"])]
    module = nn.Sequential(net, NormalParamExtractor()) if continuous else net
    return ProbabilisticActor(
        TensorDictModule(module, in_keys=[OBSERVATION], out_keys=keys),
        in_keys=keys,
        out_keys=[ACTION],
        distribution_class=DISTRIBUTIONS[kind],
        distribution_kwargs=distribution_kwargs,
        return_log_prob=True,
    )


def make_data(actor, batch=(5, 8), n_agents=3, n_obs=3):
    agents = TensorDict({"observation": torch.randn(*batch, n_agents, n_obs, dtype=torch.float64)}, [*batch, n_agents])
    data = TensorDict({GROUP: agents}, batch_size=batch)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        actor(data)
    data["advantage"] = torch.randn(*batch, n_agents, 1, dtype=torch.float64)
    return data


def make_single(n_obs=3, n_act=2, hidden=4):
    """A policy of one agent without an agent dimension, and its critic."""
    net = nn.Sequential(nn.Linear(n_obs, hidden), nn.Tanh(), nn.Linear(hidden, 2 * n_act), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net.double(), in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    critic = TensorDictModule(nn.Linear(n_obs, 1).double(), in_keys=["observation"], out_keys=["state_value"])
    return actor, critic


def single_data(actor, batch=(5, 8), n_obs=3):
    """A batch of one agent with rewards, ends and next observations, but no advantage."""
    data = TensorDict({"observation": torch.randn(*batch, n_obs, dtype=torch.float64)}, batch_size=batch)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        actor(data)
    done = torch.rand(*batch, 1) < 0.2
    data["next"] = TensorDict(
        {
            "observation": torch.randn(*batch, n_obs, dtype=torch.float64),
            "reward": torch.randn(*batch, 1, dtype=torch.float64),
            "done": done,
            "terminated": done,
        },
        batch_size=batch,
    )
    return data


def flat_parameters(actor, n=1):
    """The policy's parameters in the order of its TensorDict, ``[n, P]``."""
    params = TensorDict.from_module(actor)
    return torch.cat([value.detach().reshape(n, -1) for value in params.values(True, True) if value.requires_grad], 1)


def with_parameters(actor, flat):
    """The TensorDict of parameters that a flat vector ``[n, P]`` stands for."""
    params = TensorDict.from_module(actor).data
    position = 0
    for key, value in params.items(True, True):
        size = value.numel() // flat.shape[0]
        params.set(key, flat[:, position : position + size].reshape(value.shape))
        position += size
    return params


def distribution(actor, flat, data):
    with with_parameters(actor, flat).to_module(actor, preserve_module_state=False):
        return actor.get_dist(data.select(*actor.in_keys))


def textbook_kl(p, q):
    """KL(p ‖ q) written out by hand, ``[*B, n_agents]``."""
    if hasattr(p, "logits"):
        return (p.probs * (p.probs.log() - q.probs.log())).sum(-1)
    p, q = (d.base_dist.base_dist if isinstance(d, TanhNormal) else d.base_dist for d in (p, q))
    kl = (q.scale / p.scale).log() + (p.scale**2 + (p.loc - q.loc) ** 2) / (2 * q.scale**2) - 0.5
    return kl.sum(-1)


def region_mean(values, per_agent):
    """Means over rows (and agents): ``[*B, n_agents]`` to ``[n]``."""
    return values.flatten(0, -2).mean(0) if per_agent else values.mean().reshape(1)


def dense_fisher(actor, data, per_agent):
    """The Hessian of the mean KL at the current parameters, written out: one ``[P, P]`` per region."""
    theta = flat_parameters(actor, data[ACTION].shape[2] if per_agent else 1)
    old = distribution(actor, theta, data)

    def total(flat):
        return region_mean(textbook_kl(old, distribution(actor, flat, data)), per_agent).sum()

    hessian = torch.autograd.functional.hessian(total, theta)  # [n, P, n, P]
    return torch.stack([hessian[i, :, i] for i in range(theta.shape[0])])


def dense_surrogate(actor, data, per_agent, flat, factor=1.0):
    """The surrogate at given parameters, ``[n]``."""
    log_prob = distribution(actor, flat, data).log_prob(data[ACTION])
    ratio = (log_prob - data[LOG_PROB]).exp()
    return region_mean(factor * ratio * data["advantage"].squeeze(-1), per_agent)


def dense_gradient(actor, data, per_agent):
    theta = flat_parameters(actor, data[ACTION].shape[2] if per_agent else 1).requires_grad_()
    return torch.autograd.grad(dense_surrogate(actor, data, per_agent, theta).sum(), theta)[0]


def bits(module):
    """A copy of all parameters, to compare bit by bit."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def same_bits(module, before):
    return all(torch.equal(new, old) for new, old in zip(module.parameters(), before, strict=True))
