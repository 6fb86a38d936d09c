"""Small policies and batches in float64, and the dense truth that the numerics are compared with."""

from __future__ import annotations

import shutil

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    IndependentNormal,
    MaskedCategorical,
    MaskedOneHotCategorical,
    MultiAgentMLP,
    NormalParamExtractor,
    OneHotCategorical,
    ProbabilisticActor,
    set_recurrent_mode,
)

from torchrl_trpo.distributions import BoundedTanhNormal, MultiCategorical
from torchrl_trpo.objectives import TRPOLoss
from torchrl_trpo.objectives.policy_network import input_keys, is_composite

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
GROUP = "agents"
OBSERVATION, ACTION = (GROUP, "observation"), (GROUP, "action")
LOG_PROB, REWARD, VALUE = (GROUP, "action_log_prob"), (GROUP, "reward"), (GROUP, "state_value")
MASK = (GROUP, "action_mask")
NVEC = (3, 2)
PARTS = {"move": IndependentNormal, "gear": Categorical}
DISTRIBUTIONS = {
    "normal": IndependentNormal,
    "tanh_normal": BoundedTanhNormal,
    "categorical": Categorical,
    "one_hot": OneHotCategorical,
    "masked": MaskedCategorical,
    "masked_one_hot": MaskedOneHotCategorical,
    "multi_categorical": MultiCategorical,
    "masked_multi_categorical": MultiCategorical,
    "composite": CompositeDistribution,
}
"""Every kind of action that has an exact KL."""
OLD_DATA = pytest.mark.filterwarnings("ignore:The data was not collected by the policy")
"""For tests that step more than once on a batch, or change its log-probabilities."""


def make_actor(
    kind="normal", *, share_params=False, n_agents=3, n_obs=3, n_act=2, hidden=4, device=None, **distribution_kwargs
):
    sizes = {"normal": 2 * n_act, "tanh_normal": 2 * n_act, "composite": 2 * n_act + 3}
    net = MultiAgentMLP(
        n_obs,
        sum(NVEC) if "multi" in kind else sizes.get(kind, n_act + 2),
        n_agents=n_agents,
        centralized=False,
        share_params=share_params,
        num_cells=[hidden],
        depth=1,
        device=device,
    ).double()
    return make_policy(net, kind, n_act, **distribution_kwargs)


def make_policy(net, kind, n_act=2, **distribution_kwargs):
    """A policy of a kind of action on a network from observations to the distribution's parameters."""
    keys, parameters, actions = [(GROUP, "logits")], {"logits": (GROUP, "logits")}, [ACTION]
    module = net
    if kind.endswith("normal"):
        keys, module = [(GROUP, "loc"), (GROUP, "scale")], nn.Sequential(net, NormalParamExtractor())
        parameters = dict(zip(["loc", "scale"], keys, strict=True))
    elif kind == "composite":
        root = (GROUP, "params")
        keys = [(*root, "move", "loc"), (*root, "move", "scale"), (*root, "gear", "logits")]
        module, parameters = nn.Sequential(net, CompositeParameters(n_act)), [root]
        actions = [(GROUP, name) for name in PARTS]
        distribution_kwargs |= {"distribution_map": PARTS, "name_map": dict(zip(PARTS, actions, strict=True))}
    if kind.startswith("masked"):
        parameters["mask"] = MASK
    if "multi" in kind:
        distribution_kwargs["nvec"] = NVEC
    return ProbabilisticActor(
        TensorDictModule(module, in_keys=[OBSERVATION], out_keys=keys),
        in_keys=parameters,
        out_keys=actions,
        distribution_class=DISTRIBUTIONS[kind],
        distribution_kwargs=distribution_kwargs,
        return_log_prob=True,
    )


class CompositeParameters(nn.Module):
    """Splits outputs into the parameters of ``move`` and ``gear``."""

    def __init__(self, n_act):
        super().__init__()
        self.n_act = n_act

    def forward(self, outputs):
        loc, scale, logits = outputs.split([self.n_act, self.n_act, 3], -1)
        return loc, nn.functional.softplus(scale), logits


def make_loss(actor, **keywords):
    """The loss of a policy, with the keys that a composite one writes."""
    loss = TRPOLoss(actor, **keywords)
    if is_composite(actor):
        names = [(GROUP, name) for name in PARTS]
        loss.set_keys(action=names, sample_log_prob=[(GROUP, f"{name}_log_prob") for name in PARTS])
    return loss


def make_data(actor, batch=(5, 8), n_agents=3, n_obs=3):
    agents = TensorDict({"observation": torch.randn(*batch, n_agents, n_obs, dtype=torch.float64)}, [*batch, n_agents])
    data = TensorDict({GROUP: agents}, batch_size=batch)
    if MASK in actor.in_keys:
        kwargs = actor.module[-1].distribution_kwargs
        sizes = kwargs.get("nvec", (4,))
        allowed = [torch.rand(*batch, n_agents, n) < 0.6 for n in sizes]
        for part in allowed:
            part[..., 0] = True
        data[MASK] = torch.cat(allowed, -1)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM), set_recurrent_mode(True):
        actor(data)
    data["advantage"] = torch.randn(*batch, n_agents, 1, dtype=torch.float64)
    return data


def joint_log_prob(dist, data):
    """The log-probability of what was done, ``[*B, n_agents]``."""
    if isinstance(dist, CompositeDistribution):
        return sum(dist[GROUP, name].log_prob(data[GROUP, name]) for name in PARTS)
    return dist.log_prob(data[ACTION])


def collected_log_prob(data):
    """What the policy wrote at collection, ``[*B, n_agents]``."""
    if LOG_PROB in data.keys(True):
        return data[LOG_PROB]
    return sum(data[GROUP, f"{name}_log_prob"] for name in PARTS)


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
    own = with_parameters(actor, flat).to_module(actor, preserve_module_state=False)
    with set_recurrent_mode(True), own:
        return actor.get_dist(data.select(*input_keys(actor)))


def textbook_kl(p, q):
    """KL(p ‖ q) written out by hand, ``[*B, n_agents]``."""
    if isinstance(p, CompositeDistribution):
        return sum(textbook_kl(p[name], q[name]) for name in p)
    if isinstance(p, MultiCategorical):
        return sum(textbook_kl(a, b) for a, b in zip(p.categoricals, q.categoricals, strict=True))
    if hasattr(p, "logits"):
        allowed = p.probs > 0
        log_p, log_q = (torch.where(allowed, d.probs, 1.0).log() for d in (p, q))
        return (p.probs * (log_p - log_q)).sum(-1)
    p, q = (d.base_dist.base_dist if isinstance(d, BoundedTanhNormal) else d.base_dist for d in (p, q))
    kl = (q.scale / p.scale).log() + (p.scale**2 + (p.loc - q.loc) ** 2) / (2 * q.scale**2) - 0.5
    return kl.sum(-1)


def region_mean(values, per_agent):
    """Means over rows (and agents): ``[*B, n_agents]`` to ``[n]``."""
    return values.flatten(0, -2).mean(0) if per_agent else values.mean().reshape(1)


def dense_fisher(actor, data, per_agent):
    """The Hessian of the mean KL at the current parameters, written out: one ``[P, P]`` per region."""
    theta = flat_parameters(actor, data[OBSERVATION].shape[2] if per_agent else 1)
    old = distribution(actor, theta, data)

    def total(flat):
        return region_mean(textbook_kl(old, distribution(actor, flat, data)), per_agent).sum()

    hessian = torch.autograd.functional.hessian(total, theta)  # [n, P, n, P]
    return torch.stack([hessian[i, :, i] for i in range(theta.shape[0])])


def dense_surrogate(actor, data, per_agent, flat, factor=1.0):
    """The surrogate at given parameters, ``[n]``."""
    ratio = (joint_log_prob(distribution(actor, flat, data), data) - collected_log_prob(data)).exp()
    return region_mean(factor * ratio * data["advantage"].squeeze(-1), per_agent)


def dense_gradient(actor, data, per_agent):
    theta = flat_parameters(actor, data[OBSERVATION].shape[2] if per_agent else 1).requires_grad_()
    return torch.autograd.grad(dense_surrogate(actor, data, per_agent, theta).sum(), theta)[0]


def bits(module):
    """A copy of all parameters, to compare bit by bit."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def same_bits(module, before):
    return all(torch.equal(new, old) for new, old in zip(module.parameters(), before, strict=True))
