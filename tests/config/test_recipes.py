"""Runs every recipe with a tiny model, a few local records and a few steps."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny import write_bart, write_encoder, write_model, write_t5

from prefix_jax import config as configs
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.config import Config
from prefix_jax.mesh import make_mesh
from prefix_jax.runs.run import run

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "quickstart")

# A few records per dataset, with the fields of its files or of TFDS.
RECORDS: dict[str, list[dict[str, Any]]] = {
    "e2e": [
        {"mr": f"name[The {name}], eatType[pub], familyFriendly[no]", "ref": f"{name} is a pub."}
        for name in ("Eagle", "Mill", "Vaults")
    ],
    "web_nlg": [
        {"input": [f"{name} | cityServed | Aarhus", f"{name} | runwayLength | 27.0"],
         "target": f"{name} serves Aarhus.", "references": [f"{name} serves Aarhus."]}
        for name in ("Airport", "Station", "Port")
    ],
    "dart": [
        {"tripleset": [f"{name} | JOINED | 1973"], "target": f"{name} joined in 1973."}
        for name in ("Mars Hill", "Erskine", "Lees")
    ],
    "xsum": [
        {"document": f"{name} was closed on Monday. Nobody was hurt.", "summary": f"{name} closed."}
        for name in ("A bridge", "A road", "A school")
    ],
    "sst2": [
        {"sentence": f"a {word} film", "label": label, "idx": 0}
        for word, label in (("great", 1), ("bad", 0), ("dull", 0))
    ],
    "mrpc": [
        {"sentence1": "He ran .", "sentence2": f"He {word} .", "label": label, "idx": 0}
        for word, label in (("ran", 1), ("sat", 0), ("did run", 1))
    ],
    "rte": [
        {"sentence1": "It rained.", "sentence2": f"It was {word}.", "label": label, "idx": 0}
        for word, label in (("wet", 0), ("dry", 1), ("raining", 0))
    ],
    "boolq": [
        {"question": f"is the {word} good", "passage": f"The {word} is good.", "label": label}
        for word, label in (("film", 1), ("plot", 0), ("cast", 1))
    ],
    "superglue rte": [
        {"premise": "It rained.", "hypothesis": f"It was {word}.", "label": label}
        for word, label in (("wet", 0), ("dry", 1), ("raining", 0))
    ],
    "copa": [
        {"premise": f"The {word} fell.", "choice1": "It rained.", "choice2": "It broke.",
         "question": question, "label": label}
        for word, question, label in (("cup", "effect", 1), ("dam", "cause", 0), ("jar", 1, 1))
    ],
    "wic": [
        {"word": "plot", "sentence1": f"A {word} plot.", "sentence2": "The plot.", "label": label,
         "start1": 2, "end1": 6, "start2": 4, "end2": 8}
        for word, label in (("good", 1), ("bad", 0), ("great", 1))
    ],
    "wsc": [
        {"text": f"The {word} film was good.", "span1_index": 2, "span1_text": "film",
         "span2_index": 3, "span2_text": "was", "label": label}
        for word, label in (("good", 0), ("bad", 1), ("great", 0))
    ],
    "conll03": [
        {"tokens": ["paris", "was", word], "ner": [5, 0, 0], "pos": [1, 2, 3], "chunks": [1, 2, 3]}
        for word in ("good", "bad", "great")
    ],
    "squad": [
        {"question": "where", "context": f"the {word} film was paris.", "id": word,
         "answers": {"text": ["paris"], "answer_start": [len(f"the {word} film was ")]}}
        for word in ("good", "bad", "great")
    ],
    "squad2": [
        {"question": "where", "context": f"the {word} film was paris.", "id": word,
         "answers": {"text": [], "answer_start": []}, "is_impossible": True}
        for word in ("good", "bad", "great")
    ],
    "gsm8k": [
        {"query": f"What is {n} + 1?", "response": f"{n} + 1 = {n + 1}. The answer is: {n + 1}"}
        for n in range(3)
    ],
}  # fmt: skip

# Tiny models by a part of the model's name. Decoders have one layer: decoding unrolls them.
_decoder = functools.partial(write_model, num_hidden_layers=1)
WRITERS: dict[str, Callable[[Path], Path]] = {
    "roberta": functools.partial(write_encoder, kind="roberta"),
    "bert": write_encoder,
    "gpt2": _decoder,
    "llama": _decoder,
    "gemma": _decoder,
    "bart": functools.partial(write_bart, decoder_layers=1),
    "t5": write_t5,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pretrained]:
    """Returns the tiny model that replaces a recipe's model."""

    @functools.cache
    def model(write: Callable[[Path], Path]) -> Pretrained:
        path = write(tmp_path_factory.mktemp("models") / "model")
        return load(path, mesh=make_mesh(devices=jax.devices()[:1]))

    def find(name: str) -> Pretrained:
        return model(next(write for kind, write in WRITERS.items() if kind in name.lower()))

    return find


def small(config: Config, recipe: Path, folder: Path) -> Config:
    """Shrinks a recipe to local data and a few steps."""
    dataset = max((name for name in RECORDS if recipe.stem.startswith(name)), key=len, default="")
    if dataset == "rte" and config.task.name == "classify":
        dataset = "superglue rte"
    records = folder / "records.jsonl"
    records.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[dataset]))
    splits = {name: str(records) for name in ("train", "dev", "test") if getattr(config.data, name)}
    accumulate = config.optim.grad_accum_steps
    return dataclasses.replace(
        config,
        task=dataclasses.replace(config.task, stride=16)
        if config.task.name == "span"
        else config.task,
        method=config.method | {"length": min(config.method["length"], 4)},
        data=dataclasses.replace(config.data, **splits, batch_size=2 * accumulate, max_length=None),
        train=dataclasses.replace(config.train, steps=2, epochs=None, eval_every=2),
        decode=dataclasses.replace(config.decode, max_new_tokens=6, min_new_tokens=0),
        output_dir=str(folder / "run"),
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe, models, tmp_path):
    config = configs.load(recipe)
    model = models(config.model.path)
    result = run(small(config, recipe, tmp_path), pretrained=model, quiet=True)
    assert result.step in (1, 2)
    assert result.card is not None
    assert result.card.method["name"] == config.method["name"]


def test_readme_lists_every_recipe():
    listed = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "configs/README.md").read_text(), re.M)
    assert listed == [path.name for path in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_header_states_command_data_and_published_figure(recipe):
    header = recipe.read_text().partition("model:")[0]
    assert f"prefix-jax train configs/{recipe.name}" in header
    assert "Data: " in header
    assert "Published" in header
