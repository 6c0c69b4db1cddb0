"""Types and ranges declared as hints."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from prefix_jax.errors import BackboneError
from prefix_jax.untrusted.values import (
    Count,
    Positive,
    Range,
    Size,
    describe,
    matches,
    require,
    require_fields,
)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int),
        (np.int64(3), int),
        (3, float),
        (np.float32(0.5), float),
        (True, bool),
        ("x", str),
        (None, int | None),
        (0, Count),
        (2**31 - 1, Size),
        (1e-9, Positive),
        ([1, 2], list[int]),
        ((True,), tuple[bool, ...]),
        ({"a": [None]}, dict[str, list[None]]),
        ("silu", Literal["silu", "relu"]),
        (object(), Any),
    ],
)
def test_accepts_values_of_the_type(value: Any, hint: Any) -> None:
    assert matches(value, hint)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (1, bool),
        (1.0, int),
        ("1", int),
        (True, float),
        (math.nan, float),
        (math.inf, float),
        (10**400, float),
        (-1, Count),
        (0, Size),
        (2**31, Size),
        (0.0, Positive),
        (10**30, Positive),
        (None, str),
        ([1, True], list[int]),
        ((1,), list[int]),
        ({1: 2}, dict[str, int]),
        (["silu"], Literal["silu"]),
        (1, Literal[True]),
    ],
)
def test_rejects_other_values(value: Any, hint: Any) -> None:
    assert not matches(value, hint)


def test_error_names_place_expectation_and_value() -> None:
    with pytest.raises(BackboneError, match=r"^hidden_size must be a positive integer.*, got 'x'$"):
        require("x", Size, "hidden_size", BackboneError)


def test_error_shortens_long_values() -> None:
    with pytest.raises(BackboneError) as failure:
        require("x" * 10_000, Size, "hidden_size", BackboneError)
    assert len(str(failure.value)) < 200


def test_every_field_of_a_dataclass_is_checked() -> None:
    @dataclasses.dataclass
    class Shape:
        width: Annotated[int, Range(1, 8)]
        scale: Positive | None = None

    require_fields(Shape(8), ValueError)
    with pytest.raises(ValueError, match="width must be an integer from 1 to 8, got 9"):
        require_fields(Shape(9), ValueError)
    with pytest.raises(ValueError, match=r"scale must be a positive number .* or null, got"):
        require_fields(Shape(1, math.nan), ValueError)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Size, "a positive integer below 2**31"),
        (Annotated[float, Range(0, 1, open=True)], "a number above 0 to 1"),
        (list[bool] | None, "a list, each item true or false or null"),
        (dict[str, int], "an object"),
        (Literal["a", "b"], "one of a, b"),
    ],
)
def test_hints_are_described_in_words(hint: Any, words: str) -> None:
    assert describe(hint) == words
