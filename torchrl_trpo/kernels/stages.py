"""The lines of a function of rows, in parts: in stages, each of which waits for the one before in all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torchrl_trpo.kernels.lanes import BLOCKS, Lane, Statement

_STATEMENTS_OF_A_PART = 1000  # a compiler's time grows faster than the length of a function


class Line(NamedTuple):
    """A line of code, the lane that it makes, and the lanes that it reads."""

    lane: int | None
    code: str
    reads: list[int]


def ends_of_stages(statements: Sequence[Statement], needed: Sequence[int]) -> set[int]:
    """The statements ``any`` that must be known before what comes after them: random numbers are drawn by them.

    A guess would be wrong nearly always. It is made anyway where results are in memory, which is that of a few rows.
    """
    if {statements[index].operation for index in needed} & BLOCKS:
        return set()
    seen: set[int] = set()
    found: set[int] = set()
    pending = [index for index in needed if statements[index].operation == "drawn_if"]
    while pending:
        for lane in lanes_of(statements[pending.pop()].arguments):
            if statements[lane].operation == "any":
                found.add(lane)
            elif lane not in seen:
                seen.add(lane)
                pending.append(lane)
    return found


def in_parts(stages: Sequence[Sequence[Line]], statements: Sequence[Statement]) -> tuple[list[list[str]], int, int]:
    """The lines of each stage in functions of bounded length.

    What a later function of a stage reads is kept in an array, and what a later stage reads is held in one for all
    rows. Returns their lengths too.
    """

    def declared(lane: int) -> str:
        return f"const {type_of(statements[lane].kind)} v{lane}"

    size = _STATEMENTS_OF_A_PART
    parts = [[lines[start : start + size] for start in range(0, len(lines), size)] for lines in stages]
    everywhere = [((stage, k), part) for stage, each in enumerate(parts) for k, part in enumerate(each)]
    made_in = {made: where for where, part in everywhere for made, *_ in part if made is not None}
    last_read: dict[int, tuple[int, int]] = {}
    for where, part in everywhere:
        last_read |= {read: where for *_, reads in part for read in reads if made_in[read] != where}
    crossing = (lane for lane, where in last_read.items() if where[0] != made_in[lane][0])
    held = {lane: number for number, lane in enumerate(crossing)}
    kept: dict[int, int] = {}
    free: list[int] = []
    n_kept = 0
    written: list[list[str]] = [[] for _ in stages]
    for where, part in everywhere:
        here: set[int] = set()
        code = []
        for made, line, reads in part:
            for read in reads:
                if made_in[read] != where and read not in here:
                    here.add(read)
                    value = f"load(held + {held[read]} * P + i)" if read in held else f"kept[{kept[read]}]"
                    code.append(f"  {declared(read)} = ({type_of(statements[read].kind)}){value};")
            code.append(f"  {line};" if made is None else f"  {declared(made)} = {line};")
            if made in held:
                code.append(f"  store(held + {held[made]} * P + i, (F)v{made});")
            elif made in last_read:
                kept[made] = free.pop() if free else n_kept
                n_kept = max(n_kept, kept[made] + 1)
                code.append(f"  kept[{kept[made]}] = (F)v{made};")
        free += [kept[lane] for lane in here if lane in kept and last_read[lane] == where]
        written[where[0]].append("\n".join(code))
    return written, n_kept, len(held)


def lanes_of(arguments: Sequence[Any]) -> list[int]:
    """The lanes that arguments read. Results of statements that have several are in memory."""
    return [argument.number for argument in arguments if isinstance(argument, Lane)]


def type_of(kind: str) -> str:
    """The type of a lane."""
    return "B" if kind == "b" else "F"
