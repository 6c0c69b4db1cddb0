"""What Orbax prints after a save that failed is hidden, and nothing else is."""

from __future__ import annotations

import asyncio
import logging
import sys
from types import SimpleNamespace

import pytest

from prefix_jax.runs.orbax_logging import silence_orbax


@pytest.fixture
def unraisable(monkeypatch):
    """The errors that reach the hook that was there before."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    silence_orbax.__wrapped__()
    return seen


def test_a_write_that_ends_after_its_event_loop_is_silent(unraisable):
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError, match="Event loop is closed") as raised:
        loop.call_soon_threadsafe(print)
    # TensorStore calls the loop from C++: the traceback begins in asyncio.
    inner = raised.value.__traceback__.tb_next
    sys.unraisablehook(SimpleNamespace(exc_value=raised.value, exc_traceback=inner))
    assert unraisable == []


def test_other_unraisable_errors_are_shown(unraisable):
    class Broken:
        def __del__(self):
            raise RuntimeError("Event loop is closed")

    Broken()
    (shown,) = unraisable
    assert str(shown.exc_value) == "Event loop is closed"


def test_records_of_orbax_are_hidden_and_others_shown(unraisable, caplog):
    def record(path: str) -> logging.LogRecord:
        return logging.LogRecord("absl", logging.ERROR, path, 1, "text", (), None)

    absl = logging.getLogger("absl")
    assert not absl.filter(record("/site-packages/orbax/checkpoint/save.py"))
    assert absl.filter(record("/site-packages/other/save.py"))
