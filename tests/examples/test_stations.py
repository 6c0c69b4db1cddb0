"""The stations data: texts match their facts, and files match their generator."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "stations"
SPLITS = ("train", "dev", "test")

NUMBER = {"a single": 1, "its single": 1, "two": 2, "both": 2} | {
    word: number for number, word in enumerate(("three", "four", "five", "six"), start=3)
}


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("stations_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # needed by dataclasses
    spec.loader.exec_module(module)
    return module


def read(split: str) -> list[dict]:
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def fields(facts: str) -> dict[str, str]:
    return dict(re.findall(r"([\w-]+)\[([^]]+)\]", facts))


def extract_facts(text: str) -> dict[str, str]:
    """Extracts the facts from a text, independently of the generator."""
    name = r"(?:Opened in \d+, )?([A-Z]\w+ [A-Z]\w+) (?:serves|has|is|lies|dates)\b"
    town = r"(?:serve[sd] (?:the town of )?|station for )([A-Z]\w+)|is (\w+)'s stop"
    facts: dict[str, str] = {}

    def note(field: str, value: str | None) -> None:
        if value is not None:
            assert field not in facts, f"{field} is stated twice: {text}"
            facts[field] = value

    for match in re.finditer(name, text):
        note("name", match[1])
    for match in re.finditer(town, text):
        note("town", match[1] or match[2])
    for match in re.finditer(r"on the (\w+) Line", text):
        note("line", match[1])
    for match in re.finditer(r"\b(\d{4})\b", text):
        note("opened", match[1])
    for match in re.finditer(r"(\w+(?: single)?) (?:step-free )?platforms?\b", text):
        note("platforms", str(NUMBER[match[1].lower()]))
    for match in re.finditer(r"step-free|(by steps)", text):
        note("step-free", "no" if match[1] else "yes")
    for match in re.finditer(r"\b(a|no|neither a) café", text):
        note("café", "yes" if match[1] == "a" else "no")
    for match in re.finditer(r"parking for (\d+) cars|(no|nor) parking", text):
        note("parking", match[1] or "none")
    return facts


def test_committed_files_match_the_generator(make):
    assert set(make.records()) == set(SPLITS)
    for split, records in make.records().items():
        written = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8")
        assert make.render(records) == written


def test_texts_state_each_fact_once_and_nothing_else():
    for split in SPLITS:
        for record in read(split):
            for text in record["text"]:
                assert extract_facts(text) == fields(record["facts"])


def test_every_station_states_four_to_six_facts():
    counts = {len(fields(record["facts"])) for split in SPLITS for record in read(split)}
    assert counts == {4, 5, 6}


def test_splits_share_no_station_or_text():
    names = {split: {fields(r["facts"])["name"] for r in read(split)} for split in SPLITS}
    texts = {split: {text for r in read(split) for text in r["text"]} for split in SPLITS}
    for group in (names, texts):
        assert not group["train"] & group["dev"]
        assert not group["train"] & group["test"]
        assert not group["dev"] & group["test"]


def test_splits_have_the_documented_sizes():
    texts = {split: [len(record["text"]) for record in read(split)] for split in SPLITS}
    assert {split: len(counts) for split, counts in texts.items()} == {
        "train": 240,
        "dev": 40,
        "test": 40,
    }
    assert sum(texts["train"]) == 300
    assert set(texts["dev"]) == set(texts["test"]) == {2}


def test_stations_and_texts_are_unique():
    for split in SPLITS:
        assert len({record["facts"] for record in read(split)}) == len(read(split))
        assert all(len(set(record["text"])) == len(record["text"]) for record in read(split))
