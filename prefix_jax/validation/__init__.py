"""Types, ranges and checks of every value that a user or a file provides.

An annotation declares the accepted values of a field: `Annotated[int, Interval(ge=1, le=1024)]` or
one of `types`. pydantic validates them (`parse`); messages give the key, the expected and the
actual value.
"""

from annotated_types import Interval

from prefix_jax.validation.check import (
    build,
    check_conditions,
    check_fields,
    construct,
    matches,
    renamed,
    renamed_arguments,
    require,
)
from prefix_jax.validation.messages import Problem
from prefix_jax.validation.plain import plain, shown
from prefix_jax.validation.types import (
    MAX_INT32,
    Count,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seed,
    Share,
    Size,
    Width,
    accepts_text,
    describe,
    hint_at,
)

__all__ = [
    "MAX_INT32",
    "Count",
    "Fraction",
    "Interval",
    "NonNegativeFloat",
    "PositiveFloat",
    "PositiveInt",
    "Probability",
    "Problem",
    "Seed",
    "Share",
    "Size",
    "Width",
    "accepts_text",
    "build",
    "check_conditions",
    "check_fields",
    "construct",
    "describe",
    "hint_at",
    "matches",
    "plain",
    "renamed",
    "renamed_arguments",
    "require",
    "shown",
]
