"""The TRPO objective: PPO's unclipped surrogate with an exact KL, solved by a trust-region step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection, unravel_key
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    composite_lp_aggregate,
    dispatch,
)
from torch import Tensor
from torch import distributions as D
from torchrl.modules import ValueNorm
from torchrl.objectives import PPOLoss, ValueEstimators
from torchrl.objectives.utils import _sum_td_features, default_value_kwargs
from torchrl.objectives.value import ValueEstimatorBase

from torchrl_trpo.arguments import plain_number, positive_whole
from torchrl_trpo.distributions.divergence import has_exact_entropy, kl_if_exact, sum_events
from torchrl_trpo.errors import nearest
from torchrl_trpo.keys import entry, reads_init
from torchrl_trpo.numerics.statistics import effective_sample_size
from torchrl_trpo.objectives.agent_checks import check_shared_agents, check_stacked_agents
from torchrl_trpo.objectives.agent_gae import AgentGAE
from torchrl_trpo.objectives.attention import differentiable_attention
from torchrl_trpo.objectives.collected import (
    LOG_PROB_ROLE,
    action_group,
    broadcast_advantage,
    check_agent_dim,
    collected_log_prob,
)
from torchrl_trpo.objectives.compiled_policy import CompiledPolicy
from torchrl_trpo.objectives.functional import parameters_restored
from torchrl_trpo.objectives.loss_parts import (
    actor_parameters,
    check_padding,
    estimated_advantage,
    exact_entropy,
    mask_keys,
    row_mask,
    standardized_advantage,
)
from torchrl_trpo.objectives.policy_network import (
    distribution_keys,
    distribution_parameters,
    input_keys,
    is_composite,
    resolve_trust_region,
    single_agent_network,
)
from torchrl_trpo.objectives.policy_region import PolicyTrustRegion
from torchrl_trpo.objectives.policy_rows import PolicyRows, flatten_rows
from torchrl_trpo.objectives.popart import update_value_norm
from torchrl_trpo.parallel.ranks import ALONE, Ranks


class TRPOLoss(PPOLoss):
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
        compile_policy: whether the policy's forward pass in the update's gradient and line search is compiled
            (``torch.compile``), with the same result to rounding; or the keywords for it. Products with the Fisher
            matrix differentiate twice, which ``torch.compile`` does not support, and stay as they are. Default: False.
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
      parameters are read from the data; left out when the data has none, or the distribution no closed form.
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

    default_value_estimator = ValueEstimators.MAGAE
    value_norm: ValueNorm | None

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
        compile_policy: bool | Mapping[str, Any] = False,
        process_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        accepted = [name for name in inspect.signature(PPOLoss).parameters if name != "kwargs"]
        for name in kwargs:
            if name not in accepted:  # PPOLoss would ignore it
                raise TypeError(f"{name}: TRPOLoss has no such argument. {nearest(name, accepted)}")
        super().__init__(actor_network, critic_network, entropy_coeff=plain_number(entropy_coeff), **kwargs)
        self.value_norm = value_norm
        self.agent_dim = agent_dim
        self.chunk_size = None if chunk_size is None else positive_whole("chunk_size", chunk_size)
        self.compile_policy = compile_policy
        self._compiled: dict[str, CompiledPolicy] = {}
        self.trust_region, self.n_regions = resolve_trust_region(
            trust_region, self.actor_network, self.actor_parameters
        )
        self._returns_kl = False
        self._norm_has_started = False
        self._region_is_inferred = trust_region is None
        self._agents_are_checked = False
        self.ranks = Ranks(process_group)
        if self.ranks.size > 1 and self.advantage_norm is not None:
            raise ValueError(
                "advantage_norm: its statistics would be of each process alone. Legal: normalize_advantage."
            )
        for tensor in (*self.parameters(), *self.buffers()):
            self.ranks.first_(tensor.data)

    @property
    def actor_parameters(self) -> TensorDictBase:
        """The policy's parameters and buffers, whether the loss is functional or not."""
        return actor_parameters(self)

    @property
    def out_keys(self) -> list[NestedKey]:
        """What :meth:`forward` returns; ``kl`` is among them if it could be computed for the data seen last."""
        if self._out_keys is not None:
            return self._out_keys
        keys = ["loss_objective", "kl_approx", "ESS"]
        keys += ["kl"] if self._returns_kl else []
        keys += ["entropy", "loss_entropy"] if self.entropy_bonus else []
        keys += ["composite_entropy"] if self.entropy_bonus and self._entropy_by_part() else []
        if self._has_critic:
            keys += ["loss_critic"]
            keys += ["value_clip_fraction"] if self.clip_value else []
            keys += ["explained_variance"] if self.log_explained_variance else []
        return keys

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Evaluates the objective at the current parameters.

        With a critic and a ``value_norm``, the statistics of the values move as in :meth:`loss_critic`, unless
        gradients are off (``torch.no_grad``): a second call then gives another ``loss_critic``, as with ``MAPPOLoss``.
        Nothing else changes.

        Args:
            tensordict: the data, ``[*B, T]``.

        Returns:
            The losses and log entries that the class docstring lists, without batch dimensions.
        """
        tensordict = tensordict.clone(False)
        collected = self._collected_distribution(tensordict)
        advantage = self.normalized_advantage(tensordict)
        if not isinstance(key := self.tensor_keys.sample_log_prob, list) and isinstance(tensordict.get(key), Tensor):
            tensordict.set(key, collected_log_prob(self, tensordict).squeeze(-1))  # of the joint action
        log_weight, dist, kl_approx, log_is_weight = self._log_weight(tensordict, adv_shape=advantage.shape[:-1])
        if log_is_weight is not None:
            log_weight = log_weight + log_is_weight
        advantage = broadcast_advantage(advantage, log_weight, self.tensor_keys.advantage)
        out = TensorDict({"loss_objective": -log_weight.exp() * advantage})
        out.set("kl_approx", kl_approx.detach().mean())
        with torch.no_grad():
            out.set("ESS", effective_sample_size(log_weight, row_mask(self, tensordict, log_weight)))
            kl = None if collected is None else kl_if_exact(collected, dist, log_weight.ndim - 1)
            self._returns_kl = kl is not None
            if kl is not None:
                out.set("kl", self._reduce_loss(kl.unsqueeze(-1), tensordict, reduction="mean"))
        if self.entropy_bonus:
            bonus = self._get_entropy(dist, adv_shape=advantage.shape[:-1])
            if is_tensor_collection(bonus):
                out.set("composite_entropy", bonus.detach())
                out.set("entropy", _sum_td_features(bonus).detach().mean())
            else:
                out.set("entropy", bonus.detach().mean())
            out.set("loss_entropy", self._weighted_loss_entropy(bonus))
        if self._has_critic:
            loss_critic, value_clip_fraction, explained_variance = self.loss_critic(tensordict)
            out.set("loss_critic", loss_critic)
            if value_clip_fraction is not None:
                out.set("value_clip_fraction", value_clip_fraction)
            if explained_variance is not None:
                out.set("explained_variance", explained_variance)
        out = out.named_apply(
            lambda name, value: self._reduce_loss(value, tensordict).squeeze(-1) if name.startswith("loss_") else value
        )
        networks = ("actor_network_params", "critic_network_params")
        self._clear_weakrefs(tensordict, out, *networks, *(f"target_{name}" for name in networks))
        return out

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
        if agent is not None:
            indices = range(index, index + 1)
            if self.trust_region == "per_agent":
                agent_slice = slice(agent, agent + 1)
                network = single_agent_network(network, agent, self.n_regions)
                rows = rows.of_agent(agent)
        return PolicyTrustRegion(
            network,
            self.actor_parameters,
            rows if factor is None else rows.with_factor(factor),
            indices=indices,
            agent_slice=agent_slice,
            entropy_coeff=self.entropy_coeff if self._entropy_counts() else None,
            max_importance_ratio=self.max_importance_ratio,
            compiled=self._compiled_policy(network),
            chunk_size=self.chunk_size,
            ranks=self.ranks,
        )

    def _compiled_policy(self, network: ProbabilisticTensorDictSequential) -> CompiledPolicy | None:
        """The compiled forward pass; one agent's is a function of its parameters, the same for all of them."""
        if self.compile_policy is False:
            return None
        name = "all agents" if network is self.actor_network else "one agent"
        if name not in self._compiled:
            options = dict(self.compile_policy) if isinstance(self.compile_policy, Mapping) else {}
            self._compiled[name] = CompiledPolicy(network, options)
        return self._compiled[name]

    def _apply(self, *args: Any, **kwargs: Any) -> TRPOLoss:
        self._compiled = {}  # constants in it stay on the device where they were
        return super()._apply(*args, **kwargs)

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
        if 0 in tensordict.batch_size:
            raise ValueError(f"the data is empty: its batch size is {tuple(tensordict.batch_size)}.")
        if self.delay_actor:
            raise ValueError(
                "delay_actor=True keeps a lagging policy for clipping; a trust-region step is taken from the current "
                "one. Use delay_actor=False."
            )
        tensordict = tensordict.clone(False)
        advantage = self.normalized_advantage(tensordict, update_norm=True)
        check_padding(self, tensordict)
        keys = self.tensor_keys
        log_prob = collected_log_prob(self, tensordict)
        if self.trust_region == "per_agent":
            check_agent_dim(log_prob, tensordict.batch_size, self.agent_dim, self.n_regions)
        rows = flatten_rows(
            entry(tensordict, input_keys(self.actor_network), "the actor's in_keys"),
            action=entry(tensordict, keys.action, "action"),
            log_prob=log_prob,
            advantage=advantage,
            mask=row_mask(self, tensordict, log_prob),
            group=action_group(self),
            per_agent=self.trust_region == "per_agent",
            sequences=reads_init(self.actor_network),
            ranks=self.ranks if ranks is None else ranks,
        )
        if not any(value.requires_grad for value in self.actor_parameters.values(True, True)):
            raise ValueError("no parameter of the policy requires a gradient: nothing of it can be updated.")
        if not self._agents_are_checked and rows.agent_shape.numel() > 1:
            if self.trust_region == "per_agent":
                check_stacked_agents(self.actor_network, self.actor_parameters, rows)
            elif self._region_is_inferred:
                check_shared_agents(self.actor_network, self.actor_parameters, rows)
            self._agents_are_checked = True
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
            dist_params = distribution_parameters(self.actor_network, self.actor_parameters, rows.inputs)
        dist = self.actor_network.build_dist_from_params(dist_params)
        counts = rows.weight > 0
        ratio = torch.where(counts, rows.log_ratio(dist, self.max_importance_ratio).exp(), 1.0)
        with torch.no_grad():
            written = tensordict.select(*distribution_keys(self.actor_network), strict=False)
            collected = self._collected_distribution(written.reshape(rows.inputs.batch_size))
            kl = None if collected is None else kl_if_exact(collected, dist, rows.log_prob.ndim - 1)
            kl = torch.full_like(rows.log_prob, torch.nan) if kl is None else kl.unsqueeze(-1)
            kl = (rows.weight * torch.where(counts, kl, 0.0)).flatten(0, rows.row_dims - 1).flatten(1).sum(0)
        terms = (ratio, rows.weight * rows.advantage)
        ratio, weighted_advantage = (term.flatten(0, rows.row_dims - 1).flatten(1) for term in terms)
        return ratio, weighted_advantage, kl

    def make_value_estimator(self, value_type: ValueEstimators | type | Any = None, **hyperparams: Any) -> TRPOLoss:
        """Makes the value estimator, as for any TorchRL loss; one given as a class gets the loss's keys too.

        Args:
            value_type: a ``ValueEstimators`` entry or its name, or a ``ValueEstimatorBase`` class or instance. Default,
                and for ``ValueEstimators.MAGAE``: :class:`AgentGAE`, a ``MultiAgentGAE``.
            **hyperparams: the estimator's arguments, such as ``gamma`` and ``lmbda``.

        Returns:
            The loss itself.

        Raises:
            ValueError: if the estimator's ``value_network`` is not the loss's critic, or its statistics would be of one
                process alone.
        """
        given = hyperparams.get("value_network", getattr(value_type, "value_network", None))
        if given is not None and self.critic_network is not None and given is not self.critic_network:
            raise ValueError(
                "value_network is another network than the loss's critic_network: values would come from one that "
                "loss_critic does not train. Legal: the critic_network that the loss was made with."
            )
        if value_type is None or getattr(value_type, "name", str(value_type)).upper() == ValueEstimators.MAGAE.name:
            defaults = default_value_kwargs(self.default_value_estimator)
            super().make_value_estimator(AgentGAE, **{**defaults, "value_network": self.critic_network, **hyperparams})
            self.value_type = ValueEstimators.MAGAE
        else:
            super().make_value_estimator(value_type, **hyperparams)
        if not isinstance(value_type, ValueEstimatorBase):
            self._forward_value_estimator_keys()
        self._forward_masks()
        self._set_in_keys()
        if self.ranks.size > 1 and getattr(self._value_estimator, "average_gae", False):
            raise ValueError(
                "average_gae=True would normalise the advantages of each process alone. Legal: average_gae=False, with "
                "normalize_advantage=True in TRPOLoss, which is over all of them."
            )
        return self

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        if self._value_estimator is not None:  # what a critic reads at t+1 need not be what the policy reads
            for key in self._value_estimator.in_keys:
                keys = [unravel_key(part) for part in (key if isinstance(key, list) else [key])]
                self._in_keys += [part for part in keys if part not in self._in_keys]

    @property
    def loss_mask_key(self) -> NestedKey | Literal["auto"] | None:
        """Which entry says what counts, as for any TorchRL loss; the value estimator reads it too."""
        return self._loss_mask_key

    @loss_mask_key.setter
    def loss_mask_key(self, value: NestedKey | Literal["auto"] | None) -> None:
        PPOLoss.loss_mask_key.fset(self, value)
        self._forward_masks()

    def _forward_masks(self) -> None:
        estimator = getattr(self, "_value_estimator", None)
        if isinstance(estimator, AgentGAE):
            estimator.mask_keys = mask_keys(self)

    def loss_critic(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The critic's distance from the value targets, to be minimised.

        Each call moves the statistics of ``value_norm`` towards these targets first, unless gradients are off
        (``torch.no_grad``). The last layer of a critic that outputs normalised values is then corrected in place, so
        that no value changes (PopArt); a graph from an earlier call can no longer be differentiated.

        Args:
            tensordict: the data with value targets, ``[*B]``.

        Returns:
            The distance ``[*B, n_agents, 1]`` times ``critic_coeff``, the share of clipped values (None without
            ``clip_value``) and the explained variance (None unless it is logged).
        """
        if torch.is_grad_enabled():
            self.update_value_norm(tensordict)
        with parameters_restored(self.critic_network):
            return super().loss_critic(tensordict.clone(False))  # values are written, that clip_value must not read

    def update_value_norm(self, tensordict: TensorDictBase) -> None:
        """Moves the statistics of ``value_norm``, as :meth:`loss_critic` does; nothing without one.

        Args:
            tensordict: the data with value targets, ``[*B]``; ``B`` may be 0, where other processes have rows.
        """
        if self.value_norm is not None:
            targets = entry(tensordict, self.tensor_keys.value_target, "value_target")
            mask = row_mask(self, tensordict, targets)
            targets = targets if mask is None else targets[mask].unsqueeze(-1)
            update_value_norm(self.value_norm, targets, self._normalised_critic(), self.ranks)

    def _normalised_critic(self) -> TensorDictBase | None:
        """The critic's parameters if other statistics would change its values; the first statistics are no change."""
        if not self._outputs_normalised_values():
            return None
        if not self._norm_has_started:
            norm: Any = self.value_norm
            self._norm_has_started = any(bool(buffer.any()) for buffer in norm.buffers())  # waits for the device
            if not self._norm_has_started:
                return None
        return self.critic_network_params if self.functional else TensorDict.from_module(self.critic_network)

    def _outputs_normalised_values(self) -> bool:
        """Whether the critic does: the estimator denormalises with the same statistics."""
        return getattr(self._value_estimator, "value_norm", None) is self.value_norm

    def normalized_advantage(self, tensordict: TensorDictBase, *, update_norm: bool = False) -> Tensor:
        """The advantage of a batch, computed by the value estimator if missing, normalised if the loss does so.

        Args:
            tensordict: the data, ``[*B, T]``; a missing advantage and value target are written into it.

        Keyword Args:
            update_norm: whether value targets computed here count in the statistics of ``advantage_norm``.

        Returns:
            The advantage, ``[*B, T, n_agents, 1]`` (without agents ``[*B, T, 1]``).
        """
        advantage, missing = estimated_advantage(self, tensordict)
        advantage = broadcast_advantage(advantage, collected_log_prob(self, tensordict), self.tensor_keys.advantage)
        return self._maybe_normalize_advantage(advantage, tensordict, update_norm=missing and update_norm)

    def _standardize_advantage(self, advantage: Tensor, tensordict: TensorDictBase) -> Tensor:
        return standardized_advantage(self, advantage, tensordict, self.ranks)

    def _log_weight(self, tensordict: TensorDictBase, adv_shape: torch.Size) -> Any:
        for key, name in [(self.tensor_keys.sample_log_prob, LOG_PROB_ROLE), (self.tensor_keys.action, "action")]:
            entry(tensordict, key, name)
        with parameters_restored(self.actor_network):
            return super()._log_weight(tensordict, adv_shape=adv_shape)

    def _get_cur_log_prob(self, tensordict: TensorDictBase, params: TensorDictBase | None = None) -> Any:
        log_prob, dist, composite = super()._get_cur_log_prob(tensordict, params)
        if not composite:
            log_prob = sum_events(log_prob, tensordict.get(self.tensor_keys.sample_log_prob).ndim)
        return log_prob, dist, composite

    def _critic_loss_inputs(
        self, target_return: Tensor, state_value: Tensor, old_state_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        norm = self.value_norm
        if norm is None:
            return target_return, state_value, old_state_value
        if not self._outputs_normalised_values():
            state_value = norm.normalize(state_value)
        old_state_value = None if old_state_value is None else norm.normalize(old_state_value)
        return norm.normalize(target_return.detach()), state_value, old_state_value

    def _get_entropy(self, dist: D.Distribution, adv_shape: torch.Size) -> Tensor | TensorDict:
        # Without sampling where possible: the parent's estimate would differ from call to call.
        if not has_exact_entropy(dist):
            return super()._get_entropy(dist, adv_shape)
        return exact_entropy(dist, adv_shape)

    def _entropy_by_part(self) -> bool:
        return is_composite(self.actor_network) and not composite_lp_aggregate(nowarn=True)

    def _entropy_counts(self) -> bool:
        if not self.entropy_bonus:
            return False
        if self._entropy_coeff_map is not None:
            raise NotImplementedError("the policy update takes one entropy_coeff for all action heads, not a mapping.")
        # The coefficient may be scheduled; it is read from the device only after it has changed.
        version = (id(self.entropy_coeff), self.entropy_coeff._version)
        if self.__dict__.get("_cache_entropy_coeff", (None,))[0] != version:
            self.__dict__["_cache_entropy_coeff"] = (version, bool(self.entropy_coeff != 0))
        return self.__dict__["_cache_entropy_coeff"][1]

    def _collected_distribution(self, tensordict: TensorDictBase) -> D.Distribution | None:
        """The policy's distribution as it was at collection, from the parameters that it wrote; None without them."""
        keys = distribution_keys(self.actor_network)
        if any(tensordict.get(key, None) is None for key in keys):
            return None
        return self.actor_network.build_dist_from_params(tensordict.select(*keys))
