"""N-gram tables are stored next to a prefix, and damaged ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from stored_prefixes import assert_equal, card_of, keys_values

from prefix_jax import artifact
from prefix_jax.data.batch import Example
from prefix_jax.data.ngrams import MAX_BUCKETS, NgramTable
from prefix_jax.errors import PrefixError


def table(*texts: list[int]) -> NgramTable:
    """The table of texts whose tokens are all targets except the first."""
    examples = [
        Example.of_text(np.array(ids, np.int32), np.arange(len(ids)) > 0, "here") for ids in texts
    ]
    ngrams = NgramTable.of(examples)
    assert ngrams is not None
    return ngrams


@pytest.fixture
def ngrams() -> NgramTable:
    return table([1, 2, 3, 1, 2, 4], [1, 2, 3])


@pytest.fixture
def path(tmp_path: Path, ngrams: NgramTable) -> Path:
    produced = keys_values()
    artifact.save(tmp_path / "p", produced, card_of(produced), ngrams=ngrams)
    return tmp_path / "p"


def test_table_is_stored_with_its_prefix(path: Path, ngrams: NgramTable) -> None:
    stored = artifact.load_ngrams(path)
    assert stored is not None
    np.testing.assert_array_equal(stored.entry_G2W, ngrams.entry_G2W)
    produced, card = artifact.load(path)
    assert_equal(produced, keys_values())
    artifact.save(path, produced, card)  # replaces the table, too
    assert artifact.load_ngrams(path) is None
    (path / "ngrams.safetensors").mkdir()
    with pytest.raises(PrefixError):
        artifact.load_ngrams(path)


def _flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def _with(**arrays: np.ndarray) -> Callable[[bytes], bytes]:
    return lambda content: safetensors.numpy.save({**safetensors.numpy.load(content), **arrays})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flip, "does not match its digest"),
        (lambda content: content[:-9], "truncated or corrupt"),
        (lambda content: b"", "truncated or corrupt"),
        (_with(entry_G2W=np.zeros((3, 2, 4), np.uint32)), r"the table has shape \(3, 2, 4\)"),
        (_with(entry_G2W=np.zeros((2 * MAX_BUCKETS, 2, 4), np.uint32)), "the table has shape"),
        (_with(entry_G2W=np.zeros((2, 2, 4), np.float32)), "it contains .*F32"),
        (_with(more=np.zeros(1, np.uint32)), "it contains .*more"),
    ],
    ids=["flipped", "truncated", "empty", "shape", "large", "floats", "more"],
)
def test_damaged_table_is_refused(path: Path, change, message: str) -> None:
    file = path / "ngrams.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(PrefixError, match=message):
        artifact.load_ngrams(path)


def test_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    produced = keys_values()
    card = card_of(produced)
    ngrams = table([1, card.geometry.vocab])
    artifact.save(tmp_path / "p", produced, card, ngrams=ngrams)
    with pytest.raises(PrefixError, match=f"token id {card.geometry.vocab} is outside the vocab"):
        artifact.load_ngrams(tmp_path / "p")


def test_large_tables_keep_the_most_frequent_contexts() -> None:
    rng = np.random.default_rng(0)
    often = [[1, 2, 3, 4, 5, 6]] * 3
    rare = [rng.integers(10, 2**20, 50).tolist() for _ in range(1000)]
    ngrams = table(*rare, *often)
    assert len(ngrams.entry_G2W) == MAX_BUCKETS
    assert {2, 3, 4, 5, 6} <= set(ngrams.token_GW.ravel().tolist())
