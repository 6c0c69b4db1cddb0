"""Where models are found, and what is refused."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from huggingface_hub.errors import HfHubHTTPError
from safetensors.numpy import load_file, save_file

from prefix_jax.backbones.load import architecture, find, load, read_config
from prefix_jax.errors import BackboneError, ConfigError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "smollm", tmp_path / "model"))


def _edit_config(model: Path, **values: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def test_an_unsupported_architecture_lists_the_supported_ones(model: Path) -> None:
    _edit_config(model, model_type="mamba")
    with pytest.raises(BackboneError, match="'mamba'; supported: gpt2, llama, mistral, qwen2"):
        load(model)


@pytest.mark.parametrize("value", [None, 0, "4"])
def test_a_config_with_values_that_cannot_be_is_an_error(model: Path, value: object) -> None:
    config = read_config(model) | {"num_attention_heads": value}
    config.pop("head_dim", None)
    with pytest.raises(BackboneError, match="configuration of here holds values that no "):
        architecture(config, "here")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", -1),
        ("hidden_size", 32.0),
        ("num_attention_heads", 5),
        ("num_key_value_heads", 3),
        ("rope_theta", "x"),
    ],
)
def test_a_model_is_not_built_from_numbers_that_cannot_be(tmp_path: Path, key, value) -> None:
    directory = tiny.write_model(tmp_path / "model")
    _edit_config(directory, **{key: value})
    with pytest.raises(BackboneError, match="holds values that no llama has"):
        load(directory)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"x": 1}}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, index: str) -> None:
    directory = tiny.write_model(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BackboneError, match=r"index\.json is not a safetensors index"):
        load(directory)


def test_a_config_that_lacks_a_number_names_it(model: Path) -> None:
    config = read_config(model)
    del config["num_hidden_layers"]
    with pytest.raises(BackboneError, match="configuration of here lacks 'num_hidden_layers'"):
        architecture(config, "here")


def test_missing_unexpected_and_misshapen_tensors_are_told_at_once(model: Path) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float16)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((32, 48), np.float16)
    save_file(tensors, file)
    with pytest.raises(BackboneError) as error:
        load(model)
    for line in (
        "    norm.weight",
        "    model.layers.0.self_attn.q_proj.bias",
        "    layers.1.mlp.up_proj.weight: (32, 48) instead of (48, 32)",
    ):
        assert line in str(error.value).splitlines()


def test_a_checkpoint_of_the_bare_model_loads_like_the_whole_one(model: Path) -> None:
    whole = load(model)
    file = model / "model.safetensors"
    tensors = {name.removeprefix("model."): x for name, x in load_file(file).items()}
    save_file(tensors, file)
    assert load(model).fingerprint == whole.fingerprint


def test_tensors_that_hold_nothing_may_be_there(model: Path) -> None:
    whole = load(model)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    assert load(model).fingerprint == whole.fingerprint


def test_an_untied_head_must_be_there(model: Path) -> None:
    _edit_config(model, tie_word_embeddings=False)
    with pytest.raises(BackboneError, match=r"1 missing:\n    lm_head\.weight"):
        load(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not valid JSON"), ("[]", "holds no mapping"), (None, r"has no config\.json")],
)
def test_an_unreadable_config_is_named(model: Path, content: str | None, message: str) -> None:
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(content)
    with pytest.raises(BackboneError, match=message):
        load(model)


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/model", "a/b/c", "nowhere.gguf"])
def test_a_missing_path_is_an_error(path: str) -> None:
    with pytest.raises(BackboneError, match="there is no directory or file"):
        find(path)


def test_weights_are_held_in_no_other_form_than_those_there_are(model: Path) -> None:
    form: Any = "int3"
    with pytest.raises(ConfigError, match="quantize: 'int3' is not one of none, int8, int4"):
        load(model, quantize=form)
    with pytest.raises(ConfigError, match="dtype: 'int3' is not one of auto, float32, bfloat16"):
        load(model, dtype=form)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(BackboneError, match=r"neither a directory .* nor a \.gguf file"):
        find(tmp_path / "weights.bin")


def test_a_preset_has_no_weights_to_load() -> None:
    with pytest.raises(BackboneError, match="preset:gpt2 is a model's shape without its weights"):
        load("preset:gpt2")


def test_a_hub_model_that_cannot_be_fetched_says_why() -> None:
    with pytest.raises(BackboneError, match="'nobody/nothing' could not be fetched"):
        find("nobody/nothing")


def test_a_failure_of_the_hub_that_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(BackboneError, match=r"could not be fetched .*: TimeoutError"):
        find("nobody/nothing")


def lost(kind: str) -> Exception:
    """What huggingface_hub raises where a connection breaks in the middle of a file."""
    if kind == "xet":
        return RuntimeError("Data processing error: the connection was reset")
    # Of the HTTP client that it runs on: httpx, later httpx2.
    client = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    return client.RemoteProtocolError("peer closed connection without sending complete message")


@pytest.mark.parametrize("kind", ["http", "xet"])
def test_a_connection_that_is_lost_half_way_is_an_error_of_the_user(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise lost(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(BackboneError, match=r"could not be fetched .*connection"):
        find("nobody/nothing")


def test_a_gguf_in_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_tiny"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "b.gguf").touch()
    (package / "a.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find("package:llm_tiny") == package / "a.gguf"
    assert "llm_tiny" not in sys.modules


def test_an_absent_package_is_not_advised_to_be_installed_under_any_name() -> None:
    with pytest.raises(BackboneError, match="no Python package 'llm_absent'") as raised:
        find("package:llm_absent")
    assert "pip install" not in str(raised.value)


def test_a_directory_in_an_installed_package_is_found_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny_encoder" / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "2_Dense").mkdir()
    # A folder with a configuration alone is none; of several, the outermost is the model's.
    for where in (".", "1_Pooling", "2_Dense"):
        (folder / where / "config.json").touch()
    for where in (".", "2_Dense"):
        (folder / where / "model.safetensors").touch()
    (tmp_path / "tiny_encoder" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find("package:tiny_encoder") == folder


def test_a_package_without_a_model_is_an_error() -> None:
    with pytest.raises(
        BackboneError, match=r"holds neither a \.gguf file nor a model\.safetensors"
    ):
        find("package:json")
