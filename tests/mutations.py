"""Seeded mutations of well-formed inputs, for tests that attack a reader.

Every function is deterministic in its `random.Random`.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

# Values that JSON can hold and that code rarely expects.
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "false", "\u001b[31m", "\ud800", "é" * 300, "../../up", "a\0b",
    0, -1, 1, 2, 7, 2**31, 2**31 - 1, 2**63, 10**9, 10**30, -(10**9),
    0.0, -0.5, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"),
    [], [0], ["silu"], [[]], [None], {}, {"": None}, {"x": {"y": [1, "z"]}},
)  # fmt: skip
HOSTILE_TEXT = (
    "", "\0", "\ufeff", "\u202e", "\u2028", "\x1b]0;title\x07", "\x9b31m", "{", "}", "{{", "%",
    '"', "'", "\\", "\n", ",", ":", "[", "]", "&a *a", "!!int x", "~", "9" * 5000, "(" * 300,
)  # fmt: skip


def refusal(read: Callable[[], object], error: type[Exception]) -> str | None:
    """The message of the error with which a reader refuses its input; None if it accepts it.

    Any other error propagates and fails the test.
    """
    try:
        read()
    except error as failure:
        return str(failure)
    return None


def mutate_json(value: Any, rng: random.Random, edits: int | None = None) -> Any:
    """A copy of a JSON value with one to three edits: a value replaced, removed or moved.

    Args:
        value: of lists, mappings and scalars; not changed.
        rng: the source of randomness.
        edits: how many; None draws one to three.
    """
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3)) if edits is None else edits):
        places = list(_places(value))
        if not places:
            return rng.choice(HOSTILE_VALUES)
        container, key = rng.choice(places)
        _edit(container, key, rng)
    return value


def mutate_text(text: str, rng: random.Random) -> str:
    """A text with a piece removed, doubled, moved, or replaced by something hostile."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        start, end = sorted(rng.randint(0, len(text)) for _ in range(2))
        end = min(end, start + rng.choice((1, 1, 3, 20)))
        piece = text[start:end]
        insert = rng.choice(("", piece * 2, rng.choice(HOSTILE_TEXT), chr(rng.randrange(0xD800))))
        text = text[:start] + insert + text[end:]
    return text


def mutate_bytes(data: bytes, rng: random.Random, span: int | None = None) -> bytes:
    """Bytes with bits flipped, values overwritten, pieces removed or the end cut off.

    Args:
        data: well-formed.
        rng: the source of randomness.
        span: mutate the first `span` bytes only, such as a header; None mutates everywhere.
    """
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not content:
            break
        at = rng.randrange(min(len(content), span or len(content)))
        match rng.randrange(6):
            case 0:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                number = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
                content[at : at + 8] = number.to_bytes(8, "little")
            case 3:
                del content[at : at + rng.choice((1, 4, 8, 64))]
            case 4:
                content[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
            case _:
                del content[at:]
    return bytes(content)


def dump_json(value: Any) -> bytes:
    """JSON of any mutated value: half surrogate pairs are escaped, NaN and infinity written out."""
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _edit(container: Any, key: Any, rng: random.Random) -> None:
    match rng.randrange(8):
        case 0:
            del container[key]
        case 1:
            container[key] = [container[key]]
        case 2:
            container[key] = {"x": container[key]}
        case 3 if isinstance(container, dict):
            container[rng.choice(("", "x", "\u001b[2J", "a" * 300))] = container.pop(key)
        case 4 if isinstance(container[key], int | float):
            number = container[key]
            container[key] = rng.choice(
                (-number, number + 1, number - 1, number * 1000, f"{number}")
            )
        case 5 if isinstance(container[key], str):
            container[key] = mutate_text(container[key], rng)
        case _:
            container[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
