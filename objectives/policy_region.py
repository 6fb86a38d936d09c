"""Trust-region subproblems of a policy: where keys, networks and numerics meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torch import distributions as D

from torchrl_trpo.distributions.divergence import entropy, kl_divergence
from torchrl_trpo.numerics.fisher import fisher_product, output_hessian_product
from torchrl_trpo.numerics.vectors import flatten, unflatten
from torchrl_trpo.objectives.attention import differentiable_attention
from torchrl_trpo.objectives.compiled_policy import CompiledPolicy
from torchrl_trpo.objectives.policy_network import (
    build_distribution,
    distribution_parameters,
    slice_agents,
    stacked_prefixes,
)
from torchrl_trpo.objectives.policy_rows import PolicyRows, at_least_single
from torchrl_trpo.parallel.ranks import ALONE, Ranks

_CPU_ROWS = 4096
"""Rows times agents that are evaluated at once on a CPU."""
_LARGEST_LOG_RATIO = 40.0
"""Its square is within float32."""
_LOG_RATIO_ROUNDING = 0.01
"""How far log-probabilities of the same policy may be apart."""


@dataclass
class _Piece:
    """Some rows that are evaluated at once, and what is known of them at ``θ_k``.

    Attributes:
        rows: the rows.
        dist_params: the distribution's parameters; with their graph, from when it is made until the last who needs it.
        dist: the distribution, without a graph.
        gain: what each row gives to the surrogate, ``[*R, *A, 1]``, without a graph.
    """

    rows: PolicyRows
    dist_params: TensorDictBase | None = None
    dist: D.Distribution | None = None
    gain: Tensor | None = None


class PolicyTrustRegion:
    """The trust-region subproblem(s) of a policy on one batch; implements ``TrustRegionProblem``.

    The surrogate is ``L(θ) = mean[M · π_θ(u|o)/π_k(u|o) · Â] + entropy_coeff · mean[H(π_θ)]``, the divergence the exact
    mean ``KL(π_k ‖ π_θ)`` from the policy with the parameters that were current when this object was made. It serves
    one solve: :meth:`fisher_product`, then :meth:`gradient`, once each, then any number of evaluations and one write.
    With all rows in the Fisher matrix, the two share one forward pass.

    Args:
        network: the policy.
        parameters: its parameters (and buffers), all of them.
        rows: the batch.

    Keyword Args:
        indices: the rows of the statistics that the regions are, ``n`` of them.
        agent_slice: which agents of stacked parameters, on their leading dimension, are solved; None for one region
            over all parameters.
        entropy_coeff: the weight of the entropy, a scalar tensor, or None to leave it out.
        max_importance_ratio: the cap on ``π_θ/π_k``, a scalar tensor, or None.
        compiled: the policy's forward pass where it is differentiated once or not at all. Default: as the network is.
        chunk_size: how many rows may have a graph, or anything computed from them, at a time; more are evaluated in
            pieces, anew for each product and each try. None for all.
        ranks: the processes that solve the subproblem together, each with its rows: what is summed over rows is summed
            over them. Default: this one alone.
    """

    def __init__(
        self,
        network: ProbabilisticTensorDictSequential,
        parameters: TensorDictBase,
        rows: PolicyRows,
        *,
        indices: Sequence[int],
        agent_slice: slice | None = None,
        entropy_coeff: Tensor | None = None,
        max_importance_ratio: Tensor | None = None,
        compiled: CompiledPolicy | None = None,
        chunk_size: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.indices = indices
        self._network = network
        self._compiled = compiled
        self._rows = rows
        self._batch_dims = rows.log_prob.ndim - 1
        self._agent_slice = agent_slice
        self._entropy_coeff = entropy_coeff
        self._max_importance_ratio = max_importance_ratio
        trained: dict[int, Tensor] = {}
        keys: dict[int, list[NestedKey]] = {}  # several for a parameter that is tied
        for key, value in parameters.items(True, True):
            if value.requires_grad:
                trained[id(value)] = value
                keys.setdefault(id(value), []).append(key)
        self._keys = list(keys.values())
        # Views on the storage of the live parameters: read at θ_k, written once by an accepted step.
        self._stateless = (
            parameters.data if agent_slice is None else slice_agents(parameters, agent_slice, stacked_prefixes(network))
        )
        self._live = [self._stateless.get(names[0]) for names in self._keys]
        self._leaves = [value.clone().requires_grad_() for value in self._live]
        self._accepted = torch.zeros(len(indices), dtype=torch.bool, device=rows.log_prob.device)
        self._log_ratio_max = rows.log_prob.new_zeros(len(indices))
        self._ratio_moments = rows.log_prob.new_zeros(3, len(indices))
        self._ranks = ranks
        self._chunk_rows = len(rows) if chunk_size is None else max(1, chunk_size // rows.steps_per_row)
        self._pieces = self._split(rows)

    @property
    def parameters(self) -> Tensor:
        """The parameters ``θ_k``, ``[n, P]``."""
        return flatten(self._leaves, len(self.indices)).detach()

    def fisher_product(self, subsample: float = 1.0) -> Callable[[Tensor], Tensor]:
        """The product with the Fisher matrix, the Hessian of the mean KL at ``θ_k``, from and to ``[n, P]``.

        Args:
            subsample: the share of the rows that the mean is taken over, drawn from torch's generator.

        Returns:
            The product; it keeps the graph of the policy alive, if the rows fit into ``chunk_size``.
        """
        rows, pieces = self._rows, self._pieces
        if subsample < 1:
            drawn = torch.randperm(len(rows), device=rows.log_prob.device)
            rows = self._renormalise(rows.take(drawn[: max(1, round(subsample * len(rows)))]))
            pieces = self._split(rows)
        if self._fits_in_chunk(rows):
            products = [self._piece_product(piece.rows, piece) for piece in pieces]
            return lambda vectors: self._sum([product(vectors) for product in products])
        return lambda vectors: self._sum(self._piece_product(piece.rows)(vectors) for piece in pieces)

    def gradient(self) -> Tensor:
        """The gradient of the surrogate at ``θ_k``, ``[n, P]``."""
        total = torch.zeros_like(self.parameters)
        for piece in self._pieces:
            dist_params = piece.dist_params
            shared = dist_params is not None  # with the products
            with torch.enable_grad():
                if dist_params is None:
                    dist_params = self._distribution_parameters(piece.rows, self._leaves)
                gain = self._gain(piece.rows, self._distribution(dist_params))
                surrogate = (piece.rows.weight * gain).sum()
            dist_k = self._distribution(dist_params.detach())
            self._compare_with_data(piece.rows, dist_k)
            slopes = torch.autograd.grad(surrogate, self._leaves, retain_graph=shared, materialize_grads=True)
            total += flatten(slopes, len(self.indices))
            piece.dist_params = None
            if self._fits_in_chunk(self._rows):
                piece.dist, piece.gain = dist_k, gain.detach()
        return self._ranks.sum_(total)

    @torch.no_grad()
    def evaluate(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The improvement ``L(θ) − L(θ_k)`` and the mean KL from ``π_k`` in nats, each ``[n]``.

        Args:
            parameters: the candidate ``θ``, ``[n, P]``.

        Returns:
            The improvement and the KL.
        """
        leaves = unflatten(parameters, self._leaves)
        improvement = kl = torch.zeros_like(parameters[:, 0])
        for piece in self._pieces:
            rows = piece.rows
            dist_k = piece.dist or self._distribution(self._distribution_parameters(rows, self._leaves))
            gain_k = self._gain(rows, dist_k) if piece.gain is None else piece.gain
            dist = self._distribution(self._distribution_parameters(rows, leaves))
            improvement = improvement + self._total(rows, self._gain(rows, dist) - gain_k)
            kl = kl + self._total(rows, kl_divergence(dist_k, dist, self._batch_dims).unsqueeze(-1))
        improvement, kl = self._ranks.sum_(torch.stack([improvement, kl]))
        return improvement, kl

    @torch.no_grad()
    def write(self, parameters: Tensor, accepted: Tensor) -> None:
        """Writes the accepted regions' parameters; those of the others stay untouched to the bit.

        Args:
            parameters: the new ``θ``, ``[n, P]``.
            accepted: which regions are written, bool ``[n]``.
        """
        self._accepted = accepted
        for live, new in zip(self._live, unflatten(parameters, self._leaves), strict=True):
            taken = accepted.reshape(()) if self._agent_slice is None else accepted.reshape(-1, *[1] * (live.ndim - 1))
            live.copy_(torch.where(taken, new, live))

    def snapshot(self) -> Callable[[], None]:
        """A function that writes ``θ_k`` again, to the bit, whatever was written since."""
        live, before = self._live, self._leaves  # and no rows: it may outlive the region

        @torch.no_grad()
        def restore() -> None:
            for value, own in zip(live, before, strict=True):
                value.copy_(own)

        return restore

    def diagnostics(self) -> dict[str, Tensor]:
        """How far the data is from ``π_k``, and in a sequential update how uneven the factor is.

        Returns:
            ``log_ratio_max`` and ``ESS`` as in ``TrustRegionUpdater.step``; ``mismatch``, the share of the rows with
            another log-probability than the data says; in a sequential update ``factor_std``, the standard deviation of
            ``M`` over the rows that count. Each ``[n]``.
        """
        mean, square, mismatch = self._ranks.sum_(self._ratio_moments)
        entries = {"log_ratio_max": self._ranks.max_(self._log_ratio_max), "ESS": mean.square() / square}
        entries["mismatch"] = mismatch
        rows = self._rows
        if rows.factor.ndim > 1:
            change = rows.factor - 1  # small: its square keeps the digits
            moments = torch.stack([self._total(rows, change), self._total(rows, change.square())])
            mean, square = self._ranks.sum_(moments)
            entries["factor_std"] = (square - mean.square()).clamp_min(0).sqrt()
        return entries

    @torch.no_grad()
    def ratio(self) -> Tensor:
        """``π_new(u|o) / π_k(u|o)`` once the step is written, ``[*R, *A, 1]``.

        It is 1, whatever the data, for regions whose step was rejected, and where a row is masked.
        """
        ratios = []
        for rows in (piece.rows for piece in self._pieces):
            dist = self._distribution(self._distribution_parameters(rows, self._live))
            ratio = rows.log_ratio(dist, self._max_importance_ratio).exp()
            ratios.append(torch.where(self._per_region(self._accepted, ratio) & (rows.weight > 0), ratio, 1.0))
        return torch.cat(ratios)

    @torch.no_grad()
    def _compare_with_data(self, rows: PolicyRows, dist: D.Distribution) -> None:
        """Adds some rows to what is known of the ratios ``π_k(u|o) / π_data(u|o)``."""
        log_ratio = torch.where(rows.weight > 0, rows.log_ratio(dist), 0.0)
        ratio = log_ratio.clamp_max(_LARGEST_LOG_RATIO).exp()
        rounding = 8 * torch.finfo(self._leaves[0].dtype).eps * (1 + rows.log_prob.abs())
        other = (log_ratio.abs() > rounding.clamp_min(_LOG_RATIO_ROUNDING)).to(ratio)
        moments = torch.stack([self._total(rows, values) for values in (ratio, ratio.square(), other)])
        self._ratio_moments = self._ratio_moments + moments
        dims = (*range(rows.row_dims), -1) if self._agent_slice is not None else tuple(range(log_ratio.ndim))
        largest = log_ratio.abs().amax(dims).reshape(len(self.indices))
        self._log_ratio_max = torch.maximum(self._log_ratio_max, largest)

    def _piece_product(self, rows: PolicyRows, kept: _Piece | None = None) -> Callable[[Tensor], Tensor]:
        """Some rows' share of the product with the Fisher matrix: ``v ↦ Jᵀ Fdist J v``.

        Args:
            rows: the rows.
            kept: where the graph is left for the gradient.

        Returns:
            The product.
        """
        with torch.enable_grad():
            dist_params = self._distribution_parameters(rows, self._leaves, twice=True)
        if kept is not None:
            kept.dist_params = dist_params
        keys = [key for key, value in dist_params.items(True, True) if value.requires_grad]
        outputs = [dist_params.get(key) for key in keys]
        detached = dist_params.detach()
        dist_k = self._distribution(detached)

        def mean_kl(tensors: list[Tensor]) -> Tensor:
            moved = detached.clone(False)
            for key, tensor in zip(keys, tensors, strict=True):
                moved.set(key, tensor)
            kl = kl_divergence(dist_k, self._distribution(moved), self._batch_dims)
            return (rows.weight * kl.unsqueeze(-1)).sum()

        return fisher_product(outputs, self._leaves, output_hessian_product(mean_kl, outputs), len(self.indices))

    def _distribution_parameters(
        self, rows: PolicyRows, leaves: Sequence[Tensor], *, twice: bool = False
    ) -> TensorDictBase:
        """The distribution's parameters, in single precision at least; ``twice`` if they are differentiated twice."""
        parameters = self._stateless.clone(False)
        for keys, leaf in zip(self._keys, leaves, strict=True):
            for key in keys:
                parameters.set(key, leaf)
        with differentiable_attention(twice=twice):
            if self._compiled is not None and not twice:
                return self._compiled(parameters, rows.inputs).apply(at_least_single)
            return distribution_parameters(self._network, parameters, rows.inputs).apply(at_least_single)

    def _distribution(self, dist_params: TensorDictBase) -> D.Distribution:
        return build_distribution(self._network, dist_params)

    def _gain(self, rows: PolicyRows, dist: D.Distribution) -> Tensor:
        """What each row gives to the surrogate, ``[*R, *A, 1]``."""
        ratio = rows.log_ratio(dist, self._max_importance_ratio).exp()
        gain = rows.factor * ratio * rows.advantage
        if self._entropy_coeff is None:
            return gain
        return gain + self._entropy_coeff * entropy(dist, self._batch_dims).unsqueeze(-1)

    def _sum(self, products: Iterable[Tensor]) -> Tensor:
        """The sum of the pieces' shares of a product, of all ranks, ``[n, P]``."""
        products = iter(products)
        total = next(products)
        for product in products:
            total = total + product
        return self._ranks.sum_(total)

    def _total(self, rows: PolicyRows, values: Tensor) -> Tensor:
        """The weighted sum over the rows of each region, ``[*R, *A, 1]`` to ``[n]``."""
        weighted = rows.weight * values
        if self._agent_slice is None:
            return weighted.sum().reshape(1)
        return weighted.sum((*range(rows.row_dims), -1))

    def _per_region(self, flags: Tensor, like: Tensor) -> Tensor:
        """Flags of the regions ``[n]``, broadcastable to rows ``[*R, *A, 1]``."""
        if self._agent_slice is None:
            return flags.reshape(())
        row_dims = self._rows.row_dims
        return flags.reshape(*[1] * row_dims, -1, *[1] * (like.ndim - row_dims - 1))

    def _renormalise(self, sample: PolicyRows) -> PolicyRows:
        """Rows drawn from the batch, with weights that sum to 1 again."""
        if sample.weight.ndim == 1:
            return replace(sample, weight=sample.weight * (len(self._rows) / len(sample)))
        per_region = list(range(sample.row_dims))
        total = self._ranks.sum_(sample.weight.sum() if self._agent_slice is None else sample.weight.sum(per_region))
        total = total if self._agent_slice is None else total.reshape(*[1] * sample.row_dims, *total.shape)
        return replace(sample, weight=sample.weight / torch.where(total > 0, total, 1.0))

    def _split(self, rows: PolicyRows) -> list[_Piece]:
        """Pieces of at most a chunk; smaller on a CPU, so that a layer's activations stay in a core's cache."""
        size = self._chunk_rows
        if rows.log_prob.device.type == "cpu":
            size = min(size, max(1, _CPU_ROWS // rows.log_prob.shape[1:].numel()))
        slices = [rows.take(slice(start, start + size)) for start in range(0, len(rows), size)]
        return [_Piece(part.contiguous() if self._fits_in_chunk(rows) else part) for part in slices]

    def _fits_in_chunk(self, rows: PolicyRows) -> bool:
        return len(rows) <= self._chunk_rows
