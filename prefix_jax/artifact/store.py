"""Saves and loads the directory of a prefix, and checks it for damage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from prefix_jax.artifact.arrays import ArraySpec, from_arrays, prefix_spec, problems, to_arrays
from prefix_jax.artifact.atomic_dir import SYSTEM_FILES, atomic_replace, backup_path
from prefix_jax.artifact.card import FORMAT_VERSION, Card
from prefix_jax.artifact.upgrade import upgrade
from prefix_jax.data.ngrams import NgramTable, shape_problems
from prefix_jax.errors import CheckpointError, ConfigError, PrefixError
from prefix_jax.prefix import Produced
from prefix_jax.untrusted.json import read_json
from prefix_jax.untrusted.paths import expand
from prefix_jax.untrusted.safetensors import map_array, read_header, read_tensors
from prefix_jax.validation import build

Container = Literal["orbax", "safetensors"]

_CARD = "prefix.json"
# The key of the card's digest, which covers all other keys; required since this format version.
_DIGEST, _FIRST_WITH_DIGEST = "sha256", 3
# Bytes; the labels of a task take the most space.
CARD_LIMIT = 16 * 2**20
# Bytes that a checkpoint may expand to, plus this many times its size. Orbax compresses arrays of
# zeros, such as an untrained gate, to almost nothing.
_MAX_EXPANDED, _MAX_RATIO = 2**28, 100
_MAX_FILES = 10_000
_HEAD = "head."
_CONTAINERS: dict[Container, str] = {"orbax": "arrays", "safetensors": "prefix.safetensors"}
_NGRAMS = "ngrams.safetensors"
# In a run directory: the prefix, or the folder with one prefix per dataset.
_IN_RUN = "prefix"
PREFIXES = "prefixes"
_REMEDY = "copy it again from its source, or train it again"
_NGRAMS_REMEDY = "copy it again from its source, or delete it and decode without its drafts"


def save(
    path: str | Path,
    produced: Produced,
    card: Card,
    arrays: Container | None = None,
    head: Mapping[str, Any] | None = None,
    ngrams: NgramTable | None = None,
) -> None:
    """Saves a prefix, atomically replacing a prefix that already exists at `path`.

    With several processes, every process calls this and process 0 writes; the other processes need
    not see its disk. The prefix is on disk when the call returns.

    Args:
        path: the directory; if it exists, it must be a prefix.
        produced: the output of the method, without dropout.
        card: the card, made with `make_card`.
        arrays: the storage format. The default is "orbax", or "safetensors" with several
            processes: those can use Orbax only on a shared disk.
        head: the arrays of the head, if the card has one.
        ngrams: an n-gram table of the training targets, for speculative decoding.

    Raises:
        PrefixError: the prefix does not match its card or contains NaN, the card contains invalid
            Unicode, or `path` exists and is not a prefix.
        CheckpointError: writing failed; `path` is unchanged.
    """
    # Resolve links first: renaming a link would not move the directory.
    path = expand(path, PrefixError).resolve()
    if prefix_spec(produced) != card.spec:
        raise PrefixError(f"{path}: the card describes another prefix; make it with make_card")
    head_arrays = {_HEAD + name: np.array(x, np.float32) for name, x in (head or {}).items()}
    content = {**to_arrays(produced), **head_arrays}
    if messages := _problems(content, card):
        raise PrefixError(f"cannot save the prefix to {path}: {'; '.join(messages)}")
    multiprocess = jax.process_count() > 1
    if multiprocess and arrays == "orbax":
        raise PrefixError(f"{path}: several processes cannot save with Orbax; use safetensors")
    arrays = arrays or ("safetensors" if multiprocess else "orbax")
    try:
        text = _to_json(card, content, arrays)
        text.encode()
    except UnicodeEncodeError as error:
        raise PrefixError(
            f"{path}: the card contains {error.object[error.start : error.end]!r}, which is not "
            "valid Unicode; remove it from the template, labels and names"
        ) from None
    failure: Exception | None = None
    if jax.process_index() == 0:
        if path.exists() and not _replaceable(path):
            failure = PrefixError(f"{path} exists and is not a prefix; choose another path")
        else:
            failure = _write(path, text, content, arrays, ngrams)
    if multihost_utils.broadcast_one_to_all(np.bool_(failure is not None)):
        raise failure or CheckpointError(f"process 0 could not write the prefix to {path}")


def _write(
    path: Path,
    text: str,
    content: dict[str, np.ndarray],
    arrays: Container,
    ngrams: NgramTable | None,
) -> CheckpointError | None:
    try:
        with atomic_replace(path) as new:
            _write_arrays(new / _CONTAINERS[arrays], content, arrays)
            (new / _CARD).write_text(text, encoding="utf-8")
            if ngrams is not None:
                (new / _NGRAMS).write_bytes(_ngrams_to_bytes(ngrams))
    # A full disk raises OSError, but Orbax and TensorStore turn it into others, such as ValueError.
    except Exception as error:
        state = "the existing prefix is unchanged" if path.exists() else "nothing was written"
        failure = CheckpointError(
            f"cannot write the prefix to {path} ({state}): {_reason(error)}; "
            "free disk space or choose another path, and save again"
        )
        failure.__cause__ = error
        return failure
    return None


def refuse_existing(path: str | Path) -> None:
    """Raises PrefixError if a directory already contains a prefix."""
    if (expand(path, PrefixError) / _CARD).exists():
        raise PrefixError(
            f"{path} already contains a prefix; choose another directory, or remove it"
        )


def stored_bytes(path: str | Path) -> int:
    """Returns the size of the files in a directory."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def load(path: str | Path) -> tuple[Produced, Card]:
    """Loads a prefix and its card.

    Args:
        path: the directory of a prefix, or of a run.

    Raises:
        PrefixError: there is no prefix, or it is damaged or has a newer format.
    """
    produced, _, card = _load(path)
    return produced, card


def load_head(path: str | Path) -> dict[str, jax.Array]:
    """Loads the arrays of the head stored with a prefix; empty if it has none.

    Args:
        path: the directory of a prefix, or of a run.

    Raises:
        PrefixError: there is no prefix, or it is damaged or has a newer format.
    """
    return _load(path)[1]


def load_ngrams(path: str | Path) -> NgramTable | None:
    """Loads the n-gram table stored with a prefix; None if it has none.

    Args:
        path: the directory of a prefix, or of a run.

    Raises:
        PrefixError: there is no prefix, or the table is damaged.
    """
    path = find(path)
    file = path / _NGRAMS
    if not file.exists():
        return None
    card, _ = _read_card(path / _CARD)
    header = read_header(file, PrefixError)
    dtypes = {name: x.dtype for name, x in header.items()}
    messages = []
    if dtypes != {"entry_G2W": "U32", "sha256": "U8"} or header["sha256"].shape != (32,):
        messages = [f"it contains {dtypes}"]
    else:
        messages = shape_problems(header["entry_G2W"].shape)
    if not messages:
        entry_G2W, digest = (
            np.array(map_array(file, dtype, header[name].offset, header[name].shape, PrefixError))
            for name, dtype in (("entry_G2W", np.dtype("<u4")), ("sha256", np.dtype("u1")))
        )
        ngrams = NgramTable(entry_G2W.astype(np.uint32))
        if _sha256_of_ngrams(ngrams) != digest.tobytes():
            messages = ["its content does not match its digest"]
        elif (largest := ngrams.token_GW.max()) >= card.geometry.vocab:
            messages = [
                f"token id {largest} is outside the vocabulary (size {card.geometry.vocab})"
            ]
    if messages:
        raise PrefixError(f"{file} is damaged: {'; '.join(messages)}; {_NGRAMS_REMEDY}")
    return ngrams


def _ngrams_to_bytes(ngrams: NgramTable) -> bytes:
    digest = np.frombuffer(_sha256_of_ngrams(ngrams), np.uint8)
    return safetensors.numpy.save({"entry_G2W": ngrams.entry_G2W, "sha256": digest})


def _sha256_of_ngrams(ngrams: NgramTable) -> bytes:
    return hashlib.sha256(ngrams.entry_G2W.astype("<u4").tobytes()).digest()


def _load(path: str | Path) -> tuple[Produced, dict[str, jax.Array], Card]:
    path = find(path)
    card, stored = _read_card(path / _CARD)
    file = path / _CONTAINERS[stored.container]
    # Check the shapes before allocating any array.
    messages = _problems(_array_specs(file, stored.container), card)
    content = {} if messages else _read_arrays(file, stored.container)
    messages = messages or _problems(content, card)
    if not messages and {name: _sha256(x) for name, x in content.items()} != stored.sha256:
        messages = [f"its arrays do not match the digests in {_CARD}"]
    if messages:
        raise PrefixError(f"{path} is damaged: {'; '.join(messages)}; {_REMEDY}")
    arrays = {name: jnp.asarray(x) for name, x in content.items()}
    head = {name.removeprefix(_HEAD): x for name, x in arrays.items() if _of_head(name)}
    prefix = {name: x for name, x in arrays.items() if not _of_head(name)}
    return from_arrays(card.spec, prefix), head, card


def find(path: str | Path) -> Path:
    """Returns the directory of a prefix, given that directory or its run directory.

    Raises:
        PrefixError: neither contains a prefix.
    """
    path = expand(path, PrefixError)
    for directory in (path, path / _IN_RUN):
        if expand(directory / _CARD, PrefixError).is_file():
            return directory
    for directory in (path, path / _IN_RUN):
        if not directory.exists() and backup_path(directory).is_dir():
            raise PrefixError(
                f"saving to {directory} was interrupted; the previous prefix is at "
                f"{backup_path(directory)}, rename it to {directory}"
            )
    if str(path).startswith("gs:"):
        raise PrefixError(
            f"{path.name} is in a bucket; copy it with 'gcloud storage cp --recursive' and give "
            "the local directory"
        )
    if not path.is_dir():
        raise PrefixError(f"no directory {path}; give the directory of a prefix or a run")
    if prefixes := sorted(card.parent for card in (path / PREFIXES).glob(f"*/{_CARD}")):
        raise PrefixError(
            f"{path} has one prefix per dataset; give one of {', '.join(map(str, prefixes))}"
        )
    raise PrefixError(
        f"no prefix in {path}: neither {_CARD} nor {_IN_RUN}/{_CARD} exists; give the directory of "
        "a prefix or of a finished run (method full has no prefix, only checkpoints)"
    )


def _of_head(name: str) -> bool:
    return name.startswith(_HEAD)


def _problems(content: Mapping[str, np.ndarray | ArraySpec], card: Card) -> list[str]:
    """Like `problems`, for the arrays of a prefix and its head."""
    prefix = {name: x for name, x in content.items() if not _of_head(name)}
    messages = problems(prefix, card.spec, card.geometry)
    expected = {_HEAD + name: shape for name, shape in card.head_shapes.items()}
    for name in expected | {name: None for name in content if _of_head(name)}:
        x, shape = content.get(name), expected.get(name)
        if x is None or shape is None:
            messages.append(f"{name} is {'missing' if x is None else 'unknown'}")
        elif x.shape != shape or x.dtype != np.float32:
            messages.append(f"{name} is {x.dtype} {x.shape} instead of float32 {shape}")
        elif isinstance(x, np.ndarray) and not np.isfinite(x).all():
            messages.append(f"{name} has values that are NaN or infinite")
    return messages


# Reading and writing.


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The entry "arrays" of `prefix.json`."""

    container: Container
    sha256: dict[str, Any]


def _to_json(card: Card, arrays: Mapping[str, np.ndarray], container: Container) -> str:
    """Returns the text of `prefix.json`, with one field per line."""
    stored = _Stored(container, {name: _sha256(x) for name, x in arrays.items()})
    # JSON has neither NaN nor infinity.
    metrics = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in card.metrics.items()
    }
    card = dataclasses.replace(card, metrics=metrics, format_version=FORMAT_VERSION)
    fields = dataclasses.asdict(card)
    fields = {"format_version": FORMAT_VERSION, **fields, "arrays": dataclasses.asdict(stored)}
    fields[_DIGEST] = _digest(fields)
    lines = (
        f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for name, value in fields.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _digest(fields: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the fields of `prefix.json`, independent of formatting and order."""
    content = {name: value for name, value in fields.items() if name != _DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_card(file: Path) -> tuple[Card, _Stored]:
    try:
        fields = read_json(file, PrefixError, limit=CARD_LIMIT)
    except PrefixError as error:
        raise PrefixError(f"{error}; {_REMEDY}") from None
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if type(version) is not int:
        raise PrefixError(f"{file} is not the card of a prefix: format_version is missing")
    if version > FORMAT_VERSION:
        raise PrefixError(
            f"{file} has format {version}, written by prefix_jax {fields.get('package')}; this "
            f"version reads formats up to {FORMAT_VERSION}, run pip install --upgrade prefix-jax"
        )
    try:  # reject values that could not be saved again
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise PrefixError(f"{file} is damaged: {_reason(error)}; {_REMEDY}") from None
    digest, actual = fields.pop(_DIGEST, None), _digest(fields)
    stored_fields = fields.pop("arrays", {})
    try:
        stored = build(_Stored, stored_fields, "arrays")
        card = build(Card, upgrade(fields))
    except ConfigError as error:
        raise PrefixError(f"{file} is damaged:\n{error}\n{_REMEDY}") from None
    if version >= _FIRST_WITH_DIGEST and digest != actual:
        raise PrefixError(
            f"{file} was modified: its content has sha256 {actual}, but it records {digest}; copy "
            "the original again. To change a field, save the prefix with another card "
            "(prefix_jax.artifact.save)"
        )
    return card, stored


def _write_arrays(path: Path, arrays: dict[str, np.ndarray], container: Container) -> None:
    if container == "orbax":
        ocp.save(path, arrays)
    else:
        path.write_bytes(safetensors.numpy.save(arrays))


def _array_specs(path: Path, container: Container) -> dict[str, ArraySpec]:
    """Reads the shapes and dtypes of stored arrays."""
    if container == "safetensors":
        header = read_header(path, PrefixError)
        return {name: ArraySpec(x.shape, x.numpy_dtype or x.dtype) for name, x in header.items()}
    size = _check_orbax(path)
    try:
        # Orbax requires absolute paths.
        metadata = ocp.metadata(path.absolute()).metadata
        specs = {name: ArraySpec(tuple(x.shape), np.dtype(x.dtype)) for name, x in metadata.items()}
    # Damaged files make Orbax raise many kinds of exceptions.
    except Exception as error:
        raise PrefixError(f"{path} is missing or damaged: {_reason(error)}; {_REMEDY}") from error
    needed = sum(4 * math.prod(x.shape) for x in specs.values())
    if needed > _MAX_EXPANDED + _MAX_RATIO * size:
        raise PrefixError(
            f"{path} is damaged: its arrays would need {needed:,} bytes, but its files have only "
            f"{size:,}; {_REMEDY}"
        )
    return specs


def _check_orbax(path: Path) -> int:
    """Returns the size of an Orbax checkpoint in bytes; rejects links, pipes and devices."""
    size = 0
    try:
        for number, entry in enumerate(path.rglob("*")):
            mode = entry.lstat().st_mode
            if number >= _MAX_FILES:
                raise PrefixError(f"{path} is damaged: more than {_MAX_FILES:,} files; {_REMEDY}")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise PrefixError(f"{path} is damaged: {entry} is not a regular file; {_REMEDY}")
            size += entry.lstat().st_size if stat.S_ISREG(mode) else 0
    except OSError as error:
        raise PrefixError(f"{path} cannot be read: {_reason(error)}; {_REMEDY}") from None
    return size


def _read_arrays(path: Path, container: Container) -> dict[str, np.ndarray]:
    try:
        if container == "orbax":
            return {name: np.asarray(x) for name, x in ocp.load(path.absolute()).items()}
        return read_tensors(path, PrefixError)
    except PrefixError:
        raise
    # Damaged files make Orbax raise many kinds of exceptions.
    except Exception as error:
        raise PrefixError(f"{path} is missing or damaged: {_reason(error)}; {_REMEDY}") from error


def _replaceable(path: Path) -> bool:
    """Returns whether the path is a directory that is empty or contains only a prefix."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir() if not SYSTEM_FILES.fullmatch(entry.name)}
    return not names or (_CARD in names and names <= {_CARD, _NGRAMS, *_CONTAINERS.values()})


def _sha256(x: np.ndarray) -> str:
    return hashlib.sha256(x.astype("<f4").tobytes()).hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
