"""A quantised backbone computes with its dequantised weights, on any mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import decoders
import encoder_decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.loading import weights
from prefix_jax.backbones.loading.config import architecture, read_config
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.backbones.loading.quantized import abstract_params, quantize_params
from prefix_jax.mesh import make_mesh, weight_shardings
from prefix_jax.nn.quantized import QTensor, dequantize
from prefix_jax.prefix import Hidden

FIXTURES = Path(__file__).parents[2] / "fixtures"
LLAMA = FIXTURES / "backbones" / "llama_grouped"


def _is_quantised(node: Any) -> bool:
    return isinstance(node, QTensor)


@jax.jit
def _plain(params: Any) -> Any:
    """Dequantises all weights."""
    return jax.tree.map(
        lambda x: dequantize(x) if _is_quantised(x) else x, params, is_leaf=_is_quantised
    )


_quantised = jax.jit(quantize_params, static_argnums=1)


def _equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


# --- Loading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["int8", "int4"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
def test_quantising_while_loading_equals_quantising_afterwards(
    how: Any, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_PART", 500)  # quantises large tensors in parts
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    pretrained = load(LLAMA, mesh=mesh, quantize=how)
    _equal(pretrained.params, _quantised(load(LLAMA).params, how))
    q_DNH = pretrained.params["layers"]["attn"]["q_DNH"]
    assert np.prod(q_DNH.q.addressable_shards[0].data.shape) * mesh.size == q_DNH.size
    assert q_DNH.scale.sharding.spec[-2] == "tensor"


@pytest.mark.parametrize(
    "name",
    [
        *(f"backbones/{name}" for name in ("gpt2", "gemma2", "neox", "opt")),
        *(f"encoders/{name}" for name in ("bert", "electra_wide")),
        *(f"encoder_decoders/{name}" for name in ("t5_gated", "bart")),
    ],
)
def test_only_layer_matrices_and_tables_are_quantised(name: str) -> None:
    arch = architecture(read_config(FIXTURES / name), name)
    for key, leaf in flatten_dict(dict(abstract_params(Backbone(arch), how="int4"))).items():
        axes = key[-1].rsplit("_", 1)[-1]
        matrix = "layers" in key and len(axes) > 1 and "bias" not in key[-1]
        if matrix or key[-1] in ("tokens_VD", "unembed_DV"):
            assert leaf.q.dtype == (jnp.int4 if matrix else jnp.int8), key
        else:
            assert leaf.dtype == jnp.float32, key


def test_fingerprint_depends_on_quantisation_but_not_on_dtype() -> None:
    marks = {
        (how, load(LLAMA, dtype=dtype, quantize=how).fingerprint)
        for how in ("none", "int8", "int4")
        for dtype in ("float32", "bfloat16")
    }
    assert len(marks) == 3
    assert len({mark for _, mark in marks}) == 3


def test_abstract_weights_match_loaded_ones() -> None:
    pretrained = load(LLAMA, dtype="bfloat16", quantize="int4")
    abstract = abstract_params(pretrained.backbone, jnp.bfloat16, "int4")
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pretrained.params)
    assert abstract == shape


# --- Computing -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "how"), [("qwen3", "int8"), ("gpt2", "int4")])
def test_logits_equal_those_of_dequantised_weights(name: str, how: Any) -> None:
    """Covers tied and untied heads, both forms of weights, and `lift`."""
    backbone = decoders.decoder(name)
    params = _quantised(decoders.weights(backbone), how)
    ids_BT, tokens = decoders.token_ids(2, 7), decoders.present(2, 7)
    hidden = Hidden(jax.random.normal(jax.random.key(1), (3, 4, 32)))

    @jax.jit
    def logits(params: Any) -> jax.Array:
        prefix = backbone.lift(params, hidden)
        return backbone.unembed(params, backbone.hidden(params, ids_BT, tokens, prefix)[0])

    expected = logits(_plain(params))
    bare = logits(decoders.weights(backbone))
    scale = float(jnp.abs(bare).max())
    np.testing.assert_allclose(logits(params), expected, atol=1e-4 * scale)
    assert float(jnp.abs(expected - bare).max()) > 1e-3 * scale
    unstacked = backbone.unstacked(params)
    np.testing.assert_allclose(logits(unstacked), expected, atol=1e-4 * scale)


def test_encoder_decoder_computes_with_quantised_weights() -> None:
    backbone = encoder_decoders.encoder_decoder("t5")
    params = _quantised(encoder_decoders.weights(backbone), "int4")
    ids_BT, tokens = decoders.token_ids(2, 5), decoders.present(2, 5)

    @jax.jit
    def states(params: Any) -> jax.Array:
        encoded = backbone.encode(params, ids_BT, tokens)
        return backbone.hidden(params, ids_BT, tokens, encoded=encoded)[0]

    np.testing.assert_allclose(states(params), states(_plain(params)), atol=1e-4)


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_mesh_gives_equal_results(how: Any) -> None:
    backbone = decoders.decoder("qwen3")
    params = _quantised(decoders.weights(backbone), how)
    ids_BT, tokens = decoders.token_ids(8, 7), decoders.present(8, 7)

    @jax.jit
    def logits(params: Any) -> jax.Array:
        return backbone.unembed(params, backbone.hidden(params, ids_BT, tokens)[0])

    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        spread = logits(jax.device_put(params, weight_shardings(params, mesh)))
    np.testing.assert_allclose(spread, logits(params), atol=1e-4)
