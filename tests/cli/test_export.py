import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from prefix_jax import artifact
from prefix_jax.cli.main import main
from prefix_jax.prefix import Geometry, KVPrefix, Prefix, Site, SiteShape

# That of the model of `tiny.write_gguf`.
GEOMETRY = Geometry(32, 258, SiteShape(2, 4, 2, 8))


@pytest.fixture
def stored(tmp_path):
    k_LPKH, v_LPKH = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 2, 8)))
    produced = Prefix(Site(KVPrefix(k_LPKH, v_LPKH)), text_position=3)
    backbone = artifact.BackboneCard(
        source="/gone", model_type="gpt2", fingerprint="0", dtype="float32"
    )
    card = artifact.make_card(produced, GEOMETRY, backbone)
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


def test_vllm_export_prints_the_commands_that_serve_it(stored, tmp_path, capsys):
    assert main(["export", str(stored), str(tmp_path / "served" / "mine"), "--to", "vllm"]) == 0
    out = capsys.readouterr().out
    assert "mine: 3 slots for vLLM" in out
    assert f"PYTHONPATH={tmp_path}/served vllm serve /gone --config" in out
    assert '"model": "mine"' in out


def test_vllm_export_quotes_paths_for_the_shell(stored, tmp_path, capsys):
    assert main(["export", str(stored), str(tmp_path / "my served" / "mine"), "--to", "vllm"]) == 0
    out = capsys.readouterr().out
    assert f"PYTHONPATH='{tmp_path}/my served' vllm serve /gone --config '{tmp_path}/my" in out


def test_vllm_export_names_the_option_for_a_gguf_backbone(stored, tmp_path, capsys):
    model = tiny.write_gguf(tmp_path / "model.gguf")
    arguments = ["export", str(stored), str(tmp_path / "served" / "mine"), "--to", "vllm"]
    assert main([*arguments, "--model", str(model)]) == 0
    assert "is a GGUF file, which vLLM does not read; export with --write-model" in (
        capsys.readouterr().out
    )
    assert main([*arguments, "--model", str(model), "--write-model"]) == 2
    assert "already contains a prefix" in capsys.readouterr().err
    assert main([*arguments, "--model", str(model), "--write-model", "--replace"]) == 0
    assert f"vllm serve {tmp_path}/served/model" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--replace", "--write-model"])
def test_options_of_vllm_are_refused_for_other_formats(option, stored, tmp_path, capsys):
    assert main(["export", str(stored), str(tmp_path / "copy"), option]) == 2
    assert f"{option} requires --to vllm" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()
