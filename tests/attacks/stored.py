"""Attacks on stored prefixes, PEFT adapters and run directories."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from random import Random

import jax
import tiny
from mutations import (
    dump_json,
    mutate_bytes,
    mutate_json,
)

from attacks.registry import FIXTURES, Attempt, replaced, target
from prefix_jax import artifact
from prefix_jax.api import import_peft
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.cli.main import main
from prefix_jax.errors import PrefixJaxError
from prefix_jax.methods import make_method
from prefix_jax.tasks import TextTask, to_card


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
    task = to_card(TextTask("{facts}\n", "{text}"))
    decode = {"max_new_tokens": 5}
    card = artifact.make_card(produced, geometry, backbone, task=task, decode=decode)
    artifact.save(folder / "prefix", produced, card, container)
    return folder / "prefix"


def _inspect(path: Path) -> None:
    """Reads a prefix directly, and with `prefix-jax inspect`, which catches errors itself."""
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
        with replaced(file, content):
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
        with replaced(file, mutate_bytes(file.read_bytes(), rng)):
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
        with replaced(folder / name, content):
            import_peft(folder, model)

    return attempt


# The files that are read when `train` shows the results of a finished run.
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
        backup = folder / "backup"
        shutil.copytree(folder / "run", backup)
        try:
            file.write_bytes(content)
            if code := run():
                assert code == 2
                raise PrefixJaxError("the command rejected the run")
        finally:
            shutil.rmtree(folder / "run")
            backup.rename(folder / "run")

    return attempt
