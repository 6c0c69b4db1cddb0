"""Every reader reports files without read permission in one line."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import tiny

from prefix_jax import artifact
from prefix_jax.artifact import BackboneCard
from prefix_jax.backbones.loading.find import find
from prefix_jax.backbones.loading.pretrained import architecture_of, load
from prefix_jax.errors import BackboneError, PrefixError, PrefixJaxError
from prefix_jax.interop.peft.files import read
from prefix_jax.methods.multitask import read_parts
from prefix_jax.prefix import Embeds, Geometry, SiteShape
from tests.mutations import refusal

ADAPTER = Path(__file__).parents[1] / "fixtures" / "peft" / "prefix"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a GGUF file, prefixes and an adapter."""
    folder = tmp_path_factory.mktemp("files")
    tiny.write_model(folder / "model")
    (folder / "model" / "generation_config.json").write_text("{}")
    tiny.write_gguf(folder / "model.gguf")
    shutil.copytree(ADAPTER, folder / "adapter")
    produced = Embeds(jnp.ones((2, 32)))
    geometry = Geometry(32, 257, decoder=SiteShape(2, 4, 2, 8))
    backbone = BackboneCard(source="x", model_type="llama", fingerprint="f", dtype="float32")
    card = artifact.make_card(produced, geometry, backbone)
    artifact.save(folder / "orbax", produced, card, "orbax")
    artifact.save(folder / "safetensors", produced, card, "safetensors")
    return folder


def forbid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a file unreadable, or a directory inaccessible, also for root."""

    def denied(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Path, *args: Any, **kwargs: Any) -> Any:
            if path in self.parents or (self == path and method.__name__ == "open"):
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            return method(self, *args, **kwargs)

        return call

    for method in (Path.stat, Path.open):
        monkeypatch.setattr(Path, method.__name__, denied(method))


@pytest.mark.parametrize(
    ("path", "read", "error"),
    [
        ("model", lambda folder: find(folder / "model" / "inner"), BackboneError),
        ("model", lambda folder: architecture_of(folder / "model"), BackboneError),
        ("model/config.json", lambda folder: architecture_of(folder / "model"), BackboneError),
        ("model/generation_config.json", lambda folder: load(folder / "model"), BackboneError),
        ("model/model.safetensors", lambda folder: load(folder / "model"), BackboneError),
        ("model.gguf", lambda folder: load(folder / "model.gguf"), BackboneError),
        ("orbax", lambda folder: artifact.load(folder / "orbax"), PrefixError),
        ("orbax/prefix.json", lambda folder: artifact.load(folder / "orbax"), PrefixError),
        ("orbax/arrays", lambda folder: artifact.load(folder / "orbax"), PrefixError),
        (
            "safetensors/prefix.safetensors",
            lambda folder: artifact.load(folder / "safetensors"),
            PrefixError,
        ),
        ("adapter", lambda folder: read(folder / "adapter"), PrefixError),
        ("adapter/adapter_config.json", lambda folder: read(folder / "adapter"), PrefixError),
        ("adapter/adapter_model.safetensors", lambda folder: read(folder / "adapter"), PrefixError),
        (
            "adapter/adapter_model.safetensors",
            lambda folder: read_parts(folder / "adapter" / "adapter_model.safetensors"),
            PrefixError,
        ),
    ],
)
def test_names_a_path_without_permission(
    path: str,
    read: Callable[[Path], object],
    error: type[PrefixJaxError],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as context:
        forbid(folder / path, context)
        message = refusal(lambda: read(folder), error)
    assert message is not None
    assert str(folder / path) in message
    assert "Permission denied" in message
