from __future__ import annotations

import multiprocessing

import pytest
import torch
from tensordict.nn import set_composite_lp_aggregate

from tests.rank_processes import PRELOADED

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_probs_by_part():
    """What TorchRL's PPOLoss wants for composite actions."""
    with set_composite_lp_aggregate(False):
        yield


@pytest.fixture
def without_picture(monkeypatch):
    """Runs end without their learning curve, which takes as long to draw as an iteration of these runs."""
    monkeypatch.setattr("torchrl_trpo.run.plot_learning_curve", lambda *_, **__: None)


@pytest.fixture
def quick_processes():
    """Processes of environments that are forked from one that has imported what they need."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(None, force=True)
