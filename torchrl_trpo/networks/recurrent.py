"""Recurrent networks for one agent or several, trained on whole sequences with episode borders inside."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase, TensorDictPrimer
from torchrl.modules.models.multiagent import MultiAgentNetBase
from torchrl.modules.tensordict_module.rnn import recurrent_mode

from torchrl_trpo.errors import PlainKeyError, nearest
from torchrl_trpo.keys import entry, path


class RecurrentModule(TensorDictModuleBase):
    """A GRU or LSTM layer over each agent's own observations, for the state keys and modes of TorchRL's ``GRUModule``.

    Inside ``set_recurrent_mode(True)`` it reads whole sequences, ``[*B, T]``; otherwise single steps, ``[*B]``. Where
    ``"is_init"`` is set, a sequence starts anew from the state recorded there: episode borders need no padding. It
    consists of plain operations, so it can be differentiated twice and batched over agents.

    Args:
        input_size: the size of an observation.
        hidden_size: the size of the features.

    Keyword Args:
        cell: ``"gru"`` (Cho et al. 2014, arXiv:1406.1078) or ``"lstm"`` (Hochreiter and Schmidhuber 1997).
        in_keys: the observation ``[*B, (T), n_agents, F]``, the recurrent state ``[*B, (T), n_agents, S]`` (if it is
            missing, sequences start from zeros) and the flag where episodes begin, ``[*B, (T), 1]``.
        out_keys: the features ``[*B, (T), n_agents, hidden_size]`` and the state after each step.
        n_agents: the number of agents; None for entries without an agent dimension.
        share_params: whether the agents share one layer or have one each, stacked on a leading agent dimension.
        device: where the parameters are.

    Raises:
        ValueError: if ``cell`` is another one, or there are not three ``in_keys``.
        PlainKeyError: when called on data without the observation or the flag; or on single steps without the state,
            where no episode begins.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import set_recurrent_mode
        >>> from torchrl_trpo.networks.recurrent import RecurrentModule
        >>> state = ("agents", "state")
        >>> layer = RecurrentModule(
        ...     3, 8, cell="gru", in_keys=[("agents", "observation"), state, "is_init"],
        ...     out_keys=[("agents", "features"), ("next", *state)], n_agents=2, share_params=False,
        ... )
        >>> data = TensorDict({("agents", "observation"): torch.randn(5, 7, 2, 3)}, [5, 7])
        >>> data["is_init"] = torch.zeros(5, 7, 1, dtype=torch.bool)
        >>> with set_recurrent_mode(True):
        ...     layer(data)["agents", "features"].shape
        torch.Size([5, 7, 2, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        cell: str,
        in_keys: list[NestedKey],
        out_keys: list[NestedKey],
        n_agents: int | None = None,
        share_params: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell: {cell!r}. {nearest(cell, CELLS)}")
        if len(in_keys) != 3:
            raise ValueError(f"in_keys: {in_keys}. Legal: three, of the observation, the state and 'is_init'.")
        self.in_keys = in_keys
        self.out_keys = out_keys
        self.n_agents = n_agents
        self.hidden_size = hidden_size
        self.state_size = CELLS[cell].states * hidden_size
        sizes: dict[str, Any] = {"input_size": input_size, "hidden_size": hidden_size, "cell": cell}
        self.network: nn.Module
        if n_agents is None:
            self.network = _Sequence(**sizes, time_dim=-2, device=device)
        else:
            self.network = _AgentSequences(n_agents=n_agents, share_params=share_params, device=device, **sizes)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the features and the states after each step.

        Args:
            tensordict: the data, ``[*B]``, or in recurrent mode ``[*B, T]``.

        Returns:
            The same tensordict.
        """
        observation = entry(tensordict, self.in_keys[0], "in_keys")
        is_init = entry(tensordict, self.in_keys[2], "in_keys (TorchRL's InitTracker adds 'is_init')")
        state = tensordict.get(self.in_keys[1], None)
        if state is None:
            if not (recurrent_mode() or is_init.is_meta or bool(is_init.all())):
                raise PlainKeyError(
                    f"the recurrent state {self.in_keys[1]!r} is missing where no episode begins: the network would "
                    "have no memory. Legal: an environment that carries it, carry_states(env, policy) of "
                    "torchrl_trpo.networks; or whole sequences, with set_recurrent_mode(True)."
                )
            state = observation.new_zeros(*observation.shape[:-1], self.state_size)
        if self.n_agents is not None:
            is_init = is_init.unsqueeze(-2).expand(*observation.shape[:-1], 1)
        inputs = torch.cat([observation, state, is_init.to(observation.dtype)], -1)
        time_dim = -2 if self.n_agents is None else -3
        if not recurrent_mode():
            inputs = inputs.unsqueeze(time_dim)
        states = self.network(inputs)
        if not recurrent_mode():
            states = states.squeeze(time_dim)
        tensordict.set(self.out_keys[0], states[..., : self.hidden_size])
        _, *group, _ = path(self.out_keys[1])
        if group and tensordict.get(("next", *group), None) is None:  # the group's batch size has the agents
            tensordict.set(("next", *group), tensordict.get(tuple(group)).empty())
        return tensordict.set(self.out_keys[1], states)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform by which an environment carries the state, which is zero where an episode begins."""
        agents = () if self.n_agents is None else (self.n_agents,)
        *groups, name = path(self.in_keys[1])
        spec = Composite({name: Unbounded((*agents, self.state_size))}, shape=agents if groups else ())
        for group in reversed(groups):
            spec = Composite({group: spec})
        return TensorDictPrimer(spec, expand_specs=True, reset_key="_reset")


def carry_states(env: EnvBase, *modules: nn.Module) -> EnvBase:
    """Makes an environment carry the states of recurrent modules from step to step.

    Args:
        env: the environment, a ``TransformedEnv``.
        *modules: policies and critics.

    Returns:
        The same environment.
    """
    for module in modules:
        for layer in module.modules():
            make_primer: Any = getattr(layer, "make_tensordict_primer", None)
            if make_primer is not None:
                env.append_transform(make_primer())
    return env


class _AgentSequences(MultiAgentNetBase):
    """One layer for all agents, or one each: ``[*B, T, n_agents, F + S + 1]`` to states ``[*B, T, n_agents, S]``."""

    def __init__(self, *, n_agents: int, share_params: bool, device: torch.device | None, **sizes: Any) -> None:
        time_dim = -3 if share_params else -2  # an agent's own layer sees no agent dimension
        super().__init__(
            n_agents=n_agents,
            centralized=False,
            share_params=share_params,
            agent_dim=-2,
            device=device,
            time_dim=time_dim,
            **sizes,
        )

    def _build_single_net(self, *, device: torch.device | None, **kwargs: Any) -> nn.Module:
        return _Sequence(device=device, **kwargs)

    def _pre_forward_check(self, inputs: Tensor) -> Tensor:
        if inputs.shape[self.agent_dim] != self.n_agents:
            raise ValueError(
                f"the network has {self.n_agents} agents, but its input has shape {tuple(inputs.shape)}. Legal: "
                f"[*B, {self.n_agents}, F]."
            )
        return inputs


class _Sequence(nn.Module):
    """Steps a layer through time: ``[*B, T, ..., F + S + 1]`` to the states after each step ``[*B, T, ..., S]``."""

    layer: _GRU | _LSTM

    def __init__(
        self, *, input_size: int, hidden_size: int, cell: str, time_dim: int, device: torch.device | None
    ) -> None:
        super().__init__()
        self.layer = CELLS[cell](input_size, hidden_size, device)
        self.sizes = [input_size, CELLS[cell].states * hidden_size, 1]
        self.time_dim = time_dim

    def forward(self, inputs: Tensor) -> Tensor:
        observation, recorded, is_init = inputs.split(self.sizes, -1)
        driven = self.layer.input(observation).unbind(self.time_dim)
        starts, recorded = is_init.bool().unbind(self.time_dim), recorded.unbind(self.time_dim)
        state = recorded[0]
        states = []
        for drive, start, own in zip(driven, starts, recorded, strict=True):
            state = self.layer(drive, torch.where(start, own, state))
            states.append(state)
        return torch.stack(states, self.time_dim)


class _GRU(nn.Module):
    states = 1  # h

    def __init__(self, input_size: int, hidden_size: int, device: torch.device | None) -> None:
        super().__init__()
        self.input = nn.Linear(input_size, 3 * hidden_size, device=device)
        self.recurrence = nn.Linear(hidden_size, 3 * hidden_size, device=device)

    def forward(self, drive: Tensor, h: Tensor) -> Tensor:
        reset, update, new = drive.chunk(3, -1)
        from_reset, from_update, from_new = self.recurrence(h).chunk(3, -1)
        candidate = torch.tanh(new + torch.sigmoid(reset + from_reset) * from_new)
        z = torch.sigmoid(update + from_update)
        return (1 - z) * candidate + z * h


class _LSTM(nn.Module):
    states = 2  # h and c

    def __init__(self, input_size: int, hidden_size: int, device: torch.device | None) -> None:
        super().__init__()
        self.input = nn.Linear(input_size, 4 * hidden_size, device=device)
        self.recurrence = nn.Linear(hidden_size, 4 * hidden_size, device=device)

    def forward(self, drive: Tensor, state: Tensor) -> Tensor:
        h, c = state.chunk(2, -1)
        enter, forget, new, leave = (drive + self.recurrence(h)).chunk(4, -1)
        c = torch.sigmoid(forget + 1) * c + torch.sigmoid(enter) * torch.tanh(new)  # remembers at first
        return torch.cat([torch.sigmoid(leave) * torch.tanh(c), c], -1)


CELLS: dict[str, type[_GRU] | type[_LSTM]] = {"gru": _GRU, "lstm": _LSTM}
