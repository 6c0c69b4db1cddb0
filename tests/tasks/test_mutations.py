"""Mutated records become examples or one error that names its record.

Every case is seeded. `make fuzz` runs many more, in processes that are watched.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from mutations import HOSTILE_VALUES, attempt, dump_json, mutate_json

from prefix_jax.data.source import Record, read_records
from prefix_jax.tasks import (
    ChatTask,
    Classify,
    ExtractSpan,
    MultipleChoice,
    Reader,
    Regress,
    Tag,
    TextTask,
)

GOOD: dict[str, dict[str, Any]] = {
    "text": {"facts": "name[Mill], area[centre]", "text": ["the mill", "a mill"], "refs": ["mill"]},
    "chat": {
        "turns": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "where"},
            {"role": "assistant", "content": "centre"},
        ]
    },
    "classify": {"a": "the film", "b": "was good", "label": "good"},
    "regress": {"a": "the film", "label": 2.5},
    "tag": {"tokens": ["the", "film", "3"], "label": ["O", "B", "O"]},
    "span": {
        "a": "where", "b": "the film was in paris",
        "label": {"text": ["paris"], "answer_start": [16]},
    },
    "choice": {"a": "the film was", "b": "good", "ends": ["bad", "great"], "label": 1},
}  # fmt: skip
TASKS = {
    "text": TextTask("{facts} => ", "{text}", references="refs", max_length=64),
    "chat": ChatTask("turns", max_length=64),
    "classify": Classify("{a}", "{b}", labels=("bad", "good"), max_length=32, truncate="right"),
    "regress": Regress("{a}", max_length=32, truncate="right"),
    "tag": Tag(labels=("B", "O"), max_length=32, truncate="right"),
    "span": ExtractSpan("{a}", "{b}", stride=2, max_length=32, truncate="right"),
    "choice": MultipleChoice("{a}", ("{b}", "{ends}"), max_length=32, truncate="right"),
}


@pytest.fixture
def examples_of(kind: str, tokenizer: Any, bert: Any) -> Callable[[Any], Any]:
    """Loads the examples of a source like a run of this kind."""
    task = TASKS[kind]
    reader = Reader(tokenizer) if task.generates else Reader(bert, causal=False, token_types=True)
    return lambda source: task.examples(read_records(source), reader)


def outcome(examples_of: Callable[[Any], Any], path: Path, records: list[Any]) -> Any:
    """Maps lines of a JSONL file to their examples, or returns the error and its line."""
    path.write_bytes(b"\n".join(map(dump_json, records)))
    examples, message = attempt(examples_of, path)
    if message is not None:
        return message
    by_origin: dict[str, list[Any]] = {}
    for example in examples:
        # The index of a question depends on the questions before it.
        window = example.window and dataclasses.replace(example.window, question=0)
        values = vars(example) | {
            "window": None,
            "origin": None,
            **(vars(window) if window else {}),
        }
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}
        by_origin.setdefault(example.origin, []).append(plain)
    return by_origin


@pytest.mark.parametrize("kind", GOOD)
def test_example_does_not_depend_on_other_records(
    kind: str, examples_of: Callable[[Any], Any], tmp_path: Path
) -> None:
    path, good, refused = tmp_path / "data.jsonl", GOOD[kind], 0
    assert isinstance(outcome(examples_of, path, [good]), dict)
    for case in range(250):
        record = mutate_json(good, Random(f"{kind}/{case}"))
        alone = outcome(examples_of, path, [record])
        among = outcome(examples_of, path, [good, record, good])
        if isinstance(alone, dict):
            assert among["data.jsonl:2"] == alone["data.jsonl:1"], record
        else:
            refused += 1
            assert "data.jsonl:1" in alone, record
            assert among == alone.replace("data.jsonl:1", "data.jsonl:2"), record
    assert 50 < refused < 250


def test_collects_any_labels_or_names_the_record() -> None:
    for case in range(600):
        rng = Random(case)
        values = [rng.choice((*HOSTILE_VALUES, "a", "b", 0, 1)) for _ in range(rng.randint(2, 4))]
        task = Tag() if case % 2 else Classify()
        records = [
            Record({"label": [v] if case % 2 else v}, f"r:{i}") for i, v in enumerate(values)
        ]
        collected, message = attempt(task.collect, records)
        if message is not None:
            assert message.startswith("r:") or "has only one label" in message
        else:
            names = collected.labels
            assert len(set(names)) == len(names) >= 2
            json.dumps(names, ensure_ascii=False).encode()
