"""Mutated files become records or one error that names its line.

Every case is seeded. `make fuzz` runs many more, in processes that are watched.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from mutations import attempt, mutate_bytes, mutate_text

from prefix_jax.data.source import read_records

GOOD = {
    "a": "where",
    "b": "the film was in paris",
    "label": {"text": ["paris"], "answer_start": [16]},
    "x": "é\ud83d\ude00",
}


def test_lines_of_mutated_json_are_records_or_an_error_with_the_line(tmp_path: Path) -> None:
    path, line = tmp_path / "data.jsonl", json.dumps(GOOD)
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
