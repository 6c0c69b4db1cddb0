"""End tokens are read from the same file as in transformers; `tests/parity` compares."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny

from prefix_jax.backbones.loading.ends import ends_of_gguf
from prefix_jax.backbones.loading.gguf import GGUF
from prefix_jax.backbones.loading.pretrained import architecture_of, load
from prefix_jax.data.special import end_tokens
from prefix_jax.errors import BackboneError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("ends") / "model")


@pytest.fixture
def stating(written: Path, tmp_path: Path):
    """Copies the model, with another `eos_token_id` in config.json and generation_config.json."""

    def state(generation: Any = None, **config: Any) -> Path:
        path = shutil.copytree(written, tmp_path / "stating")
        content = {key: value for key, value in tiny.CONFIG.items() if key != "eos_token_id"}
        (path / "config.json").write_text(json.dumps(content | config))
        if generation is not None:
            (path / "generation_config.json").write_text(json.dumps(generation))
        return path

    return state


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (None, {"eos_token_id": 7}, (7,)),
        (None, {"eos_token_id": [7, 8, 7]}, (7, 8)),
        (None, {"eos_token_id": None}, ()),
        (None, {}, ()),
        (None, {"text_config": {"eos_token_id": [1, 106]}}, (1, 106)),
        (None, {"eos_token_id": 2, "text_config": {"eos_token_id": 3}}, (2,)),
        ({"eos_token_id": [1, 106]}, {"eos_token_id": 7}, (1, 106)),
        ({"eos_token_id": 0}, {"eos_token_id": 7}, (0,)),
        ({"do_sample": True}, {"eos_token_id": 7}, ()),
        ({"eos_token_id": []}, {"eos_token_id": 7}, ()),
        # The default of transformers' GPT2Config, for any vocabulary.
        (None, {"eos_token_id": [50256, 3]}, (3,)),
    ],
)
def test_end_tokens_come_from_generation_config_or_else_config(
    stating, generation, config, ends
) -> None:
    assert architecture_of(stating(generation, **config)).end_ids == ends


@pytest.mark.parametrize("wrong", ["x", True, -1, 2.0, [2, "x"], [2, False], {"a": 1}, [[2]]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_invalid_end_token_is_reported_with_file_and_key(stating, name: str, wrong: Any) -> None:
    both = {"config.json": (None, wrong), "generation_config.json": ({"eos_token_id": wrong}, 7)}
    generation, config = both[name]
    with pytest.raises(
        BackboneError, match=rf"/{name}: eos_token_id must be an? .*integer.* or a list"
    ):
        architecture_of(stating(generation, eos_token_id=config))


def test_end_tokens_include_the_tokenizers(stating) -> None:
    model = load(stating({"eos_token_id": [5, 6]}))
    assert end_tokens(model.tokenizer, model.backbone.arch.end_ids) == (256, 5, 6)
    assert model.tokenizer.eos_token_id == 256


def test_encoder_has_no_end_tokens(tmp_path: Path) -> None:
    path = tiny.write_encoder(tmp_path / "roberta", "roberta", eos_token_id=-1)
    assert architecture_of(path).end_ids == ()


def test_encoder_decoder_start_must_be_one_token_of_the_vocabulary(tmp_path: Path) -> None:
    for number, wrong in enumerate((True, 259, -1, [256, 3])):
        path = tiny.write_t5(tmp_path / str(number), vocab_size=259)
        config = json.loads((path / "config.json").read_text()) | {"decoder_start_token_id": wrong}
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(BackboneError, match=r"decoder_start_token_id (is|must be)"):
            architecture_of(path)


def test_gguf_end_tokens_are_eos_eot_and_eom(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_eos_token_id(9)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 4)
    writer.add_uint32("tokenizer.ggml.eom_token_id", 9)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert ends_of_gguf(GGUF(tmp_path / "model.gguf"), vocab=10) == (9, 4)
    assert ends_of_gguf(GGUF(tmp_path / "model.gguf"), vocab=9) == (4,)
