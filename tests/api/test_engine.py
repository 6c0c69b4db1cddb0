"""Tests `Engine`: names, sources of prefixes, prompts and errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_runs

import prefix_jax as pj
from prefix_jax import artifact, tasks
from prefix_jax.artifact import BackboneCard, Card
from prefix_jax.errors import BackboneError, ConfigError, DataError, PrefixError
from prefix_jax.evaluate.predictions import read_predictions
from prefix_jax.prefix import Hidden, KVPrefix, Prefix, Produced, Site

TASK = pj.TextTask("{sum}=", "{total}")
CONFIG = pj.DecodeConfig(max_new_tokens=6)
HOT = {"temperature": 5.0, "seed": 4}


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> pj.Pretrained:
    return tiny_runs.on_one_device(tiny_model_dir)


def card_of(model: pj.Pretrained, produced: Produced, **fields) -> Card:
    arch = model.backbone.arch
    backbone = BackboneCard(
        source=model.source,
        model_type=arch.model_type,
        fingerprint=model.fingerprint,
        dtype="float32",
    )
    task = {"name": tasks.name_of(TASK), **dataclasses.asdict(TASK)}
    decode = {"max_new_tokens": 5}
    return artifact.make_card(
        produced, arch.geometry, backbone, **{"task": task, "decode": decode, **fields}
    )


@pytest.fixture(scope="module")
def tuned(model: pj.Pretrained) -> pj.Tuned:
    slots = np.random.default_rng(0).normal(size=(2, 2, 4, 2, 8))
    produced = Prefix(Site(KVPrefix(*jnp.asarray(2 * slots, jnp.float32))), text_position=4)
    return pj.Tuned(model, produced, card_of(model, produced))


@pytest.fixture(scope="module")
def hidden(model: pj.Pretrained) -> pj.Tuned:
    h_LPD = np.random.default_rng(1).normal(size=(2, 3, 32))
    produced = Hidden(jnp.asarray(h_LPD, jnp.float32))
    return pj.Tuned(model, produced, card_of(model, produced))


@pytest.fixture(scope="module")
def engine(model: pj.Pretrained, tuned: pj.Tuned, hidden: pj.Tuned, tmp_path_factory) -> pj.Engine:
    directory = tmp_path_factory.mktemp("prefix") / "hidden"
    hidden.save(directory, "safetensors")
    assert tuned.produced is not None
    pair = (tuned.produced, tuned.card)
    return pj.Engine(model, {"kv": tuned, "hidden": directory, "pair": pair}, rows=4)


def test_every_prompt_has_its_own_prefix(
    engine: pj.Engine, tuned: pj.Tuned, hidden: pj.Tuned
) -> None:
    prompts = ["1+2=", {"sum": "3+1"}, "1+2=", [49, 43], "2+2="]
    generations = engine.generate(prompts, ["kv", "hidden", None, "hidden", "pair"], CONFIG)
    bare = tuned.without_prefix()
    models = [tuned, hidden, bare, hidden, tuned]
    for prompt, generation, alone in zip(prompts, generations, models, strict=True):
        if isinstance(prompt, list):
            prompt = model_text(engine, prompt)
        expected = alone.generate(prompt, decode=CONFIG, details=True)
        assert generation.samples[0].ids == expected.samples[0].ids
        assert generation.text == expected.text


def model_text(engine: pj.Engine, ids: list[int]) -> str:
    return engine._pretrained.tokenizer.decode(ids)


def test_one_name_serves_all_prompts_with_its_own_settings(
    engine: pj.Engine, tuned: pj.Tuned
) -> None:
    prompts = ["1+2=", "2+2="]
    generations = engine.generate(prompts, "kv")
    assert [generation.text for generation in generations] == tuned.generate(prompts)
    assert all(len(generation.samples[0].ids) <= 5 for generation in generations)
    (longer,) = engine.generate(prompts[:1], "kv", max_new_tokens=9)
    assert longer.samples[0].ids[:5] == generations[0].samples[0].ids


def test_chats_are_rendered_by_the_tokenizers_template(engine, tuned, monkeypatch) -> None:
    tokenizer = engine.model.tokenizer
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}[assistant]"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    turns = [{"role": "system", "content": "Be"}, {"role": "user", "content": "1+2"}]
    chat, text = engine.generate([turns, "[system]Be</s>[user]1+2</s>[assistant]"], "kv", CONFIG)
    assert chat == text
    with pytest.raises(DataError, match="turn 1 of 'messages' must be"):
        engine.generate([[{"role": "user"}]])


def test_records_are_predicted_with_their_own_prefixes(
    engine: pj.Engine, tuned: pj.Tuned, hidden: pj.Tuned, tmp_path: Path
) -> None:
    bare = tuned.without_prefix()
    engine.add("bare", bare)
    records = [{"sum": f"{i}+1"} for i in range(6)]
    models = {"kv": tuned, "hidden": hidden, "bare": bare}
    names = [*models, *models]
    predictions = engine.predict(records, names, output=tmp_path / "p.jsonl", num_samples=2, **HOT)
    assert [prediction.origin for prediction in predictions[::2]] == [
        f"record {i}" for i in range(1, 7)
    ]
    for name, alone in models.items():
        expected = alone.predict(records, num_samples=2, **HOT)
        for index, prediction in enumerate(predictions):
            if names[index // 2] == name:
                assert prediction == expected[index]
    stored = [prediction.prediction for prediction in read_predictions(tmp_path / "p.jsonl")]
    assert stored == [prediction.prediction for prediction in predictions]
    assert len(set(stored)) > 3
    with pytest.raises(DataError, match="record 2: no field 'sum'"):
        engine.predict([{"sum": "1"}, {"total": "2"}], "kv")
    engine.remove("bare")


def test_samples_depend_on_the_position_of_the_prompt(engine: pj.Engine, tuned: pj.Tuned) -> None:
    options = {"temperature": 1.0, "num_samples": 2, "seed": 4}
    generations = engine.generate(["1+2="] * 3, "kv", **options)
    expected = tuned.generate(["1+2="] * 3, details=True, **options)
    for generation, alone in zip(generations, expected, strict=True):
        assert [s.ids for s in generation.samples] == [s.ids for s in alone.samples]


def test_streams_text_and_results(engine: pj.Engine) -> None:
    pieces: dict[tuple[int, int], str] = {}
    done: dict[int, str] = {}

    def on_text(index: int, sample: int, piece: str) -> None:
        pieces[index, sample] = pieces.get((index, sample), "") + piece

    generations = engine.generate(
        ["1+2=", "2+2="],
        ["kv", None],
        CONFIG,
        on_text=on_text,
        on_done=lambda index, generation: done.update({index: generation.text}),
    )
    texts = [generation.text for generation in generations]
    assert [pieces.get((index, 0), "") for index in range(2)] == texts
    assert [done[index] for index in range(2)] == texts
    assert engine.idle


def test_prefixes_are_added_replaced_and_removed(
    model: pj.Pretrained, tuned: pj.Tuned, hidden: pj.Tuned
) -> None:
    engine = pj.Engine(model, {"a": tuned}, rows=2)
    with pytest.raises(PrefixError, match="already a prefix 'a'; choose another name, or pass"):
        engine.add("a", hidden)
    with pytest.raises(PrefixError, match="no prefix 'b'"):
        engine.replace("b", hidden)
    first = engine.prefixes["a"].digest
    engine.replace("a", hidden)
    assert engine.prefixes["a"].digest != first
    assert engine.generate(["1+2="], "a")[0].text == hidden.generate("1+2=")
    engine.add("a", tuned, replace=True)
    assert engine.prefixes["a"].digest == first
    engine.remove("a")
    assert not engine.prefixes
    with pytest.raises(PrefixError, match="no prefix 'a'; add it first, or give one of none"):
        engine.generate(["1+2="], "a")


def test_one_wrong_prompt_stops_all_before_anything_runs(engine: pj.Engine) -> None:
    texts: list[str] = []
    for prompts, names, error, message in (
        (["a", "b"], ["kv", "law"], PrefixError, "no prefix 'law'.* one of 'hidden', 'kv', 'pair'"),
        (["a", {"sum": "1"}], ["kv", None], DataError, "prompt 1 is a record"),
        (["a", {"total": "1"}], ["kv", "kv"], DataError, "prompt 1: no field 'sum'"),
        (["a", [300]], ["kv", "kv"], DataError, "prompt 1 contains token id 300"),
        (["a", "b"], ["kv"], ConfigError, "1 names for 2 prompts"),
        ("a", "kv", DataError, r"must be a list, got 'a'; write \[prompt\]"),
    ):
        with pytest.raises(error, match=message):
            engine.generate(
                prompts, names, CONFIG, on_text=lambda _index, _sample, piece: texts.append(piece)
            )
        assert engine.idle
    assert not texts


def test_prefix_of_another_backbone_is_refused(
    model: pj.Pretrained, tuned: pj.Tuned, tmp_path: Path
) -> None:
    other = tiny_runs.on_one_device(tiny.write_model(tmp_path / "other", seed=1))
    with pytest.raises(PrefixError, match="allow_other_weights=True"):
        pj.Engine(other, {"a": tuned}, rows=2)
    assert pj.Engine(other, {"a": tuned}, rows=2, allow_other_weights=True).prefixes
    wide = tiny.write_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(PrefixError, match="this backbone has another shape"):
        pj.Engine(tiny_runs.on_one_device(wide), {"a": tuned}, rows=2, allow_other_weights=True)


def test_what_cannot_generate_is_refused(engine: pj.Engine, tuned: pj.Tuned, tmp_path) -> None:
    with pytest.raises(PrefixError, match="is only a backbone; use None"):
        engine.add("bare", pj.Tuned(tuned.pretrained, None, None))
    with pytest.raises(PrefixError, match=r"must be a directory, a Tuned, or .* got int"):
        engine.add("number", 3)
    with pytest.raises(PrefixError, match="must be a non-empty text, got ''"):
        engine.add("", tuned)
    with pytest.raises(PrefixError, match="no directory"):
        engine.add("missing", tmp_path / "missing")
    assert set(engine.prefixes) == {"kv", "hidden", "pair"}


def test_prefix_with_a_head_is_refused(engine: pj.Engine, tuned: pj.Tuned) -> None:
    task = pj.Classify("{text}", labels=("a", "b"))
    head = task.head(engine._pretrained.backbone.arch)
    fields = {"name": tasks.name_of(task), **dataclasses.asdict(task)}
    card = dataclasses.replace(tuned.card, task=fields, head=head)
    with pytest.raises(PrefixError, match=r"was trained with a head .* use Tuned\.predict"):
        engine.add("labels", (tuned.produced, card))


def test_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"bert is an encoder; use Tuned\.predict"):
        pj.Engine(tiny_runs.on_one_device(tiny.write_encoder(tmp_path / "bert")))
