"""The process: starts the engine and the HTTP server, and stops both in order."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import uvicorn

from prefix_jax.api.engine import Engine
from prefix_jax.errors import ConfigError, PrefixJaxError, reason
from prefix_jax.serve.app import App, Limits
from prefix_jax.serve.engine_thread import EngineThread
from prefix_jax.serve.guides import Vocabulary
from prefix_jax.serve.limits import SlowReaders
from prefix_jax.serve.metrics import Metrics
from prefix_jax.serve.models import Models

logger = logging.getLogger(__name__)

# The interval at which new and changed prefixes are loaded ahead of requests.
_WATCH_SECONDS = 2.0
# The longest time in which a client must read a piece of its answer.
_READ_SECONDS = 60.0
_KEEP_ALIVE_SECONDS = 15


class EngineFailedError(PrefixJaxError):
    """The engine has failed, and the server has stopped."""


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """The settings of a server.

    Attributes:
        name: the model id of the backbone.
        prefixes: directories of prefixes by model id.
        prefix_dir: a directory in which every prefix is a model id.
        limits: who may send what.
        max_waiting: the maximum number of continuations that wait for a row.
        drain_seconds: the time for running requests to finish after SIGTERM.
    """

    name: str
    prefixes: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    prefix_dir: Path | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)
    max_waiting: int = 256
    drain_seconds: int = 30


def serve(
    engine: Engine,
    options: ServeOptions,
    sock: socket.socket,
    ready: Callable[[str, int], None],
) -> None:
    """Serves an engine over HTTP until SIGTERM or SIGINT.

    The first signal lets running and waiting requests finish; the second ends them.

    Args:
        engine: the engine, without requests.
        options: the settings.
        sock: where to listen, from `listen`.
        ready: called with the URL and the number of prefixes once the server accepts requests.

    Raises:
        ConfigError: a prefix has the name of the backbone.
        PrefixError: a prefix of `options.prefixes` cannot be used.
        EngineFailedError: the engine has failed.
    """

    async def main() -> None:
        server = Server(engine, options)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        await server.run(sock, ready)

    asyncio.run(main())


class Server:
    """A server in an event loop.

    Args:
        engine: the engine, without requests.
        options: the settings.
    """

    def __init__(self, engine: Engine, options: ServeOptions):
        self._options = options
        self._engine = EngineThread(engine, options.max_waiting, self._fail)
        self._models = Models(options.name, self._engine, options.prefix_dir)
        pretrained = engine.model
        app = App(
            self._engine,
            self._models,
            Metrics(engine),
            Vocabulary(pretrained.tokenizer, pretrained.backbone.arch.vocab),
            options.limits,
        )
        self._http = _Http(
            uvicorn.Config(
                SlowReaders(app.starlette(), _READ_SECONDS),
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=options.drain_seconds,
            )
        )

    async def run(self, sock: socket.socket, ready: Callable[[str, int], None]) -> None:
        """Serves until `stop`; see `serve`."""
        self._engine.start()
        try:
            for name, directory in self._options.prefixes.items():
                if name == self._options.name:
                    raise ConfigError(f"--prefix {name}: the model has this name; choose another")
                await self._models.add(name, directory)
            count = len(await self._models.all()) - 1
            await _warm_up(self._engine)
            watcher = asyncio.create_task(self._models.watch(_WATCH_SECONDS))
            host, port = sock.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            self._http.on_start = lambda: ready(url, count)
            await self._http.serve(sockets=[sock])
            watcher.cancel()
        finally:
            await self._engine.stop()
        failure = self._engine.failure
        if failure is not None:
            raise EngineFailedError(f"the engine failed: {failure}") from failure

    def stop(self) -> None:
        """Stops the server after its requests; if called again, at once."""
        if self._http.should_exit:
            self._http.force_exit = True
        elif self._http.started:
            logger.info("stopping after the requests that are running")
        self._http.should_exit = True

    def _fail(self) -> None:
        logger.error("the engine failed; the server stops")
        self._http.should_exit = True


class _Http(uvicorn.Server):
    """Calls `on_start` once clients can connect.

    It leaves signals to `serve`: uvicorn would raise them again after the shutdown.
    """

    on_start: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.on_start is not None:
            self.on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _warm_up(thread: EngineThread) -> None:
    """Compiles the programs that short requests need."""
    engine = thread.engine
    for prefix in [None, *list(engine.prefixes)[:1]]:
        request = engine.request([0] * 2, prefix, max_new_tokens=2, min_new_tokens=0)
        with contextlib.suppress(PrefixJaxError):
            async with thread.generate([request]) as events:
                async for _ in events:
                    pass


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket, before anything is loaded, so that a wrong address fails at once.

    Args:
        host: a name or an address.
        port: the port; 0 is any free one.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except BaseException:
            sock.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {host} port {port} ({reason(error)}); choose another --host or "
            "--port, or stop the program that uses it"
        ) from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # The kernel drops connections whose client does not read; accepted sockets inherit it.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_READ_SECONDS * 1000))
    return sock
