"""Heads of adapters are imported and exported with their tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adapters import ADAPTERS, WEIGHTS, imported, rewrite
from safetensors.numpy import load_file, save_file

import prefix_jax as pj
from prefix_jax import artifact
from prefix_jax.errors import PrefixError
from prefix_jax.interop.export import export
from prefix_jax.interop.peft import export_peft


@pytest.mark.parametrize(
    ("name", "task"),
    [("classify_bert", "classify"), ("tag_bert", "tag"), ("span_bert", "span")],
)
def test_imports_a_head_with_its_task(name: str, task: str, tmp_path: Path) -> None:
    tuned = imported(ADAPTERS / name)
    tuned.save(tmp_path / "ours")
    again = pj.load_prefix(tmp_path / "ours", tuned.pretrained)
    stored = again.card.task
    assert stored["name"] == task
    assert stored.get("labels") == (None if task == "span" else ["LABEL_0", "LABEL_1", "LABEL_2"])
    assert sorted(again.head) == ["out_DY", "out_bias_Y"]


def test_one_output_is_a_regression(copy: Callable[..., Path]) -> None:
    def first(arrays: dict[str, np.ndarray]) -> None:
        for name in list(arrays):
            if "classifier" in name:
                arrays[name] = np.ascontiguousarray(arrays[name][:1])

    folder = rewrite(copy("classify_bert"), first)
    assert isinstance(imported(folder).task, pj.Regress)


def test_rejects_unexpected_head(copy: Callable[..., Path]) -> None:
    head = {"base_model.lm_head.weight": np.ones((2, 32), np.float32)}
    folder = rewrite(copy(), lambda arrays: arrays.update(head))
    with pytest.raises(PrefixError, match=r"more than a prefix, base_model\.lm_head\.weight"):
        imported(folder)


def test_rejects_missing_or_wrong_head(copy: Callable[..., Path]) -> None:
    folder = copy("classify_bert")
    whole = load_file(folder / WEIGHTS)
    bare = {"prompt_embeddings": whole["prompt_embeddings"]}
    save_file(bare, folder / WEIGHTS)
    with pytest.raises(PrefixError, match=r"no weights .*of a head"):
        imported(folder)
    save_file(bare | {"base_model.score.weight": np.ones((3, 32), np.float32)}, folder / WEIGHTS)
    with pytest.raises(PrefixError, match=r"base_model\.classifier\.bias.*has base_model\.score"):
        imported(folder)
    other = {"base_model.classifier.weight": np.ones((3, 16), np.float32)}
    save_file(whole | other, folder / WEIGHTS)
    with pytest.raises(PrefixError, match=r"shape \(3, 16\), but .* head has \(3, 32\)"):
        imported(folder)


def test_rejects_export_of_classifier_that_reads_text_after_soft_tokens(tmp_path: Path) -> None:
    tuned = imported(ADAPTERS / "classify_soft")
    assert tuned.task.reads_soft
    card = dataclasses.replace(
        tuned.card,
        task={**tuned.card.task, "reads_soft": False},
        head=dataclasses.replace(tuned.card.head, soft=False),
    )
    artifact.save(tmp_path / "ours", tuned.produced, card, head=tuned.head)
    with pytest.raises(PrefixError, match=r"the text's first token; train with task\.reads_soft"):
        export_peft(tmp_path / "ours", tmp_path / "theirs")


def test_copy_in_another_container_keeps_its_head(tmp_path: Path) -> None:
    imported(ADAPTERS / "classify_roberta").save(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "copy")
    before, after = (artifact.load_head(tmp_path / name) for name in ("ours", "copy"))
    assert sorted(after) == ["dense_DE", "dense_bias_E", "out_DY", "out_bias_Y"]
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x)
