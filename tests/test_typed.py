import dataclasses

import pytest

from prefix_jax.errors import ConfigError
from prefix_jax.typed import build


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
        "method.init.kind: expected str; got 2",
        "method.length: missing; expected int",
    ]
