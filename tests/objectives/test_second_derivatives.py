"""Policies whose operations have no second derivative of their own: attention, which is replaced, and others, named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchrl.modules.models.multiagent import MultiAgentNetBase
from torchrl.objectives import ClipPPOLoss

from tests.cases import (
    ACTION,
    LOG_PROB,
    bits,
    dense_fisher,
    dense_gradient,
    distribution,
    flat_parameters,
    make_data,
    make_loss,
    make_policy,
    region_mean,
    same_bits,
    textbook_kl,
)
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import HAPPOUpdater, HATRPOSequentialObjective

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")  # vmap of attention


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, tokens):
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def encoder_layer():
    return nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)


class Tokens(nn.Module):
    """Each of an agent's observations is a token of a sequence."""

    def __init__(self, body):
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(1, 4), body, nn.Linear(4, 4)

    def forward(self, observation):
        tokens = self.embed(observation.reshape(-1, observation.shape[-1], 1))
        return self.head(self.body(tokens).mean(1)).reshape(*observation.shape[:-1], 4)


class AgentNet(MultiAgentNetBase):
    """One network of tokens for each agent, or one for all."""

    def __init__(self, make_body, share_params):
        self.__dict__["make_body"] = make_body
        super().__init__(n_agents=3, centralized=False, share_params=share_params, agent_dim=-2)

    def _build_single_net(self, **_):
        return Tokens(self.make_body())

    def _pre_forward_check(self, inputs):
        return inputs


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("share_params", [True, False], ids=["shared", "per_agent"])
@pytest.mark.parametrize("body", [Attends, encoder_layer], ids=lambda body: body.__name__)
def test_attention_in_the_policy(body, share_params, training):
    """Its fused kernels have one derivative; the fast path of evaluation has none, but was taken under vmap."""
    actor = make_policy(AgentNet(body, share_params).double(), "normal")
    data = make_data(actor)
    with sdpa_kernel(SDPBackend.MATH):
        fisher, gradient = dense_fisher(actor, data, not share_params), dense_gradient(actor, data, not share_params)
        theta = flat_parameters(actor, gradient.shape[0])
        old = distribution(actor, theta, data)
    actor.train(training)
    loss = make_loss(actor).train(training)
    region = next(iter(loss.trust_regions(data)))
    vectors = torch.randn_like(gradient)
    torch.testing.assert_close(region.fisher_product()(vectors), torch.einsum("nij,nj->ni", fisher, vectors))
    torch.testing.assert_close(region.gradient(), gradient)
    _, kl = region.evaluate(theta + 0.01 * vectors)
    new = distribution(actor.train(), theta + 0.01 * vectors, data)
    torch.testing.assert_close(kl, region_mean(textbook_kl(old, new), not share_params))
    actor.train(training)
    assert TrustRegionUpdater(loss).step(data)["accepted"].all()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_attention_in_a_sequence_of_agents(training):
    actor = make_policy(AgentNet(encoder_layer, share_params=False).double(), "normal")
    data = make_data(actor)
    actor.train(training)
    objective = HATRPOSequentialObjective(make_loss(actor).train(training))
    objective(data)["loss_objective"].backward()
    assert TrustRegionUpdater(objective).step(data)["accepted"].all()
    clipping = ClipPPOLoss(actor)
    clipping.set_keys(action=ACTION, sample_log_prob=LOG_PROB)
    assert HAPPOUpdater(clipping, minibatch_size=40, epochs=1).step(data)["accepted"].all()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0].cos()


class Cut(Once):
    @staticmethod
    def backward(ctx, slope):
        return (slope * ctx.saved_tensors[0].cos()).detach()


class Donated(Once):
    """Refuses to be differentiated with a graph, as what torch.compile makes."""

    @staticmethod
    def backward(ctx, slope):
        if torch.is_grad_enabled():
            raise RuntimeError("This backward function was compiled with non-empty donated buffers")
        return slope * ctx.saved_tensors[0].cos()


class Sign(torch.autograd.Function):
    """Its derivative is 0, and so is the second one."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, slope):
        return torch.zeros_like(slope)


def flash(x):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*3 * [x.unsqueeze(1)]).squeeze(1)


def policy_with(operation):
    class Operation(nn.Linear):
        def forward(self, x):
            return x + operation(super().forward(x))

    return make_policy(Tokens(Operation(4, 4)).double(), "normal")


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        pytest.param(Once.apply, "OnceBackward", id="once_differentiable"),
        pytest.param(Cut.apply, "CutBackward", id="detached"),
        pytest.param(lambda x: torch.cdist(x, x) @ x, "CdistBackward0", id="cdist"),
        pytest.param(flash, "ScaledDotProductFlashAttentionForCpuBackward0", id="flash"),
        pytest.param(Donated.apply, "DonatedBackward", id="compiled"),
    ],
)
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_an_operation_with_one_derivative_is_named(operation, name, chunk_size):
    """A custom one took its share out of the Fisher matrix without a word; steps were too long, or rejected."""
    actor = policy_with(operation)
    data, before = make_data(actor), bits(actor)
    with pytest.raises(RuntimeError, match=f"can be differentiated only once, {name};"):
        TrustRegionUpdater(make_loss(actor, chunk_size=chunk_size)).step(data)
    assert same_bits(actor, before)


def test_an_operation_whose_derivative_is_zero_is_none_of_them():
    actor = policy_with(Sign.apply)
    data = make_data(actor)
    assert TrustRegionUpdater(make_loss(actor)).step(data)["accepted"].all()
