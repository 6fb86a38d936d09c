from __future__ import annotations

import gc
import multiprocessing

import pytest
import torch
from tensordict.nn import set_composite_lp_aggregate

from tests.rank_processes import PRELOADED

torch.set_num_threads(1)
collect_ignore = ["device"]  # it registers a device for its whole process: a call of its own, make test


def pytest_collection_finish():
    """What has been imported stays, and the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_probs_by_part():
    """What TorchRL's PPOLoss wants for composite actions."""
    with set_composite_lp_aggregate(False):
        yield


@pytest.fixture(autouse=True)
def _no_plots(request, monkeypatch):
    """Runs of this process draw no pictures, a third of the time of a short run, unless a test is about them."""
    if "plots" not in request.keywords:
        for name in ("plot_learning_curve", "plot_diagnostics"):
            monkeypatch.setattr(f"torchrl_trpo.reporting.plots.{name}", lambda *_, **__: None)


@pytest.fixture
def quick_processes(monkeypatch):
    """Processes of environments and studies that are forked from one that has imported what they need."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_context", lambda *_: context)
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(None, force=True)
