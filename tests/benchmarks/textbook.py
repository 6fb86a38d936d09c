"""TRPO and HATRPO as commonly published, in plain PyTorch: the baseline that ours is measured against.

The same subproblem as :class:`~torchrl_trpo.TrustRegionUpdater` solves (surrogate, mean KL, damping, conjugate
gradient, line search), done the usual way (ikostrikov/pytorch-trpo, HARL): each Fisher product reruns the forward
passes of the old policy and the new one and differentiates twice through the mean KL, ``xᵀFx`` is another product, each
try of the line search writes the parameters and reruns the forward pass, and several agents are a Python loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

MAX_KL, DAMPING, CG_ITERS, CG_TOL = 0.01, 0.1, 10, 1e-6
BACKTRACK_COEFF, MAX_BACKTRACKS, ACCEPT_RATIO = 0.8, 10, 0.5


@dataclass(frozen=True)
class Batch:
    """What an update reads, for one policy.

    Attributes:
        observation: ``[*B, F]``.
        action: ``[*B, A]``.
        log_prob: of the actions, as collected, ``[*B]``.
        advantage: ``[*B]``.
        factor: the ``M`` of a sequential update, ``[*B]``, or 1.
    """

    observation: Tensor
    action: Tensor
    log_prob: Tensor
    advantage: Tensor
    factor: Tensor | float = 1.0


def distribution(policy: nn.Module, batch: Batch) -> Independent:
    """The policy's distribution at a batch.

    Args:
        policy: from observations to a mean and a standard deviation.
        batch: the batch.

    Returns:
        The distribution.
    """
    loc, scale = policy(batch.observation)
    return Independent(Normal(loc, scale), 1)


def surrogate(dist: Independent, batch: Batch) -> Tensor:
    """The mean of ``M · π_θ/π_k · Â``.

    Args:
        dist: the policy at the batch.
        batch: the batch.

    Returns:
        The surrogate.
    """
    ratio = (dist.log_prob(batch.action) - batch.log_prob).exp()
    return (batch.factor * ratio * batch.advantage).mean()


def fisher_product(policy: nn.Module, batch: Batch) -> Callable[[Tensor], Tensor]:
    """The product with ``F + λI``: the Hessian of the mean KL by differentiating twice, and damping.

    Args:
        policy: the policy.
        batch: the batch.

    Returns:
        The product, from ``[P]`` to ``[P]``.
    """
    parameters = list(policy.parameters())

    def product(vector: Tensor) -> Tensor:
        with torch.no_grad():
            old_dist = distribution(policy, batch)
        kl = kl_divergence(old_dist, distribution(policy, batch)).mean()
        slopes = parameters_to_vector(torch.autograd.grad(kl, parameters, create_graph=True))
        curvature = torch.autograd.grad(slopes @ vector, parameters)
        return parameters_to_vector(curvature) + DAMPING * vector

    return product


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Solves ``A x = b``.

    Args:
        product: the product with ``A``.
        b: the right-hand side, ``[P]``.

    Returns:
        The solution, ``[P]``.
    """
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = bb = r @ r
    for _ in range(CG_ITERS):
        if rr <= CG_TOL**2 * bb:
            break
        Ap = product(p)
        alpha = rr / (p @ Ap)
        x += alpha * p
        r -= alpha * Ap
        rr_next = r @ r
        p = r + rr_next / rr * p
        rr = rr_next
    return x


def trpo_step(policy: nn.Module, batch: Batch) -> bool:
    """Takes one trust-region step.

    Args:
        policy: the policy; its parameters are written.
        batch: the batch.

    Returns:
        Whether a step was accepted.
    """
    parameters = list(policy.parameters())
    old_dist = distribution(policy, batch)
    old_surrogate = surrogate(old_dist, batch)
    gradient = parameters_to_vector(torch.autograd.grad(old_surrogate, parameters))
    product = fisher_product(policy, batch)
    x = conjugate_gradient(product, gradient)
    full_step = (2 * MAX_KL / (x @ product(x))).sqrt() * x
    expected = gradient @ full_step
    with torch.no_grad():
        old = parameters_to_vector(parameters)
        for tries in range(MAX_BACKTRACKS + 1):
            fraction = BACKTRACK_COEFF**tries
            vector_to_parameters(old + fraction * full_step, parameters)
            dist = distribution(policy, batch)
            improvement = surrogate(dist, batch) - old_surrogate
            kl = kl_divergence(old_dist, dist).mean()
            if improvement >= ACCEPT_RATIO * fraction * expected and kl <= MAX_KL:
                return True
        vector_to_parameters(old, parameters)
    return False


def hatrpo_step(policies: Sequence[nn.Module], batches: Sequence[Batch]) -> None:
    """Takes a step for each agent in turn; those that follow see what it has changed.

    Args:
        policies: the agents' policies; their parameters are written.
        batches: the agents' batches.
    """
    factor = torch.ones_like(batches[0].advantage)
    for policy, batch in zip(policies, batches, strict=True):
        trpo_step(policy, replace(batch, factor=factor))
        with torch.no_grad():
            factor = factor * (distribution(policy, batch).log_prob(batch.action) - batch.log_prob).exp()
