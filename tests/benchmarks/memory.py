"""Peak memory of one update, in a fresh process for each case (Linux).

python -m tests.benchmarks.memory --rows 100000 --chunk-size 10000
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.benchmarks.problems import policy_and_data
from tests.benchmarks.scaling import CHUNK_SIZE
from tests.benchmarks.update import DEFAULT_SUBSAMPLE
from torchrl_trpo import TrustRegionUpdater


def bench(repetitions: int, quick: bool) -> dict[str, float]:
    """Peaks with and without ``chunk_size``; memory does not vary, each is measured once.

    Args:
        repetitions: unused.
        quick: whether the large batch is ten times smaller.

    Returns:
        Figures by label.
    """
    small, large = (10_000, 100_000) if quick else (100_000, 1_000_000)
    results = {}
    for subsample, name in ((DEFAULT_SUBSAMPLE, "1/10 of the rows in F"), (1.0, "all rows in F")):
        cases = {"whole": (small, None), "chunked": (small, CHUNK_SIZE)}
        cases |= {"chunked, large": (large, CHUNK_SIZE)} if subsample < 1 else {}
        peaks = {}
        for case, (rows, chunk_size) in cases.items():
            measured = _in_fresh_process(rows, chunk_size, subsample)
            label = f"{name}, {rows} rows, chunk_size={chunk_size}"
            results[f"{label}: data [MB]"] = measured["data"]
            results[f"{label}: peak with data [MB]"] = measured["peak"]
            peaks[case] = measured
        results[f"{name}: peak of {small} rows, chunked / whole"] = peaks["chunked"]["peak"] / peaks["whole"]["peak"]
        if subsample < 1:
            more = peaks["chunked, large"]["peak"] - peaks["chunked, large"]["data"]
            label = f"{name}, chunked: peak of {large} rows without data / peak of {small} rows"
            results[label] = more / peaks["chunked"]["peak"]
    return results


def peak_of_update(rows: int, chunk_size: int | None, fisher_subsample: float) -> dict[str, float]:
    """The peak resident memory of one update of a single agent, above what there was before the data was made.

    Args:
        rows: the number of environment steps.
        chunk_size: of the loss.
        fisher_subsample: of the updater.

    Returns:
        In MB: ``"peak"``, and ``"data"``, the part of it that is the batch.
    """
    loss, data = policy_and_data(1, share_params=True, rows=100, chunk_size=chunk_size)
    updater = TrustRegionUpdater(loss, fisher_subsample=fisher_subsample)
    updater.step(data)  # loads what is loaded once
    before = _status("VmRSS")
    _, data = policy_and_data(1, share_params=True, rows=rows)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    updater.step(data)
    return {"peak": _status("VmHWM") - before, "data": data.bytes() / 1e6}


def _status(name: str) -> float:
    """A line of the process's status, in MB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def _in_fresh_process(rows: int, chunk_size: int | None, fisher_subsample: float) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.memory", f"--rows={rows}", f"--subsample={fisher_subsample}"]
    command += [] if chunk_size is None else [f"--chunk-size={chunk_size}"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    """Measures one case and prints it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--chunk-size", type=int)
    parser.add_argument("--subsample", type=float, default=DEFAULT_SUBSAMPLE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(peak_of_update(arguments.rows, arguments.chunk_size, arguments.subsample)))


if __name__ == "__main__":
    main()
