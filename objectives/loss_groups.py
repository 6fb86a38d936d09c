"""The losses of several groups, which must not get in each other's way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tensordict import NestedKey, unravel_key
from torchrl.objectives import PPOLoss

from torchrl_trpo.keys import group_of, key_list, path
from torchrl_trpo.objectives.policy_update import actor_parameters


def check_separate_losses(losses: Mapping[str, PPOLoss]) -> None:
    """Raises ValueError if the policies of two groups share a parameter, or their losses write the same entry.

    A step of one would move the other's policy, or one would train on the other's advantages. Nor may they share a
    ``value_norm`` for which their critics are corrected.
    """
    owners: dict[int, str] = {}
    for group, loss in losses.items():
        for key, value in actor_parameters(loss).items(True, True):
            other = owners.setdefault(id(value), group)
            if value.requires_grad and other != group:
                raise ValueError(
                    f"groups {other!r} and {group!r} share the parameter {key} of their policies: a step of one would "
                    "move the other's policy. Legal: a policy for each group, or one group of all agents."
                )
    norms: dict[int, str] = {}
    for group, loss in losses.items():
        corrects = getattr(loss, "corrects_critic", False)  # not those of TorchRL, whose critics output raw values
        other = norms.setdefault(id(loss.value_norm), group) if corrects else group
        if other != group and losses[other].critic_network is not loss.critic_network:
            raise ValueError(
                f"value_norm: groups {other!r} and {group!r} share one, and their critics output normalised values: "
                "when it moves for one group, the values of the other's critic change. Legal: one for each group."
            )
    check_own_entries(losses)


def check_own_entries(
    losses: Mapping[str, PPOLoss] | Mapping[str | int, PPOLoss],
    names: Sequence[str] = ("advantage", "value", "value_target"),
) -> None:
    """Raises ValueError if two groups' losses have the same entry: one would train on the other's advantages."""
    taken: dict[tuple[str, NestedKey], str | int] = {}
    for group, loss in losses.items():
        for name in names if loss.critic_network is not None else {"advantage"}.intersection(names):
            key = unravel_key(getattr(loss.tensor_keys, name))
            other = taken.setdefault((name, key), group)
            if other != group:
                own = path(key)[-1]
                legal = {m: (m, own) if isinstance(m, str) else f"{own}_{m}" for m in (other, group)}
                raise ValueError(
                    f"{name}: {key!r} is the key of groups {other!r} and {group!r}: each would use what the other's "
                    "value estimator writes. Legal: a key for each group, such as "
                    f"{' and '.join(f'losses[{m!r}].set_keys({name}={key!r})' for m, key in legal.items())}."
                )


def by_group(losses: Iterable[PPOLoss]) -> dict[str | int, PPOLoss]:
    """Losses by the group of their actions, or by their number where groups are not told apart by that."""
    losses = list(losses)
    groups = [group_of(next(iter(key_list(loss.tensor_keys.action)))) for loss in losses]
    named = None not in groups and len(set(groups)) == len(groups)
    return {group if named and group else n: loss for n, (group, loss) in enumerate(zip(groups, losses, strict=True))}
