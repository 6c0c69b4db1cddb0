"""Configurations of OPT."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefix_jax.backbones.loading.config import architecture, read_config
from prefix_jax.errors import BackboneError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "backbones"


@pytest.mark.parametrize(
    ("field", "value"), [("do_layer_norm_before", False), ("word_embed_proj_dim", 16)]
)
def test_rejects_opt_350m(field: str, value: object) -> None:
    config = read_config(FIXTURES / "opt")
    with pytest.raises(BackboneError, match=f"OPT with {field}={value} is not supported"):
        architecture(config | {field: value}, "here")


def test_null_projection_width_means_the_hidden_size() -> None:
    config = read_config(FIXTURES / "opt")
    null = architecture(config | {"word_embed_proj_dim": None}, "here")
    assert null == architecture(config, "here")


def test_position_0_is_row_2() -> None:
    arch = architecture(read_config(FIXTURES / "opt"), "here")
    assert (arch.positions, arch.position_offset, arch.max_positions) == (66, 2, 64)
