"""How deep a compiled program is: the longest chain of operations of a kind of which each waits for the one before.

Read off the program's text by following what depends on what, through fusions, calls, branches and loops. A loop is a
matrix: entry (j, i) is the longest chain in one turn from the i-th value it carries to the j-th; turns multiply it,
with max for the sum and + for the product. So iterations that do not wait for each other add nothing to the depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dreamer4_jax.parallel.hlo import Instruction, Module, operand_names, trip_count

NEVER = -np.inf  # does not depend

Marked = Callable[[Instruction], bool]
Value = np.ndarray | list  # longest chains [sources] to an array; of a tuple a list, one for each part


@dataclass(frozen=True)
class Depth:
    """Of the marked operations of one call of a program.

    Attributes:
      chain: the longest chain in which each waits for the one before: time on a machine with any number of processors.
      work: all of them, loops multiplied.
    """

    chain: int
    work: int


def depth(module: Module, marked: Marked, *, trips: int | None = None) -> Depth:
    """Chain and work of the operations that `marked` picks. `trips`: of loops whose length the text does not hold."""
    reader = _Reader(module, marked, trips)
    result = reader.computation(module.entry, None, 1)
    longest = float(_flat(result, 1).max())
    return Depth(int(longest), int(round(reader.work(module.entry))))


def in_scope(scope: str, opcode: str = "dot") -> Marked:
    """Picks the operations of an opcode that a `jax.named_scope` has made."""
    return lambda at: at.opcode == opcode and f"/{scope}/" in at.attributes


def _flat(value: Value, sources: int) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    return np.max([_flat(v, sources) for v in value] + [np.full(sources, NEVER)], axis=0)


class _Reader:
    def __init__(self, module: Module, marked: Marked, trips: int | None):
        self.module, self.marked, self.trips = module, marked, trips

    def work(self, name: str) -> float:
        """Marked operations of one call of a computation."""
        lines, total = self.module.computations[name], 0.0
        for at in lines:
            total += self.marked(at)
            if at.opcode == "while":
                total += self._count(at, lines) * self.work(at.called("body")[0])
            elif at.opcode == "conditional":
                total += max(map(self.work, _branches(at)))
            else:
                total += sum(map(self.work, _callees(at)))
        return total

    def computation(self, name: str, arguments: Sequence[Value] | None, sources: int) -> Value:
        """Chains to its result, from what its `arguments` have; those of the program itself have none behind them."""
        lines = self.module.computations[name]
        known = {at.name for at in lines}
        values: dict[str, Value] = {}
        root: Value = np.zeros(sources)
        for at in lines:
            if at.opcode == "parameter":
                values[at.name] = np.zeros(sources) if arguments is None else arguments[int(at.operands)]
            else:
                operands = [values[n] for n in operand_names(at) if n in known]
                values[at.name] = self._line(at, operands, lines, sources)
            root = values[at.name]  # until a line says that it is the root
            if at.root:
                return root
        return root

    def _line(self, at: Instruction, operands: list[Value], lines: list[Instruction], sources: int) -> Value:
        if at.opcode == "tuple":
            return operands
        if at.opcode == "get-tuple-element":
            (whole,) = operands
            return whole[at.index] if isinstance(whole, list) else whole
        if at.opcode in ("copy", "bitcast", "optimization-barrier") and len(operands) == 1:
            return operands[0]
        if at.opcode == "while":
            return self._loop(at, operands[0], lines, sources)
        if at.opcode == "conditional":
            results = [
                self.computation(name, [argument], sources)
                for name, argument in zip(_branches(at), operands[1:], strict=True)
            ]
            return np.max([_flat(operands[0], sources), *(_flat(r, sources) for r in results)], axis=0)
        if callees := _callees(at):
            return self.computation(callees[0], operands, sources)
        return _flat(operands, sources) + self.marked(at)

    def _loop(self, at: Instruction, start: Value, lines: list[Instruction], sources: int) -> Value:
        assert isinstance(start, list), f"loop {at.name} carries no tuple"
        count = len(start)
        units: list[Value] = [np.where(np.arange(count) == i, 0.0, NEVER) for i in range(count)]
        body = self.computation(at.called("body")[0], [units], count)
        assert isinstance(body, list)
        turn = np.stack([_flat(v, count) for v in body])
        total, left = np.where(np.eye(count, dtype=bool), 0.0, NEVER), self._count(at, lines)
        while left:  # the turn to the power of the trips
            if left & 1:
                total = _compose(turn, total)
            turn, left = _compose(turn, turn), left >> 1
        behind = np.stack([_flat(v, sources) for v in start])
        return list((total[:, :, None] + behind[None]).max(1))

    def _count(self, at: Instruction, lines: list[Instruction]) -> int:
        found = trip_count(self.module, at, lines)
        found = self.trips if found is None else found
        if found is None:
            raise ValueError(f"loop {at.name} has no constant number of trips: pass trips")
        return found


def _compose(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    return (after[:, :, None] + before[None]).max(1)


def _branches(at: Instruction) -> list[str]:
    roles = ("branch_computations", "true_computation", "false_computation")
    return [name for role in roles for name in at.called(role)]


def _callees(at: Instruction) -> list[str]:
    """Computations that run once for the line. Those of reductions and sorts, run for each element, are left out."""
    role = {"fusion": "calls", "call": "to_apply", "async-start": "calls"}.get(at.opcode)
    return at.called(role) if role else []
