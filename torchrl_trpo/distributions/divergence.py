"""Exact KL divergences and entropies of action distributions; never by sampling."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import CompositeDistribution
from torch import Tensor
from torch import distributions as D
from torch.distributions.kl import _KL_REGISTRY  # no public function tells which pairs are registered
from torchrl.modules import TruncatedNormal
from torchrl.modules.distributions.utils import has_analytic_entropy

from torchrl_trpo.distributions.multi_categorical import MultiCategorical


def kl_divergence(p: D.Distribution, q: D.Distribution, batch_dims: int | None = None) -> Tensor:
    """The exact ``KL(p ‖ q)`` of two action distributions of the same policy, in nats.

    It is the KL of the joint action: summed over the action's dimensions, not averaged. A bijection that both share
    (the squashing of a ``TanhNormal``) leaves the KL unchanged, so it is taken between the base distributions; one that
    depends on the distribution's parameters (that of a ``Weibull``) is not shared, and has no KL this way. Actions
    that are masked, in both, add neither divergence nor curvature. Of independent parts (``CompositeDistribution``,
    :class:`~torchrl_trpo.distributions.MultiCategorical`) it is the sum.

    Args:
        p: the distribution that the expectation is taken under, with batch shape ``[*B]``.
        q: the other one, of the same type and shape, squashed by the same bijection and with the same mask; this is
            not checked.
        batch_dims: the number of dimensions in ``*B``. Dimensions of a distribution beyond them are those of an action
            whose entries are independent, such as a ``Normal`` that is not ``Independent``: they are summed. Default:
            those of ``p``.

    Returns:
        The divergences, ``[*B]``.

    Raises:
        NotImplementedError: if there is no closed form; a sampled KL would make the trust region a matter of luck.
    """
    if isinstance(p, CompositeDistribution) and isinstance(q, CompositeDistribution):
        return _sum_of_parts(p, [kl_divergence(p[name], q[name]) for name in p], batch_dims)
    if isinstance(p, MultiCategorical) and isinstance(q, MultiCategorical):
        pairs = zip(p.categoricals, q.categoricals, strict=True)
        return torch.stack([kl_divergence(*pair, batch_dims) for pair in pairs]).sum(0)
    if isinstance(p, D.Categorical) and isinstance(q, D.Categorical):
        return sum_events(_categorical_kl(p, q), batch_dims)
    if _is_registered(p, q):
        return sum_events(D.kl_divergence(p, q), batch_dims)
    if isinstance(p, D.Independent) and isinstance(q, D.Independent) and not isinstance(p, TruncatedNormal):
        kl = kl_divergence(p.base_dist, q.base_dist)
        dims = p.reinterpreted_batch_ndims
        return sum_events(kl.flatten(-dims).sum(-1) if dims else kl, batch_dims)
    transformed = D.TransformedDistribution
    if isinstance(p, transformed) and isinstance(q, transformed) and not _moves_its_bijection(p, q):
        return kl_divergence(p.base_dist, q.base_dist, batch_dims)
    reason = (
        " TorchRL's TruncatedNormal bounds its normaliser away from 0, so that its density does not integrate to 1 "
        "where the mean is far outside of the bounds: what it samples has no exact KL."
        if isinstance(p, TruncatedNormal)
        else ""
    )
    raise NotImplementedError(
        f"There is no exact KL divergence for {type(p).__name__}.{reason} Legal: a policy with IndependentNormal, "
        "TanhNormal (within bounds), (Masked)Categorical, (Masked)OneHotCategorical or MultiCategorical actions, a "
        "CompositeDistribution of them, or a closed form of your own, registered with "
        "torch.distributions.register_kl."
    )


def curved(dist: D.Distribution) -> D.Distribution:
    """The distribution, if autograd finds the curvature of its KL; else NotImplementedError is raised.

    It cannot differentiate ``|x|`` at 0 twice, nor a support that moves with the parameters.
    """
    if isinstance(dist, CompositeDistribution):
        for name in dist:
            curved(dist[name])
    elif isinstance(dist, (D.Independent, D.TransformedDistribution)) and not isinstance(dist, D.Pareto):
        curved(dist.base_dist)
    elif isinstance(dist, (D.Laplace, D.Pareto, D.Uniform)):
        raise NotImplementedError(
            f"The KL divergence of {type(dist).__name__} has no second derivative where both are the same: it bounds "
            "no trust region. Legal: the distributions that kl_divergence names."
        )
    return dist


def kl_if_exact(p: D.Distribution, q: D.Distribution, batch_dims: int | None = None) -> Tensor | None:
    """:func:`kl_divergence`, ``[*B]``, or None where there is no closed form; for logging."""
    try:
        return kl_divergence(p, q, batch_dims)
    except NotImplementedError:
        return None


def _is_registered(p: D.Distribution, q: D.Distribution) -> bool:
    """Whether torch has a closed form for the pair itself, not only for the distributions that it wraps."""
    wrappers = (D.Independent, D.TransformedDistribution)
    return any(isinstance(p, a) and isinstance(q, b) and a not in wrappers for a, b in _KL_REGISTRY)


def _moves_its_bijection(p: D.TransformedDistribution, q: D.TransformedDistribution) -> bool:
    """Whether the bijection depends on the policy: it has parameters that are not the base distribution's."""
    base = q.base_dist
    while isinstance(base, D.Independent):
        base = base.base_dist
    if q.arg_constraints:
        return not q.arg_constraints.keys() <= base.arg_constraints.keys()
    # A plain TransformedDistribution names no parameters.
    pairs = zip(_tensors(p.transforms), _tensors(q.transforms), strict=True)
    return any(after.requires_grad or not torch.equal(before, after) for before, after in pairs)


def _tensors(transforms: Iterable[D.Transform]) -> Iterator[Tensor]:
    for transform in transforms:
        yield from (value for value in vars(transform).values() if isinstance(value, Tensor))
        yield from _tensors(getattr(transform, "parts", ()))
        yield from _tensors([transform.base_transform] if isinstance(transform, D.IndependentTransform) else ())


def _categorical_kl(p: D.Categorical, q: D.Categorical) -> Tensor:
    """``Σ_u p(u) (log p(u) − log q(u))`` over the actions that ``p`` allows."""
    allowed = p.probs > 0  # masked actions add nothing to the value, and no NaN to the gradient
    log_p, log_q = (torch.where(allowed, dist.logits, 0.0) for dist in (p, q))
    return (p.probs * (log_p - log_q)).sum(-1)


def _sum_of_parts(dist: CompositeDistribution, parts: list[Tensor], batch_dims: int | None) -> Tensor:
    """The sum over a composite's parts; its own batch size may have fewer dimensions than ``*B``."""
    ndim = len(dist.batch_shape) if batch_dims is None else batch_dims
    return torch.stack([sum_events(part, ndim) for part in parts]).sum(0)


def sum_events(values: Tensor, batch_dims: int | None) -> Tensor:
    """Sums ``[*B, ...]`` over the entries of an action, to ``[*B]``; unchanged if ``batch_dims`` is None."""
    return values if batch_dims is None or values.ndim <= batch_dims else values.flatten(batch_dims).sum(-1)


def log_prob(dist: D.Distribution, action: Tensor | TensorDictBase, batch_dims: int | None = None) -> Tensor:
    """The logarithm of the density of a joint action, ``[*B]``; of a composite one, the sum over its parts.

    ``batch_dims`` is as for :func:`kl_divergence`.
    """
    if isinstance(dist, CompositeDistribution):
        actions: Any = action
        return _sum_of_parts(dist, [dist[name].log_prob(actions.get(name)) for name in dist], batch_dims)
    return sum_events(dist.log_prob(action), batch_dims)


def has_exact_entropy(dist: D.Distribution) -> bool:
    """Whether :func:`entropy` knows the distribution: a closed form, a squashed normal, or a composite of them."""
    if isinstance(dist, CompositeDistribution):
        return all(has_exact_entropy(dist[name]) for name in dist)
    return has_analytic_entropy(dist) or _is_squashed_normal(dist)


def entropy(dist: D.Distribution, batch_dims: int | None = None, *, nodes: int = 16) -> Tensor:
    """The entropy of an action distribution in nats, without sampling.

    Closed form where there is one. For a squashed normal ``u = f(z)``, ``H(u) = H(z) + E[log |f'(z)|]``, whose
    one-dimensional expectations are taken by Gauss-Hermite quadrature: deterministic and smooth in the parameters, as
    a line search needs it.

    Args:
        dist: the distribution, batch shape ``[*B]``.
        batch_dims: as for :func:`kl_divergence`.

    Keyword Args:
        nodes: the number of quadrature nodes for squashed normals.

    Returns:
        The entropies, ``[*B]``.

    Raises:
        NotImplementedError: if the distribution has neither.
    """
    if isinstance(dist, CompositeDistribution):
        return _sum_of_parts(dist, [entropy(dist[name], nodes=nodes) for name in dist], batch_dims)
    if has_analytic_entropy(dist):
        return sum_events(dist.entropy(), batch_dims)
    if not _is_squashed_normal(dist):
        raise NotImplementedError(
            f"There is no exact entropy for {type(dist).__name__}. Set entropy_coeff=0 (and entropy_bonus=False), or "
            "use IndependentNormal, TanhNormal, categorical or MultiCategorical actions, or a CompositeDistribution of "
            "them."
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
    return sum_events(base.entropy() + (expected.sum(event_dims) if event_dims else expected), batch_dims)


@functools.cache
def _gauss_hermite(nodes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Abscissae and weights for expectations under the standard normal, copied to a device once."""
    abscissae, weights = np.polynomial.hermite.hermgauss(nodes)
    with torch.inference_mode(False):  # tensors that are cached may be differentiated later
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
