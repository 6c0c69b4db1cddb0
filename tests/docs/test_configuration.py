"""The page of config keys matches the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from prefix_jax.config import Config
from prefix_jax.validation.types import keys

DOCS = Path(__file__).parents[2] / "docs"


def test_page_matches_its_script() -> None:
    spec = importlib.util.spec_from_file_location("script", DOCS / "make_configuration.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text("utf-8") == script.page(), "run: python docs/make_configuration.py"


def test_page_has_every_key() -> None:
    text = (DOCS / "configuration.md").read_text("utf-8")
    for key in keys(Config):
        if "." in key:
            assert f"| `{key}` |" in text, key
