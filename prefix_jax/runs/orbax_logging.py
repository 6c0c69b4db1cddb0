"""Silences Orbax's output about a failed save, which `Checkpoints` reports as one error."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from pathlib import Path
from types import TracebackType

# Coroutines of Orbax that a save never awaits if it fails early; Python warns about them.
_COROUTINES = (
    r"coroutine '(OrbaxLayout|BasePyTree|cancellable|_serialize_|_async_serialize_).*never awaited"
)


@functools.cache
def silence_orbax() -> None:
    """Installs the filters permanently, because Orbax's threads outlive a failed save.

    After the first failed write, Orbax no longer waits for the others. They end later, and log the
    same failure with a traceback, or report to an event loop that is closed by then.
    """
    logging.getLogger("absl").addFilter(_keep_record)
    warnings.filterwarnings("ignore", _COROUTINES, RuntimeWarning)
    previous = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not _is_closed_loop(unraisable.exc_value, unraisable.exc_traceback):
            previous(unraisable)

    sys.unraisablehook = hook


def _keep_record(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _is_closed_loop(error: BaseException | None, traceback: TracebackType | None) -> bool:
    """Returns whether TensorStore reported the end of a write to a closed event loop."""
    if not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
        return False
    # TensorStore calls the loop from C++, so the first Python frame is in asyncio.
    return traceback is not None and Path(traceback.tb_frame.f_code.co_filename).parent.name == (
        "asyncio"
    )
