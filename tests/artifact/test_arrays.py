"""Conversion of every method's output to named arrays and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.artifact import BackboneCard, make_card
from prefix_jax.artifact.arrays import from_arrays, prefix_spec, problems, to_arrays
from prefix_jax.methods import (
    Cartridge,
    LlamaAdapter,
    Method,
    PrefixTuning,
    PrefixTuningPlus,
    PTuning,
)
from prefix_jax.prefix import Gated, Geometry, Prefix, Produced, Site, SiteShape

# Sites differ in depth and heads.
GEOMETRY = Geometry(
    d_model=32,
    vocab=96,
    encoder=SiteShape(2, 4, 4, 8),
    decoder=SiteShape(3, 4, 2, 8),
    cross=SiteShape(3, 4, 2, 8),
)
METHODS = {
    "all sites": PrefixTuning(5),
    "some sites": PrefixTuning(5, sites=("encoder", "cross"), text_position=0, pinned=True),
    "some layers": PrefixTuning(5, layers=(1,)),
    "MLP": PrefixTuning(5, mid_dim=7, sites=("decoder",), layers=(0, 2)),
    "soft tokens": PTuning(5),
    "adapter": LlamaAdapter(5, layers=2),
    "adapter of all layers": LlamaAdapter(5),
    "adapter with one gate per layer": LlamaAdapter(5, layers=(1,), gate="plain"),
    "cartridge": Cartridge(5, frozen=2),
    "memory": PrefixTuningPlus(),
    "memory of some layers": PrefixTuningPlus(layers=(0,)),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def output_of(method: Method) -> Produced:
    return method(method.init(jax.random.key(0), GEOMETRY, None))


@each_method
def test_output_of_every_method_round_trips(method: Method) -> None:
    produced = output_of(method)
    arrays = to_arrays(produced)
    assert problems(arrays, prefix_spec(produced), GEOMETRY) == []
    again = from_arrays(prefix_spec(produced), arrays)
    assert jax.tree.structure(again) == jax.tree.structure(produced)
    jax.tree.map(np.testing.assert_array_equal, again, produced)


@each_method
def test_reports_wrong_shapes_and_unknown_arrays(method: Method) -> None:
    produced = output_of(method)
    arrays = to_arrays(produced)
    for name, x in arrays.items():
        (message,) = problems(arrays | {name: x[:, :-1]}, prefix_spec(produced), GEOMETRY)
        assert message.startswith(f"{name} is float32")
    (message,) = problems(arrays | {"surplus": np.zeros(1)}, prefix_spec(produced), GEOMETRY)
    assert message == "surplus is unknown"


@pytest.mark.parametrize(
    ("name", "positions", "layers"),
    [
        ("some layers", 5, {"encoder": (1,), "decoder": (1,), "cross": (1,)}),
        ("adapter", 0, {"adapter": (1, 2)}),
        ("memory", 0, {}),
        ("memory of some layers", 0, {"encoder": (0,), "decoder": (0,), "cross": (0,)}),
    ],
)
def test_card_lists_layers_and_positions(name, positions, layers) -> None:
    backbone = BackboneCard(source="some/model", model_type="t5", fingerprint="f", dtype="float32")
    card = make_card(output_of(METHODS[name]), GEOMETRY, backbone)
    assert card.layers == layers
    assert card.positions == tuple(range(positions))


def test_gated_keys_and_values_round_trip() -> None:
    pair = (jnp.ones((3, 5, 2, 8)), jnp.ones((3, 5, 2, 8)))
    prefix = Prefix(Site(outside=Gated(*pair, jnp.ones((3, 4)))))
    arrays = to_arrays(prefix)
    assert set(arrays) == {f"decoder.gated.{name}" for name in ("k_LPKH", "v_LPKH", "gate_LN")}
    assert problems(arrays, prefix_spec(prefix), GEOMETRY) == []
    again = from_arrays(prefix_spec(prefix), arrays)
    assert jax.tree.structure(again) == jax.tree.structure(prefix)
