"""Warnings name the line of the user's code, however deep in the libraries they come from."""

import pytest
import torch

from tests.cases import make_actor, make_data
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.envs import BatchedResetVmasEnv, CompiledCollector
from torchrl_trpo.errors import close_names
from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss


def update(*, compiled=False, broken=False):
    actor = make_actor()
    data = make_data(actor)
    if broken:
        data["advantage"][0, 0] = torch.nan
    TrustRegionUpdater(HATRPOSequentialObjective(TRPOLoss(actor, compiled=compiled))).step(data)


def update_within_a_decorator():
    torch.no_grad()(update)(broken=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: update(broken=True), "gradient of region .* is not finite"),
        (update_within_a_decorator, "gradient of region .* is not finite"),
        (lambda: update(compiled=True), "The policy's update is not compiled"),
        (
            lambda: CompiledCollector(
                BatchedResetVmasEnv("simple", num_envs=2, seed=0), frames_per_batch=4, total_frames=4
            ),
            "Rollouts are not compiled",
        ),
    ],
    ids=["step", "decorator", "compiled step", "collector"],
)
def test_a_warning_is_of_the_users_line(call, message):
    with pytest.warns(UserWarning, match=message) as caught:
        call()
    assert {each.filename for each in caught} == {__file__}


@pytest.mark.parametrize(
    ("given", "legal", "first"),
    [
        ("('agents', 'obs')", ["('agents', 'loc')", "('agents', 'observation')"], "('agents', 'observation')"),
        ("max_kl", ["max_steps", "updater.max_kl"], "updater.max_kl"),
    ],
)
def test_the_nearest_name_comes_first(given, legal, first):
    assert close_names(given, legal)[0] == first
