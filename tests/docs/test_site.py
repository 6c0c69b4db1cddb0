"""The documentation site: every page is in the navigation, every public name in the reference."""

from __future__ import annotations

import re
from pathlib import Path

import prefix_jax

ROOT = Path(__file__).parents[2]


def test_navigation_lists_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = set(re.findall(r"[a-z_]+\.md", text[text.index("\nnav:") :]))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= pages


def test_reference_lists_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text("utf-8")
    assert sorted(re.findall(r"^::: prefix_jax\.(\w+)$", text, re.M)) == prefix_jax.__all__
