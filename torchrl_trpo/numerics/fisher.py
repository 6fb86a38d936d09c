"""Matrix-free Fisher products by plain reverse-mode differentiation.

For outputs ``φ(θ)`` with Jacobian ``J`` and a curvature ``H`` in output space, the generalised Gauss-Newton product is
``v ↦ Jᵀ H J v``.  When ``φ`` are the parameters of a distribution and ``H`` the Hessian of its own KL divergence,
this is the product with the Fisher matrix, exactly the Hessian of the mean KL at ``θ_k`` (Schulman et al. 2015,
appendix C.1; Martens 2014, arXiv:1412.1193, section 9).

``J v`` needs no forward mode: ``u ↦ Jᵀ u`` is linear in ``u``, so differentiating ``⟨Jᵀ u, v⟩`` with respect to ``u``
gives ``J v``.  Both graphs are built once and kept; a product then costs about one forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from torchrl_trpo.numerics.vectors import flatten, unflatten

_ONLY_ONCE = (
    "the policy has an operation that can be differentiated only once, {}; products with the Fisher matrix "
    "differentiate twice. Legal: operations whose derivatives are differentiable (plain PyTorch in place of a fused, "
    "compiled or custom one)."
)


def output_hessian_product(
    function: Callable[[list[Tensor]], Tensor],
    outputs: Sequence[Tensor],
    *,
    row_dims: int | None = None,
    max_block: int = 16,
) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """Builds the product with the Hessian of a sum over rows, which is block-diagonal: one small block per row.

    Blocks of up to ``max_block`` entries a side are computed once; a product is then one small multiplication. Larger
    ones (many discrete actions) are never formed: each product differentiates again.

    Args:
        function: maps tensors shaped as ``outputs`` to a scalar, twice differentiable: a sum over rows of a function of
            each row's outputs.
        outputs: where the Hessian is taken, each ``[*rows, d_i]``; they are detached.

    Keyword Args:
        row_dims: the number of dimensions in ``*rows``. Blocks are formed of outputs with one dimension more, not of
            matrices such as a ``scale_tril``. Default: all but the last of each output.
        max_block: the largest ``d = Σ d_i`` for which blocks are formed.

    Returns:
        The product ``w ↦ H w``, on tensors shaped as ``outputs``.

    Raises:
        ValueError: if there are no outputs.
    """
    if not outputs:
        raise ValueError(
            "outputs: [], for no trained parameter reaches the policy's distribution. Legal: at least one output that "
            "depends on a parameter with requires_grad=True."
        )
    points = [output.detach().requires_grad_() for output in outputs]
    with torch.enable_grad():
        slopes = torch.autograd.grad(function(points), points, create_graph=True, materialize_grads=True)
    curved = [slope for slope in slopes if slope.requires_grad]

    def product(tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        directions = [t for t, slope in zip(tangents, slopes, strict=True) if slope.requires_grad]
        return torch.autograd.grad(curved, points, directions, retain_graph=True, materialize_grads=True)

    sizes = [output.shape[-1] for output in outputs]
    ndims = {output.ndim for output in outputs}
    if sum(sizes) > max_block or len(ndims) > 1 or (row_dims is not None and max(ndims) > row_dims + 1):
        return product
    unit = torch.eye(sum(sizes), dtype=points[0].dtype, device=points[0].device)
    columns = [product([e.expand_as(p) for e, p in zip(row.split(sizes), points, strict=True)]) for row in unit]
    blocks = torch.stack([torch.cat(column, -1) for column in columns], -1)  # [*rows, d, d]

    def block_product(tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (blocks * torch.cat(list(tangents), -1).unsqueeze(-2)).sum(-1).split(sizes, -1)

    return block_product


def fisher_product(
    outputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    metric: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    n_regions: int = 1,
) -> Callable[[Tensor], Tensor]:
    """Builds the product ``v ↦ Jᵀ H J v`` for ``J = ∂ outputs / ∂ parameters``.

    Args:
        outputs: tensors with a graph that leads to ``parameters``; the graph is kept alive by the product.
        parameters: the tensors to differentiate by, each ``[n, *shape]`` (any shape when ``n_regions`` is 1).
        metric: the product with ``H``, the symmetric positive semi-definite curvature in output space: from and to
            tensors shaped as ``outputs``. Weights of the rows belong into it.
        n_regions: the number of independent regions ``n``; parameters of one must not reach outputs of another.

    Returns:
        The product, from ``[n, P]`` to ``[n, P]``.

    An operation between parameters and outputs that can be differentiated only once is a ``RuntimeError``.
    """
    # If a torch.autograd.Function cannot be differentiated twice, its part of J v may be missing without an error.
    custom = [node for node in _graph(outputs) if isinstance(node, BackwardCFunction)]
    _check_differentiable_twice(outputs, parameters, custom)
    cotangents = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    with torch.enable_grad():
        pulled = torch.autograd.grad(outputs, parameters, cotangents, create_graph=True, materialize_grads=True)
    linear = [pull for pull in pulled if pull.requires_grad]  # not those of parameters without influence

    def product(vectors: Tensor) -> Tensor:
        tangents = unflatten(vectors, parameters)
        directions = [t for t, pull in zip(tangents, pulled, strict=True) if pull.requires_grad]
        try:
            Jv = torch.autograd.grad(linear, cotangents, directions, retain_graph=True, materialize_grads=True)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError):
                _check_differentiable_twice(outputs, parameters, _graph(outputs))
            raise
        HJv = metric(Jv)
        JtHJv = torch.autograd.grad(outputs, parameters, HJv, retain_graph=True, materialize_grads=True)
        return flatten(JtHJv, n_regions)

    return product


def _graph(outputs: Sequence[Tensor]) -> list[Node]:
    """The operations that lead to outputs, each once."""
    nodes: dict[Node, None] = {}
    left = [output.grad_fn for output in outputs]
    while left:
        node = left.pop()
        if node is not None and node not in nodes:
            nodes[node] = None
            left.extend(following for following, _ in node.next_functions)
    return list(nodes)


def _check_differentiable_twice(outputs: Sequence[Tensor], parameters: Sequence[Tensor], nodes: Sequence[Node]) -> None:
    """Raises an error that names the first operation whose derivative cannot be differentiated."""
    if not nodes:
        return
    begun: list[str] = []
    passed: list[tuple[str, Any, Any]] = []  # an operation, the derivatives that it returned, those that it received

    def begin(name: str) -> Callable[[Any], None]:
        return lambda received: begun.append(name)

    def record(name: str) -> Callable[[Any, Any], None]:
        return lambda slopes, received: passed.append((name, slopes, received))

    hooks = [node.register_prehook(begin(node.name())) for node in nodes]
    hooks += [node.register_hook(record(node.name())) for node in nodes]
    cotangents = [torch.ones_like(output, requires_grad=True) for output in outputs]
    try:
        with torch.enable_grad():
            torch.autograd.grad(outputs, parameters, cotangents, create_graph=True, allow_unused=True)
    except RuntimeError as error:  # of a compiled one, which may free what its derivative is made of
        if isinstance(error, torch.OutOfMemoryError) or len(begun) == len(passed):
            raise
        raise RuntimeError(_ONLY_ONCE.format(begun[-1])) from error
    finally:
        for hook in hooks:
            hook.remove()
    for name, slopes, received in passed:
        causes = [cotangent for cotangent in received if cotangent is not None and cotangent.requires_grad]
        if causes and any(slope is not None and not _leads_to(slope, causes) for slope in slopes):
            raise RuntimeError(_ONLY_ONCE.format(name))


def _leads_to(slope: Tensor, causes: Sequence[Tensor]) -> bool:
    """Whether a derivative can be differentiated with respect to its ``causes``; a derivative of 0 need not be."""
    found: Sequence[Tensor | None] = [None]
    if slope.requires_grad:
        try:
            found = torch.autograd.grad(slope.sum(), causes, retain_graph=True, allow_unused=True)
        except RuntimeError:
            return False
    return any(part is not None for part in found) or not bool(slope.any())
