"""Exact KL divergences and entropies of action distributions; never by sampling."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
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
from torchrl_trpo.kernels.settings import fixed

# The logistic distribution function is Σ w Φ(sz), of pairs (w, s), within 3e-9. Monahan and Stefanski 1992, Normal
# scale mixture approximations to F*(z) and computation of the logistic-normal integral.
_LOGISTIC = (
    (0.003246343272134, 1.365340806296348),
    (0.051517477033972, 1.059523971016916),
    (0.195077912673858, 0.830791313765644),
    (0.315569823632818, 0.650732166639391),
    (0.274149576158423, 0.508135425366489),
    (0.131076880695470, 0.396313345166341),
    (0.027912418727972, 0.308904252267995),
    (0.001449567805354, 0.238212616409306),
)
_WEIGHTS = tuple(weight for weight, _ in _LOGISTIC)
_VARIANCES = tuple((2 * slope) ** -2 for _, slope in _LOGISTIC)  # of the logistic distribution with density sech²/2


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
    elif isinstance(dist, (D.Laplace, D.Pareto, D.Uniform)):
        raise NotImplementedError(
            f"The KL divergence of {type(dist).__name__} has no second derivative where both are the same: it bounds "
            "no trust region. Legal: the distributions that kl_divergence names."
        )
    elif isinstance(dist, (D.Independent, D.TransformedDistribution)) and not _is_registered(dist, dist):
        curved(dist.base_dist)
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
    if any(tensor.requires_grad for tensor in _tensors(q.transforms)):
        return True
    if q.arg_constraints:
        return not q.arg_constraints.keys() <= base.arg_constraints.keys()
    # A plain TransformedDistribution names no parameters.
    pairs = zip(_tensors(p.transforms), _tensors(q.transforms), strict=True)
    return any(not torch.equal(before, after) for before, after in pairs)


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
    """Whether :func:`entropy` knows the distribution: a closed form, a squashed normal, or a composite of them.

    A method ``entropy`` counts as a closed form. Where it has none (``Poisson``), :func:`entropy` says so.
    """
    if isinstance(dist, CompositeDistribution):
        return all(has_exact_entropy(dist[name]) for name in dist)
    return has_analytic_entropy(dist) or _is_squashed_normal(dist)


def entropy(dist: D.Distribution, batch_dims: int | None = None, *, nodes: int = 16) -> Tensor:
    """The entropy of an action distribution in nats, without sampling.

    Closed form where there is one. For a squashed normal ``u = f(z)``, ``H(u) = H(z) + E[log |f'(z)|]``. Of a tanh or a
    sigmoid, with an affine map behind it, the expectation is a sum of eight closed forms: its error is below 1e-6 of
    the scale (of 1, if that is larger), and that of its slopes below 6e-6, at any location. Of other bijections it is
    taken by Gauss-Hermite quadrature, which is as good only where ``log |f'|`` is close to a polynomial within a few
    scales. Both are deterministic and smooth in the parameters, as a line search needs it.

    Args:
        dist: the distribution, batch shape ``[*B]``.
        batch_dims: as for :func:`kl_divergence`.

    Keyword Args:
        nodes: the number of quadrature nodes for bijections other than tanh and sigmoid.

    Returns:
        The entropies, ``[*B]``.

    Raises:
        NotImplementedError: if the distribution has neither.
    """
    if isinstance(dist, CompositeDistribution):
        return _sum_of_parts(dist, [entropy(dist[name], nodes=nodes) for name in dist], batch_dims)
    if has_analytic_entropy(dist):
        with contextlib.suppress(NotImplementedError):  # a method that is inherited, and of no use
            return sum_events(dist.entropy(), batch_dims)
    if not _is_squashed_normal(dist):
        named = dist.base_dist if isinstance(dist, D.Independent) else dist
        raise NotImplementedError(
            f"There is no exact entropy for {type(named).__name__}. Legal: entropy_bonus=False (entropy_coeff=0 still "
            "reports it), or a policy with IndependentNormal, TanhNormal, categorical or MultiCategorical actions, or "
            "a CompositeDistribution of them."
        )
    squashed: Any = dist
    base = squashed.base_dist
    event_dims = tuple(range(-len(dist.event_shape), 0))
    expected = _expected_log_slope([*_elementary(squashed.transforms)], base.mean, base.variance, nodes)  # [*B, A]
    return sum_events(base.entropy() + (expected.sum(event_dims) if event_dims else expected), batch_dims)


def _elementary(transforms: Iterable[D.Transform]) -> Iterator[D.Transform]:
    for transform in transforms:
        parts = _elementary(transform.parts) if isinstance(transform, D.ComposeTransform) else [transform]
        yield from parts


def _expected_log_slope(transforms: Sequence[D.Transform], mean: Tensor, variance: Tensor, nodes: int) -> Tensor:
    """``E[log |f'(z)|]`` of normal ``z``, for transforms of numbers one after the other: ``[*B, A]`` as ``mean``."""
    first, *others = transforms or [D.identity_transform]
    is_affine = all(isinstance(transform, D.AffineTransform) for transform in others)
    if is_affine and isinstance(first, (D.TanhTransform, D.SigmoidTransform)):
        width = 1 if isinstance(first, D.TanhTransform) else 2  # a sigmoid is (1 + tanh(z/2)) / 2
        expected = 2 * (math.log(2 / width) - _expected_log_2cosh(mean / width, variance / width**2))
        return expected + sum(transform.log_abs_det_jacobian(mean, mean) for transform in others)  # the same at any z
    abscissae, weights = (_constants(values, mean) for values in _gauss_hermite(nodes))
    z = mean + variance.sqrt() * abscissae  # [nodes, *B, A]
    log_slope = torch.zeros_like(z)
    for transform in transforms:
        image = transform(z)
        log_slope = log_slope + transform.log_abs_det_jacobian(z, image)
        z = image
    return (weights * log_slope).sum(0)


def _expected_log_2cosh(mean: Tensor, variance: Tensor) -> Tensor:
    """``E[log(2 cosh z)]`` of normal ``z``, ``[*B]`` as ``mean``.

    Its second derivative, ``sech²``, is twice a logistic density, which is a mixture of normal densities of variances
    ``τ²``. That of ``E|z + τε|``, for standard normal ``ε``, is twice one of these. So ``log(2 cosh z)`` is the mean of
    ``E|z + τε|`` over ``τ``.
    """
    weights = _constants(_WEIGHTS, mean)
    spread = (2 * (variance + _constants(_VARIANCES, mean))).sqrt()  # [8, *B]
    x = mean.abs() / spread
    t = 1 / (1 + 0.3275911 * x)
    # exp(x²) erfc(x), within 1.5e-7 exp(x²) (Abramowitz and Stegun 1964, 7.1.26)
    erfcx = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    excess = spread * (-x.square()).exp() * (1 / math.sqrt(math.pi) - x * erfcx)  # of E|z + τε| over |mean|
    return mean.abs() + (weights * excess).sum(0)


@functools.cache
def _gauss_hermite(nodes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Abscissae and weights for expectations under the standard normal."""
    abscissae, weights = np.polynomial.hermite.hermgauss(nodes)
    return tuple(math.sqrt(2) * abscissae), tuple(weights / math.sqrt(math.pi))


def _constants(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Numbers along a dimension before those of ``like``: ``[n, 1, ...]``."""
    return _on_device(values, like.dtype, like.device).reshape(-1, *[1] * like.ndim)


@functools.cache
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that are copied to a device once."""
    with torch.inference_mode(False):  # tensors that are cached may be differentiated later
        return fixed(torch.tensor(values, dtype=dtype, device=device))


def _is_squashed_normal(dist: D.Distribution) -> bool:
    if not isinstance(dist, D.TransformedDistribution):
        return False
    base = dist.base_dist
    while isinstance(base, D.Independent):
        base = base.base_dist
    return isinstance(base, D.Normal) and all(t.domain.event_dim == 0 for t in dist.transforms)
