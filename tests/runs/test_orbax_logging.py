"""Hides only what Orbax prints after a failed save."""

from __future__ import annotations

import asyncio
import logging
import sys
from types import SimpleNamespace

import pytest

from prefix_jax.runs.orbax_logging import silence_orbax


@pytest.fixture
def unraisable(monkeypatch):
    """Collects the errors that reach the previous hook."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    silence_orbax.__wrapped__()
    return seen


def test_hides_a_write_that_ends_after_its_event_loop(unraisable):
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError, match="Event loop is closed") as raised:
        loop.call_soon_threadsafe(print)
    # TensorStore calls the loop from C++, so the traceback starts in asyncio.
    inner = raised.value.__traceback__.tb_next
    sys.unraisablehook(SimpleNamespace(exc_value=raised.value, exc_traceback=inner))
    assert unraisable == []


def test_shows_other_unraisable_errors(unraisable):
    class Broken:
        def __del__(self):
            raise RuntimeError("Event loop is closed")

    Broken()
    (shown,) = unraisable
    assert str(shown.exc_value) == "Event loop is closed"


def test_hides_only_log_records_of_orbax(unraisable, caplog):
    def record(path: str) -> logging.LogRecord:
        return logging.LogRecord("absl", logging.ERROR, path, 1, "text", (), None)

    absl = logging.getLogger("absl")
    assert not absl.filter(record("/site-packages/orbax/checkpoint/save.py"))
    assert absl.filter(record("/site-packages/other/save.py"))
