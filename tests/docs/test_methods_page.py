"""The table in `docs/methods.md` matches its code, and every method has a section."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefix_jax.methods import FULL, METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def test_table_matches_the_output_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (table,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == table


@pytest.mark.parametrize("name", [*METHODS, FULL])
def test_every_method_has_a_section(name: str) -> None:
    assert f"\n## {name}\n" in PAGE
    assert name == FULL or f"`pj.{METHODS[name].__name__}`" in PAGE
