"""Model ids: the backbone, and prefixes that are read from directories and watched for changes.

Before every request, the files of its prefix are compared by inode, time and size with those that
were loaded. Once a prefix is replaced on disk, no request that arrives uses the old one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from prefix_jax import artifact
from prefix_jax.engine.bank import Banked
from prefix_jax.errors import PrefixError, PrefixJaxError
from prefix_jax.serve.engine_thread import EngineStoppedError, EngineThread

logger = logging.getLogger(__name__)

# The state of a directory: path, inode, time and size of every file.
_Stamp = tuple[tuple[str, int, int, int], ...]
# Prefixes have a handful of files.
_MAX_FILES = 1000


class UnknownModelError(PrefixJaxError):
    """There is no such model id, or its prefix cannot be used."""


@dataclasses.dataclass
class _Source:
    """The directory of a prefix, and its state.

    Attributes:
        directory: of the prefix or of a run.
        stamp: the state of the directory when it was read.
        error: why it cannot be used; None if it can.
        unloaded: whether it was unloaded; it stays so until its directory changes.
        created: when it was read, in seconds since 1970.
    """

    directory: Path
    stamp: _Stamp
    error: str | None = None
    unloaded: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model id.

    Attributes:
        id: the name.
        created: when it was loaded, in seconds since 1970.
        prefix: its prefix in the engine; None for the backbone.
    """

    id: str
    created: int
    prefix: Banked | None


class Models:
    """The model ids of a server.

    Args:
        base: the id of the backbone.
        engine: the engine, running.
        directory: every prefix in this directory is a model id; None for no such directory.
    """

    def __init__(self, base: str, engine: EngineThread, directory: Path | None):
        self.base = base
        self.directory = None if directory is None else directory.resolve()
        self._engine = engine
        self._created = int(time.time())
        self._sources: dict[str, _Source] = {}
        # Held while sources change.
        self._lock = asyncio.Lock()

    async def add(self, name: str, directory: Path) -> None:
        """Adds a prefix, from any directory.

        Raises:
            PrefixJaxError: it cannot be used.
        """
        async with self._lock:
            source = await self._read(name, directory, await asyncio.to_thread(_stamp, directory))
        if source.error is not None:
            raise PrefixError(source.error)

    async def find(self, name: str) -> Model:
        """Returns a model, as it is on disk now.

        Raises:
            UnknownModelError: there is no such model, or its prefix cannot be used.
        """
        if name == self.base:
            return Model(name, self._created, None)
        source = self._sources.get(name)
        if source is None or await asyncio.to_thread(_stamp, source.directory) != source.stamp:
            async with self._lock:
                source = await self._update(name)
        if source is None or source.unloaded:
            raise UnknownModelError(f"the model {name!r} does not exist")
        prefix = self._engine.engine.prefixes.get(name)
        if prefix is None:
            error = source.error or "it has just been unloaded"
            raise UnknownModelError(f"the model {name!r} is not available: {error}")
        return Model(name, source.created, prefix)

    async def all(self) -> list[Model]:
        """Returns the models that can be used, the backbone first."""
        models = [Model(self.base, self._created, None)]
        for name in sorted(await self._refresh()):
            source, prefix = self._sources.get(name), self._engine.engine.prefixes.get(name)
            if source is not None and prefix is not None:
                models.append(Model(name, source.created, prefix))
        return models

    async def watch(self, seconds: float) -> None:
        """Reads new and changed prefixes now and then, so that requests need not wait for it."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self._refresh()
            except EngineStoppedError:
                return
            except Exception:  # it must not be the last time
                logger.exception("cannot look for changed prefixes")

    @property
    def errors(self) -> Mapping[str, str]:
        """Why prefixes cannot be used, by name."""
        return {
            name: source.error
            for name, source in self._sources.items()
            if source.error is not None and not source.unloaded
        }

    async def load(self, name: str, path: str | None, replace: bool) -> Model:
        """Loads a prefix from below the directory of prefixes.

        Args:
            name: the model id.
            path: the directory, relative to the directory of prefixes; None for `name`.
            replace: whether to replace a loaded prefix with this name.

        Raises:
            PrefixError: the name is taken or invalid, the path is outside the directory, or the
                prefix cannot be used. A prefix that was loaded before then stays.
        """
        directory = self._inside(name if path is None else path)
        if not name or name == self.base:
            raise PrefixError(f"{name!r} cannot be the name of a prefix")
        async with self._lock:
            source = self._sources.get(name)
            if source is not None and not source.unloaded and not replace:
                raise PrefixError(
                    f"there is already a prefix {name!r}; choose another name, or set replace"
                )
            stamp = await asyncio.to_thread(_stamp, directory)
            await self._engine.call(lambda: self._engine.engine.add(name, directory, replace=True))
            self._sources[name] = _Source(directory, stamp)
        return await self.find(name)

    async def unload(self, name: str) -> None:
        """Unloads a prefix. It is read again when its directory changes.

        Raises:
            UnknownModelError: there is no such prefix.
        """
        async with self._lock:
            source = self._sources.get(name)
            if source is None or source.unloaded:
                raise UnknownModelError(f"the prefix {name!r} does not exist")
            await self._remove(name)
            source.unloaded = True

    async def _refresh(self) -> list[str]:
        """Reads new and changed prefixes; returns all names."""

        def changed(known: dict[str, _Source], names: set[str]) -> list[str]:
            """The names whose directories are not as they were: one thread looks at all."""
            return [
                name
                for name in names
                if (source := known.get(name)) is None or _stamp(source.directory) != source.stamp
            ]

        names = {*self._sources, *await asyncio.to_thread(self._names)}
        for name in await asyncio.to_thread(changed, dict(self._sources), names):
            with contextlib.suppress(UnknownModelError):
                await self.find(name)
        return list(names)

    async def _update(self, name: str) -> _Source | None:
        """Reads a prefix if it is new or has changed."""
        source = self._sources.get(name)
        directory = self._watched(name) if source is None else source.directory
        if directory is None:
            return None
        stamp = await asyncio.to_thread(_stamp, directory)
        if source is not None and stamp == source.stamp:
            return source
        if not stamp:
            await self._remove(name)
            self._sources.pop(name, None)
            return None
        return await self._read(name, directory, stamp)

    async def _read(self, name: str, directory: Path, stamp: _Stamp) -> _Source:
        """Reads a prefix. If that fails, the prefix that it would have replaced is removed."""
        source = _Source(directory, stamp)
        try:
            if self.directory is not None and directory.parent == self.directory:
                self._inside(name)
            await self._engine.call(lambda: self._engine.engine.add(name, directory, replace=True))
        except PrefixJaxError as error:
            source.error = str(error)
            logger.warning("prefix %r is not available: %s", name, error)
            await self._remove(name)
        else:
            logger.info("loaded prefix %r", name)
        # Only now, because requests that find the same stamp use the engine's prefix.
        self._sources[name] = source
        return source

    async def _remove(self, name: str) -> None:
        engine = self._engine.engine
        if name in engine.prefixes:
            await self._engine.call(lambda: engine.remove(name))

    def _names(self) -> list[str]:
        """The names in the directory of prefixes."""
        if self.directory is None:
            return []
        try:
            with os.scandir(self.directory) as entries:
                return [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
        except OSError as error:
            logger.warning("cannot read %s: %s", self.directory, error.strerror)
            return []

    def _watched(self, name: str) -> Path | None:
        """The directory of a name that no one has loaded yet."""
        is_name = name and not name.startswith(".") and not {"/", "\\", "\0"} & {*name}
        if self.directory is None or not is_name:
            return None
        return self.directory / name

    def _inside(self, path: str) -> Path:
        """A path below the directory of prefixes.

        Raises:
            PrefixError: it is outside, also by a symbolic link, or there is no such directory.
        """
        if self.directory is None:
            raise PrefixError("prefixes can be loaded only if the server runs with --prefix-dir")
        try:
            directory = (self.directory / path).resolve()
        except (OSError, ValueError):
            directory = self.directory
        if self.directory not in directory.parents:
            raise PrefixError(f"{path!r} is not below the directory of prefixes (--prefix-dir)")
        return directory


def _stamp(directory: Path) -> _Stamp:
    """The state of a directory; empty if it does not exist."""
    try:
        target = artifact.find(directory)
    except PrefixJaxError:
        target = directory
    files = []
    # If files are removed meanwhile, the next stamp differs from this one.
    with contextlib.suppress(OSError):
        for path in itertools.islice(target.rglob("*"), _MAX_FILES):
            stat = path.stat()
            files.append((str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(sorted(files))
