"""BoundedTanhNormal against TorchRL's TanhNormal."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torchrl.modules import TanhNormal
from torchrl.modules.distributions.utils import has_analytic_entropy

from torchrl_trpo.distributions import BoundedTanhNormal
from torchrl_trpo.distributions.divergence import entropy, kl_divergence

BOUNDS = {
    "unit": (-1.0, 1.0),
    "equal": (-2, 3.0),
    "by dimension": ((-1.0, 0.1), (0.5, 7.0)),
    "by agent": (((-1.0, 0.1), (-2.0, 0.0), (-3.0, -1.0)), 7.0),
}


def draw(distribution, low, high, **kwargs):
    """A sample and everything that is said of it, with its gradients."""
    torch.manual_seed(0)
    loc, scale = torch.randn(5, 3, 2, requires_grad=True), torch.rand(5, 3, 2).add(0.1).requires_grad_()
    dist = distribution(loc, scale, low=low, high=high, **kwargs)
    action, log_prob = dist.rsample_and_log_prob()
    said = [
        action,
        log_prob,
        dist.log_prob(dist.sample()),
        dist.deterministic_sample,
        entropy(dist),
        dist.low + dist.high,
    ]
    said.append(kl_divergence(dist, distribution(loc + 1, 2 * scale, low=low, high=high, **kwargs)))
    return dist, [
        *said,
        *torch.autograd.grad(sum(value.sum() for value in said[:-1] if value.requires_grad), [loc, scale]),
    ]


@pytest.mark.parametrize("kwargs", [{}, {"event_dims": 2}, {"tanh_loc": True, "upscale": 2.0}], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_it_is_a_tanh_normal_to_the_bit(bounds, kwargs):
    low, high = (torch.tensor(bound) for bound in BOUNDS[bounds])
    theirs, expected = draw(TanhNormal, low, high, **kwargs)
    for given in (BOUNDS[bounds], (low, high), (low.numpy(), high.tolist())):
        ours, values = draw(BoundedTanhNormal, *given, **kwargs)
        assert all(torch.equal(value, other) for value, other in zip(values, expected, strict=True))
    assert isinstance(ours, TanhNormal)
    assert has_analytic_entropy(ours) == has_analytic_entropy(theirs)
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)


def test_one_is_not_another():
    """What all of them know of the bounds is shared; a copy, an update and other bounds are not."""
    loc, scale = torch.zeros(4, 2), torch.ones(4, 2)
    dist = BoundedTanhNormal(loc, scale, low=-2.0, high=2.0)
    other, copied, sent = (
        BoundedTanhNormal(loc, scale, low=-2.0, high=4.0),
        copy.deepcopy(dist),
        pickle.loads(pickle.dumps(dist)),
    )
    dist.update(loc + 1, scale)
    assert BoundedTanhNormal(loc, scale, low=-2.0, high=2.0).deterministic_sample.eq(0).all()
    assert copied.deterministic_sample.eq(0).all()
    assert sent.deterministic_sample.eq(0).all()
    assert other.deterministic_sample.eq(1).all()
    with pytest.raises(RuntimeError, match="high values must be strictly greater"):
        BoundedTanhNormal(loc, scale, low=1.0, high=(2.0, 1.0))


def test_what_inference_mode_has_seen_first_can_be_trained():
    """Bounds and nodes of the quadrature that were first needed in inference mode once could not be differentiated."""
    loc, scale = torch.zeros(4, 2, requires_grad=True), torch.ones(4, 2)

    def entropies():
        return entropy(BoundedTanhNormal(loc, scale, low=-0.25, high=0.75), nodes=7).sum()

    with torch.inference_mode():
        entropies()
    assert torch.autograd.grad(entropies(), loc)[0].isfinite().all()


def test_bounds_that_are_written_to_are_looked_at_anew():
    high = torch.ones(2)
    for bound in (1.0, 5.0):
        high.fill_(bound)
        dist = BoundedTanhNormal(torch.full((4, 2), 20.0), torch.ones(4, 2), low=-1.0, high=high)
        torch.testing.assert_close(dist.deterministic_sample, torch.full((4, 2), bound), rtol=1e-2, atol=0)
