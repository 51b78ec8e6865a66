"""What a compiled program moves through memory, counted from its text.

The operands and results of the instructions that run one after another, a loop's times its turns.
What a fusion makes inside itself is not moved. Where it reads or rewrites a part of an array alone,
the part is counted. XLA's own cost analysis counts the body of a loop once.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?(%[\w.\-, %]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
)
_NOT_ARITHMETIC = _FREE | {
    "broadcast",
    "reshape",
    "transpose",
    "copy",
    "slice",
    "concatenate",
    "iota",
    "pad",
    "reverse",
    "dynamic-slice",
    "dynamic-update-slice",
    "gather",
    "scatter",
    "fusion",
    "fusion-start",
    "convert",
    "bitcast-convert",
    "dot",
    "convolution",
    "custom-call",
    "reduce",
    "reduce-window",
}


class Array(NamedTuple):
    """An array of a type's text."""

    bits: int
    elements: int
    in_memory: bool  # and not in a scratchpad beside the processor

    @property
    def bytes(self) -> float:
        return self.bits * self.elements / 8 if self.in_memory else 0


def arrays(shape: str) -> list[Array]:
    """All arrays of a type; the layout says where an array lies: S(0), memory, is left out."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(shape):
        sizes = [int(n.strip("<=")) for n in sizes.split(",") if n]
        digits = re.search(r"\d+", dtype)
        bits = _BITS[dtype] if dtype in _BITS else int(digits[0]) if digits else 32
        found.append(Array(bits, prod(sizes), not re.search(r"S\([1-9]", layout)))
    return found


def _bytes(shape: str) -> float:
    return sum(array.bytes for array in arrays(shape))


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # its attributes; of a parameter, its number
    is_root: bool

    @property
    def bytes(self) -> float:
        return _bytes(self.shape)

    @cached_property
    def called(self) -> list[str]:
        return [n.strip(" %") for m in _CALLED.findall(self.rest) for n in m.split(",")]


Computation = dict[str, Instruction]


@dataclass
class Counts:
    """Totals of a program."""

    bytes: float = 0
    operations: float = 0  # elementwise ones, of arrays
    largest: float = 0  # bytes of the largest array that is written, but for results and arguments
    collectives: dict[str, list[tuple[float, int]]] = field(default_factory=dict)  # bytes, times
    loops: list[int] = field(default_factory=list)  # turns


def count(text: str) -> Counts:
    """Count a program, from `compiled.as_text()`."""
    return _Program(text).counts


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.counts = Counts()
        entry = ""
        for is_entry, name, body in _computations(text):
            self.computations[name] = body
            entry = name if is_entry else entry
        self._shapes = {
            o.name: o.shape for body in self.computations.values() for o in body.values()
        }
        results = self.computations[entry].values()
        self._returned = {name for one in results if one.is_root for name in self._made_by(one)}
        self._run(entry, 1)

    def _made_by(self, root: Instruction) -> set[str]:
        """The names of what the program returns, through tuples."""
        names, todo = set(), [root.name]
        entry = next(c for c in self.computations.values() if c.get(root.name) is root)
        while todo:
            one = entry[todo.pop()]
            names.add(one.name)
            if one.opcode in ("tuple", "get-tuple-element", "bitcast", "copy-done"):
                todo += one.operands
        return names

    def _run(self, name: str, times: int) -> None:
        body = self.computations[name]
        for one in body.values():
            if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
                continue
            if one.opcode == "while":
                turns = self._turns(one)
                self.counts.loops.append(turns * times)
                self._run(_named(one, "body"), times * turns)
            elif one.opcode == "conditional":
                self._run(self._largest_branch(one), times)
            elif one.opcode in ("call", "async-start") and one.called:
                self._run(one.called[0], times)
            else:
                self._count(one, body, times)

    def _count(self, one: Instruction, body: Computation, times: int) -> None:
        counts, kind = self.counts, one.opcode.removesuffix("-start")
        counts.bytes += times * self._moved(one, body)
        counts.operations += times * self._arithmetic(one)
        if one.name not in self._returned:
            written = (array.bytes for array in arrays(one.shape))
            counts.largest = max(counts.largest, *written, 0)
        if kind in _COLLECTIVES:
            size = sum(_bytes(body[name].shape) for name in one.operands)
            counts.collectives.setdefault(kind, []).append((size, times))

    def _moved(self, one: Instruction, body: Computation) -> float:
        given = [_bytes(body[name].shape) for name in one.operands]
        if one.opcode in ("fusion", "fusion-start"):
            inside = self.computations[one.called[0]]
            read = (self._read(inside, i, size) for i, size in enumerate(given))
            return sum(read) + self._written(inside, one)
        if one.opcode == "copy-start":  # its result: to, from, and a flag
            return given[0] + arrays(one.shape)[0].bytes
        if one.opcode == "slice-start":  # from, to, and a flag
            source, result, *_ = arrays(one.shape)
            return result.bytes + source._replace(elements=result.elements).bytes
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * one.bytes + sum(given[1:])
        if one.opcode == "dynamic-update-slice":
            return 2 * given[1]
        if one.opcode == "scatter":
            return sum(given[1:]) + 2 * given[-1]
        return sum(given) + one.bytes

    def _read(self, inside: Computation, number: int, whole: float) -> float:
        """Of a parameter of a fusion: the whole, or the parts that are all it reads."""
        numbered = (p for p in inside.values() if p.opcode == "parameter")
        parameter = next(p for p in numbered if p.rest.startswith(f"{number})"))
        return min(whole, self._read_of(inside, parameter.name, whole))

    def _read_of(self, inside: Computation, name: str, whole: float) -> float:
        total = 0.0
        for user in inside.values():
            if name not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += _elements_bytes(user, inside[name])
            elif user.opcode in ("bitcast", "reshape", "get-tuple-element", "copy", "convert"):
                total += self._read_of(inside, user.name, whole)
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
                total += 0.0  # rewritten in place: counted as written
            elif user.opcode == "fusion":
                deeper = self.computations[user.called[0]]
                places = [i for i, operand in enumerate(user.operands) if operand == name]
                total += sum(self._read(deeper, i, whole) for i in places)
            elif user.opcode == "tuple":
                total += 0.0
            else:
                return whole
        return total

    def _written(self, inside: Computation, fusion: Instruction) -> float:
        root = next(one for one in inside.values() if one.is_root)
        parts = [inside[n] for n in root.operands] if root.opcode == "tuple" else [root]
        results = arrays(fusion.shape)
        if fusion.opcode == "fusion-start":  # (from), to, and flags
            results = results[len(fusion.operands) :]
        memory = [array.in_memory for array in results]
        return sum(
            self._written_by(inside, part)
            for part, kept in zip(parts, memory, strict=False)
            if kept
        )

    def _written_by(self, inside: Computation, one: Instruction) -> float:
        root, whole = one, _plain_bytes(one)
        while root.opcode in ("bitcast", "reshape", "convert", "copy"):
            root = inside[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return min(whole, _plain_bytes(inside[root.operands[1]]))
        if root.opcode == "scatter":
            return min(whole, 2 * _plain_bytes(inside[root.operands[-1]]))
        return whole

    def _arithmetic(self, one: Instruction) -> float:
        """Elementwise operations, of what an instruction makes and calls."""
        if one.opcode in ("fusion", "fusion-start"):
            return sum(map(self._arithmetic, self.computations[one.called[0]].values()))
        if one.opcode == "reduce":
            each = self.computations[one.called[0]].values()
            elements = _elements(self._shapes[one.operands[0]])
            return elements * sum(map(self._arithmetic, each))
        if one.opcode in _NOT_ARITHMETIC or one.opcode.startswith(_COLLECTIVES):
            return 0
        return _elements(one.shape)

    def _turns(self, loop: Instruction) -> int:
        known = _TRIPS.search(loop.rest)
        if known:
            return int(known[1])
        condition = self.computations[_named(loop, "condition")].values()
        bounds = [one.rest for one in condition if one.opcode == "constant"]
        numbers = [int(m[1]) for rest in bounds if (m := re.match(r"(\d+)\)", rest))]
        if len(numbers) != 1:
            raise ValueError(f"the turns of the loop {loop.name} are not known")
        return numbers[0]

    def _largest_branch(self, one: Instruction) -> str:
        def size(name: str) -> float:
            body = self.computations[name]
            return sum(
                self._moved(i, body) for i in body.values() if i.opcode not in (*_FREE, "while")
            )

        return max(one.called, key=size)


def _named(one: Instruction, attribute: str) -> str:
    found = re.search(rf"{attribute}=%([\w.\-]+)", one.rest)
    if found is None:
        raise ValueError(f"{one.name} has no {attribute}")
    return found[1]


def _elements(shape: str) -> int:
    return max((array.elements for array in arrays(shape)), default=0)


def _elements_bytes(one: Instruction, like: Instruction) -> float:
    """One's elements, as wide as those that they are read from."""
    return sum(a.elements for a in arrays(one.shape)) * arrays(like.shape)[0].bits / 8


def _plain_bytes(one: Instruction) -> float:
    """Inside a fusion no layout says where an array lies."""
    return sum(a.bits * a.elements / 8 for a in arrays(one.shape))


def _computations(text: str) -> Iterator[tuple[bool, str, Computation]]:
    header, body = None, {}
    for line in text.splitlines():
        if header is None:
            header = _HEADER.match(line)
            body = {}
        elif line.startswith("}"):
            yield bool(header[1]), header[2], body
            header = None
        elif (one := _instruction(line)) is not None:
            body[one.name] = one


def _instruction(line: str) -> Instruction | None:
    begin = re.match(r"\s*(ROOT )?%([\w.\-]+) = ", line)
    if begin is None:
        return None
    after = line[begin.end() :]
    shape, after = _until_space(after)
    opcode, after = after.split("(", 1)
    operands, _ = _until_closed(after)
    names = tuple(re.findall(r"%([\w.\-]+)", operands))
    return Instruction(begin[2], shape, opcode, names, after, bool(begin[1]))


def _until_space(text: str) -> tuple[str, str]:
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == " " and depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _until_closed(text: str) -> tuple[str, str]:
    depth = 1
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""
