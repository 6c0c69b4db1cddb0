"""Ends connections of clients that do not read their answers."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class SlowReaders:
    """ASGI middleware that gives up when a client reads nothing for a while.

    Args:
        app: the application.
        seconds: the maximum time between two reads of a client.
    """

    def __init__(self, app: ASGIApp, seconds: float):
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._seconds):
                    await send(message)
            except TimeoutError:
                # An OSError, as if the client had closed the connection.
                raise ConnectionAbortedError("the client does not read its answer") from None

        await self._app(scope, receive, send_in_time)
