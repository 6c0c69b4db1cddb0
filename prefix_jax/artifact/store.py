"""Writes and reads the directory of a prefix."""

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

from prefix_jax.artifact.arrays import Described, from_arrays, prefix_spec, problems, to_arrays
from prefix_jax.artifact.atomic_dir import SYSTEM_FILES, atomic_replace, backup_path
from prefix_jax.artifact.card import FORMAT_VERSION, Card
from prefix_jax.errors import CheckpointError, ConfigError, PrefixError
from prefix_jax.prefix import Produced
from prefix_jax.typed import build
from prefix_jax.untrusted.json import read_json
from prefix_jax.untrusted.paths import expand
from prefix_jax.untrusted.safetensors import read_header, read_tensors

Container = Literal["orbax", "safetensors"]

_CARD = "prefix.json"
# The key of its digest, which covers everything else in it.
_DIGEST, _FIRST_WITH_DIGEST = "sha256", 3
# Bytes of a card: its longest part are the labels of a task.
CARD_LIMIT = 16 * 2**20
# Orbax compresses: arrays of zeros, as of a gate before training, to almost nothing.
_INFLATED, _RATIO = 2**28, 100
_MOST_FILES = 10_000
_HEAD = "head."
_CONTAINERS: dict[Container, str] = {"orbax": "arrays", "safetensors": "prefix.safetensors"}
# Under a run directory.
_INNER = "prefix"
# The same of a run that trained several tasks: a prefix for each, under its name.
PREFIXES = "prefixes"
_REMEDY = "copy it again from where it came from, or train it again"


def save(
    path: str | Path,
    produced: Produced,
    card: Card,
    arrays: Container | None = None,
    head: Mapping[str, Any] | None = None,
) -> None:
    """Writes a prefix. What stood at `path` is replaced once the new one is safely on disk.

    In a run of several processes every one calls this, and the first one writes: `path` may be on
    a disk of its own. The prefix is complete when the call returns.

    Args:
        path: the directory; an existing one must be a prefix.
        produced: what the method produces, without dropout.
        card: of `make_card`.
        arrays: the container of the arrays; None is "orbax", and of several processes
            "safetensors": they save by Orbax only together, to a disk that all of them see.
        head: the arrays of a task's head, if the card has a task.

    Raises:
        PrefixError: the prefix contradicts its card or holds NaN, its card holds text that is not
            Unicode, or `path` is something else.
        CheckpointError: it could not be written; `path` is as it was.
    """
    # Renaming a link would leave the directory behind.
    path = expand(path, PrefixError).resolve()
    if prefix_spec(produced) != card.spec:
        raise PrefixError(f"{path}: the card describes another prefix; make it with make_card")
    of_head = {_HEAD + name: np.array(x, np.float32) for name, x in (head or {}).items()}
    content = {**to_arrays(produced), **of_head}
    if wrong := _problems(content, card):
        raise PrefixError(f"a prefix like this is not saved to {path}: {'; '.join(wrong)}")
    several = jax.process_count() > 1
    if several and arrays == "orbax":
        raise PrefixError(f"{path}: one of several processes stores no Orbax; give safetensors")
    arrays = arrays or ("safetensors" if several else "orbax")
    try:
        text = _to_json(card, content, arrays)
        text.encode()
    except UnicodeEncodeError as error:
        raise PrefixError(
            f"{path}: the card contains {error.object[error.start : error.end]!r}, which is half "
            "of a character and cannot be stored; remove it from the template, labels and names"
        ) from None
    failure: Exception | None = None
    if jax.process_index() == 0:
        if path.exists() and not _replaceable(path):
            failure = PrefixError(
                f"{path} exists and is not a prefix; choose another place for the new one"
            )
        else:
            failure = _write(path, text, content, arrays)
    if multihost_utils.broadcast_one_to_all(np.bool_(failure is not None)):
        raise failure or CheckpointError(f"the first process could not write the prefix to {path}")


def _write(
    path: Path, text: str, content: dict[str, np.ndarray], arrays: Container
) -> CheckpointError | None:
    try:
        with atomic_replace(path) as new:
            _write_arrays(new / _CONTAINERS[arrays], content, arrays)
            (new / _CARD).write_text(text, encoding="utf-8")
    # A full disk is an OSError, or whatever Orbax and TensorStore make of it: a ValueError, today.
    except Exception as error:
        before = "the prefix that was there is unharmed" if path.exists() else "nothing was there"
        failure = CheckpointError(
            f"cannot write the prefix to {path} ({before}): {_reason(error)}; "
            "make room or choose another place, and save again"
        )
        failure.__cause__ = error
        return failure
    return None


def load(path: str | Path) -> tuple[Produced, Card]:
    """Reads a prefix.

    Args:
        path: its directory, or a run directory that holds one.

    Raises:
        PrefixError: there is none, or it is damaged or of a newer format.
    """
    produced, _, card = _load(path)
    return produced, card


def load_head(path: str | Path) -> dict[str, jax.Array]:
    """Reads the arrays of the head beside a prefix; empty where there is none. See `load`."""
    return _load(path)[1]


def _load(path: str | Path) -> tuple[Produced, dict[str, jax.Array], Card]:
    path = find(path)
    card, stored = _read_card(path / _CARD)
    place = path / _CONTAINERS[stored.container]
    # Nothing is allocated for arrays that the card does not have.
    wrong = _problems(_describe_arrays(place, stored.container), card)
    content = {} if wrong else _read_arrays(place, stored.container)
    wrong = wrong or _problems(content, card)
    if not wrong and {name: _sha256(x) for name, x in content.items()} != stored.sha256:
        wrong = [f"its arrays are not those that {_CARD} was written for"]
    if wrong:
        raise PrefixError(f"{path} is damaged: {'; '.join(wrong)}; {_REMEDY}")
    arrays = {name: jnp.asarray(x) for name, x in content.items()}
    of_head = {name.removeprefix(_HEAD): x for name, x in arrays.items() if _of_head(name)}
    own = {name: x for name, x in arrays.items() if not _of_head(name)}
    return from_arrays(card.spec, own), of_head, card


def find(path: str | Path) -> Path:
    """The directory of a prefix, given it or a run directory that holds it.

    Raises:
        PrefixError: there is none.
    """
    path = expand(path, PrefixError)
    for place in (path, path / _INNER):
        if expand(place / _CARD, PrefixError).is_file():
            return place
    for place in (path, path / _INNER):
        if not place.exists() and backup_path(place).is_dir():
            raise PrefixError(
                f"saving to {place} was interrupted; the prefix that was there before is "
                f"{backup_path(place)}: rename it to {place}"
            )
    if str(path).startswith("gs:"):
        raise PrefixError(
            f"{path.name} is in a bucket: copy it first, gcloud storage cp --recursive, and give "
            "the copy"
        )
    if not path.is_dir():
        raise PrefixError(f"there is no directory {path}; give that of a prefix or of a run")
    if inner := sorted(card.parent for card in (path / PREFIXES).glob(f"*/{_CARD}")):
        raise PrefixError(
            f"{path} is of several tasks and holds a prefix for each: give one of "
            f"{', '.join(map(str, inner))}"
        )
    raise PrefixError(
        f"{path} holds no prefix: neither {_CARD} nor {_INNER}/{_CARD} is there; "
        "give the directory of a prefix, or of a run that has ended (of method full there is no "
        "prefix: its weights are in its checkpoints)"
    )


def _of_head(name: str) -> bool:
    return name.startswith(_HEAD)


def _problems(content: Mapping[str, np.ndarray | Described], card: Card) -> list[str]:
    """Where the arrays are not those that the card promises, or not finite. See `problems`."""
    own = {name: x for name, x in content.items() if not _of_head(name)}
    found = problems(own, card.spec, card.geometry)
    promised = {} if card.task is None else card.task.shapes
    expected = {_HEAD + name: tuple(shape) for name, shape in promised.items()}
    for name in expected | {name: None for name in content if _of_head(name)}:
        x, shape = content.get(name), expected.get(name)
        if x is None or shape is None:
            found.append(f"{name} is {'missing' if x is None else 'unknown'}")
        elif x.shape != shape or x.dtype != np.float32:
            found.append(f"{name} is {x.dtype} {x.shape} instead of float32 {shape}")
        elif isinstance(x, np.ndarray) and not np.isfinite(x).all():
            found.append(f"{name} has values that are NaN or infinite")
    return found


# Reading and writing.


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The entry "arrays" of `prefix.json`."""

    container: Container
    sha256: dict[str, Any]


def _to_json(card: Card, arrays: Mapping[str, np.ndarray], container: Container) -> str:
    """One field a line: as readable as it is small."""
    stored = _Stored(container, {name: _sha256(x) for name, x in arrays.items()})
    # JSON has no word for what is not finite.
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
    """SHA-256 of the content of `prefix.json`, whatever its white space and the order of its
    keys."""
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
        raise PrefixError(f"{file} is not the card of a prefix: it has no format_version")
    if version > FORMAT_VERSION:
        raise PrefixError(
            f"{file} has format {version}, written by prefix_jax {fields.get('package')}; this "
            f"version reads formats up to {FORMAT_VERSION}: pip install --upgrade prefix-jax"
        )
    try:  # what could not be written again
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise PrefixError(f"{file} is damaged: {_reason(error)}; {_REMEDY}") from None
    digest, actual = fields.pop(_DIGEST, None), _digest(fields)
    stored_fields = fields.pop("arrays", {})
    try:
        stored = build(_Stored, stored_fields, "arrays")
        card = build(Card, fields)
    except ConfigError as error:
        raise PrefixError(f"{file} is damaged:\n{error}\n{_REMEDY}") from None
    if version >= _FIRST_WITH_DIGEST and digest != actual:
        raise PrefixError(
            f"{file} was changed after it was written: its content has the sha256 {actual}, and "
            f"it states {digest}; copy the original again. To change a field, save the prefix "
            "with another card (prefix_jax.artifact)"
        )
    return card, stored


def _write_arrays(path: Path, arrays: dict[str, np.ndarray], container: Container) -> None:
    if container == "orbax":
        ocp.save(path, arrays)
    else:
        path.write_bytes(safetensors.numpy.save(arrays))


def _describe_arrays(path: Path, container: Container) -> dict[str, Described]:
    """The shapes and dtypes of stored arrays."""
    if container == "safetensors":
        header = read_header(path, PrefixError)
        return {name: Described(x.shape, x.numpy_dtype or x.dtype) for name, x in header.items()}
    size = _check_orbax(path)
    try:
        # Orbax reads from absolute paths only.
        metadata = ocp.metadata(path.absolute()).metadata
        found = {name: Described(tuple(x.shape), np.dtype(x.dtype)) for name, x in metadata.items()}
    # Damage shows as whatever the reader trips over.
    except Exception as error:
        raise PrefixError(f"{path} is missing or damaged: {_reason(error)}; {_REMEDY}") from error
    needed = sum(4 * math.prod(x.shape) for x in found.values())
    if needed > _INFLATED + _RATIO * size:
        raise PrefixError(
            f"{path} is damaged: its arrays would need {needed:,} bytes, and its files have "
            f"{size:,}; {_REMEDY}"
        )
    return found


def _check_orbax(path: Path) -> int:
    """The size of an Orbax checkpoint in bytes, of regular files only."""
    size = 0
    try:
        for number, entry in enumerate(path.rglob("*")):
            mode = entry.lstat().st_mode
            if number >= _MOST_FILES or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise PrefixError(
                    f"{path} is damaged: {entry} is not a regular file, or one of more than "
                    f"{_MOST_FILES}; {_REMEDY}"
                )
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
    # Damage shows as whatever the reader trips over.
    except Exception as error:
        raise PrefixError(f"{path} is missing or damaged: {_reason(error)}; {_REMEDY}") from error


def _replaceable(path: Path) -> bool:
    """Whether nothing but a prefix stands there, so that a new one may take its place."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir() if not SYSTEM_FILES.fullmatch(entry.name)}
    return not names or (_CARD in names and names <= {_CARD, *_CONTAINERS.values()})


def _sha256(x: np.ndarray) -> str:
    return hashlib.sha256(x.astype("<f4").tobytes()).hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
