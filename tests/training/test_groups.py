"""What is done for the losses of several groups at once."""

from __future__ import annotations

import pytest
from tensordict.nn import TensorDictModule
from torch import nn

from tests.cases import make_actor, make_data
from torchrl_trpo.objectives import TRPOLoss
from torchrl_trpo.training.critic_fit import critic_optimizer, fit_critics
from torchrl_trpo.training.estimators import estimate_advantages


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        *(("estimate_advantages", shared) for shared in ("advantage", "value", "value_target")),
        *(("fit_critics", shared) for shared in ("value", "value_target")),
    ],
)
def test_losses_of_groups_that_write_the_same_entry_are_refused(name, shared):
    """The second group's advantages were those of both, and so were its targets."""
    losses = []
    for group in ("cars", "trucks"):
        critic = TensorDictModule(nn.Linear(3, 1).double(), [(group, "observation")], [(group, "value")])
        losses.append(TRPOLoss(make_actor(), critic))
        own = {key: (group, key) for key in ("advantage", "value", "value_target") if key != shared}
        losses[-1].set_keys(action=(group, "action"), **own)
    data, optimizer = make_data(make_actor()), critic_optimizer(losses, lr=1e-3)
    calls = {
        "estimate_advantages": lambda: estimate_advantages(losses, data),
        "fit_critics": lambda: fit_critics(losses, optimizer, data, epochs=1, minibatch_size=10),
    }
    legal = rf"{shared}: .* groups 'cars' and 'trucks'.*losses\['trucks'\].set_keys\({shared}=\('trucks', "
    with pytest.raises(ValueError, match=legal):
        calls[name]()
