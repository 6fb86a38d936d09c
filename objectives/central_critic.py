"""The centralised critic: its input pooled over all agents, then GAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictModuleBase
from torch import Tensor
from torchrl.data import Categorical, Composite, TensorSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ValueNorm, set_recurrent_mode

from torchrl_trpo.keys import entry, group_of, key_list, next_key, path
from torchrl_trpo.objectives.agent_gae import AgentGAE
from torchrl_trpo.objectives.functional import parameters_restored


class CentralCriticValueEstimator(AgentGAE):
    r"""Generalised advantage estimation with a centralised critic :math:`V(s)` or :math:`V(s, u^{-i})`.

    Writes the critic's input into ``central_key``, at ``t`` and at ``t+1`` (Hu et al. 2023, arXiv:2210.13708, on
    centralised critics): for each agent the concatenation of

    - the global state (``state_key``), if the environment has one;
    - all agents' observations (``observation_keys``);
    - optionally the actions of all *other* agents (``action_keys``). Those at ``t+1`` are the recorded ones; where the
      rollout or an episode ends, they are drawn from ``actor_network``;
    - optionally the agent's index, one-hot (``agent_one_hot``).

    Agent ``i``'s value never depends on agent ``i``'s own action. The value network reads ``central_key``, here and in
    ``loss_critic``. Then GAE (Schulman et al. 2016, arXiv:1506.02438, equation 16) as :class:`AgentGAE` computes it:
    team rewards and done flags ``[*B, T, 1]`` are broadcast to the agents, steps that were truncated but not terminated
    are bootstrapped.

    Keyword Args:
        gamma: the discount.
        lmbda: GAE's :math:`\lambda`.
        value_network: the critic, from ``central_key`` ``[*B, T, n_agents, F]`` to values ``[*B, T, n_agents, 1]``.
        observation_keys: the agents' observations, each ``[*B, T, n_g, *F_g]`` with the ``n_g`` agents of its group:
            the key of one group, or a list of several groups' keys. An empty list pools the state alone.
        central_key: where the pooled input is written, ``[*B, T, n_agents, F]``. The agents are those of the
            observation in the same group (of the first one, for a root key).
        state_key: the global state, ``[*B, T, S]``. Default: none.
        n_agents: how many agents there are to give the pooled input to, needed without ``observation_keys``.
        action_keys: the agents' actions, each ``[*B, T, n_g, A_g]``, a key or a list, to pool those of the others.
            Categorical ones, ``[*B, T, n_g]``, enter one-hot if the policy has their spec, else as their index.
            Default: not pooled.
        actor_network: the policy of all groups, needed only with ``action_keys``, for the actions after the last step.
        agent_one_hot: whether to add the agent's index. Default: False.
        team_reward: ``"mean"`` or ``"sum"``: replaces the agents' rewards by one for the team, of all groups in
            ``reward_keys``. Default: rewards as they are.
        value_norm: a :class:`~torchrl.modules.ValueNorm`: the critic outputs normalised values. Default: raw values.
        **kwargs: keywords of :class:`AgentGAE` and :class:`~torchrl.objectives.value.MultiAgentGAE`.

    Raises:
        ValueError: if nothing is pooled, ``value_network`` does not read ``central_key``, ``n_agents`` or
            ``actor_network`` is missing where it is needed, ``team_reward`` is unknown, or groups are nested.
        KeyError: when called on data without one of the entries.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl_trpo.objectives import CentralCriticValueEstimator
        >>> observations, central = ("agents", "observation"), ("agents", "central")
        >>> critic = Mod(torch.nn.Linear(2 * 3, 1), in_keys=[central], out_keys=[("agents", "state_value")])
        >>> estimator = CentralCriticValueEstimator(
        ...     gamma=0.99, lmbda=0.95, value_network=critic, observation_keys=[observations], central_key=central
        ... )
        >>> estimator.set_keys(value=("agents", "state_value"))
        >>> data = TensorDict({"agents": {"observation": torch.randn(4, 5, 2, 3)}}, [4, 5])
        >>> data["next"] = TensorDict({"agents": {"observation": torch.randn(4, 5, 2, 3)}}, [4, 5])
        >>> data["next", "reward"] = torch.randn(4, 5, 1)  # one reward for the team
        >>> data["next", "done"] = data["next", "terminated"] = torch.zeros(4, 5, 1, dtype=torch.bool)
        >>> estimator(data)["advantage"].shape
        torch.Size([4, 5, 2, 1])

        In a loss, which hands over its own keys, and whose ``loss_critic`` reads ``central_key`` from the same data:

        >>> from torchrl_trpo.objectives import TRPOLoss
        >>> loss = TRPOLoss(actor, critic)  # doctest: +SKIP
        >>> loss.make_value_estimator(  # doctest: +SKIP
        ...     CentralCriticValueEstimator, gamma=0.99, lmbda=0.95, value_network=critic,
        ...     observation_keys=[observations], central_key=central,
        ... )
    """

    def __init__(
        self,
        *,
        gamma: float | Tensor,
        lmbda: float | Tensor,
        value_network: TensorDictModule,
        observation_keys: NestedKey | Sequence[NestedKey],
        central_key: NestedKey,
        state_key: NestedKey | None = None,
        n_agents: int | None = None,
        action_keys: NestedKey | Sequence[NestedKey] | None = None,
        actor_network: TensorDictModuleBase | None = None,
        agent_one_hot: bool = False,
        team_reward: Literal["mean", "sum"] | None = None,
        value_norm: ValueNorm | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            gamma=gamma,
            lmbda=lmbda,
            value_network=value_network,
            team_reward=team_reward,
            value_norm=value_norm,
            **kwargs,
        )
        self.observation_keys = key_list(observation_keys)
        self.central_key = unravel_key(central_key)
        self.state_key = None if state_key is None else unravel_key(state_key)
        self.action_keys = key_list(action_keys or ())
        if len(path(self.central_key)) > 2:
            raise ValueError(
                f"central_key: {central_key!r} is of a group within another one, which is not supported. Legal: "
                "(group, name), such as ('red', 'central'), with groups at the root: use TorchRL's RenameTransform."
            )
        if not self.observation_keys and self.state_key is None:
            raise ValueError(
                "observation_keys is empty, and there is no state_key; name at least one, such as "
                "[('agents', 'observation')]."
            )
        if not self.observation_keys and n_agents is None:
            raise ValueError("state_key alone does not say how many agents there are: give n_agents.")
        if self.action_keys and actor_network is None:
            raise ValueError(
                "action_keys need actor_network: the others' actions after the last step are drawn from the policy."
            )
        read = [unravel_key(key) for key in value_network.in_keys]
        if self.central_key not in read:
            raise ValueError(
                f"central_key: {self.central_key!r} is not read by value_network, whose in_keys are {read}: what is "
                "pooled would have no influence. Legal: a value_network with central_key among its in_keys."
            )
        self.n_agents = n_agents
        self.__dict__["actor_network"] = actor_network  # not a submodule: its parameters are the policy's
        self.agent_one_hot = agent_one_hot

    @property
    def in_keys(self) -> list[NestedKey]:
        """The keys that :meth:`AgentGAE.forward` reads."""
        pooled = [*self.observation_keys, *self.action_keys, *([self.state_key] if self.state_key else [])]
        read = [key for key in super().in_keys if key not in (self.central_key, next_key(self.central_key))]
        return list(dict.fromkeys([*read, *pooled, *[next_key(k) for k in pooled if k not in self.action_keys]]))

    def _prepared(self, tensordict: TensorDictBase, time_dim: int | None) -> TensorDictBase:
        data = self.pool(super()._prepared(tensordict, time_dim), time_dim)
        for key in (self.central_key, next_key(self.central_key)):
            tensordict.set(key, data.get(key))
        return data

    def _read_keys(self) -> list[NestedKey]:
        states = [] if self.state_key is None else [self.state_key]
        return [*super()._read_keys(), *self.observation_keys, *states]

    def pool(self, tensordict: TensorDictBase, time_dim: int | None = None) -> TensorDictBase:
        """Writes ``central_key`` at ``t`` and ``t+1``, with gradients if ``differentiable``.

        Args:
            tensordict: the data, ``[*B, T]``; written to.
            time_dim: the time dimension. Default: the one named "time", or the last.

        Returns:
            The same tensordict.
        """
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            actions = next_actions = None
            if self.action_keys:
                actions = [entry(tensordict, key, "action_keys") for key in self.action_keys]
                next_actions = self._next_actions(tensordict, actions, self._get_time_dim(time_dim, tensordict))
            tensordict.set(self.central_key, self._pool(tensordict, tensordict.batch_dims, actions))
            following = tensordict.get("next")
            following.set(self.central_key, self._pool(following, tensordict.batch_dims, next_actions))
        return tensordict

    def _pool(self, data: TensorDictBase, batch_dims: int, actions: list[Tensor] | None) -> Tensor:
        observations = [entry(data, key, "observation_keys") for key in self.observation_keys]
        for key, value in zip(self.observation_keys, observations, strict=True):
            if value.ndim < batch_dims + 2:
                raise ValueError(f"{key!r} has shape {tuple(value.shape)}; legal: [*B, T, n_agents, ...].")
        n_agents = self.n_agents or observations[self._own_index()].shape[batch_dims]
        shared = [value.flatten(batch_dims) for value in observations]
        if self.state_key is not None:
            shared.insert(0, entry(data, self.state_key, "state_key").flatten(batch_dims))
        pooled = torch.cat(shared, -1).unsqueeze(-2)  # [*B, T, 1, F]
        pooled = pooled.expand(*pooled.shape[:-2], n_agents, pooled.shape[-1])
        parts = [pooled]
        for key, action in zip(self.action_keys, actions or (), strict=True):
            spec = self._action_spec(key)
            action = spec.to_one_hot(action, safe=False) if isinstance(spec, Categorical) else action
            action = action.unsqueeze(-1) if action.ndim == batch_dims + 1 else action
            action = action.to(pooled) if pooled.is_floating_point() else action.to(pooled.device)
            parts.append(self._others(key, action, n_agents))
        if self.agent_one_hot:
            identity = torch.eye(n_agents, dtype=pooled.dtype, device=pooled.device)
            parts.append(identity.expand(*pooled.shape[:-1], n_agents))
        return pooled if len(parts) == 1 else torch.cat(parts, -1)

    def _own_index(self) -> int:
        """The index of the observation of those agents that get the pooled input."""
        groups = [group_of(key) for key in self.observation_keys]
        own = group_of(self.central_key)
        return groups.index(own) if own in groups else 0

    def _others(self, key: NestedKey, action: Tensor, n_agents: int) -> Tensor:
        """The actions of a group, without an agent's own if it is in that group: ``[*B, T, n_agents, F]``."""
        own = group_of(self.central_key)
        if own not in map(group_of, self.action_keys) and self.observation_keys:
            own = group_of(self.observation_keys[self._own_index()])
        if group_of(key) != own:
            return action.flatten(-2).unsqueeze(-2).expand(*action.shape[:-2], n_agents, -1)
        index = torch.arange(n_agents, device=action.device)
        others = (index.unsqueeze(-1) + 1 + index[:-1]) % n_agents  # row i: every agent but i
        others = others.sort(-1).values
        return action[..., others, :].flatten(-2)

    def _action_spec(self, key: NestedKey) -> TensorSpec | None:
        for module in self.actor_network.modules():
            spec = getattr(module, "spec", None)
            if isinstance(spec, Composite) and key in spec.keys(True, True):
                return spec[key]
        return None

    @torch.no_grad()
    def _next_actions(self, tensordict: TensorDictBase, actions: list[Tensor], time_dim: int) -> list[Tensor]:
        # A recurrent policy takes single steps from the recorded states.
        own = parameters_restored(self.actor_network)
        following = tensordict.get("next").select(*self.actor_network.in_keys, strict=False).copy()
        drawing = [each for each in self.actor_network.modules() if isinstance(each, ProbabilisticTensorDictModule)]
        own_keys = {key for module in drawing for key in module.in_keys}
        for key, value in following.select(*own_keys, strict=False).items(True, True):
            if value.dtype == torch.bool:  # a mask of actions; where an episode ends none may be allowed
                following.set(key, value | ~value.any(-1, keepdim=True))
        with own, set_exploration_type(ExplorationType.RANDOM), set_recurrent_mode(False):
            drawn = self.actor_network(following)
        done = entry(tensordict, next_key(self.tensor_keys.done), "the done key")
        ends = done.flatten(tensordict.batch_dims).any(-1)
        ends.select(time_dim, -1).fill_(True)
        actions_after = []
        for key, action in zip(self.action_keys, actions, strict=True):
            mask = ends.reshape(*ends.shape, *[1] * (action.ndim - ends.ndim))
            actions_after.append(torch.where(mask, drawn.get(key), action.roll(-1, time_dim)))
        return actions_after
