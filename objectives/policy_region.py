"""Trust-region subproblems of a policy: where keys, networks and numerics meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torch import distributions as D
from torchrl_trpo.objectives.policy_network import distribution_keys, slice_agents
from torchrl_trpo.objectives.policy_rows import PolicyRows

from torchrl_trpo.divergence import entropy, kl_divergence
from torchrl_trpo.fisher import fisher_product, output_hessian_product
from torchrl_trpo.vectors import flatten, unflatten


class PolicyTrustRegion:
    """The trust-region subproblem(s) of a policy on one batch; implements ``TrustRegionProblem``.

    The surrogate is ``L(θ) = mean[M · π_θ(u|o)/π_k(u|o) · Â] + entropy_coeff · mean[H(π_θ)]``, the divergence the exact
    mean ``KL(π_k ‖ π_θ)`` from the policy with the parameters that were current when this object was made.

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
    ) -> None:
        self.indices = indices
        self._network = network
        self._rows = rows
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
        self._stateless = parameters.data if agent_slice is None else slice_agents(parameters.data, agent_slice)
        self._live = [self._stateless.get(names[0]) for names in self._keys]
        self._leaves = [value.clone().requires_grad_() for value in self._live]
        with torch.enable_grad():
            self._dist_params = self._distribution_parameters(rows.inputs, self._leaves)
            dist = self._distribution(self._dist_params)
            self._gain = self._surrogate_rows(dist)
        self._gain_k = self._gain.detach()
        self._dist_k = self._distribution(self._dist_params.detach())

    @property
    def parameters(self) -> Tensor:
        """The parameters ``θ_k``, ``[n, P]``."""
        return flatten(self._leaves, len(self.indices)).detach()

    def gradient(self) -> Tensor:
        """The gradient of the surrogate at ``θ_k``, ``[n, P]``."""
        total = (self._rows.weight * self._gain).sum()
        slopes = torch.autograd.grad(total, self._leaves, retain_graph=True, materialize_grads=True)
        del self._gain
        return flatten(slopes, len(self.indices))

    def fisher_product(self, subsample: float = 1.0) -> Callable[[Tensor], Tensor]:
        """The product with the Fisher matrix, the Hessian of the mean KL at ``θ_k``, from and to ``[n, P]``.

        Args:
            subsample: the share of the rows that the mean is taken over, drawn from torch's generator.
        """
        rows, dist_params = self._rows, self._dist_params
        weight = rows.weight
        n_rows = rows.inputs.shape[0]
        if subsample < 1:
            drawn = torch.randperm(n_rows, device=rows.log_prob.device)[: max(1, round(subsample * n_rows))]
            with torch.enable_grad():
                dist_params = self._distribution_parameters(rows.inputs[drawn], self._leaves)
            weight = self._region_weight(weight[drawn]) if weight.ndim > 1 else weight * (n_rows / drawn.numel())
        del self._dist_params
        keys = [key for key, value in dist_params.items(True, True) if value.requires_grad]
        outputs = [dist_params.get(key) for key in keys]
        dist_k = self._distribution(dist_params.detach())

        def mean_kl(tensors: list[Tensor]) -> Tensor:
            moved = dist_params.clone(False)
            for key, tensor in zip(keys, tensors, strict=True):
                moved.set(key, tensor)
            return (weight * kl_divergence(dist_k, self._distribution(moved)).unsqueeze(-1)).sum()

        metric = output_hessian_product(mean_kl, outputs)
        return fisher_product(outputs, self._leaves, metric, len(self.indices))

    @torch.no_grad()
    def evaluate(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The improvement ``L(θ) − L(θ_k)`` and the mean KL from ``π_k`` in nats, each ``[n]``.

        Args:
            parameters: the candidate ``θ``, ``[n, P]``.
        """
        leaves = unflatten(parameters, self._leaves)
        dist = self._distribution(self._distribution_parameters(self._rows.inputs, leaves))
        improvement = self._region_mean(self._surrogate_rows(dist) - self._gain_k)
        return improvement, self._region_mean(kl_divergence(self._dist_k, dist).unsqueeze(-1))

    @torch.no_grad()
    def write(self, parameters: Tensor, accepted: Tensor) -> None:
        """Writes the accepted regions' parameters; those of the others stay untouched to the bit.

        Args:
            parameters: the new ``θ``, ``[n, P]``.
            accepted: which regions are written, bool ``[n]``.
        """
        for live, new in zip(self._live, unflatten(parameters, self._leaves), strict=True):
            taken = accepted.reshape(()) if self._agent_slice is None else accepted.reshape(-1, *[1] * (live.ndim - 1))
            live.copy_(torch.where(taken, new, live))

    @torch.no_grad()
    def ratio(self) -> Tensor:
        """``π_new(u|o) / π_k(u|o)`` at the parameters as they are now, ``[N, *A, 1]``; 1 where a row is masked."""
        dist = self._distribution(self._distribution_parameters(self._rows.inputs, self._live))
        return torch.where(self._rows.weight > 0, self._log_ratio(dist).exp(), 1.0)

    def _distribution_parameters(self, inputs: TensorDict, leaves: Sequence[Tensor]) -> TensorDict:
        parameters = self._stateless.clone(False)
        for keys, leaf in zip(self._keys, leaves, strict=True):
            for key in keys:
                parameters.set(key, leaf)
        with parameters.to_module(self._network, preserve_module_state=False):
            outputs = self._network.get_dist_params(inputs.copy())
        return outputs.select(*distribution_keys(self._network))

    def _distribution(self, dist_params: TensorDict) -> D.Distribution:
        return self._network.build_dist_from_params(dist_params)

    def _log_ratio(self, dist: D.Distribution) -> Tensor:
        log_ratio = dist.log_prob(self._rows.action).unsqueeze(-1) - self._rows.log_prob
        if self._max_importance_ratio is not None:
            # As PPOLoss does: the value is capped, the gradient keeps flowing.
            log_ratio = log_ratio + (self._max_importance_ratio.log() - log_ratio.detach()).clamp_max(0)
        return log_ratio

    def _surrogate_rows(self, dist: D.Distribution) -> Tensor:
        gain = self._rows.factor * self._log_ratio(dist).exp() * self._rows.advantage  # [N, *A, 1]
        if self._entropy_coeff is None:
            return gain
        return gain + self._entropy_coeff * entropy(dist).unsqueeze(-1)

    def _region_mean(self, values: Tensor) -> Tensor:
        weighted = self._rows.weight * values
        if self._agent_slice is None:
            return weighted.sum().reshape(1)
        return weighted.sum(dim=[0, *range(2, weighted.ndim)])  # [N, n, 1] -> [n]

    def _region_weight(self, weight: Tensor) -> Tensor:
        dims = list(range(weight.ndim)) if self._agent_slice is None else [0, *range(2, weight.ndim)]
        total = weight.sum(dims, keepdim=True)
        return weight / torch.where(total > 0, total, 1.0)
