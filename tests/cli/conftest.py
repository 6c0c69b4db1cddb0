"""Fixtures: a folder with a tiny model, data and a config, and a finished run of that config."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefix_jax.cli.main import main

CONFIG = """
model: {path: model}
method: {name: prefix, length: 4}
data: {train: train.jsonl, dev: dev.jsonl, test: test.jsonl, input: "{facts}\\n", target: "{text}"}
train: {steps: 3, checkpoint_every: 1}
evaluate: {metrics: [loss, bleu], compare_baseline: true, batch_size: 8}
decode: {max_new_tokens: 6}
output_dir: run
"""


def write_records(path: Path, count: int) -> None:
    records = (
        {"facts": f"name[Stop {i}], it's", "text": [f"Station {i}.", f"The station {i}."]}
        for i in range(count)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@dataclasses.dataclass
class Ran:
    code: int
    out: str
    err: str


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    previous = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(previous)


def call(folder: Path, *words: str) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with inside(folder), streams[0], streams[1]:
        code = main(list(words))
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def run_in() -> Callable[..., Ran]:
    """Runs a command line in a folder."""
    return call


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(tiny_model_dir, folder / "model")
    for split, count in (("train", 16), ("dev", 8), ("test", 5)):
        write_records(folder / f"{split}.jsonl", count)
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def trained(files: Path) -> tuple[Path, Ran]:
    """The folder with a finished run, and the output of the training. Do not modify them."""
    ran = call(files, "train", "config.yaml")
    assert ran.code == 0, ran.err
    return files, ran


@pytest.fixture
def folder(files: Path, tmp_path: Path) -> Path:
    """A copy of the folder without the run."""
    return Path(shutil.copytree(files, tmp_path / "copy", ignore=shutil.ignore_patterns("run")))
