import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax import artifact
from prefix_jax.cli.main import main
from prefix_jax.prefix import Geometry, KVPrefix, Prefix, Site, SiteShape


@pytest.fixture
def stored(tmp_path):
    k_LPKH, v_LPKH = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 1, 4)))
    produced = Prefix(Site(KVPrefix(k_LPKH, v_LPKH)), text_position=3)
    backbone = artifact.BackboneCard(
        source="/gone", model_type="gpt2", fingerprint="0", dtype="float32"
    )
    card = artifact.make_card(produced, Geometry(8, 16, SiteShape(2, 2, 1, 4)), backbone)
    artifact.save(tmp_path / "stored", produced, card)
    return tmp_path / "stored"


@pytest.mark.parametrize(
    ("arguments", "container", "file"),
    [
        ([], "safetensors", "prefix.safetensors"),
        (["--to", "orbax"], "orbax", "arrays"),
        (["--bake"], "safetensors", "prefix.safetensors"),
    ],
)
def test_writes_the_copy_and_prints_a_summary(arguments, container, file, stored, tmp_path, capsys):
    copy = tmp_path / "copy"
    assert main(["export", str(stored), str(copy), *arguments]) == 0
    out = capsys.readouterr().out
    assert f"{copy}: 3 slots of kind 'kv' as {container}, " in out
    assert "text starts at position 3" in out
    assert (copy / file).exists()
    assert artifact.load(copy)[1] == artifact.load(stored)[1]


def test_missing_prefix_is_one_error_and_writes_nothing(tmp_path, capsys):
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "copy")]) == 2
    assert capsys.readouterr().err.startswith("error: no directory")
    assert not (tmp_path / "copy").exists()


def test_never_overwrites_an_existing_prefix(stored, capsys):
    before = artifact.load(stored)[1]
    assert main(["export", str(stored), str(stored), "--to", "safetensors"]) == 2
    assert "already contains a prefix" in capsys.readouterr().err
    assert artifact.load(stored)[1] == before
