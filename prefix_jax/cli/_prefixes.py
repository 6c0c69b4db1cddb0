"""Several prefixes for the records of one file: `--prefix NAME=DIR`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prefix_jax.cli._usage import named_directories, nearest
from prefix_jax.errors import ConfigError, DataError, PrefixError

if TYPE_CHECKING:
    from prefix_jax.api import Engine
    from prefix_jax.artifact import Card
    from prefix_jax.data.source import Record
    from prefix_jax.prefix import Produced

# The field of a record that names its prefix.
FIELD = "prefix"
_MAX_ROWS = 16


class Mixed(NamedTuple):
    """Records that use different prefixes, and the engine that has these.

    Attributes:
        engine: the engine.
        records: the records.
        names: the name of each record's prefix in the engine.
        total: the number of texts to generate.
    """

    engine: Engine
    records: Sequence[Record]
    names: list[str]
    total: int


def load(args: argparse.Namespace) -> Mixed:
    """Reads the records, the prefixes and the backbone.

    Args:
        args: the arguments of `generate`. The first one is a prefix, which serves records that name
            none (with --no-prefix, the bare model does); or a backbone, and then every record names
            a prefix.

    Raises:
        ConfigError: the arguments are malformed or contradictory.
        DataError: a record names no prefix or an unknown one.
        PrefixError, BackboneError: a prefix or the backbone cannot be loaded.
    """
    from prefix_jax.api import Engine, Tuned
    from prefix_jax.data.source import read_records
    from prefix_jax.interop.backbone import backbone_of
    from prefix_jax.mesh import batch_shards

    # Everything that can be wrong is checked before the backbone, which may take minutes to load.
    directories = named_directories(args.prefixes)
    stored = {name: _load(path, args.settings) for name, path in directories.items()}
    records = read_records(args.input)
    default = None if _is_backbone(args.prefix) else f"{args.prefix} (the first argument)"
    names = [_name(record, directories, default, args.prefix) for record in records]
    if default is None:
        if args.model is not None or args.no_prefix:
            option = "--no-prefix" if args.model is None else "--model"
            raise ConfigError(
                f"{option} needs a prefix as the first argument, and {args.prefix} is a backbone; "
                f"give a prefix, or leave out {option}"
            )
        first, model = next(iter(stored)), args.prefix
    else:
        stored[default] = _load(args.prefix, args.settings)
        first, model = default, args.model
    pretrained = backbone_of(stored[first][1], model, allow_other_weights=args.allow_other_weights)
    total = sum(stored[name][1].decode["num_samples"] for name in names)
    shards = batch_shards(pretrained.mesh)
    engine = Engine(
        pretrained,
        rows=-(-min(total, _MAX_ROWS) // shards) * shards,
        allow_other_weights=args.allow_other_weights,
    )
    for name, (produced, card) in stored.items():
        bare = args.no_prefix and name == default
        engine.add(name, Tuned(pretrained, None, card) if bare else (produced, card))
    return Mixed(engine, records, names, total)


def _load(path: str, settings: Sequence[str]) -> tuple[Produced, Card]:
    """Loads a prefix and its card, with settings applied to its decoding options."""
    from prefix_jax import artifact, config
    from prefix_jax.config import GenerateConfig

    produced, card = artifact.load(path)
    decode = config.sections(GenerateConfig, {"decode": card.decode}, settings, path).decode
    if decode.num_beams > 1:
        raise ConfigError(
            f"{path}: --prefix does not support beam search (num_beams {decode.num_beams}); add "
            "decode.num_beams=1, or use this prefix without --prefix"
        )
    return produced, dataclasses.replace(card, decode=dataclasses.asdict(decode))


def _is_backbone(path: str) -> bool:
    """Checks whether the first argument is a backbone and not a prefix.

    Raises:
        PrefixError: it is a directory with neither.
    """
    from prefix_jax import artifact

    try:
        artifact.find(path)
    except PrefixError:
        if Path(path).is_dir() and not (Path(path) / "config.json").exists():
            raise
        return True
    return False


def _name(record: Record, names: Mapping[str, str], default: str | None, first: str) -> str:
    """The name of a record's prefix."""
    name = record.fields.get(FIELD)
    listed = ", ".join(map(repr, names))
    if name is None:
        if default is None:
            raise DataError(
                f"{record.origin}: names no prefix, and {first} is a backbone without one; set the "
                f"field {FIELD!r} to one of {listed}"
            )
        return default
    if not isinstance(name, str) or name not in names:
        raise DataError(
            f"{record.origin}: the field {FIELD!r} is {name!r:.80}, which no --prefix defines"
            f"{nearest(name, names) if isinstance(name, str) else ''}; the names are {listed}"
        )
    return name
