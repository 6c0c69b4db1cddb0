"""Missing, truncated, changed and foreign arrays are errors."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from stored_prefixes import (
    PREFIXES,
    array_files,
    assert_equal,
    card_of,
    edit_card,
    files,
    in_both_containers,
    sign,
)

from prefix_jax import artifact
from prefix_jax.artifact import store
from prefix_jax.errors import PrefixError


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
