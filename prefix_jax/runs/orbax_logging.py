"""Silences what Orbax prints about a failed save, which `Checkpoints` reports as one error."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from pathlib import Path
from types import TracebackType

# Orbax's, which a save that fails early never runs; Python warns when it collects them.
_COROUTINES = (
    r"coroutine '(OrbaxLayout|BasePyTree|cancellable|_serialize_|_async_serialize_).*never awaited"
)


@functools.cache
def silence_orbax() -> None:
    """Installs the filters, once and for good: Orbax's threads outlive the save that failed.

    After the first write that fails, Orbax no longer waits for the others. They end some time later
    and log the same failure with a traceback, or find the event loop that waited for them closed.
    """
    logging.getLogger("absl").addFilter(_keep_record)
    warnings.filterwarnings("ignore", _COROUTINES, RuntimeWarning)
    previous = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not _of_closed_loop(unraisable.exc_value, unraisable.exc_traceback):
            previous(unraisable)

    sys.unraisablehook = hook


def _keep_record(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _of_closed_loop(error: BaseException | None, traceback: TracebackType | None) -> bool:
    """Whether TensorStore reported the end of a write to an event loop that is closed."""
    if not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
        return False
    # TensorStore calls the loop from C++, so that no frame of Python's comes before asyncio's own.
    return traceback is not None and Path(traceback.tb_frame.f_code.co_filename).parent.name == (
        "asyncio"
    )
