"""Saving and loading prefixes: round trips, atomic saves, damage and heads."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from prefix_jax import artifact
from prefix_jax.artifact import BackboneCard, Card, TokenizerCard, make_card, store
from prefix_jax.artifact.arrays import to_arrays
from prefix_jax.errors import CheckpointError, ConfigError, PrefixError
from prefix_jax.nn.head import Head
from prefix_jax.prefix import Embeds, Geometry, Hidden, KVPrefix, Prefix, Produced, Site, SiteShape
from tests.mutations import dump_json, mutate_json, refusal

GEOMETRY = Geometry(d_model=32, vocab=96, decoder=SiteShape(3, 4, 2, 8))
BACKBONE = BackboneCard(source="some/model", model_type="llama", fingerprint="f00", dtype="float32")
CONTAINERS = ["orbax", "safetensors"]
FIXTURES = Path(__file__).parents[1] / "fixtures"


def random(*shape: int, seed: int = 0) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def keys_values(length: int = 5, seed: int = 0, **fields: Any) -> Prefix:
    k_LPKH, v_LPKH = random(2, 3, length, 2, 8, seed=seed)
    return Prefix(Site(KVPrefix(k_LPKH, v_LPKH)), **{"text_position": length} | fields)


def with_absent_slots() -> Prefix:
    bias_LPN = random(3, 5, 4).at[1, 2].set(-jnp.inf)
    return Prefix(Site(KVPrefix(random(3, 5, 2, 8), random(3, 5, 2, 8), bias_LPN)), text_position=5)


PREFIXES: dict[str, Produced] = {
    "embeds": Embeds(random(5, 32)),
    "hidden": Hidden(random(3, 5, 32)),
    "kv": keys_values(),
    "kv without a shift": keys_values(text_position=0),
    "kv pinned": keys_values(pinned=True),
    "kv with a bias": with_absent_slots(),
}


def card_of(produced: Produced) -> Card:
    return make_card(
        produced,
        GEOMETRY,
        BACKBONE,
        method={"name": "prefix", "length": 5, "mid_dim": None, "dropout": 0.1},
        init="text: the café",
        steps=300,
        task={"name": "text", "input": "{name} →", "target": " {text}"},
        tokenizer=TokenizerCard.of("GPT2Tokenizer", {"a": 0, "b": 1}),
        metrics={"loss": 1.25},
    )


@pytest.fixture
def stored(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A stored prefix of keys and values; tests may parametrize the container."""
    produced = keys_values()
    artifact.save(tmp_path / "p", produced, card_of(produced), getattr(request, "param", "orbax"))
    return tmp_path / "p"


in_both_containers = pytest.mark.parametrize("stored", CONTAINERS, indirect=True)


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def assert_equal(a: Produced, b: Produced) -> None:
    arrays_a, arrays_b = to_arrays(a), to_arrays(b)
    assert arrays_a.keys() == arrays_b.keys()
    assert all(np.array_equal(arrays_a[name], arrays_b[name]) for name in arrays_a)


# Round trips.


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", PREFIXES)
def test_prefix_and_card_round_trip(
    name: str, container: artifact.Container, tmp_path: Path
) -> None:
    produced = PREFIXES[name]
    card = card_of(produced)
    artifact.save(tmp_path / "p", produced, card, container)
    loaded, loaded_card = artifact.load(tmp_path / "p")
    assert_equal(loaded, produced)
    assert type(loaded) is type(produced)
    assert loaded_card == card
    if isinstance(produced, Prefix):
        assert isinstance(loaded, Prefix)
        assert (loaded.text_position, loaded.pinned) == (produced.text_position, produced.pinned)


def test_saving_a_loaded_prefix_gives_the_same_bytes(tmp_path: Path) -> None:
    produced = with_absent_slots()
    artifact.save(tmp_path / "a", produced, card_of(produced), "safetensors")
    artifact.save(tmp_path / "b", *artifact.load(tmp_path / "a"), "safetensors")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_prefix_survives_conversion_between_containers(tmp_path: Path) -> None:
    produced = with_absent_slots()
    artifact.save(tmp_path / "a", produced, card_of(produced), "safetensors")
    artifact.save(tmp_path / "b", *artifact.load(tmp_path / "a"), "orbax")
    artifact.save(tmp_path / "c", *artifact.load(tmp_path / "b"), "safetensors")
    assert files(tmp_path / "a") == files(tmp_path / "c")


def test_bfloat16_is_stored_without_loss(tmp_path: Path) -> None:
    k = random(3, 5, 2, 8).astype(jnp.bfloat16)
    produced = Prefix(Site(KVPrefix(k, k)), text_position=5)
    artifact.save(tmp_path / "p", produced, card_of(produced))
    loaded, _ = artifact.load(tmp_path / "p")
    assert isinstance(loaded, Prefix)
    assert loaded.decoder.inside is not None
    assert loaded.decoder.inside.k_LPKH.dtype == jnp.float32
    assert np.array_equal(loaded.decoder.inside.k_LPKH, k.astype(jnp.float32))


@pytest.mark.parametrize("container", CONTAINERS)
def test_sixteen_slots_of_a_135m_model_need_less_than_a_megabyte(
    container: artifact.Container, tmp_path: Path
) -> None:
    k_LPKH, v_LPKH = random(2, 30, 16, 3, 64)
    produced = Prefix(Site(KVPrefix(k_LPKH, v_LPKH)), text_position=16)
    card = make_card(produced, Geometry(576, 49152, SiteShape(30, 9, 3, 64)), BACKBONE)
    artifact.save(tmp_path / "p", produced, card, container)
    array_bytes = 2 * 30 * 16 * 3 * 64 * 4
    assert sum(map(len, files(tmp_path / "p").values())) < array_bytes + 8_000


def test_card_is_readable_text_with_one_field_per_line(stored: Path) -> None:
    lines = (stored / "prefix.json").read_text().splitlines()
    assert lines[1] == '  "format_version": 4,'
    assert '  "positions": [0, 1, 2, 3, 4],' in lines
    assert '  "init": "text: the café",' in lines


def test_non_finite_metric_is_stored_as_null(tmp_path: Path) -> None:
    card = dataclasses.replace(card_of(PREFIXES["kv"]), metrics={"loss": 1.5, "bleu": np.nan})
    artifact.save(tmp_path / "p", PREFIXES["kv"], card)
    assert artifact.load(tmp_path / "p")[1].metrics == {"loss": 1.5, "bleu": None}


@in_both_containers
def test_accepts_a_relative_path(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored.parent)
    assert_equal(artifact.load(stored.name)[0], keys_values())


def test_accepts_a_run_directory(tmp_path: Path) -> None:
    produced = keys_values()
    artifact.save(tmp_path / "run" / "prefix", produced, card_of(produced))
    assert artifact.find(tmp_path / "run") == tmp_path / "run" / "prefix"
    assert_equal(artifact.load(tmp_path / "run")[0], produced)


# Saving is all or nothing.


@contextlib.contextmanager
def full_disk(*, files_up_to: int) -> Iterator[None]:
    """Limits the size of files, so that writes fail half-way in C++ and in Python."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (files_up_to, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # the compilation cache cannot write either
def test_full_disk_is_reported_and_loses_nothing(
    container: artifact.Container, stored: Path
) -> None:
    before = files(stored)
    larger = keys_values(length=400)
    with (
        full_disk(files_up_to=20_000),
        pytest.raises(CheckpointError, match=r"p \(the existing prefix is unchanged\): .*large"),
    ):
        artifact.save(stored, larger, card_of(larger), container)
    assert files(stored) == before
    assert [entry.name for entry in stored.parent.iterdir()] == ["p"]


@pytest.mark.parametrize(
    ("owner", "step"), [(store, "_write_arrays"), (Path, "write_text"), (os, "fsync")]
)
def test_failure_at_any_step_leaves_nothing_behind(
    owner: object, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(CheckpointError, match=r"\(nothing was written\): No space left on device"):
        artifact.save(tmp_path / "p", PREFIXES["kv"], card_of(PREFIXES["kv"]))
    assert list(tmp_path.iterdir()) == []


def test_interrupt_keeps_the_old_prefix(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = files(stored)
    monkeypatch.setattr(store, "_write_arrays", interrupt)
    with pytest.raises(KeyboardInterrupt):
        artifact.save(stored, PREFIXES["embeds"], card_of(PREFIXES["embeds"]))
    assert files(stored) == before


def test_failed_rename_restores_the_old_prefix(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = files(stored), Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.name == ".p.unfinished":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(CheckpointError, match="unchanged"):
        artifact.save(stored, PREFIXES["embeds"], card_of(PREFIXES["embeds"]))
    assert files(stored) == before


def test_names_the_backup_after_a_kill_between_renames(stored: Path) -> None:
    stored.rename(stored.with_name(".p.replaced"))
    with pytest.raises(PrefixError, match=r"\.p\.replaced, rename it to .*p"):
        artifact.load(stored)


def test_leftovers_of_a_killed_process_are_replaced(stored: Path) -> None:
    shutil.copytree(stored, stored.with_name(".p.replaced"))
    shutil.copytree(stored, stored.with_name(".p.unfinished"))
    produced = PREFIXES["embeds"]
    artifact.save(stored, produced, card_of(produced))
    assert_equal(artifact.load(stored)[0], produced)
    assert [entry.name for entry in stored.parent.iterdir()] == ["p"]


@pytest.mark.parametrize("name", [".p.unfinished", ".p.replaced"])
def test_never_deletes_foreign_files_with_reserved_names(stored: Path, name: str) -> None:
    foreign = stored.with_name(name) / "thesis.tex"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    with pytest.raises(CheckpointError, match=rf"{name} exists and was not written by prefix-jax"):
        artifact.save(stored, PREFIXES["embeds"], card_of(PREFIXES["embeds"]))
    assert foreign.read_text() == "mine"
    artifact.load(stored)


def test_replaces_a_prefix_with_system_files(stored: Path) -> None:
    (stored / ".DS_Store").write_text("")
    produced = PREFIXES["embeds"]
    artifact.save(stored, produced, card_of(produced))
    assert_equal(artifact.load(stored)[0], produced)


def test_names_text_that_cannot_be_stored() -> None:
    produced = PREFIXES["embeds"]
    task = {"name": "text", "input": "{name} \ud800", "target": "{text}"}
    with pytest.raises(ConfigError, match=r"task\.input: not valid Unicode text"):
        dataclasses.replace(card_of(produced), task=task)


def test_replaces_a_prefix_or_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for name, container in (("kv", "orbax"), ("embeds", "safetensors"), ("hidden", "orbax")):
        artifact.save(tmp_path / "p", PREFIXES[name], card_of(PREFIXES[name]), container)
        assert_equal(artifact.load(tmp_path / "p")[0], PREFIXES[name])
    assert {entry.name for entry in (tmp_path / "p").iterdir()} == {"prefix.json", "arrays"}


@pytest.mark.parametrize("name", ["thesis.tex", "prefix.json/../notes"])
def test_never_replaces_other_directories(name: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / Path(name).name).write_text("years of work")
    with pytest.raises(PrefixError, match="exists and is not a prefix"):
        artifact.save(tmp_path / "work", PREFIXES["kv"], card_of(PREFIXES["kv"]))
    assert (tmp_path / "work" / Path(name).name).read_text() == "years of work"


def test_never_replaces_a_prefix_with_foreign_files(stored: Path) -> None:
    (stored / "notes.txt").write_text("mine")
    with pytest.raises(PrefixError, match="exists and is not a prefix"):
        artifact.save(stored, PREFIXES["kv"], card_of(PREFIXES["kv"]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rejects_non_finite_keys(value: float, tmp_path: Path) -> None:
    produced = keys_values()
    inside = produced.decoder.inside
    assert inside is not None
    inside = dataclasses.replace(inside, k_LPKH=inside.k_LPKH.at[0, 0, 0, 0].set(value))
    produced = Prefix(Site(inside), text_position=5)
    with pytest.raises(PrefixError, match="k_LPKH has 1 values that are NaN or infinite"):
        artifact.save(tmp_path / "p", produced, card_of(produced))
    assert not (tmp_path / "p").exists()


def test_rejects_a_prefix_that_contradicts_its_card(tmp_path: Path) -> None:
    with pytest.raises(PrefixError, match="the card describes another prefix"):
        artifact.save(tmp_path / "p", keys_values(text_position=0), card_of(keys_values()))
    wrong = dataclasses.replace(
        card_of(keys_values()),
        geometry=dataclasses.replace(GEOMETRY, decoder=SiteShape(4, 4, 2, 8)),
    )
    with pytest.raises(
        PrefixError, match=r"k_LPKH is float32 \(3, 5, 2, 8\) instead of float32 \(4, 5"
    ):
        artifact.save(tmp_path / "p", keys_values(), wrong)


def test_rejects_a_prefix_without_slots() -> None:
    with pytest.raises(PrefixError, match="no slots"):
        make_card(Prefix(Site(KVPrefix(*[jnp.zeros((3, 0, 2, 8))] * 2))), GEOMETRY, BACKBONE)


# Damage.


def edit_card(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((path / "prefix.json").read_text())
    change(fields)
    (path / "prefix.json").write_text(json.dumps(fields))


def test_reports_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(PrefixError, match=r"no directory .*nowhere"):
        artifact.load(tmp_path / "nowhere")


def test_reports_a_directory_without_a_card(stored: Path) -> None:
    (stored / "prefix.json").unlink()
    with pytest.raises(PrefixError, match=r"no prefix in .* of a finished run"):
        artifact.load(stored)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"format_version": 1'])
def test_reports_a_truncated_card(content: bytes, stored: Path) -> None:
    (stored / "prefix.json").write_bytes(content)
    with pytest.raises(PrefixError, match=r"prefix\.json: .*; copy it again from"):
        artifact.load(stored)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format_version": "1"}'])
def test_rejects_json_that_is_not_a_card(content: str, stored: Path) -> None:
    (stored / "prefix.json").write_text(content)
    with pytest.raises(PrefixError, match="not the card of a prefix"):
        artifact.load(stored)


def test_newer_format_asks_for_an_upgrade(stored: Path) -> None:
    edit_card(stored, lambda card: card.update(format_version=5, package="3.0", kind="gated"))
    with pytest.raises(PrefixError, match=r"format 5, written by prefix_jax 3\.0.*--upgrade"):
        artifact.load(stored)


def test_reports_all_invalid_card_fields_at_once(stored: Path) -> None:
    def change(card: dict[str, Any]) -> None:
        card["kind"] = "gated"
        card["geometry"]["decoder"]["layers"] = "three"
        del card["text_position"]

    edit_card(stored, change)
    with pytest.raises(PrefixError) as error:
        artifact.load(stored)
    for part in (
        "kind: must be one of embeds",
        "geometry.decoder.layers: must be a positive integer",
        "text_position: missing",
    ):
        assert part in str(error.value)


def sign(path: Path) -> None:
    """Adds a valid digest to an edited card."""
    edit_card(path, lambda card: card.update(sha256=store._digest(card)))


@pytest.mark.parametrize(
    ("key", "value"),
    [("text_position", 3), ("steps", 7), ("created", "yesterday"), ("decode", {"num_beams": 4})],
)
def test_rejects_an_edited_card(key: str, value: Any, stored: Path) -> None:
    edit_card(stored, lambda card: card.update({key: value}))
    with pytest.raises(PrefixError, match=r"prefix\.json was modified: .*sha25"):
        artifact.load(stored)


def test_rejects_a_card_without_its_digest(stored: Path) -> None:
    edit_card(stored, lambda card: card.pop("sha256"))
    with pytest.raises(PrefixError, match="it records None"):
        artifact.load(stored)


def test_card_may_be_reformatted(stored: Path) -> None:
    card = artifact.load(stored)[1]
    fields = json.loads((stored / "prefix.json").read_text())
    (stored / "prefix.json").write_text(json.dumps(fields, indent=4, sort_keys=True))
    assert artifact.load(stored)[1] == card


def test_loads_format_2_without_a_digest(stored: Path) -> None:
    edit_card(stored, lambda card: (card.pop("sha256"), card.update(format_version=2)))
    produced, card = artifact.load(stored)
    assert_equal(produced, keys_values())
    assert card.format_version == 2
    artifact.save(stored, produced, card)
    assert artifact.load(stored)[1] == dataclasses.replace(
        card, format_version=artifact.FORMAT_VERSION
    )


@pytest.mark.parametrize("version", [2, 3])
def test_formats_2_and_3_still_load(version: int, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "format3" / "text" / "prefix", tmp_path / "old")
    if version == 2:  # the same without a digest
        edit_card(
            tmp_path / "old", lambda card: (card.pop("sha256"), card.update(format_version=2))
        )
    produced, card = artifact.load(tmp_path / "old")
    assert (card.format_version, card.method) == (
        version,
        {"name": "prefix", "length": 2, "mid_dim": 3},
    )
    assert card.text_position == produced.text_position == 2
    assert {"num_beams": 2, "num_samples": 2, "no_repeat_ngram_size": 3}.items() <= (
        card.decode.items()
    )
    artifact.save(tmp_path / "new", produced, card)
    again, renewed = artifact.load(tmp_path / "new")
    assert_equal(again, produced)
    assert renewed == dataclasses.replace(card, format_version=artifact.FORMAT_VERSION)


@pytest.mark.parametrize("version", [3, 4])
def test_multitask_prefix_with_former_names_still_loads(version: int, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(FIXTURES / "format3" / "text" / "prefix", old)
    if version == 4:
        artifact.save(old, *artifact.load(old))
    former = {"name": "multitask", "tasks": ["first", "sum"], "task": "sum"}

    def change(card: dict[str, Any]) -> None:
        card["method"] = former
        if version == 3:
            card["template"]["task"] = "kind"
        else:
            card["dataset"] = {"field": "kind", "name": "sum"}

    edit_card(old, change)
    sign(old)
    _, card = artifact.load(old)
    assert card.format_version == version
    assert card.method == {"name": "multitask", "datasets": ["first", "sum"], "dataset": "sum"}
    assert card.dataset == artifact.DatasetCard(field="kind", name="sum")


def test_format_3_with_a_head_still_loads() -> None:
    directory = FIXTURES / "format3" / "classify"
    _, card = artifact.load(directory)
    assert card.task == {
        "name": "classify", "prepare": None, "max_length": None, "truncate": "left",
        "label": "label", "input": "{text}", "pair": None, "labels": ["no", "yes"],
        "dropout": 0.1, "reads_soft": False,
    }  # fmt: skip
    assert card.head is not None
    assert card.head.outputs == 2
    assert artifact.load_head(directory)["out_DY"].shape == (32, 2)


@pytest.mark.parametrize("value", [float("nan"), "\ud800"])
def test_rejects_a_card_that_could_not_be_saved_again(value: Any, stored: Path) -> None:
    edit_card(stored, lambda card: card.update(decode={"x": value}))
    sign(stored)
    with pytest.raises(PrefixError, match=r"prefix\.json is damaged: "):
        artifact.load(stored)


def test_metrics_may_be_text(stored: Path) -> None:
    edit_card(stored, lambda card: card.update(metrics={"judge": "good", "loss": None}))
    sign(stored)
    artifact.save(stored, *artifact.load(stored))
    assert artifact.load(stored)[1].metrics == {"judge": "good", "loss": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_position": -50}, "text_position: must be a non-negative integer"),
        ({"length": -1}, "length: must be a non-negative integer"),
        ({"steps": -1}, "steps: must be a non-negative integer"),
        ({"positions": [-1, 0, 1, 2, 3]}, "positions: must be a list"),
        ({"positions": [4, 3, 2, 1, 0]}, "positions must count from 0"),
        ({"layers": {"decoder": [0, 1, 9]}}, "layers.decoder must ascend from 0 to at most 2"),
        ({"layers": {"decoder": [2, 1, 0]}}, "layers.decoder must ascend"),
        ({"layers": {"cross": [0]}}, "there is no cross in the geometry"),
        ({"geometry": {"d_model": 0, "vocab": 96}}, "d_model: must be a positive integer"),
        (
            {"geometry": {"d_model": 32, "vocab": 96, "decoder": {
                "layers": 10**12, "query_heads": 4, "kv_heads": 2, "head_dim": 8}}},
            "decoder.layers: must be a positive integer",
        ),
        (
            {"tokenizer": {"name": "x", "size": -1, "sha256": ""}},
            "tokenizer.size: must be a non-negative integer",
        ),
        ({"length": 10**9}, r"instead of float32 \(3, 1000000000, 2, 8\)"),
    ],
)  # fmt: skip
def test_rejects_a_card_with_impossible_numbers(
    change: dict[str, Any], message: str, stored: Path
) -> None:
    edit_card(stored, lambda card: card.update(change))
    sign(stored)
    with pytest.raises(PrefixError, match=message):
        artifact.load(stored)


def test_rejects_a_deeply_nested_card(stored: Path) -> None:
    (stored / "prefix.json").write_text("[" * 100_000)
    with pytest.raises(PrefixError, match="nested more than"):
        artifact.load(stored)


@pytest.mark.parametrize("path", ["x" * 300, "~nosuchuser/prefix", "a\0b"])
def test_impossible_path_is_a_prefix_error(path: str) -> None:
    with pytest.raises(PrefixError, match="cannot"):
        artifact.load(path)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_rejects_orbax_arrays_that_are_not_regular_files(kind: str, stored: Path) -> None:
    file = max(array_files(stored))
    content = file.read_bytes()
    file.unlink()
    if kind == "pipe":  # opening it would block until there is a writer
        os.mkfifo(file)
    else:
        (stored.parent / "elsewhere").write_bytes(content)
        file.symlink_to(stored.parent / "elsewhere")
    with pytest.raises(PrefixError, match="is not a regular file"):
        artifact.load(stored)


def test_rejects_orbax_arrays_far_larger_than_their_files(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing chunks read as zeros, so a small checkpoint may describe arrays of any size."""
    monkeypatch.setattr(store, "_MAX_EXPANDED", 100)
    monkeypatch.setattr(store, "_MAX_RATIO", 0)
    monkeypatch.setattr(store.ocp, "load", lambda path: pytest.fail("the arrays were read"))
    with pytest.raises(PrefixError, match=r"would need 1,920 bytes, but its files have"):
        artifact.load(stored)


@pytest.mark.parametrize("stored", ["orbax"], indirect=True)
def test_checks_shapes_before_reading_arrays(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_card(stored, lambda card: card.update(length=4))
    sign(stored)
    monkeypatch.setattr(store, "_read_arrays", lambda *_: pytest.fail("the arrays were read"))
    with pytest.raises(PrefixError, match=r"float32 \(3, 5, 2, 8\) instead of"):
        artifact.load(stored)


@pytest.mark.parametrize("signed", [False, True])
def test_mutated_cards_load_or_raise_one_error(signed: bool, tmp_path: Path) -> None:
    card = dataclasses.replace(card_of(keys_values()), task=TASK, head=LAYERS)
    artifact.save(tmp_path / "p", keys_values(), card, "safetensors", head=HEAD)
    file, rng = tmp_path / "p" / "prefix.json", Random(0)
    fields = json.loads(file.read_text())
    refused = 0
    for _ in range(300):
        mutated = mutate_json(fields, rng)
        if dump_json(mutated) == dump_json(fields):
            mutated = None
        if signed and isinstance(mutated, dict):
            mutated["sha256"] = store._digest(mutated)
        file.write_bytes(dump_json(mutated))
        message = refusal(lambda: artifact.load_head(tmp_path / "p"), PrefixError)
        assert message is None or str(tmp_path / "p") in message
        refused += message is not None
    assert refused == 300 if not signed else 150 < refused < 300


@in_both_containers
def test_reports_missing_arrays(stored: Path) -> None:
    for path in (stored / "arrays", stored / "prefix.safetensors"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
    with pytest.raises(
        PrefixError, match=r"arrays is missing or damaged|prefix\.safetensors: no such file"
    ):
        artifact.load(stored)


def array_files(path: Path) -> list[Path]:
    """The files with array data; Orbax stores small arrays twice."""
    return [
        file for file in path.rglob("*") if file.parent.name == "d" or file.suffix == ".safetensors"
    ]


@in_both_containers
@pytest.mark.parametrize("keep", [0, 0.3, 0.99])
def test_detects_truncated_arrays(keep: float, stored: Path) -> None:
    for file in array_files(stored):
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(PrefixError, match=r"damaged|truncated or corrupt"):
        artifact.load(stored)


@in_both_containers
def test_detects_a_flipped_bit(stored: Path) -> None:
    for file in array_files(stored):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(PrefixError, match="damaged"):
        artifact.load(stored)


@pytest.mark.parametrize("stored", ["safetensors"], indirect=True)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("decoder.v_LPKH", None, "decoder.v_LPKH is missing"),
        (
            "decoder.v_LPKH",
            lambda v: v[:, :4],
            r"v_LPKH is float32 \(3, 4, 2, 8\) instead of",
        ),
        ("decoder.v_LPKH", lambda v: v.astype(np.float16), "decoder.v_LPKH is float16"),
        ("decoder.v_LPKH", lambda v: v * np.nan, "decoder.v_LPKH has 240 values that are NaN"),
        ("x_PD", lambda _: np.zeros(3, np.float32), "x_PD is unknown"),
        ("decoder.v_LPKH", lambda v: v + 1, r"its arrays do not match the digests in prefix\.json"),
    ],
)
def test_reports_arrays_that_do_not_fit_the_card(
    name: str, change: Callable[[Any], np.ndarray] | None, message: str, stored: Path
) -> None:
    file = stored / "prefix.safetensors"
    arrays = safetensors.numpy.load(file.read_bytes())
    if change is None:
        del arrays[name]
    else:
        arrays[name] = np.ascontiguousarray(change(arrays.get(name)))
    file.write_bytes(safetensors.numpy.save(arrays))
    with pytest.raises(PrefixError, match=f"is damaged: .*{message}"):
        artifact.load(stored)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole") / "p"
    artifact.save(path, PREFIXES["kv"], card_of(PREFIXES["kv"]), "safetensors")
    return files(path)


@given(data=st.data())
def test_damage_is_a_prefix_error_or_harmless(data: st.DataObject, whole: dict[str, bytes]) -> None:
    damaged = data.draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[damaged])
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(start + 8, len(content))))
    content[start:stop] = data.draw(st.binary(max_size=8) | st.from_regex(rb"[0-9\[{:,\"]{1,8}"))
    with tempfile.TemporaryDirectory() as folder:
        for name, intact in whole.items():
            Path(folder, name).write_bytes(content if name == damaged else intact)
        with contextlib.suppress(PrefixError):
            assert_equal(artifact.load(folder)[0], PREFIXES["kv"])


# Heads of tasks.

HEAD = {"out_DY": random(32, 2), "out_bias_Y": random(2)}
TASK = {"name": "classify", "labels": ["no", "yes"]}
LAYERS = Head(2)


@pytest.mark.parametrize("container", CONTAINERS)
def test_head_round_trips_with_its_prefix(container: artifact.Container, tmp_path: Path) -> None:
    card = dataclasses.replace(card_of(keys_values()), task=TASK, head=LAYERS)
    artifact.save(tmp_path / "a", keys_values(), card, container, head=HEAD)
    produced, loaded = artifact.load(tmp_path / "a")
    assert (loaded.task, loaded.head) == (TASK, LAYERS)
    assert loaded.head_shapes == {"out_DY": (32, 2), "out_bias_Y": (2,)}
    np.testing.assert_array_equal(
        produced.decoder.inside.k_LPKH, keys_values().decoder.inside.k_LPKH
    )
    head = artifact.load_head(tmp_path / "a")
    assert sorted(head) == sorted(HEAD)
    for name, x in HEAD.items():
        np.testing.assert_array_equal(head[name], x)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({}, "head.out_DY is missing"),
        ({**HEAD, "dense_DE": random(32, 32)}, "head.dense_DE is unknown"),
        ({**HEAD, "out_bias_Y": random(3)}, r"head.out_bias_Y is float32 \(3,\) instead of"),
        ({**HEAD, "out_bias_Y": jnp.array([jnp.nan, 0])}, "head.out_bias_Y has values that"),
    ],
)
def test_rejects_a_head_that_contradicts_its_card(head: Any, message: str, tmp_path: Path) -> None:
    card = dataclasses.replace(card_of(keys_values()), task=TASK, head=LAYERS)
    with pytest.raises(PrefixError, match=message):
        artifact.save(tmp_path / "a", keys_values(), card, head=head)
    assert not (tmp_path / "a").exists()


def test_prefix_without_a_task_has_no_head(stored: Path) -> None:
    assert artifact.load_head(stored) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": {}}, "head.outputs: missing"),
        ({"head": {"outputs": 0}}, "head.outputs: must be an integer in"),
        ({"head": {"outputs": 2, "bias": 1}}, "head.bias: must be true or false"),
        ({"head": {"outputs": 2, "activation": "x"}}, "unknown activation 'x'"),
        ({"head": {"outputs": 2, "code": "x"}}, "head.code: unknown key"),
        ({"head": {"outputs": 2, "dropout": 1.5}}, "head.dropout: must be a number in"),
        ({"task": None}, "a head needs a task"),
        ({"task": {"labels": ["a", "b"]}}, "task must have a name"),
    ],
)
def test_rejects_a_stored_head_that_is_invalid(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    card = dataclasses.replace(card_of(keys_values()), task=TASK, head=LAYERS)
    artifact.save(tmp_path / "a", keys_values(), card, head=HEAD)
    edit_card(tmp_path / "a", lambda fields: fields.update(change))
    sign(tmp_path / "a")
    with pytest.raises(PrefixError, match=rf"prefix\.json is damaged:\n.*{message}"):
        artifact.load(tmp_path / "a")
