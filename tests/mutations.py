"""Seeded mutations of well-formed inputs, for tests that attack readers.

All functions are deterministic, given their `random.Random`.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from prefix_jax.errors import DataError

# JSON values that code rarely expects.
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
    """Returns the message of a reader's error; None if it accepts its input.

    Any other exception propagates and fails the test.
    """
    try:
        read()
    except error as failure:
        return str(failure)
    return None


def mutate_json(value: Any, rng: random.Random, edits: int | None = None) -> Any:
    """Returns a copy of a JSON value in which parts are replaced, removed, wrapped or renamed.

    Args:
        value: lists, dicts and scalars; not modified.
        rng: the random generator.
        edits: the number of edits; None draws one to three.
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
    """Returns a text with pieces removed, doubled, or replaced by hostile text."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        start, end = sorted(rng.randint(0, len(text)) for _ in range(2))
        end = min(end, start + rng.choice((1, 1, 3, 20)))
        piece = text[start:end]
        insert = rng.choice(("", piece * 2, rng.choice(HOSTILE_TEXT), chr(rng.randrange(0xD800))))
        text = text[:start] + insert + text[end:]
    return text


def mutate_bytes(data: bytes, rng: random.Random, span: int | None = None) -> bytes:
    """Returns bytes with flipped bits, overwritten values, removed pieces, or a truncated end.

    Args:
        data: well-formed bytes.
        rng: the random generator.
        span: mutate only the first `span` bytes, such as a header; None mutates everywhere.
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
    """Writes any mutated value as JSON, with escaped surrogates, NaN and Infinity."""
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every (container, key) of a JSON value."""
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


def attempt(read: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    """Returns (result, None), or (None, message) if the function raises an error."""
    try:
        return read(*args), None
    except DataError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 5000
    return None, message
