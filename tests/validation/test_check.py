import dataclasses
import math
import time
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from prefix_jax.errors import BackboneError, ConfigError
from prefix_jax.validation import (
    Count,
    Interval,
    PositiveFloat,
    PositiveInt,
    build,
    check_fields,
    describe,
    matches,
    renamed,
    renamed_arguments,
    require,
)


@dataclasses.dataclass(frozen=True)
class Init:
    kind: str = "text"
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Method:
    length: int
    init: Init = Init()
    hidden: int | None = None
    extra: Init | None = None


def test_build_makes_a_dataclass_from_a_mapping():
    assert build(Method, {"length": 3, "init": {"scale": "1e-3"}, "extra": {"kind": "k"}}) == (
        Method(length=3, init=Init(scale=0.001), extra=Init(kind="k"))
    )


def test_build_leaves_an_optional_section_absent():
    assert build(Method, {"length": 3, "extra": None}).extra is None


def test_build_reports_keys_with_their_path():
    with pytest.raises(ConfigError) as caught:
        build(Method, {"lenght": 3, "init": {"scal": 1, "kind": 2}}, "method")
    assert str(caught.value).splitlines() == [
        "method.length: missing; it must be an integer",
        "method.init.kind: must be a string, got 2; put quotes around it",
        "method.init.scal: unknown key; did you mean method.init.scale? "
        "known keys here: kind, scale",
        "method.lenght: unknown key; did you mean method.length? "
        "known keys here: length, init, hidden, extra",
    ]


@dataclasses.dataclass(frozen=True)
class Checked:
    count: Annotated[int, Interval(ge=1, le=10)] | None = None
    rate: PositiveFloat = 1.0
    share: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    free: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "checked")


def problem_of(field: str, value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Checked, {field: value})
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("count", 1e1, 10),
        ("count", "7", 7),
        ("count", np.int64(3), 3),
        ("count", None, None),
        ("rate", 2, 2.0),
        ("rate", np.float32(0.5), 0.5),
        ("flag", "yes", True),
        ("names", ["x", "null"], ("x", "null")),
        ("free", {"a": (1, [None])}, {"a": [1, [None]]}),
    ],
)
def test_converts_unambiguous_values(field: str, value: Any, expected: Any):
    converted = getattr(build(Checked, {field: value}), field)
    assert (converted, type(converted)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", True, "count: must be an integer in [1, 10] or null, got true"),
        ("count", 1.5, "count: must be an integer in [1, 10] or null, got 1.5"),
        ("count", math.nan, "count: must be an integer in [1, 10] or null, got nan"),
        ("count", "1.0", "count: must be an integer in [1, 10] or null, got '1.0'"),
        ("count", 0, "count: must be an integer in [1, 10] or null, got 0"),
        ("count", 11, "count: must be an integer in [1, 10] or null, got 11"),
        ("count", 10**400, "count: an integer of more than 64 bits; give a smaller one"),
        ("rate", 0, "rate: must be a number in [1e-30, 1e30], got 0"),
        ("rate", math.inf, "rate: must be a number in [1e-30, 1e30], got inf"),
        ("rate", "nan", "rate: must be a number in [1e-30, 1e30], got 'nan'"),
        ("rate", 1e-40, "rate: must be a number in [1e-30, 1e30], got 1e-40"),
        ("rate", False, "rate: must be a number in [1e-30, 1e30], got false"),
        ("share", 1, "share: must be a number in [0, 1), got 1"),
        ("flag", 1, "flag: must be true or false, got 1; write true or false"),
        ("flag", "on", "flag: must be true or false, got 'on'; write true or false"),
        ("kind", "c", "kind: must be one of a, b, got 'c'"),
        ("names", [1, True], "got [1, True]; quote the strings: ['1', 'true']"),
        ("names", {"a", "b"}, "names: must consist of strings, numbers, lists and mappings, got {"),
        ("names", ["\ud800"], "names: not valid Unicode text: surrogates not allowed"),
        (
            "free",
            {"x": [b""]},
            "free.x: must consist of strings, numbers, lists and mappings, got b''",
        ),
        ("free", {(1, 2): 3}, "free.(1, 2): a key must be a string or a number"),
        ("\x1b[2J", 1, "'\\x1b[2J': unknown key"),
    ],
)
def test_reports_the_expected_and_the_actual_value(field: str, value: Any, message: str):
    assert message in problem_of(field, value)


def test_shared_and_cyclic_values_are_rejected_quickly():
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    shared: Any = "x"
    for _ in range(60):
        shared = [shared, shared]
    start = time.process_time()
    assert "more than 100 levels" in problem_of("free", {"x": cyclic})
    assert "more than 100,000 values" in problem_of("free", {"x": shared})
    assert time.process_time() - start < 5


def test_unprintable_value_is_still_reported():
    class Unprintable:
        def __repr__(self) -> str:
            raise RuntimeError

    assert "got <Unprintable instance" in problem_of("free", {"x": Unprintable()})


def test_dataclass_constructed_in_python_is_checked_and_normalised():
    assert Checked(count=np.int32(3), names=["a"]) == Checked(count=3, names=("a",))
    with pytest.raises(ConfigError) as caught:
        Checked(count="3", rate=-1.0, names="a")
    assert str(caught.value) == (
        "checked.count: must be an integer in [1, 10] or null, got '3'; "
        "checked.rate: must be a number in [1e-30, 1e30], got -1.0; "
        "checked.names: must be a list of strings, got 'a'; write [a]"
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
        (2**31 - 1, PositiveInt),
        (1e-9, PositiveFloat),
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
        (0, PositiveInt),
        (2**31, PositiveInt),
        (0.0, PositiveFloat),
        (10**31, PositiveFloat),
        (None, str),
        ([1, True], list[int]),
        ((1,), list[int]),
        ({1: 2}, dict[str, int]),
        (["silu"], Literal["silu"]),
        (1, Literal["1"]),
    ],
)
def test_rejects_other_values(value: Any, hint: Any) -> None:
    assert not matches(value, hint)


def test_error_names_place_expectation_and_value() -> None:
    with pytest.raises(BackboneError, match=r"^hidden_size must be a positive integer.*, got 'x'$"):
        require("x", PositiveInt, "hidden_size", BackboneError)


def test_error_shortens_long_values() -> None:
    with pytest.raises(BackboneError) as failure:
        require("x" * 10_000, PositiveInt, "hidden_size", BackboneError)
    assert len(str(failure.value)) < 200


def test_every_field_of_a_dataclass_is_checked() -> None:
    @dataclasses.dataclass
    class Shape:
        width: Annotated[int, Interval(ge=1, le=8)]
        scale: PositiveFloat | None = None

    check_fields(Shape(8), error=ValueError)
    with pytest.raises(ValueError, match=r"width: must be an integer in \[1, 8\], got 9"):
        check_fields(Shape(9), error=ValueError)
    with pytest.raises(ValueError, match=r"scale: must be a number in .* or null, got"):
        check_fields(Shape(1, math.nan), error=ValueError)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (PositiveInt, "a positive integer below 2**31"),
        (Annotated[float, Interval(gt=0, le=1)], "a number in (0, 1]"),
        (list[bool] | None, "a list of items, each true or false or null"),
        (dict[str, int], "a mapping"),
        (Literal["a", "b"], "one of a, b"),
    ],
)
def test_hints_are_described_in_words(hint: Any, words: str) -> None:
    assert describe(hint) == words


@renamed(old="new")
@dataclasses.dataclass(frozen=True)
class Renamed:
    new: int = 1


def test_former_field_names_the_current_one_in_files_and_in_python():
    with pytest.raises(ConfigError, match=r"^section\.old: renamed to section\.new$"):
        build(Renamed, {"old": 2}, "section")
    with pytest.raises(ConfigError, match=r"^old: renamed to new$"):
        Renamed(old=2)
    assert Renamed(new=2) == Renamed(2)


def test_former_argument_names_the_current_one():
    @renamed_arguments(old="new")
    def function(new: int = 1) -> int:
        return new

    with pytest.raises(ConfigError, match=r"^old: renamed to new$"):
        function(old=2)
    assert (function(), function(2), function(new=3)) == (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Pair:
    first: Checked = Checked()
    second: Init = Init()

    def __post_init__(self) -> None:
        if self.second.scale > 1:
            raise ConfigError("second.scale is too large")


@dataclasses.dataclass(frozen=True)
class Both:
    pair: Pair = Pair()
    count: int = 0


def test_reports_conditions_of_sections_along_with_other_problems():
    with pytest.raises(ConfigError) as caught:
        build(Both, {"pair": {"second": {"scale": 2}}, "count": "x"})
    assert str(caught.value).splitlines() == [
        "pair: second.scale is too large",
        "count: must be an integer, got 'x'",
    ]
