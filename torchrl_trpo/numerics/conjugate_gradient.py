"""Conjugate gradient for several symmetric positive definite systems at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class CGResult(NamedTuple):
    """The result of a solve of ``A x = b``, for ``n`` systems of size ``P``.

    Attributes:
        solution: the approximate solutions ``x``, ``[n, P]``.
        residual: ``b - A x`` as the recursion tracks it, ``[n, P]``.
        relative_residual: ``‖b - A x‖ / ‖b‖``, ``[n]``; 0 where ``b`` is 0, NaN where the system holds a NaN.
        iterations: the number of steps each system took before it was frozen, ``[n]``.
    """

    solution: Tensor
    residual: Tensor
    relative_residual: Tensor
    iterations: Tensor


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor], b: Tensor, *, iterations: int = 10, tol: float = 1e-6
) -> CGResult:
    """Solves ``A x = b`` by conjugate gradient, one system per row (Hestenes and Stiefel, 1952).

    The loop has a fixed length and no branch on data, so that it never waits for the device: a system that has
    converged (``‖r‖ ≤ tol ‖b‖``), or along whose direction the curvature is not positive, is frozen by a mask.
    Nothing is added to a denominator, and a NaN in ``A`` or ``b`` ends in a NaN residual.

    Args:
        matvec: the product ``v ↦ A v``, from ``[n, P]`` to ``[n, P]``; ``A`` is symmetric positive definite. Damping
            is part of it.
        b: the right-hand sides, ``[n, P]``.
        iterations: the number of steps, and so of products, at least 1.
        tol: the relative residual at which a system is frozen, at least 0.

    Returns:
        The solutions, residuals and step counts.

    Raises:
        ValueError: if ``b`` is not a matrix, ``iterations`` is not positive or ``tol`` is negative.
    """
    if b.ndim != 2:
        raise ValueError(f"b must have shape [n, P], one row per system; got {tuple(b.shape)}.")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")
    if tol < 0:
        raise ValueError(f"tol must be at least 0, got {tol}.")
    x = torch.zeros_like(b)
    r = b
    p = b
    rr = bb = (b * b).sum(-1, keepdim=True)  # [n, 1]
    steps = torch.zeros_like(rr)
    for _ in range(iterations):
        Ap = matvec(p)
        pAp = (p * Ap).sum(-1, keepdim=True)
        # Written as negations: a NaN must go on and show in the residual, not look like convergence.
        active = ~(rr <= tol**2 * bb) & ~(pAp <= 0)
        alpha = torch.where(active, rr / pAp, 0.0)
        x = x + alpha * p
        r = r - alpha * Ap
        rr_next = (r * r).sum(-1, keepdim=True)
        p = torch.where(active, r + rr_next / rr * p, p)
        rr = torch.where(active, rr_next, rr)
        steps = steps + active
    relative = torch.where(bb == 0, bb, (rr / bb).sqrt())
    return CGResult(x, r, relative.squeeze(-1), steps.squeeze(-1).long())
