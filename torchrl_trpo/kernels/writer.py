"""Statements for one row as code, which C++ and CUDA share. What differs is the meaning of the names that it uses.

``F`` is a number, ``B`` a flag, ``FN`` begins a function, and ``TRUE``, ``where``, ``load``, ``sqrt_of`` and so on are
those of :mod:`~torchrl_trpo.kernels.cpp` for as many rows as a register holds, or of
:mod:`~torchrl_trpo.kernels.cuda` for one row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torchrl_trpo.kernels.lanes import InMemory, Items, Lane, Lanes, Statement, Statements
from torchrl_trpo.kernels.stages import Line, ends_of_stages, in_parts, lanes_of, type_of

LARGEST_INT = 2**23  # up to which float32 holds whole numbers, with room for one addition
_C_TYPES = {"f": "float", "b": "uint8_t", "i": "int64_t", "j": "int32_t"}  # of the buffers
FUNCTIONS = ("sqrt", "sin", "cos", "tan", "exp", "log", "log1p", "expm1", "atanh", "trunc", "floor")
"""Functions of a number that the code calls with ``_of`` behind their names."""
FUNCTIONS_OF_TWO = ("atan2", "pow", "fmod")
"""Such functions of two numbers."""
_CODE = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "min": "minimum({}, {})",
    "max": "maximum({}, {})",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "and": "{} & {}",
    "or": "{} | {}",
    "xor": "{} ^ {}",
    "not": "{} ^ TRUE",
    "where": "where({}, {}, {})",
    "neg": "neg_of({})",
    "abs": "abs_of({})",
    "tanh": "tanh_of({})",
    "reciprocal": "F(1.0f) / {}",
    "sign": "sign({})",
    "logaddexp": "logaddexp({}, {})",
    "isnan": "{0} != {0}",
    "floordiv": "floordiv({}, {})",
    "mod": "mod({}, {})",
    "nonzero": "{} != F(0.0f)",
    "one": "where({}, F(1.0f), F(0.0f))",
    "same": "{}",
    **{name: f"{name}_of({{}})" for name in FUNCTIONS},
    **{name: f"{name}_of({{}}, {{}})" for name in FUNCTIONS_OF_TWO},
}
DERIVED = r"""
FN F sign(F a) { return where(a > F(0.0f), F(1.0f), where(a < F(0.0f), F(-1.0f), F(0.0f))); }
FN F logaddexp(F a, F b) {
  F sum = maximum(a, b) + log1p_of(exp_of(neg_of(abs_of(a - b))));
  return where((a == b) & (abs_of(a) == F(INFINITY)), a, sum);
}
FN F mod(F a, F b) {
  F r = fmod_of(a, b);
  return where((r != F(0.0f)) & ((r < F(0.0f)) ^ (b < F(0.0f))), r + b, r);
}
FN F floordiv(F a, F b) {
  F r = fmod_of(a, b);
  F q = (a - r) / b;
  q = where((r != F(0.0f)) & ((r < F(0.0f)) ^ (b < F(0.0f))), q - F(1.0f), q);
  F f = floor_of(q);
  f = where(q - f > F(0.5f), f + F(1.0f), f);
  return where(b == F(0.0f), a / b, where(q == F(0.0f), F(0.0f), f));
}
"""
"""Functions of the others."""


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
    n_any, scratch = [0], _Scratch(statements)
    needed = _needed(statements, [value for value, *_ in (*stores, *guards)])
    ends = ends_of_stages(statements, needed)
    for index in needed:
        lines = stages[-1]
        operation, kind, arguments = statements[index]
        if operation in {"take", "put"}:
            lines.append(Line(None, f"fail = fail | ({_term(arguments[1])} < F(0.0f))", lanes_of(arguments[1:2])))
        if operation in {"linear", "map", "table", "put"}:
            lines.append(Line(None, getattr(scratch, operation)(index, arguments, inputs), lanes_of(arguments)))
            continue
        if operation == "item":
            lines.append(Line(index, f"({type_of(kind)}){scratch.item(*arguments)}", []))
        elif operation == "take":
            lines.append(Line(index, f"({type_of(kind)}){scratch.take(*arguments)}", lanes_of(arguments)))
        elif operation == "drawn_if":
            place = f"(const float*)in[{inputs[arguments[0]][0]}], {_term(arguments[1])}, P, i"
            lines.append(Line(index, f"load_lane({place})", lanes_of(arguments)))
        elif operation in {"load", "shared"}:
            lines.append(Line(index, _load(statements[index], inputs), []))
        elif operation == "any":
            number = n_any[-1]
            for slot, argument in enumerate(arguments, 2 * number):
                hit = f"hit[{slot}] = hit[{slot}] | only({_term(argument)}, valid)"
                lines.append(Line(None, hit, lanes_of([argument])))
            n_any[-1] = number + 1
            if index in ends:
                stages.append([])
                n_any.append(number + 1)
            stages[-1].append(Line(index, f"any[{number}]", []))
        else:
            lines.append(Line(index, _CODE[operation].format(*map(_term, arguments)), lanes_of(arguments)))
        if kind in {"i", "j"} and operation != "where":
            lines.append(Line(None, f"fail = fail | (abs_of(v{index}) > F({LARGEST_INT}.0f))", [index]))
    for block in _blocks(stores):
        code = scratch.store(block[0]) if isinstance(block[0].value, Items) else _store(block)
        stages[-1].append(Line(None, code, lanes_of([store.value for store in block])))
    for value, expected in guards:
        wrong = f"({_term(value)} {'^' if isinstance(expected, bool) else '!='} {_term(expected)})"
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


class _Scratch:
    """Memory for the results of statements that have several: numbers that are next to each other."""

    def __init__(self, statements: Sequence[Statement]) -> None:
        self.size = max((len(each.arguments) for each in statements if each.operation == "linear"), default=0)
        self._first: dict[int, int] = {}
        self._statements = statements

    def linear(self, index: int, arguments: Sequence[Any], inputs: Mapping[str, tuple[int, int]]) -> str:
        """A product of a vector and a matrix in memory."""
        name, first, *steps, n_outputs = arguments[:5]
        terms, code, vector = arguments[5:], "", "scratch"
        if isinstance(terms[0], Items):
            vector = f"scratch + {self._first[terms[0].block] + terms[0].first}"
            n_inputs = terms[0].length
        else:
            code = " ".join(f"scratch[{number}] = {_term(term)};" for number, term in enumerate(terms))
            n_inputs = len(terms)
        buffer, row = inputs[name]
        template = ", ".join(map(str, (n_inputs, *steps, n_outputs)))
        place = f"(const float*)in[{buffer}] + {row + first}"
        return f"{code} linear<{template}>({vector}, {place}, scratch + {self._take(index, n_outputs)})"

    def map(self, index: int, arguments: Sequence[Any], inputs: Mapping[str, tuple[int, int]]) -> str:
        """An operation on each number of vectors."""
        operation, length, *operands = arguments
        terms = []
        for operand in operands:
            if isinstance(operand, Items):
                terms.append(f"scratch[{self._first[operand.block] + operand.first} + j]")
            elif isinstance(operand, InMemory):
                buffer, row = inputs[operand.name]
                terms.append(f"F(((const float*)in[{buffer}])[{row + operand.first} + j * {operand.step}])")
            else:
                terms.append(_term(operand))
        first = self._take(index, length)
        return f"for (int j = 0; j < {length}; j++) scratch[{first} + j] = {_CODE[operation].format(*terms)}"

    def table(self, index: int, arguments: Sequence[Any], inputs: Mapping[str, tuple[int, int]]) -> str:
        """Lanes of an input."""
        name, lane, length = arguments
        buffer, row = inputs[name]
        c_type, first = _C_TYPES[self._statements[index].kind], self._take(index, length)
        load = f"load((const {c_type}*)in[{buffer}] + ({row + lane} + j) * P + i)"
        return f"for (int j = 0; j < {length}; j++) scratch[{first} + j] = (F){load}"

    def put(self, index: int, arguments: Sequence[Any], inputs: Mapping[str, tuple[int, int]]) -> str:
        """A copy with another number at a computed place of each row."""
        items, place, value = arguments
        first = self._take(index, items.length)
        copy = f"for (int j = 0; j < {items.length}; j++) scratch[{first} + j] = (&{self.item(items)})[j]"
        return f"{copy}; put(scratch + {first}, {items.length}, {_term(place)}, (F){_term(value)})"

    def take(self, items: Items, place: Any) -> str:
        return f"take(&{self.item(items)}, {items.length}, {_term(place)})"

    def store(self, store: Store) -> str:
        """Items, in rows of a buffer."""
        place = f"(float*)out[{store.buffer}] + ({store.row} + j) * P + i"
        first = self._first[store.value.block] + store.value.first
        return f"for (int j = 0; j < {store.value.length}; j++) store({place}, only(scratch[{first} + j], valid))"

    def item(self, items: Items) -> str:
        return f"scratch[{self._first[items.block] + items.first}]"

    def _take(self, index: int, length: int) -> int:
        self._first[index] = self.size
        self.size += length
        return self._first[index]


def _load(statement: Statement, inputs: Mapping[str, tuple[int, int]]) -> str:
    operation, kind, (name, lane) = statement
    buffer, row = inputs[name]
    place = f"{row + lane} * P + i" if operation == "load" else row + lane
    return f"{operation}((const {_C_TYPES[kind]}*)in[{buffer}] + {place})"


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
        c_type = "bool" if kind == "b" else _C_TYPES[kind]
        place = f"({c_type}*)out[{buffer}] + {row} + i * S[{buffer}], S[{buffer}], n - i"
        if len(block) == 1:
            return f"store_rows({place}, {_term(value)})"
        values = ", ".join(_term(store.value) for store in block)
        return f"{{ const F block[] = {{{values}}}; store_rows<{len(block)}>({place}, block); }}"
    return f"store(({_C_TYPES[kind]}*)out[{buffer}] + {row} * P + i, only({_term(value)}, valid))"


def _needed(statements: Sequence[Statement], reads: Sequence[Any]) -> list[int]:
    """The statements whose results are used, in order."""
    needed: set[int] = set()
    pending = [reads]
    while pending:
        arguments = pending.pop()
        for index in (*lanes_of(arguments), *(each.block for each in arguments if isinstance(each, Items))):
            if index not in needed:
                needed.add(index)
                pending.append(statements[index].arguments)
    return sorted(needed)


def _term(value: Any) -> str:
    """A lane or a constant as code."""
    if isinstance(value, Lane):
        return f"v{value.number}"
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if math.isinf(value):
        return "F(INFINITY)" if value > 0 else "F(-INFINITY)"
    return "F(NAN)" if math.isnan(value) else f"F({float(value)!r}f)"
