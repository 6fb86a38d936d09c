"""The memory for the results of statements that have several: numbers that are next to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_trpo.kernels.lanes import InMemory, Items, Statement
from torchrl_trpo.kernels.stages import Line, lanes_of
from torchrl_trpo.kernels.terms import C_TYPES, CODE, term


class Scratch:
    """Writes statements with several results, and those that read them.

    The memory is as small as it can be, so that the processor has it in its nearest cache: results that nothing reads
    any more make room. An operation on each number whose results another one reads, and nothing else, is done in the
    other's loop.

    Args:
        statements: the statements.
        inputs: by the names of the inputs, the number of the input buffer and the row where they begin.
        needed: the statements that are written, in the order in which they will be.
        stores: by statements with several results, what is written of them: the items, the number of the output buffer
            and the row where they begin.

    Attributes:
        size: how many numbers the memory holds.
    """

    def __init__(
        self,
        statements: Sequence[Statement],
        inputs: Mapping[str, tuple[int, int]],
        needed: Sequence[int],
        stores: Mapping[int, Sequence[tuple[Items, int, int]]],
    ) -> None:
        self._statements, self._inputs, self._stores = statements, inputs, stores
        linear = [statements[index] for index in needed if statements[index].operation == "linear"]
        self.size = max((len(each.arguments) for each in linear), default=0)
        readers: dict[int, list[int]] = {}
        for index in needed:
            for items in _items(statements[index].arguments):
                readers.setdefault(items.block, []).append(index)
        self._within = {block for block in readers if block not in stores and self._is_within(block, readers[block])}
        written = [index for index in needed if index not in self._within]
        self._last = {items.block: index for index in written for items in _items(self._operands(index))}
        self._taken: dict[int, tuple[int, int]] = {}  # where results begin, and their number
        self._free: dict[int, list[int]] = {}  # by the number of results

    def _is_within(self, block: int, readers: Sequence[int]) -> bool:
        """Whether a statement can be done in the loop of the one that reads it."""
        (operation, _, arguments), (other, _, operands) = (self._statements[each] for each in (block, readers[0]))
        return operation == other == "map" and len(readers) == 1 and arguments[1] == operands[1]

    def lines(self, index: int) -> list[Line]:
        """The lines of a statement with several results."""
        if index in self._within:
            return []
        operation, _, arguments = self._statements[index]
        code = getattr(self, f"_{operation}")(index, *arguments)
        stores = [Line(None, self._store(*store), []) for store in self._stores.get(index, ())]
        self._release(index)
        return [Line(None, code, lanes_of(self._operands(index))), *stores]

    def value(self, index: int) -> str:
        """The code of a statement that reads one number, ``item`` or ``take``."""
        items, *place = self._statements[index].arguments
        code = f"take({self._place(items)}, {items.length}, {term(*place)})" if place else f"*({self._place(items)})"
        self._release(index)
        return code

    def _linear(self, index: int, name: str, first: int, *sizes_and_inputs: Any) -> str:
        """A product of a vector and a matrix in memory."""
        (*steps, n_outputs), inputs = sizes_and_inputs[:3], sizes_and_inputs[3:]
        code, vector, n_inputs = "", "scratch", len(inputs)
        if isinstance(inputs[0], Items):
            vector, n_inputs = self._place(inputs[0]), inputs[0].length
        else:
            code = " ".join(f"scratch[{number}] = {term(each)};" for number, each in enumerate(inputs)) + " "
        buffer, row = self._inputs[name]
        template = ", ".join(map(str, (n_inputs, *steps, n_outputs)))
        place, result = f"(const float*)in[{buffer}] + {row + first}", self._take(index, n_outputs)
        return f"{code}linear<{template}>({vector}, {place}, scratch + {result})"

    def _map(self, index: int, _: str, length: int, *__: Any) -> str:
        """An operation on each number of vectors. The results may take the place of one of these."""
        code = self._each(index)
        self._release(index)
        return f"for (int j = 0; j < {length}; j++) scratch[{self._take(index, length)} + j] = {code}"

    def _each(self, index: int) -> str:
        """The number ``j`` of such an operation."""
        operation, _, *operands = self._statements[index].arguments
        terms = []
        for operand in operands:
            if isinstance(operand, Items) and operand.block in self._within:
                terms.append(f"({self._each(operand.block)})")
            elif isinstance(operand, Items):
                terms.append(f"({self._place(operand)})[j]")
            elif isinstance(operand, InMemory):
                buffer, row = self._inputs[operand.name]
                terms.append(f"F(((const float*)in[{buffer}])[{row + operand.first} + j * {operand.step}])")
            else:
                terms.append(term(operand))
        return CODE[operation].format(*terms)

    def _table(self, index: int, name: str, lane: int, length: int) -> str:
        """Lanes of an input."""
        buffer, row = self._inputs[name]
        load = f"load((const {C_TYPES[self._statements[index].kind]}*)in[{buffer}] + ({row + lane} + j) * P + i)"
        return f"for (int j = 0; j < {length}; j++) scratch[{self._take(index, length)} + j] = (F){load}"

    def _put(self, index: int, items: Items, place: Any, value: Any) -> str:
        """A copy with another number at a computed place of each row."""
        first = self._take(index, items.length)
        copy = f"for (int j = 0; j < {items.length}; j++) scratch[{first} + j] = ({self._place(items)})[j]"
        return f"{copy}; put(scratch + {first}, {items.length}, {term(place)}, (F){term(value)})"

    def _store(self, items: Items, buffer: int, row: int) -> str:
        """Items, in rows of a buffer."""
        place = f"(float*)out[{buffer}] + ({row} + j) * P + i"
        return f"for (int j = 0; j < {items.length}; j++) store({place}, only(({self._place(items)})[j], valid))"

    def _place(self, items: Items) -> str:
        return f"scratch + {self._taken[items.block][0] + items.first}"

    def _take(self, index: int, length: int) -> int:
        """A place for results. One that is free is of results of the same number."""
        free = self._free.setdefault(length, [])
        if not free:
            free.append(self.size)
            self.size += length
        self._taken[index] = free.pop(), length
        return self._taken[index][0]

    def _release(self, index: int) -> None:
        """Makes room where nothing reads any more after a statement."""
        for block in {index, *(items.block for items in _items(self._operands(index)))}:
            if block in self._taken and self._last.get(block, index) == index:
                first, length = self._taken.pop(block)
                self._free[length].append(first)

    def _operands(self, index: int) -> list[Any]:
        """What a statement reads, also in what is done in its loop."""
        operands = []
        for argument in self._statements[index].arguments:
            is_within = isinstance(argument, Items) and argument.block in self._within
            operands += self._operands(argument.block) if is_within else [argument]
        return operands


def _items(arguments: Sequence[Any]) -> list[Items]:
    return [argument for argument in arguments if isinstance(argument, Items)]
