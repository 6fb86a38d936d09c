"""The trust-region policy update: gradient, conjugate gradient, step length, line search, one write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_trpo.arguments import RangedSettings
from torchrl_trpo.errors import warn
from torchrl_trpo.numerics.conjugate_gradient import conjugate_gradient
from torchrl_trpo.numerics.line_search import backtrack


class TrustRegionProblem(Protocol):
    """One or several independent trust-region subproblems at the current parameters ``θ_k``.

    ``n`` regions of ``P`` parameters each; improvements and divergences are measured from ``θ_k``.
    """

    @property
    def indices(self) -> Sequence[int]:
        """The regions' rows in the statistics, ``n`` numbers."""

    @property
    def parameters(self) -> Tensor:
        """The current parameters ``θ_k``, ``[n, P]``."""

    def gradient(self) -> Tensor:
        """The gradient of the surrogate at ``θ_k``, ``[n, P]``."""

    def fisher_product(self, subsample: float) -> Callable[[Tensor], Tensor]:
        """The product with ``F``, from ``[n, P]`` to ``[n, P]``, on a share ``subsample`` of the rows."""

    def evaluate(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """``L(θ) − L(θ_k)`` and the mean ``KL(π_k ‖ π_θ)`` in nats, each ``[n]``, at ``parameters`` ``[n, P]``."""

    def write(self, parameters: Tensor, accepted: Tensor) -> Tensor:
        """Writes ``parameters`` ``[n, P]`` where ``accepted`` ``[n]``, no others; returns what is live then."""

    def snapshot(self) -> Callable[[], None]:
        """A function that restores ``θ_k``, to the bit, whatever was written since."""

    def diagnostics(self) -> Mapping[str, Tensor]:
        """Further statistics, each ``[n]``, once the gradient is known; see :meth:`TrustRegionUpdater.step`.

        With them may be ``mismatch``, the share of the rows whose log-probability in the data is not the policy's; the
        updater warns of it, and does not return it.
        """


class TrustRegionObjective(Protocol):
    """What :class:`TrustRegionUpdater` drives: ``TRPOLoss``, ``HATRPOSequentialObjective``, or your own."""

    def trust_regions(self, tensordict: TensorDictBase) -> Iterable[TrustRegionProblem]:
        """The subproblems of one update, each solved and written before the next is asked for.

        If they depend on each other, the objective may have a method ``first_regions`` too, which gives all of them
        before any step is taken. ``kl_budget="team"`` shares the budget out by them. One with an ``agent_order`` that
        is ``"greedy"`` takes the argument ``gains``. It calls it before each subproblem with those that are left, as
        they are then, one region each, and yields that for which the returned ``[n_left]`` is largest.
        """


class TrustRegionUpdater(RangedSettings):
    r"""Takes trust-region steps on the policy of an objective.

    For each region, with the surrogate :math:`L`, its gradient :math:`g` and the Fisher matrix :math:`F` at the current
    parameters :math:`\theta_k` (Schulman et al. 2015, arXiv:1502.05477, section 6 and appendix C):

    .. math::
        x \approx (F + \lambda I)^{-1} g, \qquad
        \beta = \sqrt{2\delta / x^\top (F + \lambda I) x}, \qquad
        \theta_{k+1} = \theta_k + \alpha^j \beta x

    with the smallest :math:`j \le L_{max}` for which the surrogate improves by at least
    :math:`\kappa\, \alpha^j \beta\, g^\top x` and the mean KL divergence from :math:`\pi_k` stays within
    :math:`\delta`. If there is none, or anything is not finite, :math:`\theta_k` is kept to the last bit.
    :math:`x^\top (F + \lambda I) x` comes from the residual of the conjugate gradient, without another product.

    The divergence of a joint policy is the sum of its agents'. With ``kl_budget="team"`` the trust region is that of
    the joint policy: of radius :math:`n\delta` for :math:`n` regions, in place of one of :math:`\delta` for each. In
    the quadratic model a step of divergence :math:`\delta_i` improves region :math:`i` by
    :math:`\sqrt{2 \delta_i s_i}`, where :math:`s_i = g_i^\top (F_i + \lambda I)^{-1} g_i`. The sum is largest for
    :math:`\delta_i \propto s_i`, which is one step length :math:`\beta` for all regions (after HATRPO-W of Shek, Shi
    and Tokekar 2025, arXiv:2508.10340). In a sequential update :math:`s_i` is taken with :math:`M = 1`, before the
    first step; the steps themselves follow the gradients with :math:`M`.

    With the objective's ``agent_order="greedy"`` the region of the largest :math:`s_i` comes next, where :math:`s_i` of
    those that are left is taken anew, with :math:`M`. With ``kl_budget="team"`` too, its radius is its share
    :math:`s_i / \sum_j s_j` among them of what those before it have left of :math:`n\delta` (after HATRPO-G of the same
    paper).

    Settings are plain attributes: change them between steps for a schedule (``updater.max_kl = 0.005``).

    Args:
        objective: a ``TRPOLoss`` or ``HATRPOSequentialObjective``, or anything with their ``trust_regions`` method.

    Keyword Args:
        max_kl: the radius :math:`\delta`, the mean KL of an agent's joint action, in nats. Default: 0.01.
        damping: :math:`\lambda`, added to the diagonal of :math:`F`. Default: 0.1.
        cg_iters: the number of conjugate-gradient steps. Default: 10.
        cg_tol: the relative residual at which a solution is good enough and no longer changes. Default: 1e-6.
        backtrack_coeff: :math:`\alpha`, the factor between tries of the line search. Default: 0.8.
        max_backtracks: :math:`L_{max}`, the number of tries after the first. Default: 10.
        accept_ratio: :math:`\kappa`, the share of the predicted improvement that must be reached. Default: 0.5.
        fisher_subsample: the share of the rows, drawn anew for each region, that :math:`F` is estimated on. Gradient,
            surrogate and KL checks always use all rows. Default: 1.0.
        kl_budget: ``"agent"``, a radius of ``max_kl`` for each region, or ``"team"``, ``n · max_kl`` shared out among
            the ``n`` regions, at the cost of another conjugate gradient for each, which a greedy order makes anyway.
            Default: ``"agent"``.

    Raises:
        TypeError: if the objective has no ``trust_regions``, or a setting is not a number.
        ValueError: if a setting is outside its range.
    """

    RANGES: ClassVar[Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
        "max_kl": ("a positive number", lambda v: 0 < v < math.inf),
        "damping": ("a number of at least 0", lambda v: 0 <= v < math.inf),
        "cg_iters": ("a whole number of at least 1", lambda v: isinstance(v, int) and v >= 1),
        "cg_tol": ("a number of at least 0", lambda v: 0 <= v < math.inf),
        "backtrack_coeff": ("a number between 0 and 1, both excluded", lambda v: 0 < v < 1),
        "max_backtracks": ("a whole number of at least 0", lambda v: isinstance(v, int) and v >= 0),
        "accept_ratio": ("a number of at least 0 and below 1", lambda v: 0 <= v < 1),
        "fisher_subsample": ("a number above 0 and at most 1", lambda v: 0 < v <= 1),
    }
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {"kl_budget": ("agent", "team")}

    def __init__(
        self,
        objective: TrustRegionObjective,
        *,
        max_kl: float = 0.01,
        damping: float = 0.1,
        cg_iters: int = 10,
        cg_tol: float = 1e-6,
        backtrack_coeff: float = 0.8,
        max_backtracks: int = 10,
        accept_ratio: float = 0.5,
        fisher_subsample: float = 1.0,
        kl_budget: Literal["agent", "team"] = "agent",
    ) -> None:
        if not callable(getattr(objective, "trust_regions", None)):
            raise TypeError(
                f"objective must have a method trust_regions(tensordict), as TRPOLoss and HATRPOSequentialObjective "
                f"have; got {type(objective).__name__}."
            )
        self.objective = objective
        self._warned: set[str] = set()
        self._left: dict[tuple[int, ...], Tensor] = {}  # by the regions' indices, the parameters after their last step
        self.max_kl = max_kl
        self.damping = damping
        self.cg_iters = cg_iters
        self.cg_tol = cg_tol
        self.backtrack_coeff = backtrack_coeff
        self.max_backtracks = max_backtracks
        self.accept_ratio = accept_ratio
        self.fisher_subsample = fisher_subsample
        self.kl_budget: str = kl_budget

    def step(self, tensordict: TensorDictBase) -> TensorDict:
        """Updates the policy once on a batch; the batch is not modified.

        If anything raises, all parameters are as before the step, to the bit.

        Args:
            tensordict: the collected data, ``[*B, T]``, with advantages or what the objective needs to compute them.

        Returns:
            Statistics with batch size ``[n_regions]``, all detached. In a sequential update one row per agent in agent
            index order; in others one row per region.

            - ``accepted`` (bool): whether the step was taken.
            - ``kl`` (nats) and ``improvement`` of the surrogate, of the parameters kept: 0 when rejected.
            - ``expected_improvement``: what the linear model predicts for the full step.
            - ``max_kl`` (nats): the radius.
            - ``step_fraction``: the ``α^j`` taken, 0 when rejected.
            - ``grad_norm``: the Euclidean norm of the surrogate's gradient.
            - ``cg_residual``: ``‖g − (F + λI)x‖ / ‖g‖``.
            - ``factor_std``: only in a sequential update, the standard deviation over the rows that count of the factor
              ``M``, the product of the ratios of the regions before this one; 0 for the first.
            - ``order``: ``order[m]`` is the region that was solved m-th.
            - ``log_ratio_max``: the largest ``|log π_k(u|o) − log π_data(u|o)|`` over the rows that count, between the
              policy at ``θ_k`` and the log-probability in the data. It is rounding if ``π_k`` has collected the data.
              If most rows differ by more, a warning says so once.
            - ``ESS``: the effective sample size of the ratios ``π_k(u|o) / π_data(u|o)``, as a share of those rows.

        Raises:
            RuntimeError: within ``torch.inference_mode``, where nothing can be differentiated.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "step was called in torch.inference_mode, which forbids gradients. Legal: torch.no_grad."
            )
        indices: list[int] = []
        solved: list[TensorDict] = []
        snapshots: list[Callable[[], None]] = []
        try:
            agent_order = getattr(self.objective, "agent_order", None)
            greedy = isinstance(agent_order, str) and agent_order == "greedy"
            regions = self._greedy_regions(tensordict, solved) if greedy else self._regions(tensordict)
            for problem, natural, max_kl in regions:
                snapshots.append(problem.snapshot())
                solved.append(self._solve(problem, natural, max_kl))
                indices.extend(problem.indices)
                del problem, natural  # the next one needs the memory
            stats: TensorDict = TensorDict.cat(solved)
            order = torch.tensor(indices).to(stats["kl"].device, non_blocking=True)
            self._warn(stats, order)
            return stats[order.argsort()].set("order", order)
        except BaseException:
            self._left.clear()
            for restore in reversed(snapshots):
                restore()
            raise

    def _warn(self, stats: TensorDict, order: Tensor) -> None:
        """Warns once of each: a gradient that is not finite, another policy's data, a policy that something else moves.

        A few log-probabilities may differ by any amount: those of squashed actions at their bounds are all rounding.
        """
        wrong, moved = ~stats["grad_norm"].isfinite() & ~stats["accepted"], stats.pop("moved").any()
        infinite, mismatch = wrong.any(), stats.pop("mismatch", torch.zeros_like(stats["kl"])).max()
        if moved.is_meta or self._warned == {"gradient", "data", "policy"}:
            return
        found = torch.stack([infinite, (mismatch > 0.5) & ~infinite, moved]).tolist()  # waits for the device
        causes = {name for name, is_found in zip(("gradient", "data", "policy"), found, strict=True) if is_found}
        new = causes - self._warned
        self._warned |= new
        if "gradient" in new:
            regions = ", ".join(map(str, order[wrong].tolist()))
            warn(
                f"The gradient of region {regions} is not finite, so that it kept its policy. Likely: a NaN or an "
                "infinity among the advantages, observations, actions or log-probabilities of the data. Each step says "
                "so in accepted and grad_norm.",
            )
        if "data" in new:
            warn(
                "The data was not collected by the policy that is updated: its log-probabilities differ by up to "
                f"{float(stats['log_ratio_max'].max()):.3g} from the policy's (effective sample size "
                f"{float(stats['ESS'].min()):.2f}). The trust region is around the policy, not around what the data is "
                "from. Likely causes: a collector with a copy of the policy that is not updated "
                "(update_policy_weights_), a batch that was used before, rows of a recurrent policy out of order, a "
                "part of a composite log-probability left out, dropout or batch norm in the policy, most actions at "
                "their bounds. Each step says more in log_ratio_max and ESS.",
            )
        if "policy" in new:
            warn(
                "The policy is not what the last step left: something else has changed its parameters, without a trust "
                "region. Likely causes: an optimiser of loss_objective or loss_entropy, which belong to this step "
                "alone; a critic that shares layers with the policy; parameters that were loaded since.",
            )

    def _regions(self, tensordict: TensorDictBase) -> Iterator[_Region]:
        """Yields the subproblems in the objective's order, each with its natural gradient and its radius."""
        radii = self._team_radii(tensordict) if self.kl_budget == "team" else None
        for problem in self.objective.trust_regions(tensordict):
            natural = self._natural_gradient(problem)
            max_kl = torch.full_like(natural.xFx, self.max_kl)
            if radii is not None:  # a list of indices would have to be copied to the device
                max_kl = torch.stack([radii[i] for i in problem.indices])
            yield problem, natural, max_kl
            del problem, natural

    def _team_radii(self, tensordict: TensorDictBase) -> dict[int, Tensor]:
        """The radii ``δ_i`` by the regions' indices, which sum up to ``n · max_kl``."""
        problems = getattr(self.objective, "first_regions", self.objective.trust_regions)(tensordict)
        found = [(problem.indices, self._natural_gradient(problem).size) for problem in problems]
        radii = self.max_kl * _shares([size for _, size in found])
        return dict(zip(itertools.chain(*(indices for indices, _ in found)), radii, strict=True))

    def _greedy_regions(self, tensordict: TensorDictBase, solved: Sequence[TensorDict]) -> Iterator[_Region]:
        """Yields the same in the order of what they gain for the same divergence; ``solved`` has those before."""
        found: dict[int, _NaturalGradient] = {}
        shares = torch.empty(0)

        def gains(problems: Iterable[TrustRegionProblem]) -> Tensor:
            nonlocal found, shares
            found = {problem.indices[0]: self._natural_gradient(problem) for problem in problems}
            shares = _shares([natural.size for natural in found.values()])
            return shares

        objective: Any = self.objective
        for problem in objective.trust_regions(tensordict, gains=gains):
            (index,) = problem.indices
            max_kl = torch.full_like(shares[:1], self.max_kl)
            if self.kl_budget == "team":
                spent = sum((stats["kl"] for stats in solved), torch.zeros_like(max_kl))
                budget = (len(solved) + len(found)) * max_kl - spent
                max_kl = budget.clamp(min=0) / len(found) * shares[list(found).index(index)]
            problem.gradient()  # once more: this is another object than that which told its gain
            yield problem, found[index], max_kl
            del problem

    def _solve(self, problem: TrustRegionProblem, natural: _NaturalGradient, max_kl: Tensor) -> TensorDict:
        gradient, x, xFx, relative_residual = natural
        step_length = torch.where(xFx > 0, (2 * max_kl / xFx).sqrt(), 0.0)  # to the border in the quadratic model
        full_step = step_length.unsqueeze(-1) * x
        expected = (gradient * full_step).sum(-1)
        theta = problem.parameters
        search = backtrack(
            lambda fraction: problem.evaluate(theta + fraction.unsqueeze(-1) * full_step),
            expected,
            max_kl=max_kl,
            backtrack_coeff=self.backtrack_coeff,
            max_backtracks=self.max_backtracks,
            accept_ratio=self.accept_ratio,
        )
        found = theta + search.fraction.unsqueeze(-1) * full_step
        written = problem.write(found, search.accepted)
        region = tuple(problem.indices)
        left = self._left.get(region, theta)
        if (left.shape, left.dtype, left.device) != (theta.shape, theta.dtype, theta.device):
            left = theta  # another policy, or one that has been moved
        self._left[region] = written
        stats = {
            "moved": (theta != left).any(-1),
            "accepted": search.accepted,
            "kl": search.kl,
            "improvement": search.improvement,
            "expected_improvement": expected,
            "max_kl": max_kl,
            "step_fraction": search.fraction,
            "grad_norm": gradient.norm(dim=-1),
            "cg_residual": relative_residual,
        }
        return TensorDict({**stats, **problem.diagnostics()}, batch_size=search.accepted.shape)

    def _natural_gradient(self, problem: TrustRegionProblem) -> _NaturalGradient:
        fisher = problem.fisher_product(self.fisher_subsample)  # first: the gradient then uses its forward pass
        gradient = problem.gradient()  # [n, P]
        scale = gradient.abs().amax(-1, keepdim=True)
        g = gradient / torch.where(scale > 0, scale, 1.0)
        x, residual, relative_residual, _ = conjugate_gradient(
            lambda v: fisher(v) + self.damping * v, g, iterations=self.cg_iters, tol=self.cg_tol
        )
        return _NaturalGradient(gradient, x, (x * (g - residual)).sum(-1), relative_residual)


class _NaturalGradient(NamedTuple):
    """Of ``n`` regions; all but ``gradient`` are of ``g / max|g|``, whose square is in range: the step is the same."""

    gradient: Tensor
    """``g``, ``[n, P]``."""
    x: Tensor
    """``(F + λI)⁻¹g``, ``[n, P]``."""
    xFx: Tensor
    """``xᵀ(F + λI)x``, ``[n]``."""
    relative_residual: Tensor
    """``[n]``."""

    @property
    def size(self) -> tuple[Tensor, Tensor]:
        """``xᵀ(F + λI)x`` and ``max|g|``, each ``[n]``."""
        return self.xFx, self.gradient.abs().amax(-1)


_Region = tuple[TrustRegionProblem, _NaturalGradient, Tensor]


def _shares(sizes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """What each region has of the sum of ``gᵀ(F + λI)⁻¹g``, times their number, ``[n]``; ones if the sum is 0."""
    xFx, scale = (torch.cat(each) for each in zip(*sizes, strict=True))
    usable = scale.isfinite() & xFx.isfinite() & (xFx > 0)  # with others no step is accepted
    scale = torch.where(usable, scale, 0.0)
    gains = torch.where(usable, xFx * (scale / scale.max()).square(), 0.0)
    return torch.where(gains.sum() > 0, len(gains) * gains / gains.sum(), 1.0)
