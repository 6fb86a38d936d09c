"""Policies and critics, feed-forward and recurrent."""

from torchrl_trpo.networks.builders import TeamCritic, make_actor, make_central_critic, make_critic, make_value_norm
from torchrl_trpo.networks.recurrent import RecurrentModule, carry_states

__all__ = [
    "RecurrentModule",
    "TeamCritic",
    "carry_states",
    "make_actor",
    "make_central_critic",
    "make_critic",
    "make_value_norm",
]
