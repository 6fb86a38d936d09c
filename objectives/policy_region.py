"""Trust-region subproblems of a policy: where keys, networks and numerics meet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torch import distributions as D

from torchrl_trpo.distributions.divergence import curved, entropy, kl_divergence
from torchrl_trpo.numerics.fisher import fisher_product, output_hessian_product
from torchrl_trpo.numerics.vectors import flatten, unflatten
from torchrl_trpo.objectives.attention import differentiable_attention
from torchrl_trpo.objectives.policy_network import (
    build_distribution,
    distribution_parameters,
    slice_agents,
    stacked_prefixes,
)
from torchrl_trpo.objectives.policy_rows import PolicyRows, at_least_single
from torchrl_trpo.parallel.ranks import ALONE, Ranks

_LARGEST_LOG_RATIO = 40.0  # the square of its ratio is within float32
_LOG_RATIO_ROUNDING = 0.01  # how far log-probabilities of the same policy may be apart


@dataclass
class _Piece:
    """Rows that are evaluated at once, and what is kept of them at ``θ_k`` if the batch fits into a chunk."""

    rows: PolicyRows
    dist_params: TensorDictBase | None = None  # with their graph, from the Fisher product to the gradient
    dist: D.Distribution | None = None  # without a graph
    gain: Tensor | None = None  # each row's term of the surrogate, [*R, *A, 1], without a graph
    ratio: Tensor | None = None  # π_θ/π_k at the parameters that were evaluated last, [*R, *A, 1]


class PolicyTrustRegion:
    """The trust-region subproblem(s) of a policy on one batch; implements ``TrustRegionProblem``.

    The surrogate is ``L(θ) = mean[M · π_θ(u|o)/π_k(u|o) · Â] + entropy_coeff · mean[H(π_θ)]``. The divergence is the
    exact mean ``KL(π_k ‖ π_θ)`` from the policy with the parameters ``θ_k`` that it had when this object was made. The
    object serves one solve: :meth:`fisher_product`, then :meth:`gradient`, once each, then any number of evaluations
    and one write. With all rows in the Fisher matrix, product and gradient share one forward pass.

    Args:
        network: the policy.
        parameters: all of its parameters and buffers.
        rows: the batch.

    Keyword Args:
        indices: the regions' rows in the statistics, ``n`` of them.
        agent_slice: the agents that are solved, of parameters stacked by agent; None for one region of all parameters.
        entropy_coeff: the weight of the entropy, a scalar tensor, or None to leave it out.
        max_importance_ratio: the cap on ``π_θ/π_k``, a scalar tensor, or None.
        chunk_size: how many environment steps may have a graph, or results that are kept, at a time. A larger batch is
            evaluated in pieces, anew for each product and each try. None for no limit.
        ranks: the processes that each have a part of the batch; sums are over all of it. Default: this one alone.
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
        chunk_size: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.indices = indices
        self._network = network
        self._rows = rows
        self._batch_dims = rows.log_prob.ndim - 1
        # The dimensions that are summed over for a region: all of them, or all but the agents'.
        self._summed = tuple(range(rows.log_prob.ndim)) if agent_slice is None else (*range(rows.row_dims), -1)
        self._entropy_coeff = entropy_coeff
        self._max_importance_ratio = max_importance_ratio
        keys: dict[Tensor, list[NestedKey]] = {}  # several for a parameter that is tied
        for key, value in parameters.items(True, True):
            if value.requires_grad:
                keys.setdefault(value, []).append(key)
        self._keys = list(keys.values())
        # Views on the storage of the live parameters: read at θ_k, written once by an accepted step.
        self._stateless = (
            parameters.data if agent_slice is None else slice_agents(parameters, agent_slice, stacked_prefixes(network))
        )
        self._live = [self._stateless.get(names[0]) for names in self._keys]
        self._leaves = [value.clone().requires_grad_() for value in self._live]
        self._accepted = torch.zeros(len(indices), dtype=torch.bool, device=rows.log_prob.device)
        self._evaluated = self.parameters  # last, ``[n, P]``
        self._log_ratio_max = rows.log_prob.new_zeros(len(indices))
        self._ratio_moments = rows.log_prob.new_zeros(3, len(indices))
        self._ranks = ranks
        self._chunk_rows = len(rows) if chunk_size is None else max(1, chunk_size // rows.steps_per_row)
        self._pieces = [_Piece(part) for part in self._split(rows)]

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
            rows = self._sample(subsample)
            pieces = [_Piece(part) for part in self._split(rows)]
        kept = [self._piece_product(piece.rows, keep_in=piece) for piece in pieces if len(rows) <= self._chunk_rows]

        def product(vectors: Tensor) -> Tensor:
            parts = kept or (self._piece_product(piece.rows) for piece in pieces)  # one graph at a time
            return self._ranks.sum_(functools.reduce(torch.add, (part(vectors) for part in parts)))

        return product

    def gradient(self) -> Tensor:
        """The gradient of the surrogate at ``θ_k``, ``[n, P]``."""
        total = torch.zeros_like(self.parameters)
        for piece in self._pieces:
            dist_params, shared = piece.dist_params, piece.dist_params is not None  # with the products
            with torch.enable_grad():
                if dist_params is None:
                    dist_params = self._dist_params(piece.rows, self._leaves)
                _, gain = self._ratio_and_gain(piece.rows, self._distribution(dist_params))
                surrogate = (piece.rows.weight * gain).sum()
            dist_k = self._distribution(dist_params.detach())
            self._compare_with_data(piece.rows, dist_k)
            slopes = torch.autograd.grad(surrogate, self._leaves, retain_graph=shared, materialize_grads=True)
            total += flatten(slopes, len(self.indices))
            piece.dist_params = None
            if len(self._rows) <= self._chunk_rows:
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
            dist_k = piece.dist or self._policy(rows, self._leaves)
            gain_k = self._ratio_and_gain(rows, dist_k)[1] if piece.gain is None else piece.gain
            dist = self._policy(rows, leaves)
            ratio, gain = self._ratio_and_gain(rows, dist)
            piece.ratio = ratio if len(self._rows) <= self._chunk_rows else None
            improvement = improvement + self._total(rows, gain - gain_k)
            kl = kl + self._total(rows, kl_divergence(dist_k, dist, self._batch_dims).unsqueeze(-1))
        self._evaluated = flatten(leaves, len(self.indices))  # as the parameters' types hold them
        improvement, kl = self._ranks.sum_(torch.stack([improvement, kl]))
        return improvement, kl

    @torch.no_grad()
    def write(self, parameters: Tensor, accepted: Tensor) -> Tensor:
        """Writes the accepted regions' parameters; those of the others stay untouched to the bit.

        Args:
            parameters: the new ``θ``, ``[n, P]``; :meth:`ratio` is NaN if others were evaluated last.
            accepted: which regions are written, bool ``[n]``.

        Returns:
            The live parameters after it, ``[n, P]``.
        """
        self._accepted = accepted
        kept = torch.where(accepted.unsqueeze(-1), parameters, self.parameters)
        for live, new in zip(self._live, unflatten(kept, self._leaves), strict=True):
            live.copy_(new)
        return flatten(self._live, len(self.indices))

    def snapshot(self) -> Callable[[], None]:
        """A function that restores ``θ_k``, to the bit, whatever was written since."""
        live, before = self._live, self._leaves  # and no rows: it may outlive the region

        @torch.no_grad()
        def restore() -> None:
            for value, own in zip(live, before, strict=True):
                value.copy_(own)

        return restore

    def diagnostics(self) -> dict[str, Tensor]:
        """How far the data is from ``π_k``, and in a sequential update how uneven the factor is.

        Returns:
            ``log_ratio_max``, ``ESS`` and, in a sequential update, ``factor_std`` as in ``TrustRegionUpdater.step``;
            ``mismatch``, the share of the rows whose log-probability in the data is not the policy's. Each ``[n]``.
        """
        mean, square, mismatch = self._ranks.sum_(self._ratio_moments)
        largest = self._ranks.max_(self._log_ratio_max)
        entries = {"log_ratio_max": largest, "ESS": mean.square() / square, "mismatch": mismatch}
        if self._rows.factor.ndim > 1:
            change = self._rows.factor - 1  # small: its square keeps the digits
            moments = [self._total(self._rows, values) for values in (change, change.square())]
            mean, square = self._ranks.sum_(torch.stack(moments))
            entries["factor_std"] = (square - mean.square()).clamp_min(0).sqrt()
        return entries

    @torch.no_grad()
    def ratio(self) -> Tensor:
        """``π_new(u|o) / π_k(u|o)`` once the step is written, ``[*R, *A, 1]``.

        It is 1, whatever the data, for regions whose step was rejected, and where a row is masked.
        """
        same = (flatten(self._live, len(self.indices)) == self._evaluated).all(-1, keepdim=True)  # [n, 1]
        ratios = []
        for rows, known in ((piece.rows, piece.ratio) for piece in self._pieces):
            if known is None:
                ratio, _ = self._ratio_and_gain(rows, self._policy(rows, self._live))
            else:
                ratio = torch.where(same, known, torch.nan)
            ratios.append(torch.where(self._accepted.unsqueeze(-1), ratio, 1.0))
        return torch.cat(ratios)

    @torch.no_grad()
    def _compare_with_data(self, rows: PolicyRows, dist: D.Distribution) -> None:
        """Adds rows to the statistics of the ratios ``π_k(u|o) / π_data(u|o)``."""
        log_ratio = rows.log_ratio(dist)
        ratio = log_ratio.clamp_max(_LARGEST_LOG_RATIO).exp()
        rounding = 8 * torch.finfo(self._leaves[0].dtype).eps * (1 + rows.log_prob.abs())
        other = (log_ratio.abs() > rounding.clamp_min(_LOG_RATIO_ROUNDING)).to(ratio)
        moments = [self._total(rows, values) for values in (ratio, ratio.square(), other)]
        self._ratio_moments = self._ratio_moments + torch.stack(moments)
        self._log_ratio_max = torch.maximum(self._log_ratio_max, log_ratio.abs().amax(self._summed))

    def _piece_product(self, rows: PolicyRows, *, keep_in: _Piece | None = None) -> Callable[[Tensor], Tensor]:
        """The rows' part of the product with the Fisher matrix, ``v ↦ Jᵀ Fdist J v``."""
        with torch.enable_grad():
            dist_params = self._dist_params(rows, self._leaves, twice=True)
        if keep_in is not None:
            keep_in.dist_params = dist_params
        keys = [key for key, value in dist_params.items(True, True) if value.requires_grad]
        outputs = [dist_params.get(key) for key in keys]
        detached = dist_params.detach()
        dist_k = curved(self._distribution(detached))

        def mean_kl(tensors: list[Tensor]) -> Tensor:
            moved = detached.clone(False).update(dict(zip(keys, tensors, strict=True)))
            kl = kl_divergence(dist_k, self._distribution(moved), self._batch_dims)
            return (rows.weight * kl.unsqueeze(-1)).sum()

        metric = output_hessian_product(mean_kl, outputs, row_dims=self._batch_dims)
        return fisher_product(outputs, self._leaves, metric, len(self.indices))

    def _dist_params(self, rows: PolicyRows, leaves: Sequence[Tensor], *, twice: bool = False) -> TensorDictBase:
        """The distribution's parameters, in single precision at least; ``twice`` if they are differentiated twice."""
        values = {key: leaf for keys, leaf in zip(self._keys, leaves, strict=True) for key in keys}
        parameters = self._stateless.clone(False).update(values)
        with differentiable_attention(twice=twice):
            return distribution_parameters(self._network, parameters, rows.inputs).apply(at_least_single)

    def _distribution(self, dist_params: TensorDictBase) -> D.Distribution:
        return build_distribution(self._network, dist_params)

    def _policy(self, rows: PolicyRows, leaves: Sequence[Tensor]) -> D.Distribution:
        return self._distribution(self._dist_params(rows, leaves))

    def _ratio_and_gain(self, rows: PolicyRows, dist: D.Distribution) -> tuple[Tensor, Tensor]:
        """Each row's ``π_θ/π_k`` and its term of the surrogate, ``[*R, *A, 1]``."""
        ratio = rows.log_ratio(dist, self._max_importance_ratio).exp()
        gain = rows.factor * ratio * rows.advantage
        if self._entropy_coeff is None:
            return ratio, gain
        return ratio, gain + self._entropy_coeff * entropy(dist, self._batch_dims).unsqueeze(-1)

    def _total(self, rows: PolicyRows, values: Tensor) -> Tensor:
        """The weighted sum over the rows of each region, ``[*R, *A, 1]`` to ``[n]``."""
        return (rows.weight * values).sum(self._summed).reshape(len(self.indices))

    def _split(self, rows: PolicyRows) -> list[PolicyRows]:
        return rows.split(self._chunk_rows)

    def _sample(self, share: float) -> PolicyRows:
        """Rows drawn from the batch, with weights that sum to 1 again."""
        drawn = torch.randperm(len(self._rows), device=self._rows.log_prob.device)
        sample = self._rows.take(drawn[: max(1, round(share * len(self._rows)))])
        if sample.weight.ndim == 1:
            return replace(sample, weight=sample.weight * (len(self._rows) / len(sample)))
        total = self._ranks.sum_(sample.weight.sum(self._summed, keepdim=True))
        return replace(sample, weight=sample.weight / torch.where(total > 0, total, 1.0))
