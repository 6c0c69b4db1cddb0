"""Finding and loading models, and errors of invalid ones."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from huggingface_hub.errors import HfHubHTTPError
from safetensors.numpy import load_file, save_file

from prefix_jax.backbones.loading.config import architecture, read_config
from prefix_jax.backbones.loading.find import find
from prefix_jax.backbones.loading.pretrained import architecture_of, load
from prefix_jax.errors import BackboneError, ConfigError
from prefix_jax.nn.quantized import Quantize

FIXTURES = Path(__file__).parents[2] / "fixtures" / "backbones"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "smollm", tmp_path / "model"))


def _edit_config(model: Path, **values: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def test_unsupported_architecture_lists_the_supported_ones(model: Path) -> None:
    _edit_config(model, model_type="mamba")
    with pytest.raises(BackboneError, match="'mamba'; supported: gpt2, llama, mistral, qwen2"):
        load(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", None),
        ("num_attention_heads", 0),
        ("num_attention_heads", "4"),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", True),
        ("hidden_size", 32.0),
        ("vocab_size", 10**9),
        ("rms_norm_eps", "x"),
        ("rms_norm_eps", math.nan),
        ("max_position_embeddings", None),
        ("max_position_embeddings", "x"),
        ("max_position_embeddings", math.inf),
        ("hidden_act", ["silu"]),
        ("eos_token_id", "x"),
        ("tie_word_embeddings", "false"),
        ("attention_bias", 0),
        ("rope_theta", "x"),
        ("rope_theta", 0),
        ("rope_theta", -1.0),
        ("rope_scaling", [1]),
        ("rope_scaling", {"rope_type": "linear", "factor": "x"}),
        ("rope_parameters", {"rope_theta": 0}),
        ("sliding_window", 0.5),
        ("layer_types", "full_attention"),
    ],
)
def test_names_config_values_of_a_wrong_type_or_range(
    tmp_path: Path, key: str, value: object
) -> None:
    directory = tiny.write_model(tmp_path / "model")
    _edit_config(directory, **{key: value})
    inner = rf"{key}(: \w+)? must be .*, got "
    with pytest.raises(BackboneError, match=rf"config\.json: {inner}"):
        architecture_of(directory)
    with pytest.raises(BackboneError, match=f"the configuration of here: {inner}"):
        architecture(tiny.CONFIG | {key: value}, "here")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 5}, "5 query heads are not a multiple of 2 key/value heads"),
        ({"num_key_value_heads": 3}, "4 query heads are not a multiple of 3 key/value heads"),
        ({"hidden_size": 2}, "head_dim: must be a positive integer"),
        ({"head_dim": 7}, "7 of 7 dimensions rotate, expected an even number"),
        (
            {"rope_theta": 1e-30, "rope_scaling": {"rope_type": "linear", "factor": 1e-30}},
            "frequencies that are not finite",
        ),
    ],
)
def test_names_contradictory_config_values(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    directory = tiny.write_model(tmp_path / "model")
    _edit_config(directory, **values)
    with pytest.raises(BackboneError, match=f"is not valid for llama: .*{message}"):
        architecture_of(directory)


def test_rejects_relative_positions_without_a_distance(tmp_path: Path) -> None:
    directory = tiny.write_t5(tmp_path / "t5")
    _edit_config(directory, relative_attention_max_distance=0)
    with pytest.raises(BackboneError, match="relative_attention_max_distance must be an integer"):
        architecture_of(directory)


def test_rejects_an_unknown_activation_at_load(tmp_path: Path) -> None:
    directory = tiny.write_model(tmp_path / "model")
    _edit_config(directory, hidden_act="swoosh")
    with pytest.raises(BackboneError, match="unknown activation 'swoosh'; known: "):
        architecture_of(directory)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"x": 1}}', "[" * 10_000])
def test_names_an_invalid_index(tmp_path: Path, index: str) -> None:
    directory = tiny.write_model(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(
        BackboneError, match=r"index\.json: .*(JSON|must be an object|must be a mapping)"
    ):
        load(directory)


def test_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    directory = tiny.write_model(tmp_path / "model")
    (directory / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = json.dumps({"weight_map": {"x": "../model.safetensors"}})
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BackboneError, match="which is not a file in its directory"):
        load(directory)


def test_rejects_a_tensor_in_two_shards(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "model-2.safetensors")
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(BackboneError, match=r"is also in model-1\.safetensors; keep one of them"):
        load(model)


def test_omitted_number_gets_the_default_of_transformers(model: Path) -> None:
    config = read_config(model)
    del config["num_hidden_layers"]
    assert architecture(config, "here").layers == 32


def test_names_a_missing_key_without_default(model: Path) -> None:
    config = read_config(model) | {"rope_scaling": {"rope_type": "linear"}}
    with pytest.raises(BackboneError, match="configuration of here lacks 'factor'"):
        architecture(config, "here")


def test_rejects_per_layer_config(model: Path) -> None:
    config = read_config(model) | {"per_layer_config": {"0": {"intermediate_size": 24}}}
    with pytest.raises(BackboneError, match="per_layer_config is not supported"):
        architecture(config, "here")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_names_weights_that_are_not_finite(
    tmp_path: Path, value: float, quantize: Quantize
) -> None:
    directory = tiny.write_model(tmp_path / "model")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        tensors[name].flat[-1] = value
    save_file(tensors, file)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(
            BackboneError,
            match=r"NaN or infinite .* in model\.layers\.1\.mlp\.up_proj\.weight, model\.norm",
        ),
    ):
        load(directory, quantize=quantize)


def test_reports_all_missing_unexpected_and_misshapen_tensors(model: Path) -> None:
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


def test_bare_checkpoint_loads_like_the_whole_one(model: Path) -> None:
    whole = load(model)
    file = model / "model.safetensors"
    tensors = {name.removeprefix("model."): x for name, x in load_file(file).items()}
    save_file(tensors, file)
    assert load(model).fingerprint == whole.fingerprint


def test_ignored_tensors_are_allowed(model: Path) -> None:
    whole = load(model)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    assert load(model).fingerprint == whole.fingerprint


def test_untied_head_is_required(model: Path) -> None:
    _edit_config(model, tie_word_embeddings=False)
    with pytest.raises(BackboneError, match=r"1 missing:\n    lm_head\.weight"):
        load(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "malformed JSON"),
        ("[]", "expected a JSON object"),
        ("[" * 10_000, "nested more than"),
        (None, r"has no config\.json"),
    ],
)
def test_names_an_unreadable_config(model: Path, content: str | None, message: str) -> None:
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(content)
    with pytest.raises(BackboneError, match=message):
        load(model)


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/model", "a/b/c", "nowhere.gguf"])
def test_reports_a_missing_path(path: str) -> None:
    with pytest.raises(BackboneError, match="no such file or directory"):
        find(path)


@pytest.mark.parametrize("path", ["x" * 300, "~nosuchuser/model", "a\0b"])
def test_reports_an_impossible_path(path: str) -> None:
    with pytest.raises(BackboneError, match=r"cannot be used as a path|cannot expand"):
        find(path)


def test_module_without_a_spec_is_not_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    with pytest.raises(BackboneError, match="no Python package '__main__' is installed"):
        find("package:__main__")


def test_rejects_unknown_dtypes_and_quantisations(model: Path) -> None:
    form: Any = "int3"
    with pytest.raises(ConfigError, match="quantize: 'int3' is not one of none, int8, int4"):
        load(model, quantize=form)
    with pytest.raises(ConfigError, match="dtype: 'int3' is not one of auto, float32, bfloat16"):
        load(model, dtype=form)


def test_rejects_a_file_that_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(BackboneError, match=r"neither a directory .* nor a \.gguf file"):
        find(tmp_path / "weights.bin")


def test_rejects_a_preset() -> None:
    with pytest.raises(BackboneError, match="preset:gpt2 is the shape of a model without weights"):
        load("preset:gpt2")


def test_failed_download_reports_the_reason() -> None:
    with pytest.raises(BackboneError, match="'nobody/nothing' could not be downloaded"):
        find("nobody/nothing")


def test_failed_download_without_a_message_names_the_exception(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(BackboneError, match=r"could not be downloaded .*: TimeoutError"):
        find("nobody/nothing")


def lost(kind: str) -> Exception:
    """The exceptions of huggingface_hub when a connection breaks within a file."""
    if kind == "xet":
        return RuntimeError("Data processing error: the connection was reset")
    # Exceptions of its HTTP client: httpx, later httpx2.
    client = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    return client.RemoteProtocolError("peer closed connection without sending complete message")


@pytest.mark.parametrize("kind", ["http", "xet"])
def test_lost_connection_is_a_backbone_error(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise lost(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(BackboneError, match=r"could not be downloaded .*connection"):
        find("nobody/nothing")


def test_finds_a_gguf_in_a_package_without_importing_it(
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


def test_recommends_only_known_packages() -> None:
    with pytest.raises(BackboneError, match="no Python package 'llm_absent'") as raised:
        find("package:llm_absent")
    assert "pip install" not in str(raised.value)


def test_finds_a_directory_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny_encoder" / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "2_Dense").mkdir()
    # A folder with only a configuration is not a model; the outermost model is used.
    for where in (".", "1_Pooling", "2_Dense"):
        (folder / where / "config.json").touch()
    for where in (".", "2_Dense"):
        (folder / where / "model.safetensors").touch()
    (tmp_path / "tiny_encoder" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find("package:tiny_encoder") == folder


def test_rejects_a_package_without_a_model() -> None:
    with pytest.raises(
        BackboneError, match=r"contains neither a \.gguf file nor a model\.safetensors"
    ):
        find("package:json")
