"""A thread that runs an engine, and its interface for coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from prefix_jax.api.engine import Engine
from prefix_jax.engine import Event, Handle, Request
from prefix_jax.errors import PrefixJaxError

T = TypeVar("T")


class QueueFullError(Exception):
    """Too many requests are waiting."""


class EngineStoppedError(Exception):
    """The engine has failed or was stopped."""


@dataclasses.dataclass(eq=False)
class _Stream:
    """The requests of one client.

    Attributes:
        continuations: their number.
        events: (index of the request, event); an exception ends the stream.
        handles: the handles of the requests that were submitted.
    """

    continuations: int
    events: asyncio.Queue[tuple[int, Event] | BaseException]
    handles: list[Handle] = dataclasses.field(default_factory=list)


class EngineThread:
    """Runs an engine in a thread of its own.

    Only this thread uses the engine. Coroutines send it commands, which run between two steps.

    Attributes:
        engine: the engine.
        failure: why the engine has stopped by itself; None if it has not.
        capacity: the maximum number of continuations that run and wait.

    Args:
        engine: the engine.
        max_waiting: the maximum number of continuations that wait for a row.
        on_failure: called in the event loop if a step fails with anything but an error of a
            request; the engine cannot be used afterwards.
    """

    def __init__(self, engine: Engine, max_waiting: int, on_failure: Callable[[], None]):
        self.engine = engine
        self.failure: BaseException | None = None
        self.capacity = engine.rows + max_waiting
        self._on_failure = on_failure
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[Handle, tuple[_Stream, int]] = {}
        self._active = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """True while the engine accepts requests."""
        return self._thread.is_alive() and self.failure is None and not self._stopping

    def start(self) -> None:
        """Starts the thread. Call it in the event loop that will use the engine."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Cancels all requests and ends the thread."""
        if self._thread.is_alive():
            self._commands.put(self._stop)
            await asyncio.to_thread(self._thread.join)

    async def call(self, function: Callable[[], T]) -> T:
        """Runs a function in the thread, between two steps, and returns its result."""
        future: asyncio.Future[T] = self._loop.create_future()

        def finish(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def command() -> None:
            try:
                result, error = function(), None
            except Exception as failure:
                result, error = None, failure
            self._in_loop(lambda: finish(result, error))

        self._send(command)
        return await future

    @contextlib.asynccontextmanager
    async def generate(
        self, requests: Sequence[Request]
    ) -> AsyncIterator[AsyncIterator[tuple[int, Event]]]:
        """Submits requests, and cancels them when the context ends.

        Yields:
            An iterator of (index of the request, event), which ends with the last continuation.

        Raises:
            QueueFullError: too many continuations are waiting.
            EngineStoppedError: the engine has failed or was stopped.
            PrefixJaxError: a request is invalid, or fails while it runs (from the iterator).
        """
        continuations = sum(request.config.num_samples for request in requests)
        if self._active + continuations > self.capacity:
            raise QueueFullError
        stream = _Stream(continuations, asyncio.Queue())
        self._active += continuations
        try:
            await self.call(lambda: self._submit(stream, requests))
            yield self._events(stream)
        finally:
            self._active -= continuations
            with contextlib.suppress(EngineStoppedError):
                self._send(lambda: self._cancel(stream))

    async def _events(self, stream: _Stream) -> AsyncIterator[tuple[int, Event]]:
        left = stream.continuations
        while left:
            item = await stream.events.get()
            if isinstance(item, BaseException):
                raise item
            index, event = item
            if event.error is not None:
                raise event.error
            left -= event.finish is not None
            yield index, event

    def _send(self, command: Callable[[], None]) -> None:
        if not self.alive:
            raise EngineStoppedError from self.failure
        self._commands.put(command)

    # The methods below run in the thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._run_commands(wait=self.engine.idle)
                if not self._stopping:
                    events = self.engine.step()
                    if events:
                        self._in_loop(functools.partial(self._deliver, events))
        except BaseException as failure:
            # Whatever it is, it must reach the clients that are waiting.
            self.failure = failure
            self._in_loop(self._on_failure)
        finally:
            for stream, _ in list(self._streams.values()):
                self._in_loop(functools.partial(stream.events.put_nowait, EngineStoppedError()))

    def _run_commands(self, wait: bool) -> None:
        """Runs the commands that have arrived; waits for one if there is nothing else to do."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get(block=wait)()
                wait = False

    def _submit(self, stream: _Stream, requests: Sequence[Request]) -> None:
        try:
            for index, request in enumerate(requests):
                handle = self.engine.submit(request)
                stream.handles.append(handle)
                self._streams[handle] = stream, index
        except PrefixJaxError:
            self._cancel(stream)
            raise

    def _cancel(self, stream: _Stream) -> None:
        for handle in stream.handles:
            self._streams.pop(handle, None)
            self.engine.cancel(handle)

    def _stop(self) -> None:
        self._stopping = True

    def _in_loop(self, callback: Callable[[], None]) -> None:
        """Runs a function in the event loop, unless it has been closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    # The event loop again.

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            # Events of a request that was cancelled meanwhile have no stream.
            entry = self._streams.get(event.handle)
            if entry is not None:
                stream, index = entry
                stream.events.put_nowait((index, event))
