"""Kernels, sharding and communication of a stack."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import decoder, hidden, present, token_ids, weights
from jax.sharding import NamedSharding

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.families import bert
from prefix_jax.backbones.stack import Stack
from prefix_jax.mesh import (
    constrain_tokens,
    make_mesh,
    replicated,
    rows_sharding,
    weight_shardings,
)
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.nn.attention.splash_run import interpreted
from prefix_jax.plan.hlo import parse, temporaries
from prefix_jax.prefix import KVPrefix, Prefix, Site

# Gemma 2: the layers of one scan differ in their window, and soft caps take effect.
BACKBONE = decoder("gemma2")
P = 5
BERT = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 4,
    "num_attention_heads": 2,
    "intermediate_size": 200,
    "vocab_size": 50,
    "max_position_embeddings": 40,
}


def prefix() -> Prefix:
    g = BACKBONE.geometry.main
    k, v = jax.random.normal(jax.random.key(3), (2, g.layers, P, g.kv_heads, g.head_dim))
    return Prefix(Site(KVPrefix(k, v)), text_position=P)


def texts(rows: int, columns: int) -> tuple[jax.Array, TokenLayout]:
    """Rows of two segments and padding."""
    group_T = jnp.asarray([1] * (columns // 2) + [2] * (columns // 4) + [0] * (columns // 4))
    position_T = jnp.where(group_T == 2, jnp.arange(columns) - columns // 2, jnp.arange(columns))
    segment_BT, position_BT = (jnp.tile(x, (rows, 1)) for x in (group_T, position_T))
    return token_ids(rows, columns), TokenLayout(segment_BT, None, position_BT)


def loss(prefix, params, ids_BT, tokens):
    h_BTD, _ = BACKBONE.hidden(params, ids_BT, tokens, prefix)
    return jnp.sum(jnp.where((tokens.segment_BT > 0)[..., None], h_BTD, 0) ** 3)


def test_kernels_give_equal_losses_and_gradients():
    step = jax.value_and_grad(loss)
    args = prefix(), weights(BACKBONE), *texts(2, 128)
    plain = jax.jit(step)(*args)
    with interpreted():
        traced = jax.jit(lambda *args: step(*args)).trace(*args)
    assert "interpret=True" in str(traced.jaxpr)
    fused = traced.lower().compile()(*args)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
    close(fused[0], plain[0])
    jax.tree.map(
        lambda ours, theirs: close(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max())),
        fused[1],
        plain[1],
    )


@pytest.mark.parametrize("columns", [256, 196])
def test_sharded_columns_give_equal_losses_and_gradients(columns: int):
    step = jax.value_and_grad(loss)
    args = prefix(), weights(BACKBONE), *texts(2, columns)
    plain = jax.jit(step)(*args)
    with jax.set_mesh(make_mesh(2, sequence=4)), interpreted():
        traced = jax.jit(lambda *args: step(*args)).trace(*args)
        assert "interpret=True" in str(traced.jaxpr)
        split = traced.lower().compile()(*args)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=1e-4, atol=1e-5 * float(jnp.abs(theirs).max())
        ),
        split,
        plain,
    )


def test_lineage_applies_to_columns_in_original_order():
    backbone, T = decoder("llama"), 16
    args = weights(backbone), token_ids(2, T), present(2, T)
    some_BTS = jax.random.bernoulli(jax.random.key(1), 0.5, (2, T, T))
    lineage_BTS = some_BTS | jnp.eye(T, dtype=bool)
    alone, _ = hidden(backbone, *args, lineage_BTS=lineage_BTS)
    with jax.set_mesh(make_mesh(2, sequence=4)):
        shared, _ = hidden(backbone, *args, lineage_BTS=lineage_BTS)
    np.testing.assert_allclose(shared, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("soft", [0, P])
def test_devices_share_any_number_of_encoder_columns(soft: int):
    """13 or 18 columns, over 4 devices."""
    backbone, T = Backbone(bert.architecture(BERT)), 13
    D, F = backbone.arch.d_model, backbone.arch.d_ff
    prefix = Prefix(embeds_PD=jax.random.normal(jax.random.key(1), (soft, D))) if soft else None
    tokens = TokenLayout.plain(jnp.ones((2, T), bool).at[1, :2].set(False))
    args = weights(backbone), token_ids(2, T), tokens, prefix
    alone, _ = hidden(backbone, *args)
    assert alone.shape == (2, soft + T, D)
    with jax.set_mesh(make_mesh(2, sequence=4)):
        program = hidden.lower(backbone, *args).compile()
    h_BTD, _ = program(*args)
    there = np.asarray(tokens.segment_BT > 0)
    np.testing.assert_allclose(h_BTD[:, soft:][there], alone[:, soft:][there], rtol=1e-4, atol=1e-5)
    # One row each, and at most 6 of its columns.
    widest = [a for a in temporaries(parse(program.as_text())) if a.dims[-1:] == (F,)]
    assert widest
    assert max(array.elements for array in widest) <= 6 * F


def test_kernels_prefill_prompts_and_xla_continues_them():
    params = jax.eval_shape(lambda: weights(BACKBONE))

    def read(params, ids_BT, tokens):
        cache = BACKBONE.empty_cache(params, *ids_BT.shape)
        return BACKBONE.hidden(params, ids_BT, tokens, None, cache)[1].grow(128)

    def advance(params, ids_BT, tokens, cache):
        return BACKBONE.hidden(
            params, ids_BT[:, :1], jax.tree.map(lambda x: x[:, :1], tokens), None, cache
        )

    args = params, *texts(2, 128)
    with jax.set_mesh(make_mesh()):
        assert "pallas_call" in str(jax.make_jaxpr(read)(*args))
        cache = jax.eval_shape(read, *args)
        assert "pallas_call" not in str(jax.make_jaxpr(advance)(*args, cache))


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "sequence": 2, "tensor": 2}],
    ids=lambda sizes: "-".join(sizes),
)
def test_tpu_program_has_no_attention_weights_array(sizes: dict[str, int]):
    """Compiles for 8 chips that shard rows, D and heads."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    T = 256
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = make_mesh(**sizes, devices=chips)

    def on(mesh_sharding: NamedSharding, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mesh_sharding)

    params = jax.eval_shape(lambda: weights(BACKBONE))
    rows = rows_sharding(mesh, 2)
    args = (
        jax.tree.map(functools.partial(on, replicated(mesh)), jax.eval_shape(prefix)),
        jax.tree.map(on, weight_shardings(params, mesh), params),
        *jax.tree.map(functools.partial(on, rows), jax.eval_shape(lambda: texts(4, T))),
    )
    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss)).lower(*args).compile().as_text()
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mqa_{kernel}" in program
    assert not [array for array in temporaries(parse(program)) if array.dims.count(T) > 1]


def test_position_lookup_exchanges_rows_without_gathering_the_table():
    mesh, backbone = make_mesh(2, 2, 2), decoder("gpt2")

    def on(mesh_sharding: NamedSharding, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mesh_sharding)

    def place(params, x_BTD, tokens):
        return constrain_tokens(Stack(backbone.arch).embed_positions(params, x_BTD, tokens, 3))

    params = jax.eval_shape(lambda: weights(backbone))
    params = jax.tree.map(on, weight_shardings(params, mesh), params)
    x_BTD = on(rows_sharding(mesh, 3), jnp.zeros((8, 12, 32)))
    tokens = jax.tree.map(functools.partial(on, rows_sharding(mesh, 2)), present(8, 12))
    with jax.set_mesh(mesh):
        program = parse(jax.jit(place).lower(params, x_BTD, tokens).compile().as_text())
    gathered = [
        array
        for computation in program.computations.values()
        for instruction in computation.values()
        if instruction.opcode.startswith("all-gather")
        for array in instruction.results
    ]
    assert {array.dtype for array in gathered} <= {"s32"}
