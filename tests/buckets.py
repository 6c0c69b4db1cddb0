"""A fake bucket for tests: `gs://` paths in a local folder, with the limits of a real bucket."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
from etils.epath import backend, gpath


class FakeBackend(backend.Backend):
    """The interfaces of `etils.epath` and `fsspec` to Google Cloud Storage, in a local folder.

    As in a real bucket, renaming is not possible, there are no empty directories, and `walk`
    returns paths without "gs://".

    Attributes:
        failure: an exception to raise on writes, if set.
    """

    failure: Exception | None = None

    def __init__(self, root: Path) -> None:
        self._root = root

    def _real(self, path: Any) -> Path:
        return self._root / os.fspath(path).removeprefix("gs://")

    def open(self, path: Any, mode: str) -> Any:
        if self.failure is not None:
            raise self.failure
        if "w" in mode:
            self._real(path).parent.mkdir(parents=True, exist_ok=True)
        return self._real(path).open(mode)

    def exists(self, path: Any) -> bool:
        return self._real(path).exists()

    def isdir(self, path: Any) -> bool:
        return self._real(path).is_dir()

    def listdir(self, path: Any) -> list[str]:
        return sorted(entry.name for entry in self._real(path).iterdir())

    def glob(self, path: Any) -> list[str]:
        assert "**" not in os.fspath(path)
        pattern = os.fspath(path).removeprefix("gs://")
        return [f"gs://{path.relative_to(self._root)}" for path in self._root.glob(pattern)]

    def walk(self, path: Any, **_: Any) -> Any:
        for folder, folders, files in os.walk(self._real(path)):
            yield str(Path(folder).relative_to(self._root)), folders, files

    def remove(self, path: Any) -> None:
        real = self._real(path)
        real.unlink()
        while not any(real.parent.iterdir()):
            real = real.parent
            real.rmdir()

    def rmtree(self, path: Any) -> None:
        for folder, _, files in os.walk(self._real(path), topdown=False):
            for name in files:
                self.remove(Path(folder, name).relative_to(self._root))

    def pipe_file(self, path: str, content: bytes, mode: str = "overwrite") -> None:
        real = self._real(path)
        real.parent.mkdir(parents=True, exist_ok=True)
        with real.open("xb" if mode == "create" else "wb") as file:
            file.write(content)

    def cat_file(self, path: str) -> bytes:
        return self._real(path).read_bytes()

    def rm_file(self, path: str) -> None:
        self.remove(path)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("a bucket cannot do this")

    makedirs = mkdir = rename = replace = copy = stat = _refuse


def install(root: Path, patch: Any) -> FakeBackend:
    """Redirects `gs://` paths to a folder, until the monkeypatch is undone."""
    root.mkdir(exist_ok=True)
    fake = FakeBackend(root)
    patch.setitem(gpath._PREFIX_TO_BACKEND, "gs", fake)
    filesystem = fsspec.filesystem
    patch.setattr(
        fsspec, "filesystem", lambda name, **kw: fake if name == "gs" else filesystem(name, **kw)
    )
    return fake
