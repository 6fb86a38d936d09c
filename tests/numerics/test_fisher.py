"""The Fisher product of a policy against its explicit Fisher matrix."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor

from tests.cases import (
    DISTRIBUTIONS,
    dense_fisher,
    distribution,
    flat_parameters,
    make_actor,
    make_data,
    make_loss,
    make_policy,
    single_data,
)
from torchrl_trpo import TrustRegionUpdater, fisher_product, output_hessian_product
from torchrl_trpo.objectives import TRPOLoss


def product_of(loss, data, subsample=1.0):
    (region,) = loss.trust_regions(data)
    return region.fisher_product(subsample)


def as_matrix(product, n, size):
    """The dense matrix of a product, one per region: its columns are the products with unit vectors."""
    eye = torch.eye(size, dtype=torch.float64)
    return torch.stack([product(eye[i].expand(n, size).contiguous()) for i in range(size)], -1)


@pytest.mark.parametrize("share_params", [True, False], ids=["shared", "per_agent"])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_equals_the_hessian_of_the_mean_kl(kind, share_params):
    actor = make_actor(kind, share_params=share_params)
    data = make_data(actor)
    expected = dense_fisher(actor, data, per_agent=not share_params)
    actual = as_matrix(product_of(make_loss(actor), data), *expected.shape[:2])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_symmetric_and_positive_semi_definite(kind):
    actor = make_actor(kind)
    data = make_data(actor)
    n, size = dense_fisher(actor, data, per_agent=True).shape[:2]
    fisher = as_matrix(product_of(make_loss(actor), data), n, size)
    torch.testing.assert_close(fisher, fisher.mT)
    eigenvalues = torch.linalg.eigvalsh(fisher)
    assert (eigenvalues.min(-1).values > -1e-12).all()
    assert (eigenvalues.max(-1).values > 1e-3).all()


def test_twice_the_same_product():
    actor = make_actor()
    product = product_of(TRPOLoss(actor), make_data(actor))
    v = torch.randn(3, 36, dtype=torch.float64)
    assert torch.equal(product(v), product(v))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_subsamples_average_to_the_full_matrix(masked):
    """F is estimated on a share of the rows, without bias; of rows that are masked, on those that count."""
    actor = make_actor()
    data, loss = make_data(actor, batch=(6, 10)), TRPOLoss(actor)
    if masked:
        data["mask"] = torch.rand(6, 10, 3, 1) < 0.7
        loss.loss_mask_key = "mask"
    v = torch.randn(3, 36, dtype=torch.float64)
    full = product_of(loss, data)(v)
    draws = torch.stack([product_of(loss, data, subsample=0.2)(v) for _ in range(400)])
    error = (draws.mean(0) - full).norm() / full.norm()
    spread = (draws - full).flatten(1).norm(dim=1).mean() / full.norm()
    assert spread > 0.1  # one draw is off ...
    assert error < 3 * spread / 400**0.5  # ... and the mean of 400 is not


class FullCovariance(nn.Module):
    """A mean and a ``scale_tril``, a matrix, of which one is learnt."""

    def __init__(self, learnt):
        super().__init__()
        self.net, self.learnt = nn.Linear(3, 6), learnt

    def forward(self, observation):
        loc, flat = self.net(observation).split([2, 4], -1)
        scale_tril = flat.unflatten(-1, (2, 2)).tril(-1) + torch.diag_embed(flat[..., ::3].exp())
        return (loc, scale_tril.detach()) if self.learnt == "loc" else (loc.detach(), scale_tril)


@pytest.mark.parametrize("learnt", ["loc", "scale_tril"])
def test_the_parameters_of_a_row_may_be_matrices(learnt):
    """Their blocks were formed as those of vectors, 60 % off."""
    actor = ProbabilisticActor(
        TensorDictModule(FullCovariance(learnt).double(), ["observation"], ["loc", "scale_tril"]),
        in_keys=["loc", "scale_tril"],
        out_keys=["action"],
        distribution_class=torch.distributions.MultivariateNormal,
        return_log_prob=True,
    )
    data = single_data(actor, batch=(20,))
    data["advantage"] = torch.randn(20, 1, dtype=torch.float64)
    old, theta = actor.get_dist(data.clone()), flat_parameters(actor)

    def mean_kl(flat):
        return torch.distributions.kl_divergence(old, distribution(actor, flat, data)).mean()

    expected = torch.autograd.functional.hessian(mean_kl, theta)[0, :, 0]
    actual = as_matrix(product_of(TRPOLoss(actor), data), *theta.shape)
    torch.testing.assert_close(actual[0], expected, rtol=1e-9, atol=1e-12)


def test_plain_functions_without_policies():
    """The numerics know maps and vectors only: here a Gauss-Newton product of a small network."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    parameters = list(net.parameters())
    output = net(x)
    metric = output_hessian_product(lambda outputs: (outputs[0] ** 4).sum(), [output])
    product = fisher_product([output], parameters, metric)
    jacobian = torch.cat(
        [
            j.flatten(2)
            for j in torch.autograd.functional.jacobian(
                lambda *p: torch.func.functional_call(net, dict(zip(dict(net.named_parameters()), p, strict=True)), x),
                tuple(parameters),
            )
        ],
        -1,
    ).flatten(0, 1)
    curvature = torch.diag(12 * output.detach().flatten() ** 2)
    v = torch.randn(1, jacobian.shape[1], dtype=torch.float64)
    torch.testing.assert_close(product(v)[0], jacobian.T @ curvature @ jacobian @ v[0])


def test_parameters_without_influence_get_zero():
    used, unused = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.ones(3, requires_grad=True).double()
    product = fisher_product([2 * used], [used, unused.detach().requires_grad_()], lambda w: w)
    assert product(torch.ones(1, 5, dtype=torch.float64)).tolist() == [[4, 4, 0, 0, 0]]


def test_a_policy_that_no_trained_parameter_reaches_is_refused():
    net = nn.Linear(3, 4).double().requires_grad_(False)
    net.unused = nn.Parameter(torch.zeros(2))
    actor = make_policy(net, "normal")
    with pytest.raises(ValueError, match=r"no trained parameter reaches the policy's distribution\. Legal: at least"):
        TrustRegionUpdater(TRPOLoss(actor)).step(make_data(actor))


def test_meta_device():
    weight = torch.randn(3, 3, device="meta", requires_grad=True)
    output = (torch.randn(10, 3, device="meta") @ weight).tanh()
    metric = output_hessian_product(lambda outputs: (outputs[0] ** 2).sum(), [output])
    assert fisher_product([output], [weight], metric)(torch.randn(1, 9, device="meta")).shape == (1, 9)
