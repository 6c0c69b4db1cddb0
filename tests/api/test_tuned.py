"""Tests the high-level API."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tiny_runs

import prefix_jax as pj
from prefix_jax.data.source import Record
from prefix_jax.errors import BackboneError, ConfigError, ContextError, DataError, PrefixError
from prefix_jax.interop.export import export

TEMPLATES = {"input": "{sum}=", "target": "{total}"}
SHORT = {"steps": 12, "batch_size": 4, "quiet": True}
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> pj.Pretrained:
    return tiny_runs.on_one_device(tiny_model_dir)


@pytest.fixture(scope="module")
def tuned(model: pj.Pretrained, tmp_path_factory: pytest.TempPathFactory) -> pj.Tuned:
    output = tmp_path_factory.mktemp("tuned")
    return pj.fit(
        model, pj.PrefixTuning(length=4), tiny_runs.RECORDS, **TEMPLATES, **SHORT, output_dir=output
    )


def test_three_lines_make_a_tuned_model(tiny_model_dir: Path) -> None:
    method = pj.PromptTuning(2)
    tuned = pj.fit(tiny_model_dir, method, tiny_runs.RECORDS, **TEMPLATES, steps=2, quiet=True)
    assert isinstance(tuned.generate({"sum": "1+1"}, max_new_tokens=4), str)


def test_accepts_a_single_metric_name(tuned: pj.Tuned) -> None:
    some = tiny_runs.RECORDS[:2]
    assert tuned.evaluate(some, "loss").report == tuned.evaluate(some, ["loss"]).report


def test_a_loss_is_measured_without_references(tuned: pj.Tuned) -> None:
    card = dataclasses.replace(tuned.card, task=tuned.card.task | {"references": "refs"})
    tuned = dataclasses.replace(tuned, card=card)
    assert tuned.evaluate(tiny_runs.SOME, "loss").report.examples == len(tiny_runs.SOME)
    with pytest.raises(DataError, match="record 1: no field 'refs'"):
        tuned.evaluate(tiny_runs.SOME, "exact_match")


def test_training_lowers_the_loss(tuned: pj.Tuned) -> None:
    before, after = (
        each.evaluate(tiny_runs.RECORDS).report.metrics["loss"]
        for each in (tuned.without_prefix(), tuned)
    )
    assert after < before


def test_records_texts_and_lists_are_prompts(tuned: pj.Tuned) -> None:
    record, text = {"sum": "1+2"}, "1+2="
    answer = tuned.generate(record, max_new_tokens=6)
    assert tuned.generate(text, max_new_tokens=6) == answer
    assert tuned.generate([record, "3+1="], max_new_tokens=6)[0] == answer
    several = tuned.generate([text], max_new_tokens=6, num_samples=3, temperature=1.0)
    assert len(several) == 1
    assert len(several[0]) == 3
    pieces: list[str] = []
    tuned.generate(text, max_new_tokens=6, on_text=lambda _i, _m, piece: pieces.append(piece))
    assert "".join(pieces) == answer


def test_options_override_stored_options_that_conflict(tuned: pj.Tuned) -> None:
    """Earlier versions stored a length penalty without beams, which did nothing."""
    card = dataclasses.replace(tuned.card, decode={"length_penalty": 2.0, "max_new_tokens": 4})
    old = dataclasses.replace(tuned, card=card)
    with pytest.raises(ConfigError, match="to use length_penalty"):
        old.generate("1+2=")
    expected = tuned.generate("1+2=", max_new_tokens=4)
    assert old.generate("1+2=", length_penalty=1.0) == expected
    assert isinstance(old.generate("1+2=", num_beams=2), str)


@pytest.mark.parametrize("arrays", ["orbax", "safetensors"])
def test_stored_prefix_generates_the_same_text(
    tuned: pj.Tuned, model: pj.Pretrained, tmp_path: Path, arrays: str
) -> None:
    tuned.save(tmp_path / "prefix", arrays)
    loaded = pj.load_prefix(tmp_path / "prefix", model)
    prompt = {"sum": "2+3"}
    assert loaded.generate(prompt, max_new_tokens=8) == tuned.generate(prompt, max_new_tokens=8)
    assert tiny_runs.bits(loaded.produced) == tiny_runs.bits(tuned.produced)
    assert loaded.evaluate(tiny_runs.SOME) == tuned.evaluate(tiny_runs.SOME)


def test_run_directory_loads_its_own_backbone(tuned: pj.Tuned) -> None:
    loaded = pj.load_prefix(tuned.run.directory)
    assert loaded.pretrained.fingerprint == tuned.pretrained.fingerprint
    assert loaded.task == tuned.task == pj.TextTask(**TEMPLATES)


@pytest.mark.parametrize("method", [pj.HiddenPrefixTuning(4), pj.PromptTuning(4)])
def test_baking_does_not_change_generated_text(
    model: pj.Pretrained, tmp_path: Path, method: object
) -> None:
    tuned = pj.fit(
        model, method, tiny_runs.RECORDS, **TEMPLATES, **SHORT, output_dir=tmp_path / "run"
    )
    export(tmp_path / "run", tmp_path / "baked", bake=True)
    baked = pj.load_prefix(tmp_path / "baked", model)
    assert baked.card.kind == "kv"
    assert baked.generate("2+3=", max_new_tokens=8) == tuned.generate("2+3=", max_new_tokens=8)


def test_full_fine_tuning_leaves_a_model_that_generates(
    model: pj.Pretrained, tmp_path: Path
) -> None:
    tuned = pj.fit(
        model,
        None,
        tiny_runs.RECORDS,
        test=tiny_runs.SOME,
        **TEMPLATES,
        **SHORT,
        learning_rate=3e-3,
        output_dir=tmp_path,
        overrides=["evaluate.compare_baseline=true"],
    )
    before, after = (tuned.run.evaluations[name].report.metrics for name in ("before", "after"))
    assert after["loss"] < before["loss"]
    assert tuned.generate("1+1=", max_new_tokens=4) != pj.Tuned(model, None, None).generate(
        "1+1=", max_new_tokens=4
    )
    with pytest.raises(PrefixError, match=r"no prefix to save.*fully fine-tuned"):
        tuned.save(tmp_path / "prefix")


def test_data_may_come_from_a_generator_or_a_file(
    tuned: pj.Tuned, model: pj.Pretrained, tmp_path: Path
) -> None:
    def records() -> Iterator[dict[str, str]]:
        yield from tiny_runs.RECORDS

    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in tiny_runs.RECORDS))
    for name, data in {"generator": records(), "file": file}.items():
        again = pj.fit(
            model, pj.PrefixTuning(4), data, **TEMPLATES, **SHORT, output_dir=tmp_path / name
        )
        assert tiny_runs.bits(again.produced) == tiny_runs.bits(tuned.produced)


def test_chats_use_the_chat_template_in_training_and_generation(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = tiny_runs.on_one_device(tiny_model_dir)
    model.tokenizer.chat_template = CHAT
    chats = [
        {
            "turns": [
                {"role": "user", "content": record["sum"]},
                {"role": "assistant", "content": record["total"]},
            ]
        }
        for record in tiny_runs.RECORDS
    ]
    tuned = pj.fit(
        model,
        pj.PrefixTuning(4),
        chats,
        dev=chats[:4],
        messages="turns",
        **SHORT,
        output_dir=tmp_path,
    )
    question = {"turns": [{"role": "user", "content": "1+1"}]}
    prompt = tuned.task.prompt(Record(question, "x"), tuned.reader)
    assert prompt.text == "user: 1+1</s>assistant: "
    assert tuned.generate(question, max_new_tokens=4) == tuned.generate(
        "user: 1+1</s>assistant: ", max_new_tokens=4
    )
    dev = [line["loss"] for line in tiny_runs.metrics(tmp_path) if line["kind"] == "dev"]
    assert dev == [pytest.approx(tuned.evaluate(chats[:4]).report.metrics["loss"])]


def test_prefix_trained_on_chats_stops_at_end_of_turn(tmp_path: Path) -> None:
    """Gemma's turns, for example, end with a token that is not the tokenizer's eos."""
    model = tiny_runs.on_one_device(tiny.write_model(tmp_path / "model", vocab_size=258))
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    model.tokenizer.chat_template = CHAT.replace("</s>", "<end_of_turn>\n")
    chats = [
        {"turns": [{"role": "user", "content": text}, {"role": "assistant", "content": "y"}]}
        for text in "12"
    ]
    options = {"messages": "turns", "batch_size": 2, "learning_rate": 0.3, "quiet": True}
    tuned = pj.fit(
        model, pj.PrefixTuning(16), chats, **options, steps=60, output_dir=tmp_path / "run"
    )
    assert tuned.task.ends(tuned.reader) == (256, 257)
    loaded = pj.load_prefix(tmp_path / "run", model)
    generation = loaded.generate(chats[0], details=True)
    assert generation.samples[0].ids[-1] == 257
    assert (generation.text, generation.samples[0].finish) == ("y", "eos")
    metrics = loaded.evaluate(chats, ["exact_match", "accuracy"], labels=("y", "n")).report.metrics
    assert (metrics["exact_match"], metrics["accuracy"]) == (100, 100)


# --- Bad input -------------------------------------------------------------------------------


def test_rejects_prefix_of_another_backbone(tuned: pj.Tuned, tmp_path: Path) -> None:
    same_shape = tiny_runs.on_one_device(tiny.write_model(tmp_path / "same", seed=1))
    fingerprints = f"{tuned.pretrained.fingerprint}.*{same_shape.fingerprint}"
    with pytest.raises(PrefixError, match=fingerprints):
        pj.load_prefix(tuned.run.directory, same_shape)
    other = pj.load_prefix(tuned.run.directory, same_shape, allow_other_weights=True)
    assert isinstance(other.generate("1+1=", max_new_tokens=2), str)

    smaller = tiny_runs.on_one_device(tiny.write_model(tmp_path / "smaller", num_hidden_layers=1))
    with pytest.raises(PrefixError, match=r"layers.*2.*1"):
        pj.load_prefix(tuned.run.directory, smaller, allow_other_weights=True)


@pytest.mark.parametrize("name", ["prefix.json", "arrays"])
def test_a_corrupt_prefix_directory_is_an_error(
    tuned: pj.Tuned, model: pj.Pretrained, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tuned.run.directory / "prefix", copy)
    files = [copy / name] if name == "prefix.json" else [*(copy / name).rglob("d/*")]
    for file in files:
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(PrefixError, match=str(copy)):
        pj.load_prefix(copy, model)


def test_truncated_weights_are_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model_dir, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BackboneError, match=str(weights)):
        pj.load(copy)


def test_a_prompt_that_does_not_fit_is_an_error(tuned: pj.Tuned) -> None:
    fits = "x" * (256 - 4 - 8)
    assert isinstance(tuned.generate(fits, max_new_tokens=8), str)
    with pytest.raises(ContextError, match="256 positions"):
        tuned.generate(fits + "x", max_new_tokens=8)
    with pytest.raises(DataError, match="'sum'"):
        tuned.generate({"total": "02"})


def test_held_out_text_that_does_not_fit_is_an_error(tuned: pj.Tuned) -> None:
    with pytest.raises(DataError, match="max_length 252"):
        tuned.evaluate([{"sum": "1+1", "total": "0" * 256}])


@pytest.mark.parametrize("prompt", [5, [7, 8]])
def test_a_prompt_is_a_text_or_a_record(tuned: pj.Tuned, prompt: object) -> None:
    with pytest.raises(DataError, match="a prompt must be a text or a record, got"):
        tuned.generate(prompt)


def test_argument_of_wrong_type_error_states_expected_type(model: pj.Pretrained) -> None:
    with pytest.raises(ConfigError, match=r"method must be .* such as PrefixTuning.*got 'prefix'"):
        pj.fit(model, "prefix", tiny_runs.RECORDS, **TEMPLATES, **SHORT)
    with pytest.raises(ConfigError, match=r"pretrained must be .* prefix_jax\.load, got Tuned"):
        pj.fit(pj.Tuned(model, None, None), None, tiny_runs.RECORDS, **TEMPLATES, **SHORT)
    with pytest.raises(BackboneError, match=r"expected a directory.*, got a NoneType"):
        pj.load(None)
    with pytest.raises(ConfigError, match=r"length: must be an integer in .*, got '4'"):
        pj.PrefixTuning(length="4")
    with pytest.raises(ConfigError, match=r"task must be a task such as Classify.*got 'classify'"):
        pj.fit(model, pj.PrefixTuning(2), tiny_runs.RECORDS, task="classify", steps=1)
    with pytest.raises(ConfigError, match=r"overrides must be a list .*got 'train.seed=1'"):
        pj.fit(model, pj.PrefixTuning(2), tiny_runs.RECORDS, **TEMPLATES, overrides="train.seed=1")


def test_a_tuned_model_is_shown_in_a_few_lines(tuned: pj.Tuned) -> None:
    assert len(repr(tuned)) < 4000
    assert "Array" not in repr(tuned)
