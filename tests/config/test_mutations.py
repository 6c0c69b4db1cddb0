"""Mutated configurations are read, or rejected with one helpful error."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import mutations
import pytest
import tiny
import tiny_runs

from prefix_jax.config import Config, dump, load, parse
from prefix_jax.errors import ConfigError, PrefixJaxError
from prefix_jax.methods import make_method
from prefix_jax.runs.build import build_run

TEXT = """\
model: {path: m, dtype: float32, remat: dots}
method: {name: prefix, length: 4, mid_dim: 8, layers: [0, 1]}
init: {start: text, text: Summarize}
data: {train: a.jsonl, input: "{sum}=", target: "{total}", batch_size: 4}
optim: {learning_rate: 1e-2, schedule: cosine, warmup_steps: 2, weight_decay: 0.1}
train: {steps: 12, eval_every: 4, patience: 2}
evaluate: {metrics: [loss, bleu], compare_baseline: true}
decode: {max_new_tokens: 4, temperature: 0.7, top_p: 0.9, stop: ["\\n"]}
output_dir: runs/a
"""
CONFIG = parse({}, [f"{key}={value}" for key, value in (
    ("model.path", "m"), ("data.input", "{sum}="), ("data.target", "{total}"),
    ("data.batch_size", 4), ("train.steps", 3), ("output_dir", "o"), ("method.length", 4),
)])  # fmt: skip
HOSTILE = (*mutations.HOSTILE_VALUES, 10**400, 1e3, "1e3", "007", {1, 2}, b"x", object())


def check(message: str | None, config: Config | None) -> None:
    """Checks the outcome of a mutation: a config that can be stored, or a bounded message."""
    if config is not None:
        assert parse_text(dump(config)) == config
    else:
        assert message
        lines = message.splitlines()
        assert all(len(line) < 2500 for line in lines)
        assert ": " in lines[0]


def parse_text(text: str) -> Config:
    file = parse_text.folder / "config.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    return load(file)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    parse_text.folder = tmp_path


def attempt(make: Any) -> tuple[str | None, Config | None]:
    configs: list[Config] = []
    message = mutations.refusal(lambda: configs.append(make()), ConfigError)
    if configs:
        mutations.refusal(lambda: make_method(configs[0].method), ConfigError)
    return message, configs[0] if configs else None


def test_mutated_texts():
    rng = random.Random(0)
    for _ in range(100):
        text = mutations.mutate_text(TEXT, rng)
        check(*attempt(lambda text=text: parse_text(text)))


def test_mutated_overrides():
    rng = random.Random(1)
    keys = [
        f"{section.name}.{name}"
        for section in dataclasses.fields(CONFIG)
        for name in getattr(getattr(CONFIG, section.name), "__dict__", ())
    ]
    values = dataclasses.asdict(CONFIG)
    for _ in range(150):
        value = rng.choice((str(rng.choice(HOSTILE[:-3])), rng.choice(mutations.HOSTILE_TEXT)))
        override = f"{rng.choice([*keys, 'method.length', 'output_dir'])}={value}"
        if rng.random() < 0.2:
            override = mutations.mutate_text(override, rng)
        check(*attempt(lambda override=override: parse(values, [override])))


def test_mutated_mappings():
    rng = random.Random(2)
    values = dataclasses.asdict(CONFIG)
    for _ in range(150):
        mutated = mutations.mutate_json(values, rng)
        if isinstance(mutated, dict) and mutated and rng.random() < 0.3:
            mutated[rng.choice(list(mutated))] = {rng.choice(("x", 1, "path")): rng.choice(HOSTILE)}
        check(*attempt(lambda mutated=mutated: parse(mutated)))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny_runs.on_one_device(tiny.write_model(tmp_path_factory.mktemp("mutations") / "model"))


def test_mutated_configs_are_prepared_or_rejected(pretrained):
    rng = random.Random(3)
    values = dataclasses.asdict(CONFIG)
    prepared = {"prepared": 0, "refused": 0}
    while sum(prepared.values()) < 10:
        mutated = dict(values)
        for name in rng.sample(["data", "optim", "train", "init", "method", "task", "mesh"], 2):
            mutated[name] = mutations.mutate_json(values[name], rng, edits=1)
        _, config = attempt(lambda mutated=mutated: parse(mutated))
        if config is None:
            continue
        message = mutations.refusal(
            lambda config=config: build_run(
                config, pretrained=pretrained, records={"train": tiny_runs.RECORDS}
            ),
            PrefixJaxError,
        )
        prepared["refused" if message else "prepared"] += 1
    assert all(prepared.values())
