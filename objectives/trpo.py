"""The TRPO objective: PPO's unclipped surrogate with an exact KL, solved by a trust-region step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor
from torchrl.modules import ValueNorm

from torchrl_trpo.arguments import positive_whole
from torchrl_trpo.distributions.divergence import kl_if_exact
from torchrl_trpo.numerics.statistics import HostScalar
from torchrl_trpo.objectives.agent_checks import check_shared_agents, check_stacked_agents
from torchrl_trpo.objectives.attention import differentiable_attention
from torchrl_trpo.objectives.compiled_region import RegionCompiler
from torchrl_trpo.objectives.policy_network import (
    distribution_keys,
    distribution_module,
    resolve_trust_region,
    single_agent_network,
)
from torchrl_trpo.objectives.policy_region import PolicyTrustRegion
from torchrl_trpo.objectives.policy_rows import PolicyRows
from torchrl_trpo.objectives.policy_update import collected_distribution, current_distribution, read_rows, trained_keys
from torchrl_trpo.objectives.surrogate import SurrogateLoss
from torchrl_trpo.parallel.ranks import ALONE, Ranks


class TRPOLoss(SurrogateLoss):
    r"""Trust-region policy optimisation, for one agent or several (Schulman et al. 2015, arXiv:1502.05477).

    The surrogate that :class:`~torchrl_trpo.TrustRegionUpdater` maximises, at samples :math:`(o, u)` of :math:`\pi_k`,
    within a mean KL divergence :math:`\delta` (equation 14 of the paper):

    .. math::
        L(\theta) = \mathbb{E}\Big[ \frac{\pi_\theta(u|o)}{\pi_k(u|o)} \hat A \Big] + c_H\, \mathbb{E}[H(\pi_\theta)],
        \qquad \overline{KL}(\pi_k \,\|\, \pi_\theta) \le \delta

    It is a :class:`~torchrl.objectives.PPOLoss`: keys, value estimation, critic loss, reductions and masks are those of
    TorchRL. The critic is trained with :meth:`loss_critic` and any optimiser; the policy only through the updater.
    The default value estimator is :class:`AgentGAE`, a ``MultiAgentGAE``, with TorchRL's ``gamma=0.99`` and
    ``lmbda=0.95``; ``loss.make_value_estimator(gamma=..., lmbda=...)`` sets others.

    Args:
        actor_network: the policy, a ``ProbabilisticTensorDictSequential`` (such as ``ProbabilisticActor``).
        critic_network: the value network; without one, the data must bring the advantage.

    Keyword Args:
        trust_region: ``"shared"``: one region for all parameters; surrogate and KL are means over samples and agents.
            ``"per_agent"``: the parameters are stacked on a leading agent dimension, as
            ``MultiAgentMLP(share_params=False)`` keeps them; each agent is a region of its own, with its own KL, step
            length and accept decision, all solved in one batched pass. Default: inferred from the actor.
        agent_dim: the agent dimension of the advantage ``[*B, T, n_agents, 1]``: the one after the batch dimensions.
        entropy_coeff: the weight :math:`c_H` of the entropy. Default: 0.
        value_norm: a :class:`~torchrl.modules.ValueNorm` that the critic's targets are normalised with. If the value
            estimator has the same one, the critic outputs normalised values; otherwise raw values, as in ``MAPPOLoss``.
            Its statistics move when the critic's loss is computed with gradients, by :meth:`forward` or
            :meth:`loss_critic`; never by a policy update.
        chunk_size: how many environment steps the policy update evaluates at a time, with the same result to rounding.
            Its memory then depends on this number and no longer on the size of the batch, beyond the batch itself; but
            a product with the Fisher matrix costs a forward pass more. Default: all, fastest.
        compiled: whether gradient, Fisher products and evaluations of the policy update are compiled with the
            machine's C++ compiler. That is for a CPU and single precision; the results are equal up to rounding. What
            cannot be compiled is computed as without it, and a warning says why. Default: False.
        process_group: the processes of ``torch.distributed`` that update together (``torch.distributed.group.WORLD``),
            each with rows of its own; they begin with the first one's parameters and stay the same to the bit. The
            policy update, the advantage's and the values' statistics are then of all rows, as if one process had them;
            the numbers of :meth:`forward` are of this process's rows. Each call is made by all of them. Default: this
            process alone.
        **kwargs: keywords of :class:`~torchrl.objectives.PPOLoss`.

    Output keys of :meth:`forward`:

    - ``loss_objective`` (gradient): :math:`-\mathbb{E}[ratio \cdot \hat A]`; ``loss_entropy`` (gradient);
      ``loss_critic`` (gradient, with a critic).
    - ``kl`` (log only): the exact mean KL in nats from the policy that collected the data, whose distribution
      parameters are read from the data; NaN when the data has none, or the distribution no closed form.
    - ``ESS`` (log only): the effective sample size of the ratios, as a share of the rows.
    - ``kl_approx``, ``entropy``, ``explained_variance``, ... (log only): as in ``PPOLoss``.

    Raises:
        TypeError: if a keyword is not known.
        ValueError: if ``trust_region`` is unknown; or if regions are per agent, inferred or asked for, and a parameter
            is not stacked. In the first update also if agents' actions depend on each other's slices, or no parameter
            is shared in a region that was inferred to be one for all.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs.utils import ExplorationType, set_exploration_type
        >>> from torchrl.modules import IndependentNormal, MultiAgentMLP, NormalParamExtractor, ProbabilisticActor
        >>> from torchrl_trpo import TrustRegionUpdater
        >>> from torchrl_trpo.objectives import TRPOLoss
        >>> net = MultiAgentMLP(3, 4, n_agents=2, centralized=False, share_params=False, num_cells=8, depth=1)
        >>> net = torch.nn.Sequential(net, NormalParamExtractor())
        >>> loc_scale = [("agents", "loc"), ("agents", "scale")]
        >>> actor = ProbabilisticActor(
        ...     Mod(net, in_keys=[("agents", "observation")], out_keys=loc_scale),
        ...     in_keys=loc_scale, out_keys=[("agents", "action")],
        ...     distribution_class=IndependentNormal, return_log_prob=True,
        ... )
        >>> data = TensorDict({"agents": TensorDict({"observation": torch.randn(5, 7, 2, 3)}, [5, 7, 2])}, [5, 7])
        >>> with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        ...     data = actor(data)
        >>> data["advantage"] = torch.randn(5, 7, 2, 1)
        >>> loss = TRPOLoss(actor)
        >>> loss.trust_region
        'per_agent'
        >>> stats = TrustRegionUpdater(loss, max_kl=0.01).step(data)
        >>> bool((stats["kl"] <= 0.01).all()), stats.batch_size
        (True, torch.Size([2]))
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential | None = None,
        critic_network: TensorDictModule | None = None,
        *,
        trust_region: Literal["shared", "per_agent"] | None = None,
        agent_dim: int = -2,
        entropy_coeff: float | Mapping[NestedKey, float] = 0.0,
        value_norm: ValueNorm | None = None,
        chunk_size: int | None = None,
        compiled: bool = False,
        process_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            actor_network,
            critic_network,
            entropy_coeff=entropy_coeff,
            value_norm=value_norm,
            process_group=process_group,
            **kwargs,
        )
        distribution_module(self.actor_network)  # there must be one
        self.agent_dim = agent_dim
        self.chunk_size = None if chunk_size is None else positive_whole("chunk_size", chunk_size)
        self.trust_region, self.n_regions = resolve_trust_region(
            trust_region, self.actor_network, self.actor_parameters
        )
        self._region_is_inferred = trust_region is None
        self._checked_keys: list[NestedKey] | None = None  # what was trained when the agents were checked
        self._entropy_is_by_head = isinstance(entropy_coeff, Mapping)
        self._entropy_coeff_on_host = HostScalar()
        self._compiler = RegionCompiler() if compiled else None

    def trust_regions(self, tensordict: TensorDictBase) -> Iterator[PolicyTrustRegion]:
        """The subproblem of one update, for the updater: one region, or all agents' in one batch.

        Args:
            tensordict: the data, ``[*B, T]``.

        Yields:
            The batched subproblem.
        """
        yield self.policy_region(self.policy_rows(tensordict))

    def policy_region(
        self, rows: PolicyRows, *, agent: int | None = None, index: int = 0, factor: Tensor | None = None
    ) -> PolicyTrustRegion:
        """The trust-region subproblem at the current parameters.

        Args:
            rows: the batch, from :meth:`policy_rows`.

        Keyword Args:
            agent: solve only this agent of stacked parameters, at one agent's cost. Default: all.
            index: the row of the statistics when ``agent`` is given.
            factor: what the surrogate's rows are multiplied with, ``[N]``. Default: 1.

        Returns:
            The subproblem.
        """
        agent_slice = None if self.trust_region == "shared" else slice(None)
        network, indices = self.actor_network, range(self.n_regions)
        of_agent, region = single_agent_network, cast("Callable[..., PolicyTrustRegion]", PolicyTrustRegion)
        if self._compiler is not None:
            of_agent, region = self._compiler.single_agent_network, self._compiler.region
        if agent is not None:
            indices = range(index, index + 1)
            if self.trust_region == "per_agent":
                agent_slice = slice(agent, agent + 1)
                network = of_agent(network, agent, self.n_regions)
                rows = rows.of_agent(agent)
        return region(
            network,
            self.actor_parameters,
            rows if factor is None else rows.with_factor(factor),
            indices=indices,
            agent_slice=agent_slice,
            entropy_coeff=self.entropy_coeff if self._entropy_counts() else None,
            max_importance_ratio=self.max_importance_ratio,
            chunk_size=self.chunk_size,
            ranks=self.ranks,
        )

    def policy_rows(self, tensordict: TensorDictBase, ranks: Ranks | None = None) -> PolicyRows:
        """Reads from a batch what the policy update needs, flattened to ``N`` rows; the batch is not modified.

        Args:
            tensordict: the data, ``[*B, T]``.
            ranks: the processes whose rows' weights sum to 1. Default: the loss's.

        Returns:
            The rows; those that a loss mask excludes weigh 0, and their content cannot spread. Missing entries and
            shapes that do not fit are errors.

        Raises:
            ValueError: if the data is empty, the loss has a lagging policy (``delay_actor``), or the policy is frozen.
        """
        if self.delay_actor:
            raise ValueError(
                "delay_actor=True keeps a lagging policy for clipping; a trust-region step is taken from the current "
                "one. Use delay_actor=False."
            )
        rows = read_rows(
            self,
            tensordict,
            # private: PPOLoss's rule of when and by what an advantage is normalised, with its warning
            lambda advantage, data, computed: self._maybe_normalize_advantage(advantage, data, update_norm=computed),
            n_agents=self.n_regions if self.trust_region == "per_agent" else None,
            agent_dim=self.agent_dim,
            ranks=self.ranks if ranks is None else ranks,
        )
        keys = trained_keys(self.actor_parameters)
        if not keys:
            raise ValueError("no parameter of the policy requires a gradient: nothing of it can be updated.")
        if keys != self._checked_keys and rows.agent_shape.numel() > 1:
            if self.trust_region == "per_agent":
                check_stacked_agents(self.actor_network, self.actor_parameters, rows)
            elif self._region_is_inferred:
                check_shared_agents(self.actor_network, self.actor_parameters, rows)
            self._checked_keys = keys
        return rows

    def surrogate_terms(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """The surrogate at the current parameters, taken apart for a sequential objective.

        Args:
            tensordict: the data, ``[*B, T]``.

        Returns:
            The ratios ``[N, n]`` (gradient), the advantages times the rows' weights ``[N, n]``, and each agent's mean
            KL from the policy that collected the data ``[n]`` in nats, NaN when the data has no distribution
            parameters, or the distribution no closed form.
        """
        rows = self.policy_rows(tensordict, ALONE)
        with differentiable_attention():
            dist = current_distribution(self, rows.inputs)
        counts = rows.weight > 0
        ratio = torch.where(counts, rows.log_ratio(dist, self.max_importance_ratio).exp(), 1.0)
        with torch.no_grad():
            written = tensordict.select(*distribution_keys(self.actor_network), strict=False)
            collected = collected_distribution(self.actor_network, written.reshape(rows.inputs.batch_size))
            kl = None if collected is None else kl_if_exact(collected, dist, rows.log_prob.ndim - 1)
            kl = torch.full_like(rows.log_prob, torch.nan) if kl is None else kl.unsqueeze(-1)
            kl = (rows.weight * torch.where(counts, kl, 0.0)).flatten(0, rows.row_dims - 1).flatten(1).sum(0)
        terms = (ratio, rows.weight * rows.advantage)
        ratio, weighted_advantage = (term.flatten(0, rows.row_dims - 1).flatten(1) for term in terms)
        return ratio, weighted_advantage, kl

    def _entropy_counts(self) -> bool:
        """Whether the entropy is in the surrogate: its coefficient, which may be scheduled, is not 0."""
        if not self.entropy_bonus:
            return False
        if self._entropy_is_by_head:
            raise NotImplementedError("the policy update takes one entropy_coeff for all action heads, not a mapping.")
        return self._entropy_coeff_on_host.read(self.entropy_coeff) != 0
