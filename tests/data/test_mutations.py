"""Mutated records and files become examples or one error that names its record.

Every case is seeded. `make fuzz` runs many more, in processes that are watched.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from mutations import HOSTILE_VALUES, dump_json, mutate_bytes, mutate_json, mutate_text

from prefix_jax.backbones.loading.tokenizer import load_tokenizer
from prefix_jax.config import TaskConfig
from prefix_jax.data.fields import collect_labels
from prefix_jax.data.labelled import Reading
from prefix_jax.data.pipeline import load_examples
from prefix_jax.data.source import Record, read_records
from prefix_jax.errors import DataError
from prefix_jax.evaluate.report import Prediction, read_predictions, save_predictions

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
    "classify": TaskConfig("classify", labels=("bad", "good")),
    "regress": TaskConfig("regress"),
    "tag": TaskConfig("tag", labels=("B", "O")),
    "span": TaskConfig("span", stride=2),
    "choice": TaskConfig("choice", choices=("{b}", "{ends}")),
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny.write_encoder(tmp_path_factory.mktemp("bert") / "model"))


@pytest.fixture
def examples_of(kind: str, tokenizer: Any, bert: Any) -> Callable[[Any], Any]:
    """Loads the examples of a source like a run of this kind."""
    if kind == "text":
        fields = {"input": "{facts} => ", "target": "{text}", "references": "refs"}
        return lambda source: load_examples(source, tokenizer, max_length=64, **fields)
    if kind == "chat":
        return lambda source: load_examples(source, tokenizer, messages="turns", max_length=64)
    pair = "{b}" if kind in ("classify", "span") else None
    reading = Reading(bert, TASKS[kind], "{a}", pair, 32, "right", False, True)
    return lambda source: reading.examples(read_records(source))


def attempt(read: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    """Returns (result, None), or (None, message) if the function raises an error."""
    try:
        return read(*args), None
    except DataError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 5000
    return None, message


def outcome(examples_of: Callable[[Any], Any], path: Path, records: list[Any]) -> Any:
    """Maps lines of a JSONL file to their examples, or returns the error and its line."""
    path.write_bytes(b"\n".join(map(dump_json, records)))
    examples, message = attempt(examples_of, path)
    if message is not None:
        return message
    found: dict[str, list[Any]] = {}
    for example in examples:
        # The index of a question depends on the questions before it.
        window = example.window and dataclasses.replace(example.window, question=0)
        values = vars(example) | {
            "window": None,
            "source": None,
            **(vars(window) if window else {}),
        }
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}
        found.setdefault(example.source, []).append(plain)
    return found


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


def test_lines_of_mutated_json_are_records_or_an_error_with_the_line(tmp_path: Path) -> None:
    path, line = tmp_path / "data.jsonl", json.dumps(GOOD["span"] | {"x": "é\ud83d\ude00"})
    for case in range(600):
        rng = Random(case)
        content = f"{line}\n{mutate_text(line, rng)}\n".encode()
        if case % 2:
            content = f"{line}\n".encode() + mutate_bytes(f"{line}\n".encode(), rng)
        path.write_bytes(content)
        records, message = attempt(read_records, path)
        if message is not None:
            assert any(f"data.jsonl:{number}: " in message for number in (2, 3, 4))
        else:
            assert records[0].fields == json.loads(line)
            json.dumps([record.fields for record in records], ensure_ascii=False).encode()


def test_mutated_csv_is_records_or_an_error_with_the_line(tmp_path: Path) -> None:
    path, start = tmp_path / "data.csv", 'a,b,label\n"the ""film"", so",x,good\n'
    rest = 'é,"two\nlines",bad\n,nan,3\n'
    for case in range(600):
        rng = Random(case)
        changed = mutate_text(rest, rng).encode()
        path.write_bytes(start.encode() + (mutate_bytes(changed, rng) if case % 2 else changed))
        records, message = attempt(read_records, path)
        if message is not None:
            line = int(message.removeprefix(f"{path}:").partition(":")[0])
            assert 3 <= line < 40
        else:
            assert dict(records[0].fields) == {"a": 'the "film", so', "b": "x", "label": "good"}
            assert all(set(record.fields) == {"a", "b", "label"} for record in records)


def parquet_of_all_types() -> pa.Table:
    chats = [[{"role": "user", "content": "x"}], None, []] * 20
    return pa.table(
        {
            "a": ["one", "two", "three"] * 20,
            "b": pa.array(["x", None, "z"] * 20).dictionary_encode(),
            "label": [1, None, 3] * 20,
            "chat": chats,
            "map": pa.array([[("k", "v")], None, []] * 20, pa.map_(pa.string(), pa.string())),
            "when": pa.array([1, 2**40, None] * 20, pa.timestamp("ns", "Mars/Base")),
            "price": pa.array([1.5, None, 2.5] * 20).cast(pa.decimal128(5, 2)),
            "raw": [b"\xff", b"ok", None] * 20,
            "flag": [True, None, False] * 20,
        }
    )


# Attacks pyarrow's decoder in a separate process, because it may crash.
ATTACK_PARQUET = """
import sys
from pathlib import Path
from random import Random
from mutations import mutate_bytes
from prefix_jax.data.source import read_records
from prefix_jax.errors import DataError
path, refused = Path(sys.argv[1]), 0
original = path.read_bytes()
for case in range(400):
    path.write_bytes(mutate_bytes(original, Random(case)))
    try:
        [record.value("a") for record in read_records(path)]
    except DataError as error:
        refused += 1
        assert "data.parquet" in str(error), error
print(refused)
"""


def test_mutated_parquet_is_records_or_one_error(tmp_path: Path) -> None:
    pq.write_table(parquet_of_all_types(), tmp_path / "data.parquet")
    assert read_records(tmp_path / "data.parquet")[4].fields["b"] is None
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", ATTACK_PARQUET, tmp_path / "data.parquet"],
        env={"PYTHONPATH": f"{tests}:{tests.parent}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 100 < int(done.stdout) < 400


def test_collects_any_labels_or_names_the_record() -> None:
    for case in range(600):
        rng = Random(case)
        values = [rng.choice((*HOSTILE_VALUES, "a", "b", 0, 1)) for _ in range(rng.randint(2, 4))]
        task = TaskConfig("tag" if case % 2 else "classify")
        records = [
            Record({"label": [v] if case % 2 else v}, f"r:{i}") for i, v in enumerate(values)
        ]
        names, message = attempt(collect_labels, records, task)
        if message is not None:
            assert message.startswith("r:") or "has only one label" in message
        else:
            assert len(set(names)) == len(names) >= 2
            json.dumps(names, ensure_ascii=False).encode()


def test_mutated_predictions_come_back_or_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    made = [
        Prediction("a:1", "x", "y", ["z"], {"z": 0.5}),
        Prediction("a:2", "é", "", ["\u2028"]),
    ]
    save_predictions(path, made)
    original = path.read_bytes()
    objects = [json.loads(line) for line in original.splitlines()]
    for case in range(300):
        rng = Random(case)
        changed = [dump_json(row) for row in mutate_json(objects, rng)]
        path.write_bytes(mutate_bytes(original, rng) if case % 2 else b"\n".join(changed))
        found, message = attempt(read_predictions, path)
        if message is not None:
            assert message.startswith(str(path))
        else:
            save_predictions(path, found)
            assert read_predictions(path) == found or "NaN" in path.read_text()
