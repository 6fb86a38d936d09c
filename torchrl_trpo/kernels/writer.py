"""Statements for one row as code, which C++ and CUDA share. What differs is the meaning of the names that it uses.

``F`` is a number, ``B`` a flag, ``FN`` begins a function, and ``TRUE``, ``where``, ``load``, ``sqrt_of`` and so on are
those of :mod:`~torchrl_trpo.kernels.cpp` for as many rows as a register holds, or of
:mod:`~torchrl_trpo.kernels.cuda` for one row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torchrl_trpo.kernels.lanes import BLOCKS, Items, Lanes, Statement, Statements
from torchrl_trpo.kernels.scratch import Scratch
from torchrl_trpo.kernels.stages import Line, ends_of_stages, in_parts, lanes_of, type_of
from torchrl_trpo.kernels.terms import C_TYPES, CODE, term

LARGEST_INT = 2**23  # up to which float32 holds whole numbers, with room for one addition


class Store(NamedTuple):
    """A lane or constant that the function writes.

    Attributes:
        value: the lane or constant, or items, for as many rows of the buffer.
        kind: its kind.
        buffer: the number of the output buffer.
        row: the row of the buffer.
        by_row: whether the buffer is ``[n_rows, ...]`` with a stride of its own, and ``row`` the place in a row.
    """

    value: Any
    kind: str
    buffer: int
    row: int
    by_row: bool = False


class Guard(NamedTuple):
    """What must hold for the results to be right.

    Attributes:
        value: the lane or constant.
        expected: the value that it must have in all rows.
    """

    value: Any
    expected: Any

    @classmethod
    def of(cls, statements: Statements, lanes: Lanes, expected: Any) -> Guard:
        """The guard of a tensor without dimensions."""
        kind = "b" if isinstance(expected, bool) else lanes.kind
        return cls(statements.convert(lanes.values.reshape(-1)[0], kind), expected)


class Code(NamedTuple):
    """A function of rows.

    Attributes:
        functions: the code: ``stage0``, ``stage1`` and so on. One begins when the one before is done for all rows.
        arguments: their arguments.
        n_any: how many statements are about all rows, up to the end of each stage.
        n_kept: how many numbers the parts of a stage hand on.
        n_held: how many numbers of each row the stages hand on.
        n_scratch: how many numbers the results of statements that have several take.
        operations: the operations of the statements.
    """

    functions: str
    arguments: str
    n_any: list[int]
    n_kept: int
    n_held: int
    n_scratch: int
    operations: set[str]


def write(
    statements: Sequence[Statement],
    inputs: Mapping[str, tuple[int, int]],
    stores: Sequence[Store],
    guards: Sequence[Guard],
    parameters: str,
) -> Code:
    """Writes the statements that are needed.

    Args:
        statements: the statements.
        inputs: by the names of the inputs, the number of the input buffer and the row where they begin.
        stores: what is written.
        guards: what must hold.
        parameters: the parameters of the parts.

    Returns:
        The code. It sets ``fail`` where a guard does not hold.
    """
    stages: list[list[Line]] = [[]]
    needed = _needed(statements, [value for value, *_ in (*stores, *guards)])
    in_memory: dict[int, list[tuple[Items, int, int]]] = {}
    for store in stores:
        if isinstance(store.value, Items):
            in_memory.setdefault(store.value.block, []).append((store.value, store.buffer, store.row))
    n_any, scratch = [0], Scratch(statements, inputs, needed, in_memory)
    ends = ends_of_stages(statements, needed)
    for index in needed:
        lines = stages[-1]
        operation, kind, arguments = statements[index]
        if operation in {"take", "put"}:
            lines.append(Line(None, f"fail = fail | ({term(arguments[1])} < F(0.0f))", lanes_of(arguments[1:2])))
        if operation in BLOCKS:
            lines += scratch.lines(index)
            continue
        if operation in {"item", "take"}:
            lines.append(Line(index, f"({type_of(kind)}){scratch.value(index)}", lanes_of(arguments)))
        elif operation == "drawn_if":
            place = f"(const float*)in[{inputs[arguments[0]][0]}], {term(arguments[1])}, P, i"
            lines.append(Line(index, f"load_lane({place})", lanes_of(arguments)))
        elif operation in {"load", "shared"}:
            lines.append(Line(index, _load(statements[index], inputs), []))
        elif operation == "any":
            number = n_any[-1]
            for slot, argument in enumerate(arguments, 2 * number):
                hit = f"hit[{slot}] = hit[{slot}] | only({term(argument)}, valid)"
                lines.append(Line(None, hit, lanes_of([argument])))
            n_any[-1] = number + 1
            if index in ends:
                stages.append([])
                n_any.append(number + 1)
            stages[-1].append(Line(index, f"any[{number}]", []))
        else:
            lines.append(Line(index, CODE[operation].format(*map(term, arguments)), lanes_of(arguments)))
        if kind in {"i", "j"} and operation != "where":
            lines.append(Line(None, f"fail = fail | (abs_of(v{index}) > F({LARGEST_INT}.0f))", [index]))
    for block in _blocks([store for store in stores if not isinstance(store.value, Items)]):
        stages[-1].append(Line(None, _store(block), lanes_of([store.value for store in block])))
    for value, expected in guards:
        wrong = f"({term(value)} {'^' if isinstance(expected, bool) else '!='} {term(expected)})"
        stages[-1].append(Line(None, f"fail = fail | {wrong}", lanes_of([value])))
    parts, n_kept, n_held = in_parts(stages, statements)
    names = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters))
    functions = []
    for stage, codes in enumerate(parts):
        functions += [f"PART part{stage}_{k}({parameters}) {{\n{code}\n}}" for k, code in enumerate(codes)]
        calls = " ".join(f"part{stage}_{k}({names});" for k in range(len(codes)))
        functions.append(f"PART stage{stage}({parameters}) {{ {calls} }}")
    operations = {statements[index].operation for index in needed}
    return Code("\n".join(functions), names, n_any, n_kept, n_held, scratch.size, operations)


def _load(statement: Statement, inputs: Mapping[str, tuple[int, int]]) -> str:
    operation, kind, (name, lane) = statement
    buffer, row = inputs[name]
    place = f"{row + lane} * P + i" if operation == "load" else row + lane
    return f"{operation}((const {C_TYPES[kind]}*)in[{buffer}] + {place})"


def _blocks(stores: Sequence[Store]) -> list[list[Store]]:
    """Stores of numbers that are next to each other in a row, together."""
    blocks: list[list[Store]] = []
    for store in stores:
        last = blocks[-1][-1] if blocks else None
        follows = last is not None and store.by_row and store[1:] == (last.kind, last.buffer, last.row + 1, last.by_row)
        if follows and store.kind == "f":
            blocks[-1].append(store)
        else:
            blocks.append([store])
    return blocks


def _store(block: Sequence[Store]) -> str:
    value, kind, buffer, row, by_row = block[0]
    if by_row:
        c_type = "bool" if kind == "b" else C_TYPES[kind]
        place = f"({c_type}*)out[{buffer}] + {row} + i * S[{buffer}], S[{buffer}], n - i"
        if len(block) == 1:
            return f"store_rows({place}, {term(value)})"
        values = ", ".join(term(store.value) for store in block)
        return f"{{ const F block[] = {{{values}}}; store_rows<{len(block)}>({place}, block); }}"
    return f"store(({C_TYPES[kind]}*)out[{buffer}] + {row} * P + i, only({term(value)}, valid))"


def _needed(statements: Sequence[Statement], reads: Sequence[Any]) -> list[int]:
    """The statements whose results are used, in order. Where some are in memory, each is as late as it can be."""
    needed: dict[int, None] = {}
    pending = _reads(reads)[::-1]
    while pending:
        missing = [index for index in _reads(statements[pending[-1]].arguments) if index not in needed]
        if missing:
            pending += missing[::-1]
        else:
            needed[pending.pop()] = None
    return list(needed) if {statements[index].operation for index in needed} & BLOCKS else sorted(needed)


def _reads(arguments: Sequence[Any]) -> list[int]:
    """The statements that arguments read."""
    return [*lanes_of(arguments), *(argument.block for argument in arguments if isinstance(argument, Items))]
