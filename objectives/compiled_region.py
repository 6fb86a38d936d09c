"""The trust-region subproblem of a policy on a CPU, with its gradient, products and evaluations compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor

from torchrl_trpo.errors import warn
from torchrl_trpo.kernels.batch_function import BatchFunction, Blocks, check_results
from torchrl_trpo.kernels.buffers import REFUSALS, NotCompiled, reason_of
from torchrl_trpo.kernels.settings import constants_of, settings_of
from torchrl_trpo.objectives.policy_network import distribution_keys, distribution_settings, single_agent_network
from torchrl_trpo.objectives.policy_region import PolicyTrustRegion
from torchrl_trpo.objectives.policy_rows import PolicyRows

_OWN = ("action", "log_prob", "advantage", "weight", "factor")  # entries of the rows, besides the inputs
_N_COMPARED = 64  # rows on which compiled functions are compared with what they stand for
_N_ACTED, _ALIKE = 16, 1e-4  # rows on which the policy must act as it did; by this share of the largest number
_MOST = 16  # functions of a loss, which has more than one if agents have different bounds


class CompiledRegion(PolicyTrustRegion):
    """A :class:`PolicyTrustRegion` whose rows are read by compiled functions.

    Args:
        *arguments: those of :class:`PolicyTrustRegion`.

    Keyword Args:
        **settings: keywords of :class:`PolicyTrustRegion`.
    """

    _functions: RegionFunctions
    _at_start: Blocks  # each row's distribution and term of the surrogate at θ_k

    def use(self, functions: RegionFunctions) -> None:
        """Gives it its functions."""
        self._functions = functions
        self._shared = functions.shared_of(self, self._rows)
        self._blocks = Blocks(functions.rows_of(self._rows))

    def fisher_product(self, subsample: float = 1.0) -> Callable[[Tensor], Tensor]:
        """As of the base class."""
        shared, blocks = self._shared, self._blocks
        if subsample < 1:
            rows = self._sample(subsample)
            shared, blocks = self._functions.shared_of(self, rows), Blocks(self._functions.rows_of(rows))
        return lambda vectors: self._ranks.sum_(*self._functions.product([*shared, vectors], blocks))

    def gradient(self) -> Tensor:
        """As of the base class."""
        results = self._functions.gradient(self._shared, self._blocks)
        gradient, self._ratio_moments, self._log_ratio_max, *at_start = results
        self._at_start = Blocks(at_start)
        return self._ranks.sum_(gradient)

    def evaluate(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """As of the base class, after the gradient."""
        shared = [*self._shared, parameters]
        change, self._pieces[0].ratio = self._functions.evaluation(shared, self._blocks, self._at_start)
        self._evaluated = parameters
        improvement, kl = self._ranks.sum_(change)
        return improvement, kl

    def _split(self, rows: PolicyRows) -> list[PolicyRows]:
        return [rows]


class RegionFunctions:
    """The compiled functions of trust regions that differ in their numbers alone.

    Args:
        region: one of them.
        make: makes another one, of parameters, rows, the entropy's weight and the cap on the ratio.
        constants: the tensors that they may read besides.

    Raises:
        NotCompiled: if they cannot be compiled, or give other results than the region.
    """

    def __init__(
        self, region: PolicyTrustRegion, make: Callable[..., PolicyTrustRegion], constants: Sequence[Tensor]
    ) -> None:
        self._make = make
        self._keys, self._parameters = region._keys, region._stateless
        self._other_keys = [
            key for key in region._stateless.keys(True, True) if not any(key in names for names in self._keys)
        ]
        self._dist_keys = distribution_keys(region._network)
        rows = region._rows.take(torch.arange(min(_N_COMPARED, len(region._rows))))  # a copy: the batch is not kept
        self._numbers = [name for name in ("weight", "factor") if getattr(rows, name).ndim == 1]
        self._entries = [key for key in _entries(rows).keys(True, True) if key not in self._numbers]
        self._has_entropy, self._has_cap = (
            value is not None for value in (region._entropy_coeff, region._max_importance_ratio)
        )
        self._batch_dims = rows.inputs.batch_dims
        self._template = rows
        shared, of_rows = self.shared_of(region, rows), self.rows_of(rows)
        plain = self._region(shared, of_rows)
        theta = plain.parameters
        direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        at_start = self._gradient(shared, of_rows)[3:]
        calls: list[tuple[Callable[..., list[Tensor]], list[Tensor], list[list[Tensor]]]] = [
            (self._product, [*shared, direction], [of_rows]),
            (self._gradient, shared, [of_rows]),
            (self._evaluation, [*shared, theta + direction], [of_rows, at_start]),
        ]
        functions = [BatchFunction(each, given, [*itertools.chain(*rows)], constants) for each, given, rows in calls]
        self.product, self.gradient, self.evaluation = functions
        for compiled, (function, given, each) in zip(functions, calls, strict=True):
            check_results(compiled(given, *map(Blocks, each)), function, given, [*itertools.chain(*each)])

    def rows_of(self, rows: PolicyRows) -> list[Tensor]:
        """The tensors with rows."""
        entries = _entries(rows)
        return [entries.get(key) for key in self._entries]

    def shared_of(self, region: PolicyTrustRegion, rows: PolicyRows) -> list[Tensor]:
        """The tensors that all rows share."""
        entries = _entries(rows)
        settings = (region._entropy_coeff, region._max_importance_ratio)
        return [
            *region._live,
            *(region._stateless.get(key) for key in self._other_keys),
            *(entries.get(key) for key in self._numbers),
            *(value for value in settings if value is not None),
        ]

    @torch.no_grad()
    def stand_for(self, region: PolicyTrustRegion) -> bool:
        """Whether the policy acts as it did: it may read what its settings do not tell, such as a global variable."""
        few = region._rows.take(torch.arange(min(_N_ACTED, len(region._rows))))
        at_start = self.gradient(self.shared_of(region, few), Blocks(self.rows_of(few)))[4:]
        acted = region._dist_params(few, region._leaves)
        pairs = zip(at_start, (acted.get(key) for key in self._dist_keys), strict=True)
        return not any(
            bool(((new - old).abs() > _ALIKE * new.abs().max()).any()) for old, new in pairs
        )  # or NaN in both

    def _region(self, shared: Sequence[Tensor], of_rows: Sequence[Tensor]) -> PolicyTrustRegion:
        """A region of such tensors."""
        given = iter(shared)
        parameters = self._parameters.clone(False)
        for names in self._keys:
            leaf = next(given).detach().requires_grad_()
            for name in names:
                parameters.set(name, leaf)
        for key in self._other_keys:
            parameters.set(key, next(given).detach())
        entries = TensorDict({key: next(given) for key in self._numbers})
        coefficients = [next(given) if has_one else None for has_one in (self._has_entropy, self._has_cap)]
        for key, value in zip(self._entries, of_rows, strict=False):
            entries.set(key, value)
        own = {name: entries.get(name) for name in _OWN}
        inputs = entries.get("inputs", TensorDict())
        inputs.batch_size = own["log_prob"].shape[: self._batch_dims]
        rows = replace(self._template, inputs=inputs, **own)
        return self._make(parameters, rows, *coefficients)

    def _product(self, shared: list[Tensor], of_rows: list[Tensor]) -> list[Tensor]:
        *shared, vectors = shared
        return [self._region(shared, of_rows).fisher_product()(vectors)]

    def _gradient(self, shared: list[Tensor], of_rows: list[Tensor]) -> list[Tensor]:
        region = self._region(shared, of_rows)
        gradient = region.gradient()
        (piece,) = region._pieces
        with torch.no_grad():
            dist_params = region._dist_params(region._rows, region._leaves)
        at_start = [dist_params.get(key) for key in self._dist_keys]
        return [gradient, region._ratio_moments, region._log_ratio_max, piece.gain, *at_start]

    def _evaluation(self, shared: list[Tensor], of_rows: list[Tensor]) -> list[Tensor]:
        *shared, parameters = shared
        region = self._region(shared, of_rows)
        (piece,) = region._pieces
        piece.gain, *dist_params = of_rows[len(self._entries) :]
        batch_size = region._rows.inputs.batch_size
        piece.dist = region._distribution(TensorDict(dict(zip(self._dist_keys, dist_params, strict=True)), batch_size))
        change = torch.stack(region.evaluate(parameters))
        assert piece.ratio is not None
        return [change, piece.ratio]


def _entries(rows: PolicyRows) -> TensorDict:
    return TensorDict({"inputs": rows.inputs.copy(), **{name: getattr(rows, name) for name in _OWN}})


class RegionCompiler:
    """Makes the trust regions of a policy, compiled where that is possible; a warning says once why it is not."""

    def __init__(self) -> None:
        self._settings: Any = None
        self._of_agents: dict[int, ProbabilisticTensorDictSequential] = {}
        self._at_first: dict[int, Any] = {}  # the settings of those that have made one forward pass at most
        self._functions: dict[Any, RegionFunctions | None] = {}
        self._n_compiled = 0
        self._warned = False

    def __reduce__(self) -> Any:  # a copy compiles for itself: functions of ctypes cannot be copied
        return RegionCompiler, ()

    def single_agent_network(
        self, network: ProbabilisticTensorDictSequential, agent: int, n_agents: int
    ) -> ProbabilisticTensorDictSequential:
        """As the function of this name, which is called once for each agent as long as the policy's settings stay."""
        self._forget_if_changed(network)
        # Has a forward pass changed its attributes?
        if agent in self._at_first and settings_of(self._of_agents[agent].named_modules()) != self._at_first.pop(agent):
            self._functions.clear()
            del self._of_agents[agent]
        if agent not in self._of_agents:
            self._of_agents[agent] = copy = single_agent_network(network, agent, n_agents)
            self._at_first[agent] = settings_of(copy.named_modules())
        return self._of_agents[agent]

    def region(
        self,
        network: ProbabilisticTensorDictSequential,
        parameters: TensorDictBase,
        rows: PolicyRows,
        **settings: Any,
    ) -> PolicyTrustRegion:
        """The region of these arguments, which are those of :class:`PolicyTrustRegion`."""
        if network not in self._of_agents.values():
            self._forget_if_changed(network)
        region = CompiledRegion(network, parameters, rows, **settings)
        key = (distribution_settings(network), *_shapes(region))
        functions = self._functions.get(key)
        if key not in self._functions or (functions is not None and not functions.stand_for(region)):
            functions = self._functions[key] = self._compile(region, settings)
        if functions is None:
            return PolicyTrustRegion(network, parameters, rows, **settings)
        region.use(functions)
        return region

    def _forget_if_changed(self, network: ProbabilisticTensorDictSequential) -> None:
        settings = settings_of(network.named_modules())
        if settings != self._settings:
            self._settings = settings
            self._of_agents.clear()
            self._at_first.clear()
            self._functions.clear()

    def _compile(self, region: PolicyTrustRegion, settings: dict[str, Any]) -> RegionFunctions | None:
        network, indices = region._network, settings["indices"]
        agents = None if settings["agent_slice"] is None else slice(None)  # parameters of the agents alone are given

        def make(parameters: TensorDictBase, rows: PolicyRows, entropy: Any, cap: Any) -> PolicyTrustRegion:
            own = {"indices": indices, "agent_slice": agents, "entropy_coeff": entropy, "max_importance_ratio": cap}
            return PolicyTrustRegion(network, parameters, rows, **own)

        self._n_compiled += 1
        try:
            if settings["chunk_size"] is not None:
                raise NotCompiled("chunk_size is given")
            if region._rows.row_dims > 1:
                raise NotCompiled("the policy is recurrent")
            if region._leaves[0].device.type != "cpu":
                raise NotCompiled(f"it is on {region._leaves[0].device}")
            if self._n_compiled > _MOST:
                raise NotCompiled("the policy's settings, or the shapes of the data, change again and again")
            return RegionFunctions(region, make, constants_of(network.named_modules()))
        except REFUSALS as error:
            if not self._warned:
                self._warned = True
                warn(f"The policy's update is not compiled: {reason_of(error)}.")
            return None


def _shapes(region: PolicyTrustRegion) -> list[Any]:
    """What the functions of a region depend on, besides its network."""
    entries = _entries(region._rows).items(True, True)
    of_rows = [(key, value.shape[1:], value.ndim, value.dtype) for key, value in entries]
    parameters = [(key, value.shape, value.dtype) for key, value in region._stateless.items(True, True)]
    coefficients = [value is None for value in (region._entropy_coeff, region._max_importance_ratio)]
    return [tuple(of_rows), tuple(parameters), str(region._keys), len(region.indices), *coefficients]
