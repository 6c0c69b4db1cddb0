"""Turns SIGTERM and Ctrl-C into a request to save and stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class StopRequest(threading.Event):
    """Set when this process is asked to stop.

    Attributes:
        signal: the signal that asked, if it was one.
    """

    signal: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Yields a request that SIGTERM or Ctrl-C sets, so that the run saves before it ends.

    A second signal has its usual effect. Outside the main thread, which is the only one that can
    install handlers, the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _: Any) -> None:
        request.signal = signal.Signals(number)
        request.set()
        signal.signal(number, previous[request.signal])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
