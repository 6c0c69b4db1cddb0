"""Sharding of the head: the placement of logits, which must not change the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.mesh import make_mesh, place_rows
from prefix_jax.nn import vocabulary
from prefix_jax.nn.loss import frozen_head_loss
from prefix_jax.nn.quantized import matmul, quantize
from prefix_jax.plan.hlo import parse, temporaries
from prefix_jax.plan.topology import Topology

B, M, D = 8, 3, 8
MESHES = {"fsdp": (1, 4, 1), "all": (2, 2, 2), "data": (4, 1, 1)}


def mesh_of(name: str):
    sizes = MESHES[name]
    return make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def unembed(weights_DV, h_BMD):
    return matmul(h_BMD, weights_DV, dtype=jnp.float32)


@jax.jit
def loss_and_gradient(weights_DV, h_BMD, label_BM):
    def loss(h_BMD):
        weight_BM = jnp.ones(label_BM.shape)
        return frozen_head_loss(unembed, vocabulary.head(weights_DV, 1), h_BMD, label_BM, weight_BM)

    return jax.value_and_grad(loss)(h_BMD)


@functools.cache
def problem(V: int):
    rng = np.random.default_rng(V)
    weights_DV, h_BMD = rng.normal(size=(D, V)), rng.normal(size=(B, M, D))
    return weights_DV.astype(np.float32), h_BMD.astype(np.float32), rng.integers(0, V, (B, M))


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("V", [32, 30, 7])
@pytest.mark.parametrize("few", [1, 16], ids=["gathered", "shared"])
def test_loss_and_gradient_do_not_depend_on_the_mesh(few, V, name, monkeypatch):
    monkeypatch.setattr(vocabulary, "_FEW", few)
    weights_DV, h_BMD, label_BM = problem(V)
    expected = loss_and_gradient(weights_DV, h_BMD, label_BM)
    loss_and_gradient.clear_cache()
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        actual = loss_and_gradient(weights_DV, *place_rows((h_BMD, label_BM), mesh))
    for ours, alone in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [None, 8])
def test_few_devices_split_the_vocabulary(bits):
    weights_DV = jnp.ones((D, 32))
    if bits:
        weights_DV = quantize(weights_DV, bits, (1, 32), jnp.float32)
    with jax.set_mesh(mesh_of("all")):
        placed = jax.jit(lambda weights: vocabulary.head(weights, 1))(weights_DV)
    for leaf in jax.tree.leaves(placed):
        assert leaf.sharding.shard_shape(leaf.shape) == (leaf.shape[0], 8)


def test_many_devices_gather_the_head(monkeypatch):
    monkeypatch.setattr(vocabulary, "_FEW", 1)
    with jax.set_mesh(mesh_of("fsdp")):
        placed = jax.jit(lambda weights: vocabulary.head(weights, 1))(jnp.ones((D, 32)))
    assert placed.sharding.is_fully_replicated


def test_devices_that_share_only_columns_split_the_logits(monkeypatch):
    """3 targets per row are padded to 4, one on each of 4 devices."""
    monkeypatch.setattr(vocabulary, "_FEW", 1)
    V = 37
    arguments = problem(V)
    expected = loss_and_gradient(*arguments)
    loss_and_gradient.clear_cache()
    with jax.set_mesh(make_mesh(2, sequence=4)):
        program = loss_and_gradient.lower(*arguments).compile()
    for ours, alone in zip(program(*arguments), expected, strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-6)
    logits = [a for a in temporaries(parse(program.as_text())) if a.dims[-1:] == (V,)]
    assert logits
    assert max(array.elements for array in logits) <= max(B // 2, D) * V


def test_chunk_size_follows_the_mesh():
    assert vocabulary.chunk_targets() == 512
    assert targets_of_a_chunk(make_mesh(4, 1, 1, devices=jax.devices()[:4])) == 4 * 128
    assert targets_of_a_chunk(make_mesh(1, 8, 1)) == 8 * 128
    tpus = Topology.parse("v5e:2x4")
    for data, fsdp, targets in ((8, 1, 8 * 512), (2, 4, 2 * 512), (1, 8, 1024)):
        mesh = tpus.mesh({"data": data, "fsdp": fsdp, "sequence": 1, "tensor": 1})
        assert targets_of_a_chunk(mesh) == targets


def targets_of_a_chunk(mesh):
    with jax.set_mesh(mesh):
        (count,) = jax.eval_shape(lambda: jnp.zeros(vocabulary.chunk_targets())).shape
    return count


def test_does_nothing_outside_a_mesh():
    weights_DV = jnp.ones((D, 32))
    assert vocabulary.head(weights_DV, 1) is weights_DV
    assert vocabulary.rows(weights_DV) is weights_DV
