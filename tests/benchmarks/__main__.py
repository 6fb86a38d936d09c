"""The costs of the library, as ratios inside one run.

    python -m tests.benchmarks
    python -m tests.benchmarks --only sampling,update --repetitions 3 --quick

Every time is a median of repetitions taken in turn, so that a drift of the machine's speed hits all alike, on one
thread. All figures are written as JSON too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks import comparison, iteration, learning, memory, ranks, sampling, scaling, update
from tests.benchmarks.timing import machine

THEMES: dict[str, Callable[[int, bool], dict[str, float]]] = {
    "update": update.bench,
    "textbook": comparison.bench,
    "scaling": scaling.bench,
    "memory": memory.bench,
    "sampling": sampling.bench,
    "iteration": iteration.bench,
    "ranks": ranks.bench,
    "learning": learning.bench,
}
"""What can be measured; each takes the repetitions and whether to be quick, and gives figures by label."""


def main() -> None:
    """Measures the themes asked for, prints one table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_themes, default=list(THEMES), help=f"a list of {','.join(THEMES)}")
    parser.add_argument("--repetitions", type=int, default=7, help="the large tasks get fewer")
    parser.add_argument("--quick", action="store_true", help="leave out the largest sizes")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/bench.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = {"machine": machine(), "repetitions": arguments.repetitions, "quick": arguments.quick}
    print(", ".join(f"{name} {value}" for name, value in record["machine"].items()))
    for theme in arguments.only:
        torch.manual_seed(0)
        start = time.perf_counter()
        figures = THEMES[theme](arguments.repetitions, arguments.quick)
        print(f"\n{theme} ({time.perf_counter() - start:.0f} s)")
        for label, value in figures.items():
            print(f"  {label:<92} {value:>12.4g}", flush=True)
        record[theme] = figures
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nWritten to {arguments.out}")


def _themes(names: str) -> list[str]:
    unknown = [name for name in names.split(",") if name not in THEMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no theme. Legal: {', '.join(THEMES)}.")
    return names.split(",")


if __name__ == "__main__":
    main()
