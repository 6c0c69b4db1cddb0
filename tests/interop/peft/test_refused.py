"""Unknown, unfitting and damaged adapters are errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from adapters import ADAPTERS, CONFIG, WEIGHTS, backbone, imported, rewrite

from prefix_jax.errors import BackboneError, PrefixError
from prefix_jax.interop.peft import import_peft
from tests.mutations import dump_json, mutate_bytes, mutate_json, refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type 'LORA'.*PREFIX_TUNING"),
        ({"peft_type": None}, "peft_type None"),
        ({"num_virtual_tokens": 4}, "num_virtual_tokens 4.*has 3 rows"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be .*got null"),
        ({"num_virtual_tokens": "3"}, "num_virtual_tokens must be .*got '3'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type is SEQ_2_SEQ_LM.*supports CAUSAL_LM,"),
    ],
)
def test_config_that_does_not_fit_is_an_error(
    changes: dict[str, Any], message: str, copy: Callable[..., Path]
) -> None:
    with pytest.raises(PrefixError, match=message):
        imported(copy(**changes))


def test_arrays_that_do_not_fit_are_an_error(copy: Callable[..., Path]) -> None:
    folder = copy()
    rewrite(folder, lambda arrays: arrays.update(prompt_embeddings=np.ones((3, 40), np.float32)))
    with pytest.raises(PrefixError, match="40 numbers per slot, but this backbone needs 64"):
        imported(folder)
    rewrite(folder, lambda arrays: arrays.update(prompt_embeddings=np.full((3, 64), np.nan, "f4")))
    with pytest.raises(PrefixError, match="NaN"):
        imported(folder)
    rewrite(folder, lambda arrays: arrays.update(prompt_embeddings=np.ones(192, np.float32)))
    with pytest.raises(PrefixError, match="must have 2 axes"):
        imported(folder)
    rewrite(folder, lambda arrays: arrays.update(other=arrays.pop("prompt_embeddings")))
    with pytest.raises(PrefixError, match="has no prompt_embeddings, only other"):
        imported(folder)


def test_soft_tokens_of_another_width_are_an_error(copy: Callable[..., Path]) -> None:
    folder = rewrite(
        copy("prompt"), lambda arrays: arrays.update(prompt_embeddings=np.ones((3, 16), np.float32))
    )
    with pytest.raises(PrefixError, match="has width 16, but this backbone has 32"):
        imported(folder)


def test_rejects_encoder_decoder_prefix_with_one_submodule(copy: Callable[..., Path]) -> None:
    with pytest.raises(PrefixError, match="num_transformer_submodules is 1"):
        imported(copy("prefix_t5", num_transformer_submodules=1))


def test_adaption_prompt_must_cover_the_top_layers(copy: Callable[..., Path]) -> None:
    with pytest.raises(PrefixError, match=r"layers \[1\].*adapter_layers 2"):
        imported(copy("adaption", adapter_layers=2))


def test_rejects_adaption_prompt_for_gpt2(copy: Callable[..., Path]) -> None:
    with pytest.raises(PrefixError, match="with a gpt2, PEFT adds"):
        imported(copy("adaption", base_model_name_or_path="backbones/gpt2"))


@pytest.mark.parametrize("count", [10**9, 0, -1, True, "1"])
def test_number_of_adapter_layers_is_checked(copy: Callable[..., Path], count: object) -> None:
    with pytest.raises(PrefixError, match="adapter_layers"):
        imported(copy("adaption", adapter_layers=count))


def test_pickles_are_not_read(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(PrefixError, match=r"a pickle, which is never read.*Convert it"):
        imported(folder)


def test_damaged_files_are_an_error(copy: Callable[..., Path]) -> None:
    folder = copy()
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(PrefixError, match="is truncated or corrupt"):
        imported(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(PrefixError, match=f"has no {WEIGHTS}"):
        imported(folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(PrefixError, match="expected a JSON object"):
        import_peft(folder, backbone("backbones/llama_grouped"))
    (folder / CONFIG).write_text("{")
    with pytest.raises(PrefixError, match="malformed JSON"):
        import_peft(folder, backbone("backbones/llama_grouped"))


def test_deeply_nested_adapter_config_is_refused(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / CONFIG).write_text("[" * 100_000)
    with pytest.raises(PrefixError, match="nested more than"):
        import_peft(folder, "unused")


@pytest.mark.parametrize("path", ["x" * 300, "~nosuchuser/adapter", "a\0b"])
def test_path_that_cannot_exist_is_a_prefix_error(path: str) -> None:
    with pytest.raises(PrefixError, match="cannot"):
        import_peft(path, "unused")


def test_folder_of_named_adapters_error_lists_them(tmp_path: Path) -> None:
    shutil.copytree(ADAPTERS / "prefix", tmp_path / "mine")
    with pytest.raises(PrefixError, match="adapters by name: mine"):
        import_peft(tmp_path, backbone("backbones/llama_grouped"))


def test_missing_backbone_name_error_asks_for_it(copy: Callable[..., Path]) -> None:
    with pytest.raises(BackboneError, match="does not name its backbone"):
        import_peft(copy(base_model_name_or_path=None))


@pytest.mark.parametrize("kind", ["prefix", "adaption", "multitask", "classify_roberta"])
def test_mutated_adapters_import_or_raise_one_error(kind: str, tmp_path: Path) -> None:
    rng, folder = Random(0), Path(shutil.copytree(ADAPTERS / kind, tmp_path / kind))
    config = json.loads((folder / CONFIG).read_text())
    weights = (folder / WEIGHTS).read_bytes()
    pretrained = backbone(config["base_model_name_or_path"])
    task = 1 if kind == "multitask" else None
    refused = 0
    for _ in range(100):
        (folder / CONFIG).write_bytes(dump_json(mutate_json(config, rng)))
        (folder / WEIGHTS).write_bytes(
            mutate_bytes(weights, rng) if rng.random() < 0.3 else weights
        )
        message = refusal(lambda: import_peft(folder, pretrained, task=task), PrefixError)
        refused += message is not None
    assert 20 < refused < 100
