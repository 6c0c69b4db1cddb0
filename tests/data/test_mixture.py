"""Tests that records are assigned to datasets."""

from __future__ import annotations

import pytest

from prefix_jax.data.mixture import assign_datasets, collect_datasets, select_dataset
from prefix_jax.data.source import Record
from prefix_jax.errors import DataError

RECORDS = [Record({"kind": kind}, f"r:{n}") for n, kind in enumerate(["rte", "cola", 7, "rte"])]


def test_datasets_are_collected_once_each_and_sorted():
    assert collect_datasets(RECORDS, "kind") == ("7", "cola", "rte")


def test_dataset_index_is_its_position():
    records = assign_datasets(RECORDS, "kind", ("rte", "7", "cola"))
    assert [record.dataset for record in records] == [0, 2, 1, 0]
    assert [record.fields for record in records] == [record.fields for record in RECORDS]


def test_unknown_dataset_error_has_closest_match():
    with pytest.raises(
        DataError, match=r"r:1: unknown dataset 'cola' .* did you mean 'colas'\? the datasets"
    ):
        assign_datasets(RECORDS, "kind", ("rte", "colas", "7"))


def test_selects_records_of_the_dataset_or_without_the_field():
    bare = Record({"text": "a"}, "r:9")
    assert select_dataset([*RECORDS, bare], "kind", "rte") == [RECORDS[0], RECORDS[3], bare]
    with pytest.raises(DataError, match="no record has the dataset 'sst2'"):
        select_dataset(RECORDS, "kind", "sst2")


@pytest.mark.parametrize("name", ["a/b", "x" * 300, "..", "", True, 0.5])
def test_rejects_dataset_that_cannot_be_a_directory_name(name):
    with pytest.raises(DataError, match=r"r:9: field 'kind'.*(directory|the name of a dataset)"):
        collect_datasets([*RECORDS, Record({"kind": name}, "r:9")], "kind")
