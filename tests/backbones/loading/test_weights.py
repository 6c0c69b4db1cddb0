"""Streams weights from files of any layout into their shards and dtypes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.backbones.loading.weights import Safetensors
from prefix_jax.errors import BackboneError
from prefix_jax.mesh import make_mesh

FIXTURES = Path(__file__).parents[2] / "fixtures" / "backbones"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Copies a small Llama."""
    return Path(shutil.copytree(FIXTURES / "llama_grouped", tmp_path / "model"))


def _equal(a, b) -> None:
    a, b = flatten_dict(dict(a)), flatten_dict(dict(b))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=str(path))


def test_values_dtypes_and_shapes_survive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        np.dtype(dtype).name: rng.normal(size=(3, 5)).astype(dtype)
        for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = Safetensors(tmp_path)
    assert set(source.shapes) == set(tensors)
    for name, tensor in tensors.items():
        read = source.read(name)
        assert read.dtype == tensor.dtype
        np.testing.assert_array_equal(read, tensor)


def test_sharded_files_load_like_a_single_one(model: Path) -> None:
    whole = load(model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[:7], sorted(tensors)[7:])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in names}, model / file)
        weight_map |= dict.fromkeys(names, file)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sharded = load(model)
    _equal(sharded.params, whole.params)
    assert sharded.fingerprint == whole.fingerprint

    (model / "model-1.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"names missing files: model-1\.safet"):
        load(model)


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (8, 1, 1)])
@pytest.mark.parametrize("variant", ["gpt2", "qwen3"])
def test_mesh_holds_the_same_values(variant: str, sizes: tuple[int, int, int]) -> None:
    single = load(FIXTURES / variant)
    mesh = make_mesh(*sizes)
    spread = load(FIXTURES / variant, mesh=mesh)
    _equal(spread.params, single.params)
    q_LDNH = spread.params["layers"]["attn"]["q_DNH"]
    assert q_LDNH.sharding.mesh == mesh
    assert len(q_LDNH.sharding.device_set) == 8
    assert np.prod(q_LDNH.addressable_shards[0].data.shape) * sizes[1] * sizes[2] == q_LDNH.size


def test_every_parameter_has_the_target_dtype(model: Path) -> None:
    half, full = load(model, dtype="bfloat16"), load(model, dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(full.params)} == {np.dtype("float32")}
    _equal(half.params, jax.tree.map(lambda x: x.astype("bfloat16"), full.params))


def test_loaded_weights_can_be_donated(model: Path) -> None:
    """CPU arrays adopt the loader's buffers; donating them must not corrupt anything."""
    params = load(model).params
    before = jax.tree.map(lambda x: np.array(x), params)
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)(params)
    _equal(doubled, jax.tree.map(lambda x: 2 * x, before))


@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_names_a_truncated_file(model: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BackboneError, match=r"model\.safetensors is truncated or corrupt"):
        load(model)


def test_unsupported_dtype_fails_only_when_read(tmp_path: Path) -> None:
    save_file({"some.tensor": np.zeros(3, np.int8)}, tmp_path / "model.safetensors")
    source = Safetensors(tmp_path)
    assert source.shapes == {"some.tensor": (3,)}
    with pytest.raises(BackboneError, match=r"some\.tensor has dtype I8; supported: F64, F32"):
        source.read("some.tensor")


def test_pickles_are_never_read(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"a pickle, which is never read.*save_pretrained"):
        load(model)


def test_rejects_a_directory_without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"has no model\.safetensors and no model\.safet"):
        load(model)
