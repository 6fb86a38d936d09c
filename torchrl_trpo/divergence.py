"""Exact KL divergences and entropies of action distributions; never by sampling."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributions as D
from torchrl.modules.distributions.utils import has_analytic_entropy


def kl_divergence(p: D.Distribution, q: D.Distribution) -> Tensor:
    """The exact ``KL(p ‖ q)`` of two action distributions of the same policy, in nats.

    It is the KL of the joint action: summed over the action's dimensions, not averaged. A bijection that both share
    (the squashing of a ``TanhNormal``) leaves the KL unchanged, so it is taken between the base distributions.

    Args:
        p: the distribution that the expectation is taken under, with batch shape ``[*B]``.
        q: the other one, of the same type and shape, squashed by the same bijection; this is not checked.

    Returns:
        The divergences, ``[*B]``.

    Raises:
        NotImplementedError: if there is no closed form; a sampled KL would make the trust region a matter of luck.
    """
    if isinstance(p, D.TransformedDistribution) and isinstance(q, D.TransformedDistribution):
        return kl_divergence(p.base_dist, q.base_dist)
    try:
        return D.kl_divergence(p, q)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"There is no exact KL divergence for {type(p).__name__}. Use a policy with IndependentNormal, TanhNormal, "
            "Categorical or OneHotCategorical actions, or register the closed form with "
            "torch.distributions.register_kl."
        ) from error


def has_exact_entropy(dist: D.Distribution) -> bool:
    """Whether :func:`entropy` knows the distribution: a closed form, or a squashed normal.

    Args:
        dist: the distribution.

    Returns:
        True if :func:`entropy` can be called on it.
    """
    return has_analytic_entropy(dist) or _is_squashed_normal(dist)


def entropy(dist: D.Distribution, nodes: int = 16) -> Tensor:
    """The entropy of an action distribution in nats, without sampling.

    Closed form where there is one. For a squashed normal ``u = f(z)``, ``H(u) = H(z) + E[log |f'(z)|]``, whose
    one-dimensional expectations are taken by Gauss-Hermite quadrature: deterministic and smooth in the parameters, as
    a line search needs it.

    Args:
        dist: the distribution, batch shape ``[*B]``.
        nodes: the number of quadrature nodes for squashed normals.

    Returns:
        The entropies, ``[*B]``.

    Raises:
        NotImplementedError: if the distribution has neither.
    """
    if has_analytic_entropy(dist):
        return dist.entropy()
    if not _is_squashed_normal(dist):
        raise NotImplementedError(
            f"There is no exact entropy for {type(dist).__name__}. Set entropy_coeff=0 (and entropy_bonus=False), or "
            "use IndependentNormal, TanhNormal, Categorical or OneHotCategorical actions."
        )
    squashed: Any = dist
    base = squashed.base_dist
    shape = (nodes,) + (1,) * base.mean.ndim
    abscissae, weights = (x.reshape(shape) for x in _gauss_hermite(nodes, base.mean.dtype, base.mean.device))
    z = base.mean + base.stddev * abscissae  # [nodes, *B, A]
    log_slope = torch.zeros_like(z)
    for transform in squashed.transforms:
        image = transform(z)
        log_slope = log_slope + transform.log_abs_det_jacobian(z, image)
        z = image
    event_dims = tuple(range(-len(dist.event_shape), 0))
    expected = (weights * log_slope).sum(0)  # [*B, A]
    return base.entropy() + (expected.sum(event_dims) if event_dims else expected)


@functools.cache
def _gauss_hermite(nodes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Abscissae and weights for expectations under the standard normal; they are copied to a device once."""
    abscissae, weights = np.polynomial.hermite.hermgauss(nodes)
    return (
        torch.tensor(math.sqrt(2) * abscissae, dtype=dtype, device=device),
        torch.tensor(weights / math.sqrt(math.pi), dtype=dtype, device=device),
    )


def _is_squashed_normal(dist: D.Distribution) -> bool:
    if not isinstance(dist, D.TransformedDistribution):
        return False
    base = dist.base_dist
    while isinstance(base, D.Independent):
        base = base.base_dist
    return isinstance(base, D.Normal) and all(t.domain.event_dim == 0 for t in dist.transforms)
