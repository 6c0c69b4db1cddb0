"""Meshes, and sharding by the letters of a name. `conftest.py` makes 8 CPU devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import decoder, token_ids, weights
from jax.sharding import Mesh, PartitionSpec

from prefix_jax.errors import MeshError
from prefix_jax.mesh import (
    SHARE_AXES,
    batch_shards,
    check_rows,
    constrain_tokens,
    describe,
    look_up,
    make_mesh,
    on_mesh_of,
    place_rows,
    rows_sharding,
    weight_shardings,
    weight_spec,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)


# The mesh.


def test_one_size_can_be_inferred():
    def sizes(mesh: Mesh) -> tuple[int, ...]:
        assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor")
        return mesh.devices.shape

    assert sizes(make_mesh()) == (8, 1, 1, 1)
    assert sizes(make_mesh(2, -1, 2)) == (2, 2, 1, 2)
    assert sizes(make_mesh(1, 1, -1, jax.devices()[:3])) == (1, 1, 1, 3)
    assert sizes(make_mesh(2, sequence=-1)) == (2, 1, 4, 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "data=3 x fsdp=1 x tensor=1 does not fit 8 devices"),
        ((-1, 3, 1), "data=-1 x fsdp=3 x tensor=1 does not fit 8 devices"),
        ((-1, -1, 1), "only one may be -1"),
        ((0, 1, 1), "sizes must be positive"),
        ((-2, 1, 1), "sizes must be positive"),
    ],
)
def test_rejects_a_mesh_that_does_not_fit_the_devices(sizes, message):
    with pytest.raises(MeshError, match=message):
        make_mesh(*sizes)


def test_rows_divide_over_data_and_fsdp(mesh):
    assert batch_shards(mesh) == 4
    check_rows(mesh, 8, "batch")
    with pytest.raises(MeshError, match=r"batch 6 does not divide over 4 .*multiple of 4"):
        check_rows(mesh, 6, "batch")


def test_describes_a_mesh_by_its_axes(mesh):
    assert describe(mesh) == describe(dict(mesh.shape)) == "data=2 x fsdp=2 x tensor=2"
    assert describe(make_mesh(2, sequence=4)) == "data=2 x fsdp=1 x sequence=4 x tensor=1"


# Weights.


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("q_DNH", (8, 4, 2), (SHARE_AXES, "tensor", None)),
        ("q_DNH", (3, 8, 4, 2), (None, SHARE_AXES, "tensor", None)),
        ("o_NHD", (4, 2, 8), ("tensor", None, SHARE_AXES)),
        ("down_FD", (3, 6, 8), (None, "tensor", SHARE_AXES)),
        ("tokens_VD", (50, 8), ("tensor", SHARE_AXES)),
        ("positions_TD", (64, 8), (None, SHARE_AXES)),
        ("unembed_DV", (8, 50), (SHARE_AXES, "tensor")),
        # Biases with two letters are sharded like matrices.
        ("q_bias_NH", (3, 4, 2), (None, "tensor", None)),
        # 3 heads over 2 devices, or an odd vocabulary: the axis is not split.
        ("k_DKH", (8, 3, 2), (SHARE_AXES, None, None)),
        ("tokens_VD", (51, 8), (None, SHARE_AXES)),
        # Vectors are replicated, stacked or not.
        ("scale_D", (8,), ()),
        ("scale_D", (3, 8), ()),
        ("up_bias_F", (3, 8), ()),
    ],
)
def test_letters_of_a_name_shard_a_weight(mesh, name, shape, expected):
    path = (jax.tree_util.DictKey("layers"), jax.tree_util.DictKey(name))
    assert weight_spec(path, shape, mesh) == PartitionSpec(*expected)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3"])
def test_every_large_weight_is_sharded(mesh, name):
    abstract = jax.eval_shape(decoder(name).init, jax.random.key(0))
    shardings = weight_shardings(abstract, mesh)
    for leaf, sharding in zip(*map(jax.tree.leaves, (abstract, shardings)), strict=True):
        parts = leaf.size / np.prod(sharding.shard_shape(leaf.shape))
        assert parts >= 2 or leaf.size <= 3 * 128


def test_unstacked_layers_are_sharded_like_stacked_ones(mesh):
    """Conversion moves nothing between devices: each layer keeps the shards of the stack."""
    backbone = decoder("llama")
    params = weights(backbone)
    stacked = jax.device_put(params, weight_shardings(params, mesh))
    specs = jax.tree.map(lambda leaf: leaf.sharding, stacked["layers"])
    unstacked = backbone.unstacked(stacked)
    expected = weight_shardings(unstacked, mesh)
    jax.tree.map(
        lambda leaf, sharding: (
            pytest.fail(f"{leaf.sharding} is not {sharding}")
            if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            else None
        ),
        unstacked,
        expected,
    )
    again = backbone.stacked(unstacked)
    for leaf, sharding in zip(*map(jax.tree.leaves, (again["layers"], specs)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


# Rows.


def test_rows_are_sharded_over_data_and_fsdp_and_scalars_replicated(mesh):
    batch = {"ids": np.arange(24, dtype=np.int32).reshape(8, 3), "examples": np.float32(7)}
    placed = place_rows(batch, mesh)
    assert placed["ids"].sharding.shard_shape((8, 3)) == (2, 3)
    assert placed["examples"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, placed, batch)


def test_micro_batch_axis_precedes_the_rows(mesh):
    batch = {"ids": np.zeros((5, 8, 3), np.int32), "examples": np.ones(5, np.float32)}
    placed = place_rows(batch, mesh, leading=1)
    assert placed["ids"].sharding.shard_shape((5, 8, 3)) == (5, 2, 3)
    assert placed["examples"].sharding.is_fully_replicated
    assert rows_sharding(mesh, 3, 1).spec == PartitionSpec(None, ("data", "fsdp"), None)


def test_constrains_rows_only_under_a_mesh(mesh):
    x = jnp.zeros((8, 2))
    assert constrain_tokens(x) is x
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: constrain_tokens(x + 1))(token_ids(8, 2))
    assert out.sharding.shard_shape((8, 2)) == (2, 2)


def test_single_row_is_replicated_and_its_columns_sharded():
    with jax.set_mesh(make_mesh(4, sequence=2)):
        out = jax.jit(lambda x: constrain_tokens(x + 1))(token_ids(1, 6))
    assert out.sharding.shard_shape((1, 6)) == (1, 3)


@pytest.mark.parametrize("shape", [(4, 8), (4, 3), (1, 8), (3, 8)])
@pytest.mark.parametrize(
    "sizes",
    [{"data": 1, "fsdp": 2, "sequence": 4}, {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}],
    ids=lambda sizes: "-".join(sizes),
)
def test_table_lookup_exchanges_rows_without_gathering(sizes, shape, compiler_warnings):
    ids_BT, table_VD = token_ids(*shape), jnp.arange(50.0 * 8).reshape(50, 8)

    def embed(table_VD, ids_BT):
        return constrain_tokens(look_up(table_VD, ids_BT))

    mesh = make_mesh(**sizes)
    placed = {"tokens_VD": table_VD}
    placed = jax.device_put(placed, weight_shardings(placed, mesh))
    with jax.set_mesh(mesh):
        x_BTD = jax.jit(embed)(placed["tokens_VD"], ids_BT)
    np.testing.assert_array_equal(x_BTD, table_VD[ids_BT])
    assert "Involuntary full rematerialization" not in compiler_warnings()


def test_programs_run_on_the_mesh_of_their_arrays(mesh):
    placed = place_rows({"ids": np.zeros((8, 3), np.int32)}, mesh)
    with on_mesh_of(placed):
        assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh
    with on_mesh_of({"ids": jnp.zeros(3)}):
        assert jax.sharding.get_abstract_mesh().empty
