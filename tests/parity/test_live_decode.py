"""Compares decoding with transformers and PEFT on random models and seeds.

Runs only under `make parity`, whose environment has torch, transformers and peft.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.config import DecodeConfig
from prefix_jax.decode import Generator

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

TESTS = Path(__file__).parents[1]


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _import(TESTS / "fixtures" / "make_decode.py")
STORED = _import(TESTS / "decode" / "test_transformers.py")
PROCESSORS = _import(TESTS / "decode" / "test_processors.py")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("behind", [False, True], ids=["bare", "prefix"])
@pytest.mark.parametrize(
    "name",
    ["gpt2", "smollm", "qwen3", "mistral_window", "qwen2_window", "gemma2", "gemma3_text", "neox"],
)
def test_decoding_matches_transformers(name: str, behind: bool, seed: int, difference: Any) -> None:
    directory = TESTS / "fixtures" / "backbones"
    for cases, ends in (
        (MAKER.GREEDY, seed),
        (MAKER.GREEDY_CONSTRAINED, 1),
        (MAKER.BEAMS, 3 - seed),
        (MAKER.BEAMS_CONSTRAINED, seed),
    ):
        for run in MAKER.run(directory, name, cases, behind, ends, seed):
            delta = STORED.check(run, STORED.model(name))
            difference("scores of decoding, relative", delta, 1e-5, name)


@pytest.mark.parametrize("behind", [False, True], ids=["bare", "prefix"])
@pytest.mark.parametrize("name", ["t5", "t5_gated", "mt5", "bart"])
def test_encoder_decoder_decoding_matches_transformers(name: str, behind: bool) -> None:
    directory = TESTS / "fixtures" / "encoder_decoders"
    for cases, ends in (
        (MAKER.GREEDY, 1),
        (MAKER.GREEDY_CONSTRAINED, 2),
        (MAKER.TWO_SIDED, 2),
        (MAKER.TWO_SIDED_CONSTRAINED, 1),
    ):
        for run in MAKER.run(directory, name, cases, behind, ends, seed=1):
            STORED.check(run, STORED.model(name))


# The file with the actual end tokens; the others have one that is never generated.
STATED = {
    "generation_config": lambda ends: ({"eos_token_id": ends}, {"eos_token_id": 95}),
    "config": lambda ends: (None, {"eos_token_id": ends}),
    "neither": lambda ends: ({"do_sample": False}, {"eos_token_id": ends}),
}


@pytest.mark.parametrize("stated", STATED)
@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "t5", "bart"])
def test_end_tokens_match_transformers(
    name: str, stated: str, tmp_path: Path, difference: Any
) -> None:
    """Both sides read several end tokens from the checkpoint's files."""
    two_sided = name in ("t5", "bart")
    folder = TESTS / "fixtures" / ("encoder_decoders" if two_sided else "backbones") / name
    family = AutoModelForSeq2SeqLM if two_sided else AutoModelForCausalLM
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    free = family.from_pretrained(folder, **options).eval()
    free.generation_config.eos_token_id = None
    prompts = [[82, 64, 52], [31, 35, 11, 14], [88]]
    texts = [MAKER.generate(free, prompt, {}, [], 12)[0][0] for prompt in prompts]
    ends = sorted({text[4] for text in texts} | {texts[0][8]})
    assert len(ends) > 1

    path = shutil.copytree(folder, tmp_path / name)
    config = json.loads((path / "config.json").read_text())
    frame = {key: config.get(key) for key in ("decoder_start_token_id", "bos_token_id")}
    frame["decoder_start_token_id"] = free.generation_config.decoder_start_token_id
    generation, changes = STATED[stated](ends)
    config |= changes | (frame if two_sided else {}) | {"forced_eos_token_id": None}
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(frame | generation))
    theirs = family.from_pretrained(path, **options).eval()
    ours = load(path, dtype="float32")
    assert list(ours.backbone.arch.end_ids) == (ends if stated != "neither" else [])
    generator = Generator(ours.backbone, ours.params, STORED.tokenizer())

    finishes = set()
    for case in ({}, {"min_new_tokens": 6}, {"num_beams": 4, "num_samples": 4}):
        expected = [MAKER.generate(theirs, prompt, case, None, 12) for prompt in prompts]
        generations = generator.generate(prompts, DecodeConfig(max_new_tokens=12, **case))
        for generation, (ids, scores) in zip(generations, expected, strict=True):
            # transformers pads shorter beams.
            cut = [MAKER._until(text, ends) if stated != "neither" else text for text in ids]
            assert [list(sample.ids) for sample in generation.samples] == cut
            finishes |= {sample.finish for sample in generation.samples}
            if case.get("num_beams"):
                ours_scores = [sample.score for sample in generation.samples]
                delta = np.subtract(ours_scores, scores) / (1 + np.abs(scores))
                difference("scores of decoding, several ends", delta, 1e-5, name)
    assert ("eos" in finishes) == (stated != "neither")

    # Samples differ, but their ends do not.
    sampled = generator.generate(
        prompts, DecodeConfig(max_new_tokens=12, temperature=1.0, num_samples=8)
    )
    ids = torch.tensor(prompts[:1])
    torch.manual_seed(0)
    drawn = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=True,
        num_return_sequences=8, pad_token_id=0, top_k=0,
    )[:, 1 if two_sided else ids.shape[1]:].tolist()  # fmt: skip
    if stated == "neither":
        assert {len(sample.ids) for generation in sampled for sample in generation.samples} == {12}
        return
    for text in [list(sample.ids) for generation in sampled for sample in generation.samples]:
        assert MAKER._until(text, ends) == text
        assert len(text) == 12 or text[-1] in ends
    for text in drawn:
        assert not any(text[len(MAKER._until(text, ends)) :])


def test_stored_processors_match_transformers(difference: Any) -> None:
    for name, scores in MAKER.processed(seed=0).items():
        # Forbidden tokens are minus infinity on both sides.
        np.testing.assert_array_equal(np.isfinite(scores), np.isfinite(PROCESSORS.EXPECTED[name]))
        expected = PROCESSORS.EXPECTED[name]
        delta = np.subtract(
            scores, expected, where=np.isfinite(scores), out=np.zeros_like(expected)
        )
        difference("stored processors", delta, 1e-5, name)
