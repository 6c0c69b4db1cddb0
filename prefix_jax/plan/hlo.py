"""Parses optimised HLO, the text of a compiled program (`compiled.as_text()`).

Only the text is needed, so programs of any backend can be parsed on any machine.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a program.

    Attributes:
        dtype: the element type in HLO notation ("f32", "bf16").
        dims: the axis sizes.
        space: the memory space: 0 is the device memory; on a TPU, 1 is on-chip memory (VMEM), and
            others are smaller. Ignored when comparing arrays.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = dataclasses.field(default=0, compare=False)

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """The size in bytes, without the padding of a device layout."""
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(self.elements * (int(bits[0]) if bits else 8) / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its computation.
        results: the arrays that it returns; several for a tuple.
        opcode: "dot", "fusion", …
        operands: names of instructions in the same computation; for a constant, its value.
        attributes: the rest of the line.
        root: whether this is the result of the computation.
    """

    name: str
    results: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def word(self, key: str) -> str | None:
        """The value of `key=value`, without quotes; None if the attribute is missing."""
        match = re.search(rf'\b{key}="?%?([^\s,"]+)', self.attributes)
        return match[1] if match else None

    def listed(self, key: str) -> tuple[str, ...]:
        """The values of `key={a,b}`; empty if the attribute is missing."""
        match = re.search(rf"\b{key}={{([^}}]*)}}", self.attributes)
        return tuple(re.findall(r"[^\s,%]+", match[1])) if match else ()

    @property
    def op_name(self) -> str:
        """Its origin in the traced Python program; empty if the compiler added it."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the name of the entry computation."""

    computations: Mapping[str, Computation]
    entry: str


_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_PLACED_ARRAY = re.compile(rf"{_ARRAY.pattern}(?:\{{[^{{}}]*?(?:S\((\d+)\))?\}})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_BRACES = re.compile(r"\{[^{}]*\}")
_COMMENT = re.compile(r"/\*.*?\*/")
# The metadata of a Pallas kernel is on separate lines.
_CONTINUED = re.compile(r'\n(?="|\}\})')

# Instructions that pass arrays on and allocate none.
PASSING = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "opt-barrier",
}


def parse(text: str) -> Module:
    """Parses a compiled program.

    Raises:
        ValueError: the text is not HLO, or a line cannot be parsed.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = None, None
    for line in _CONTINUED.sub("", text).splitlines():
        if line.startswith("}"):
            inside = None
        elif inside is not None:
            instruction = _instruction(line)
            inside[instruction.name] = instruction
        elif match := _COMPUTATION.match(line):
            inside = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
    if entry is None:
        raise ValueError("not the text of an HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def temporaries(module: Module) -> list[Array]:
    """The temporary arrays of the program, without duplicates, largest first.

    Arrays inside a fusion never reach memory and are not included. Arrays that are updated in place
    (the stacked results of a scan) are included.
    """
    fused = {
        instruction.word("calls")
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "fusion"
    }
    arrays = {
        array
        for name, computation in module.computations.items()
        if name not in fused
        for instruction in computation.values()
        if instruction.opcode not in PASSING
        for array in instruction.results
    }
    return sorted(arrays, key=lambda array: (-array.nbytes, str(array)))


def _instruction(line: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    if not match:
        raise ValueError(f"not an HLO instruction: {line!r:.200}")
    root, name, rest = match.groups()
    # A tuple of results is in parentheses; a single result contains no space.
    cut = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    start = rest.index("(", cut)
    end = _closing(rest, start)
    return Instruction(
        name,
        _arrays(rest[:cut]),
        rest[cut:start].strip(),
        _operands(rest[start + 1 : end - 1]),
        rest[end:],
        root is not None,
    )


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`; quotes are skipped."""
    depth = 0
    for match in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses: {text!r:.200}")


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), int(space or 0))
        for dtype, dims, space in _PLACED_ARRAY.findall(text)
    )


def _operands(text: str) -> tuple[str, ...]:
    """The names in "%a, f32[2,3]{1,0} %b, /*index=2*/%c"; a type may precede each."""
    bare = _ARRAY.sub("", _BRACES.sub("", _COMMENT.sub("", text)))
    return tuple(re.findall(r"([\w.\-]+)\s*(?:,|$)", bare))
