"""Tokenizers: their files run no code and cannot crash the process; texts have limits."""

from __future__ import annotations

import ast
import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
from mutations import dump_json, mutate_bytes, mutate_json, refusal
from transformers import PreTrainedTokenizerFast

import prefix_jax
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.backbones.loading.tokenizer import load_tokenizer
from prefix_jax.data.source import Record, read_records
from prefix_jax.errors import BackboneError, DataError
from prefix_jax.tasks import Classify, Reader, TextTask
from prefix_jax.untrusted import tokenizer as tokenizer_module

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
from transformers import PreTrainedTokenizerFast as Evil
"""


class Asked(io.StringIO):
    """Standard input that answers yes, and records that it was read."""

    asked = False

    def readline(self, *_: Any) -> str:
        self.asked = True
        return "y\n"

    read = readline


@pytest.fixture
def model(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


# Code.


@pytest.mark.parametrize(
    ("config", "model_config"),
    [
        ({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil"] * 2}}, {}),
        ({"tokenizer_class": "Evil", "auto_map": ["evil.Evil", "evil.Evil"]}, {}),
        ({"tokenizer_class": None, "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}, {}),
        ({"tokenizer_class": "AutoTokenizer"}, {}),
        ({"tokenizer_class": "AutoModelForCausalLM"}, {}),
        ({"tokenizer_class": None}, {"tokenizer_class": "AutoProcessor"}),
        ({"tokenizer_class": None}, {"tokenizer_class": "AutoTokenizerFast"}),
    ],
)
def test_never_runs_code_of_a_model(
    config: dict, model_config: dict, model: Path, tmp_path: Path, monkeypatch
) -> None:
    (model / "evil.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    edit(model / "tokenizer_config.json", **config)
    edit(model / "config.json", auto_map={"AutoConfig": "evil.Evil"}, **model_config)
    stdin = Asked()
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(BackboneError, match=r"never run|is not a tokenizer of transformers"):
        load_tokenizer(model)
    assert not stdin.asked
    assert not (tmp_path / "ran").exists()


def test_ignores_code_if_transformers_has_the_class(model: Path, monkeypatch) -> None:
    before = load_tokenizer(model)
    code = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    edit(model / "tokenizer_config.json", auto_map=code)
    edit(model / "config.json", auto_map=code)
    monkeypatch.setattr(sys, "stdin", Asked())
    after = load_tokenizer(model)
    assert after.get_vocab() == before.get_vocab()
    assert type(after) is type(before)


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "merges_file", "gguf_file"])
def test_never_reads_files_outside_the_directory(key: str, model: Path) -> None:
    edit(model / "tokenizer_config.json", **{key: "/dev/zero", "cache_dir": "/dev/null"})
    assert load_tokenizer(model)("a")["input_ids"]


def test_keeps_the_origin(model: Path) -> None:
    assert load_tokenizer(model).name_or_path == str(model)


# Files that crash the Rust library.


def _vocab(content: dict) -> dict:
    return content["model"]["vocab"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: _vocab(c).update({"!": 2**31}), r"token '!': expected an id from 0 to 4194304"),
        (lambda c: _vocab(c).update({"!": -1}), r"token '!': expected an id from 0 to 4194304"),
        (lambda c: _vocab(c).update({"!": True}), r"token '!': expected an id"),
        (lambda c: _vocab(c).update({"!": 2**21}), r"ids are missing between those of its"),
        (lambda c: c["added_tokens"][0].update(id=2**32), r"added_tokens: expected ids from 0"),
        (lambda c: c["added_tokens"][0].update(special=1), r"special: expected true or false"),
        (lambda c: c["added_tokens"][0].update({"\x1b[2J": 1}), r"is not a property of a token"),
        (lambda c: c.update(model=3), r"model: expected an object, got a number"),
        (lambda c: c["model"].update(max_input_chars_per_word=10**6), r"max_input_chars_per_word"),
        (
            lambda c: c.update(
                normalizer={
                    "type": "Sequence",
                    "normalizers": [
                        {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
                    ]
                    * 40,
                }
            ),
            r"normalizer can make a text more than 64 times longer",
        ),
        (
            lambda c: c.update(
                normalizer={"type": "Replace", "pattern": {"Regex": "(?=.)"}, "content": "a" * 99}
            ),
            r"normalizer can make a text more than 64 times longer",
        ),
        (
            lambda c: c.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000,
                    "pair": [],
                    "special_tokens": {},
                }
            ),
            r"single: expected an array of at most 100 objects",
        ),
        (
            lambda c: c.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                }
            ),
            r"is not in special_tokens",
        ),
        (lambda c: c.update(pre_tokenizer={"type": "Klingon"}), r"no readable tokenizer: "),
        (lambda c: c.pop("added_tokens"), r"no readable tokenizer: "),
    ],
)
def test_malformed_tokenizer_is_one_error(
    change: Callable[[dict], object], message: str, model: Path
) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(BackboneError, match=message) as caught:
        load_tokenizer(model)
    assert str(model) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_class": 5}, "tokenizer_class: expected a string, got a number"),
        ({"eos_token": 5}, "eos_token: expected a token .*, got 5"),
        ({"eos_token": {"content": None}}, "eos_token: expected a token"),
        ({"chat_template": 5}, "chat_template: expected a string, .*; got a number"),
        ({"chat_template": [{"name": "default"}]}, "chat_template: expected a string"),
        ({"extra_ids": 10**9, "tokenizer_class": "T5Tokenizer"}, "extra_ids: 1000000000 is out"),
        ({"extra_ids": 10**6}, "extra_ids must be an integer up to 10000, got 1000000"),
        ({"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder: expected an object of tokens"),
        ({"added_tokens_decoder": {str(2**31): {"content": "x"}}}, "added_tokens_decoder"),
        ({"fast_tokenizer_files": ["../../x"]}, "'../../x' is not a file name"),
        ({"extra_special_tokens": 3}, "extra_special_tokens: expected an array, got a number"),
    ],
)
def test_malformed_tokenizer_config_is_one_error(changes: dict, message: str, model: Path) -> None:
    edit(model / "tokenizer_config.json", **changes)
    with pytest.raises(BackboneError, match=message):
        load_tokenizer(model)


def test_never_allocates_a_large_config_for_the_tokenizer(model: Path) -> None:
    edit(model / "config.json", num_labels=10**9, num_hidden_layers=10**9)
    assert load_tokenizer(model)("a")["input_ids"]


def test_accepts_a_huge_maximum_length(model: Path) -> None:
    edit(model / "tokenizer_config.json", model_max_length=10**30)
    assert load_tokenizer(model).model_max_length == 10**30


def test_library_prints_nothing_to_stdout(model: Path, capfd) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    del content["model"]["vocab"]["!"]  # a hole between the ids
    file.write_text(json.dumps(content))
    load_tokenizer(model)
    assert capfd.readouterr().out == ""


SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
CONFIG = {
    "added_tokens_decoder": {"3": {"content": "q", "lstrip": False, "special": True}},
    "extra_special_tokens": {"image_token": "<b>"},
    "chat_template": "{{ messages }}",
    "model_max_length": 10**30,
    "add_prefix_space": False,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mutated")
    return [
        tiny.write_model(folder / "llama"),
        tiny.write_encoder(folder / "bert", "bert"),
        tiny.write_encoder(folder / "roberta", "roberta"),
        tiny.write_t5(folder / "t5"),
    ]


@pytest.mark.parametrize(
    ("name", "extra", "cases"),
    [
        ("tokenizer.json", {}, 250),
        ("tokenizer_config.json", CONFIG, 250),
        ("special_tokens_map.json", SPECIAL, 50),
        ("added_tokens.json", {"<x>": 5000}, 50),
        ("config.json", {"auto_map": {"AutoConfig": "evil.Evil"}}, 50),
    ],
)
def test_mutated_tokenizers_load_or_raise_one_error(
    name: str, extra: dict, cases: int, models: list[Path], capfd
) -> None:
    refused = 0
    for seed in range(cases):
        rng = random.Random(f"{name}/{seed}")
        file = rng.choice(models) / name
        original = file.read_bytes() if file.exists() else None
        content = json.loads(original or b"{}") | (extra if rng.random() < 0.5 else {})
        if original is not None and rng.random() < 0.15:
            mutated = mutate_bytes(original, rng)
        else:
            mutated = dump_json(mutate_json(content, rng))
        file.write_bytes(mutated)

        def read(directory: Path = file.parent) -> None:
            tokenizer = load_tokenizer(directory, 300)
            texts = ["ab, 12", "日本"]
            refusal(
                lambda: tokenizer_module.token_ids(
                    tokenizer, texts, "a text", add_special_tokens=True
                ),
                DataError,
            )

        refused += refusal(read, BackboneError) is not None
        if original is None:
            file.unlink()
        else:
            file.write_bytes(original)
    assert 0 < refused < cases
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "panicked" not in captured.err


# Texts.


def test_limits_the_length_of_texts(model: Path, monkeypatch) -> None:
    tokenizer = load_tokenizer(model)
    monkeypatch.setattr(tokenizer_module, "MAX_CHARACTERS", 100)
    records = [{"a": "x" * 60, "b": "y"}, {"a": "x" * 101, "b": "y"}]
    message = r"2: the text has 101 characters, at most 100 can be tokenized"
    task, reader = TextTask("{a}", "{b}"), Reader(tokenizer)
    with pytest.raises(DataError, match=message):
        task.examples(read_records(records), reader)
    assert len(task.examples(read_records(records[:1] * 5), reader)) == 5


def test_limits_the_length_of_texts_for_heads(tmp_path: Path, monkeypatch) -> None:
    tokenizer = load_tokenizer(tiny.write_encoder(tmp_path / "bert"))
    monkeypatch.setattr(tokenizer_module, "MAX_CHARACTERS", 100)
    records = [Record({"a": "x" * size, "label": "n"}, f"a.csv:{size}") for size in (60, 70, 101)]
    task = Classify("{a}", labels=("n", "p"), max_length=32)
    reader = Reader(tokenizer, causal=False, token_types=True)
    assert len(task.examples(records[:2], reader)) == 2
    with pytest.raises(DataError, match=r"a\.csv:101: the text has 101 characters"):
        task.examples(records, reader)


def test_tokenizes_in_parts_of_limited_size(model: Path, monkeypatch) -> None:
    tokenizer = load_tokenizer(model)
    texts = ["a" * size for size in (5, 0, 9, 10, 1, 1, 1, 8)]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    sizes: list[int] = []
    whole = type(tokenizer).__call__

    def spy(self: Any, texts: list[str], *args: Any, **options: Any) -> Any:
        sizes.append(sum(map(len, texts)))
        return whole(self, texts, *args, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    monkeypatch.setattr(tokenizer_module, "MAX_CHARACTERS", 10)
    assert tokenizer_module.token_ids(tokenizer, texts, "texts") == expected
    assert max(sizes) <= 10
    assert sum(sizes) == sum(map(len, texts))


def test_names_the_text_that_cannot_be_tokenized(tmp_path: Path) -> None:
    directory = tiny.write_encoder(tmp_path / "bert")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["unk_token"] = "[NONE]"
    (directory / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    with pytest.raises(DataError, match=r"b\.csv:2: cannot be tokenized: WordPiece error"):
        tokenizer_module.token_ids(tokenizer, ["the film", "日本"], ["b.csv:1", "b.csv:2"])


def test_rejects_texts_with_ids_beyond_the_embedding_table(model: Path) -> None:
    edit(model / "added_tokens.json", **{"<extra>": 257})
    tokenizer = load_tokenizer(model, 257)
    assert tokenizer_module.token_ids(tokenizer, ["abc"], "a.csv:1")
    message = (
        r"a\.csv:1: token '<extra>' has id 257, but the model's embedding table has only 257 rows"
    )
    with pytest.raises(DataError, match=message):
        tokenizer_module.token_ids(tokenizer, ["abc <extra>"], "a.csv:1")
    with pytest.raises(DataError, match=message):
        tokenizer_module.encodings(tokenizer, ["abc <extra>"], None, "a.csv:1")


def test_rejects_an_end_token_beyond_the_embedding_table(model: Path) -> None:
    edit(model / "tokenizer_config.json", eos_token="<none>")
    with pytest.raises(BackboneError, match=r"token '<none>' has id 257, .* has only 257 rows"):
        _ = load(model).tokenizer


def test_tokenizers_are_called_only_in_this_package() -> None:
    """Other modules call tokenizers only through `untrusted.tokenizer`."""
    calls = []
    for file in Path(prefix_jax.__file__).parent.rglob("*.py"):
        if file.name == "tokenizer.py" and file.parent.name == "untrusted":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called.endswith(("tokenizer", "tokenizer.decode", "tokenizer.encode")):
                    calls.append(f"{file.name}:{node.lineno}: {called}")
    known = {"load_tokenizer", "read_tokenizer", "llguidance.hf.from_tokenizer"}
    assert [call for call in calls if call.split(": ")[1] not in known] == []


# GGUF.


def write_gguf(path: Path, kind: str = "gpt2", **changes: Any) -> Path:
    """Writes a GGUF file with a tokenizer; `changes` replaces keys, or removes them if None."""
    tokens = [*map(chr, range(97, 107)), "ab", "<s>", "</s>", "<unk>"]
    values: dict[str, Any] = {
        "model": kind,
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [1] * 11 + [3, 3, 2],
        "merges": ["a b"],
        "scores": [-float(i) for i in range(len(tokens))],
        "bos_token_id": 11,
        "eos_token_id": 12,
        "unknown_token_id": 13,
        "add_bos_token": True,
        "chat_template": "{{ messages }}",
    } | changes
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_int64(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rebuilds_a_small_gguf_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", kind))
    assert tokenizer("abc")["input_ids"][0] == 11


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "the metadata key tokenizer.ggml.tokens is missing"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list"),
        ({"token_type": [1, 1]}, "got 14 tokens and 2 types"),
        ({"token_type": ["x"] * 14}, "tokenizer.ggml.token_type must be a list"),
        ({"token_type": None}, "the metadata key tokenizer.ggml.token_type is missing"),
        ({"eos_token_id": 14}, "tokenizer.ggml.eos_token_id must be"),
        ({"eos_token_id": "x"}, "tokenizer.ggml.eos_token_id must be an integer"),
        ({"bos_token_id": -5}, "tokenizer.ggml.bos_token_id must be"),
        ({"bos_token_id": 2**40}, "tokenizer.ggml.bos_token_id must be"),
        (
            {"token_type": [1] * 11 + [5, 3, 2]},
            "the token '<s>' begins texts but is marked as unused",
        ),
        ({"add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token must be"),
        ({"chat_template": 5}, "tokenizer.chat_template must be"),
        ({"model": 5}, "tokenizer.ggml.model must be"),
        ({"model": "klingon"}, "tokenizers of kind 'klingon' cannot be rebuilt"),
    ],
)
def test_malformed_gguf_tokenizer_is_one_error(
    kind: str, changes: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match=message):
        load_tokenizer(write_gguf(tmp_path / "a.gguf", kind, **changes))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"merges": ["a b", "ab"]}, "merges contains 'ab'; expected two tokens"),
        ("gpt2", {"merges": ["x y"]}, "the tokenizer cannot be rebuilt: .*out of vocabulary"),
        ("gpt2", {"merges": None}, "the metadata key tokenizer.ggml.merges is missing"),
        ("gpt2", {"pre": 5}, "tokenizer.ggml.pre must be"),
        ("llama", {"scores": None}, "the metadata key tokenizer.ggml.scores is missing"),
        ("llama", {"scores": [1.0]}, "tokenizer.ggml.scores has 1 values for 14 tokens"),
        ("llama", {"unknown_token_id": 14}, "tokenizer.ggml.unknown_token_id must be"),
        ("llama", {"add_space_prefix": "x"}, "tokenizer.ggml.add_space_prefix must be"),
    ],
)
def test_malformed_gguf_vocabulary_is_one_error(
    kind: str, changes: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match=message):
        load_tokenizer(write_gguf(tmp_path / "a.gguf", kind, **changes))
