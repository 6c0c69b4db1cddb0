import dataclasses
import math
import time
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from prefix_jax.errors import ConfigError
from prefix_jax.typed import Range, build, check_fields, described, range_of


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


def test_build_makes_any_dataclass_from_a_mapping():
    assert build(Method, {"length": 3, "init": {"scale": "1e-3"}, "extra": {"kind": "k"}}) == (
        Method(length=3, init=Init(scale=0.001), extra=Init(kind="k"))
    )


def test_build_leaves_an_optional_section_absent():
    assert build(Method, {"length": 3, "extra": None}).extra is None


def test_build_names_keys_from_where_the_mapping_stands():
    with pytest.raises(ConfigError) as caught:
        build(Method, {"lenght": 3, "init": {"scal": 1, "kind": 2}}, "method")
    assert str(caught.value).splitlines() == [
        "method.lenght: unknown key; did you mean method.length? "
        "known keys here: length, init, hidden, extra",
        "method.init.scal: unknown key; did you mean method.init.scale? "
        "known keys here: kind, scale",
        "method.init.kind: expected str; got 2; put quotes around it",
        "method.length: missing; expected int",
    ]


@dataclasses.dataclass(frozen=True)
class Checked:
    count: Annotated[int, Range(1, 10)] | None = None
    rate: Annotated[float, Range(0, low_open=True, float32=True)] = 1.0
    share: Annotated[float, Range(0, 1, high_open=True)] = 0.0
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
def test_converts_what_is_unambiguous(field: str, value: Any, expected: Any):
    found = getattr(build(Checked, {field: value}), field)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", True, "count: expected int or null; got true"),
        ("count", 1.5, "count: expected int or null; got 1.5"),
        ("count", math.nan, "count: expected int or null; got nan"),
        ("count", "1.0", "count: expected int or null; got '1.0'"),
        ("count", 0, "count: must be at least 1, got 0"),
        ("count", 11, "count: must be at most 10, got 11"),
        ("count", 10**400, "count: an integer of more than 64 bits; give a smaller one"),
        ("rate", 0, "rate: must be positive, got 0"),
        ("rate", math.inf, "rate: must be finite, got inf"),
        ("rate", "nan", "rate: must be finite, got 'nan'"),
        ("rate", 1e-40, "rate: must be within reach of float32, 1e-30 to 1e30 in magnitude, got"),
        ("rate", False, "rate: expected float; got false"),
        ("share", 1, "share: must be in [0, 1), got 1"),
        ("flag", 1, "flag: expected bool; got 1; write true or false"),
        ("flag", "on", "flag: expected bool; got 'on'; write true or false"),
        ("kind", "c", "kind: expected one of a, b; got 'c'"),
        ("names", [1, True], "got [1, True]; put quotes around what is text: ['1', 'true']"),
        ("names", {"a", "b"}, "names: expected text, numbers, lists and mappings; got {"),
        ("names", ["\ud800"], "names: not valid Unicode text: surrogates not allowed"),
        ("free", {"x": [b""]}, "free.x: expected text, numbers, lists and mappings; got b''"),
        ("free", {(1, 2): 3}, "free.(1, 2): a key is text or a number, not a list"),
        ("\x1b[2J", 1, "'\\x1b[2J': unknown key"),
    ],
)
def test_names_what_a_value_must_be(field: str, value: Any, message: str):
    assert message in problem_of(field, value)


def test_shared_and_cyclic_values_take_no_time():
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    shared: Any = "x"
    for _ in range(60):
        shared = [shared, shared]
    start = time.process_time()
    assert "more than 100 levels" in problem_of("free", {"x": cyclic})
    assert "more than 100,000 values" in problem_of("free", {"x": shared})
    assert time.process_time() - start < 5


def test_a_value_that_cannot_be_printed_is_still_named():
    class Unprintable:
        def __repr__(self) -> str:
            raise RuntimeError

    assert "got <Unprintable instance" in problem_of("free", {"x": Unprintable()})


def test_a_dataclass_made_in_python_is_checked_and_normalised():
    assert Checked(count=np.int32(3), names=["a"]) == Checked(count=3, names=("a",))
    with pytest.raises(ConfigError) as caught:
        Checked(count="3", rate=-1.0, names="a")
    assert str(caught.value) == (
        "checked.count: expected int or null; got '3'; checked.rate: must be positive, got -1; "
        "checked.names: expected list of str; got 'a'; write [a]"
    )


def test_a_range_is_described_in_words():
    hint = Annotated[int, Range(1, 10)] | None
    assert (described(hint), str(range_of(hint))) == ("int or null", "in [1, 10]")
    assert str(Range(0, low_open=True)) == "positive"
    assert str(Range(low=2)) == "at least 2"
    assert range_of(int) is None
