"""The examples in docstrings run, with the documentation's replacements (see conftest.py)."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import prefix_jax

ROOT = Path(prefix_jax.__file__).parent


def examples() -> list[doctest.DocTest]:
    """The docstrings with examples, in all modules."""
    modules = [
        ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)
        for file in sorted(ROOT.rglob("*.py"))
        if ">>> " in file.read_text("utf-8")
    ]
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = (test for name in modules for test in finder.find(importlib.import_module(name)))
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
@pytest.mark.usefixtures("fast_docs")
def test_example_runs(example: doctest.DocTest) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    output: list[str] = []
    runner.run(example, out=output.append)
    assert runner.failures == 0, "".join(output)


def test_main_names_have_examples() -> None:
    names = {example.name.rpartition(".")[2] for example in examples()}
    assert {"Prefix", "PrefixTuning", "Tuned", "fit", "lift", "load", "load_prefix"} <= names
