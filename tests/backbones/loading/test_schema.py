"""Every key of a configuration that a family reads has a declared type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefix_jax import backbones
from prefix_jax.backbones.loading.schema import _SCHEMA, check_config
from prefix_jax.errors import BackboneError

PACKAGE = Path(backbones.__path__[0])
SOURCES = [*sorted(PACKAGE.glob("families/*.py")), PACKAGE / "architecture.py"]
READ = re.compile(r"""(?:config|rope|scaling)(?:\.get\(|\[)"(\w+)\"""")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_every_key_that_is_read_has_a_type(source: Path) -> None:
    keys = set(READ.findall(source.read_text()))
    assert keys - {"model_type"} <= _SCHEMA.keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"text_config": {"hidden_size": 0}}, "here: text_config: hidden_size must be"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 0}}}, "full_attention: rope_theta"),
        ({"rope_scaling": {"truncate": "no"}}, "here: rope_scaling: truncate must be true or"),
        ({"rope_theta": 1e-300}, "here: rope_theta must be a number in"),
        ({"text_config": []}, "here: text_config must be a mapping or null, got"),
    ],
)
def test_nested_values_are_named_by_their_path(config: dict, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        check_config(config, "here")


def test_unread_keys_are_not_checked() -> None:
    check_config({"vision_config": {"hidden_size": "x"}, "torch_dtype": 3, "x": None}, "here")
