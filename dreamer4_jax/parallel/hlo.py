"""Reads a program that the TPU compiler has made: its own cycle estimates, and the collectives, with loops multiplied.

The compiler's text estimates the cycles of every kernel, but counts the body of a loop once. Here the text is walked
from its entry, each loop's body times its trips.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str
    root: bool = False

    @property
    def index(self) -> int:
        """Of a get-tuple-element: which part it takes."""
        found = re.search(r"index=(\d+)", self.attributes)
        return int(found.group(1)) if found else 0

    @property
    def cycles(self) -> int:
        """The compiler's estimate, 0 where it makes none."""
        found = _CYCLES.search(self.attributes)
        return int(found.group(1)) if found else 0

    def called(self, role: str) -> list[str]:
        """Names of the computations it calls as `role` ("body", "calls", ...)."""
        found = re.search(role + r"=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)\}?", self.attributes)
        return [name.strip().lstrip("%") for name in found.group(1).split(",")] if found else []


@dataclass(frozen=True)
class Module:
    """The computations of a compiled program by name."""

    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Module":
        """Reads `compiled.as_text()`."""
        computations: dict[str, list[Instruction]] = {}
        entry, current = "", None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = computations.setdefault(header.group(2), [])
                if header.group(1):
                    entry = header.group(2)
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _INSTRUCTION.match(line)):
                current.append(_instruction(found.group(2), found.group(3), bool(found.group(1))))
        if not entry:
            raise ValueError("the text holds no ENTRY computation: is it the text of a compiled program?")
        return cls(computations, entry)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    found = _OPCODE.search(" " + rest)
    if found is None:
        return Instruction(name, rest, "", "", "", root)
    shape, opcode, tail = rest[: found.start() - 1], found.group(1), rest[found.end() - 1 :]
    depth = 1
    for end, letter in enumerate(tail):  # noqa: B007
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            break
    return Instruction(name, shape.strip(), opcode, tail[:end], tail[end + 1 :], root)


def operand_names(at: Instruction) -> list[str]:
    """What stands between its parentheses and may name other lines, in order; among it are types and constants."""
    return re.findall(r"%?([A-Za-z_][\w.\-]*)", re.sub(r"/\*.*?\*/", "", at.operands))


def trip_count(module: Module, loop: Instruction, around: list[Instruction]) -> int | None:
    """Of a loop in the computation `around`; None if the text does not hold it."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(found.group(1))
    return _trips(module, loop, loop.called("condition")[0], around)


def array_bytes(shape: str) -> int:
    """Bytes of the arrays that a type names, a tuple's together; padding not counted."""
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        found = _BITS.search(dtype)
        bits = 8 if dtype == "pred" or found is None else int(found.group())
        total += math.prod(int(n) for n in dims.split(",") if n) * bits // 8
    return total


def groups(attributes: str) -> list[list[int]]:
    """The devices that take part in a collective together, as positions in the mesh; empty: all of them as one."""
    if found := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes):
        return [[int(n) for n in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", found.group(1))]
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)", found.group(1) + "}")]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        rows, size = (int(n) for n in found.group(1).split(","))
        order = _iota(found.group(2), found.group(3))
        return [order[i * size : (i + 1) * size] for i in range(rows)]
    # Named axes: mesh['a'=4,'b'=2], device_ids=([8]) {'b'}
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
    )
    if not found:
        return []
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
    order = _iota(found.group(2), found.group(3)) if found.group(2) else list(range(math.prod(sizes.values())))
    return _along(order, sizes, re.findall(r"'([^']+)'", found.group(4)))


def _iota(dims: str, transposed: str | None) -> list[int]:
    import numpy as np

    shape = [int(n) for n in dims.split(",")]
    order = np.arange(math.prod(shape)).reshape(shape)
    return (order.transpose([int(n) for n in transposed.split(",")]) if transposed else order).reshape(-1).tolist()


def _along(order: Sequence[int], sizes: dict[str, int], axes: Sequence[str]) -> list[list[int]]:
    import numpy as np

    names = list(sizes)
    grid = np.array(order).reshape(list(sizes.values()))
    grid = np.moveaxis(grid, [names.index(a) for a in axes], range(-len(axes), 0)) if axes else grid
    return grid.reshape(-1, math.prod(sizes[a] for a in axes)).tolist()


@dataclass
class Collective:
    """All collectives of one kind among groups of one size.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute".
      size: devices in a group.
      slices: whether it goes between slices, over the data-centre network. The compiler takes such a collective apart:
        what is left to cross stands in its text as a transfer of each device's part, and `size` counts slices.
      hidden: whether other work goes on meanwhile.
      count: in one call of the program, loops multiplied.
      bytes: of the whole array in a group: gathered, reduced or exchanged; a device's own array for a permutation and
        for what crosses slices.
    """

    kind: str
    size: int
    slices: bool
    hidden: bool
    count: float = 0.0
    bytes: float = 0.0


@dataclass
class Costs:
    """What one call of a program does on one device.

    Attributes:
      cycles: the compiler's estimates, loops multiplied.
      scopes: cycles by the named scope that they come from.
      collectives: by (kind, size, slices, hidden).
    """

    cycles: float = 0.0
    scopes: dict[str, float] = field(default_factory=dict)
    collectives: dict[tuple, Collective] = field(default_factory=dict)


def costs(
    module: Module,
    *,
    trips: int | None = None,
    scope_of: Callable[[str], str] = lambda op_name: "",
) -> Costs:
    """Walks the program.

    Args:
      trips: of loops whose length is not in the text (the K steps of the sampler).
      scope_of: a label for the op_name of a kernel.
    """
    out = Costs()
    _walk(module, module.entry, 1.0, out, trips, scope_of)
    return out


def _walk(module: Module, name: str, times: float, out: Costs, trips, scope_of) -> None:
    seen: set[str] = set()  # an asynchronous collective stands in the text where it starts, goes on and ends
    computation = module.computations[name]
    for at in computation:
        if at.opcode == "while":
            body = at.called("body")[0]
            count = trip_count(module, at, computation)
            count = trips if count is None else count
            if count is None:
                raise ValueError(f"loop {at.name} has no constant number of trips: pass trips")
            _walk(module, body, times * count, out, trips, scope_of)
        elif at.opcode == "conditional":
            # One of them is taken: the dearest counts.
            each = [at.called(role) for role in ("branch_computations", "true_computation", "false_computation")]
            alone = {name: Costs() for names in each for name in names}
            for branch, its_own in alone.items():
                _walk(module, branch, 1.0, its_own, trips, scope_of)
            dearest = max(alone, key=lambda name: alone[name].cycles)
            _walk(module, dearest, times, out, trips, scope_of)
        elif at.opcode == "call":
            _walk(module, at.called("to_apply")[0], times, out, trips, scope_of)
        else:
            out.cycles += times * at.cycles
            if at.cycles:
                found = re.search(r'op_name="([^"]*)"', at.attributes)
                label = scope_of(found.group(1) if found else "")
                out.scopes[label] = out.scopes.get(label, 0.0) + times * at.cycles
            if at.opcode == "send":
                _cross(out, at, times)
            for inner, hidden in _collectives(module, at):
                _add(out, inner, hidden, times, seen)


def _collectives(module: Module, at: Instruction) -> Iterator[tuple[Instruction, bool]]:
    """The collectives that a line stands for, and whether they run beside other work."""
    kind = at.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        yield at, at.opcode.endswith("-start")
    elif at.opcode in ("fusion", "async-start"):
        for callee in at.called("calls"):
            lines = module.computations.get(callee, [])
            alone = not any(line.opcode == "custom-call" and "AsyncCollective" in line.attributes for line in lines)
            for line in lines:
                if line.opcode.removesuffix("-start") in COLLECTIVES:
                    yield line, "async_collective" in callee or not alone or at.opcode == "async-start"


def _add(out: Costs, at: Instruction, hidden: bool, times: float, seen: set[str]) -> None:
    found = re.search(r"channel_id=(\d+)", at.attributes)
    channel = found.group(1) if found else at.name
    if channel in seen:
        return
    seen.add(channel)
    kind, parts = at.opcode.removesuffix("-start"), groups(at.attributes)
    size = max((len(part) for part in parts), default=1)
    shapes = at.shape
    whole = array_bytes(shapes)
    if at.opcode.endswith("-start"):  # (operand, result, ...)
        arrays = [array_bytes(f"{d}[{n}]") for d, n in _ARRAY.findall(shapes)]
        whole = arrays[1] if len(arrays) > 1 else arrays[0]
    if kind in ("reduce-scatter", "all-to-all"):  # a device's result is its part
        whole *= size
    _count(out, (kind, size, False, hidden), times, whole)


def _cross(out: Costs, at: Instruction, times: float) -> None:
    """A transfer to other slices, named after the collective that it is a part of."""
    found = re.search(r'_xla_host_transfer_rendezvous="([a-z\-]+)', at.attributes)
    if "megascale" not in at.attributes or found is None:
        return
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', at.attributes)
    size = len(slices.group(1).split(",")) if slices else 2
    dtype, dims = _ARRAY.findall(at.shape)[0]
    _count(out, (found.group(1), size, True, False), times, array_bytes(f"{dtype}[{dims}]"))


def _count(out: Costs, key: tuple[str, int, bool, bool], times: float, size: int) -> None:
    entry = out.collectives.setdefault(key, Collective(*key))
    entry.count += times
    entry.bytes += times * size


def _trips(module: Module, loop: Instruction, condition: str, around: list[Instruction]) -> int | None:
    """Of ``while (i < constant)``, i counting from its initial constant by one; None if it is not of that form."""
    lines = {at.name: at for at in module.computations[condition]}
    compared = next((at for at in lines.values() if at.opcode == "compare" and "direction=LT" in at.attributes), None)
    if compared is None:
        return None
    operands = [name.strip().lstrip("%") for name in compared.operands.split(",")]
    ends = [int(lines[n].operands) for n in operands if n in lines and lines[n].opcode == "constant"]
    index = next((lines[n] for n in operands if n in lines and lines[n].opcode == "get-tuple-element"), None)
    if not ends or index is None:
        return None
    place = re.search(r"index=(\d+)", index.attributes)
    return ends[0] - _initial(loop, int(place.group(1)) if place else 0, around)


def _initial(loop: Instruction, place: int, around: list[Instruction]) -> int:
    """The constant that a loop's counter starts from; 0, as loops do, where it is not a constant in plain sight."""
    named = {at.name: at for at in around}
    start = named.get(loop.operands.strip().lstrip("%"))
    if start is None or start.opcode != "tuple":
        return 0
    element = re.sub(r"/\*.*?\*/", "", start.operands).split(",")[place].strip().lstrip("%")
    while element in named and named[element].opcode in ("copy", "bitcast"):
        element = named[element].operands.strip().lstrip("%")
    found = named.get(element)
    return int(found.operands) if found is not None and found.opcode == "constant" and found.operands.isdigit() else 0
