"""Show the origin, size and norms of a prefix, and the words nearest its soft tokens."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefix_jax.terminal import printable

if TYPE_CHECKING:
    from rich.table import Table

    from prefix_jax.artifact import Card
    from prefix_jax.interop.inspect import Inspection, Norms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the prefix, the backbone and the output format."""
    parser.add_argument("prefix", metavar="PREFIX", help="directory of a prefix or a run")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="the backbone, for the words nearest soft tokens (default: as in training)",
    )
    parser.add_argument(
        "--words",
        metavar="N",
        type=int,
        default=5,
        help="number of nearest words per soft token (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-other-weights",
        action="store_true",
        help="accept a backbone with the same shapes but other weights, such as a quantised copy",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints a verdict and tables, or JSON. Returns 0 if all norms are finite, else 1."""
    from prefix_jax.interop.inspect import inspect
    from prefix_jax.terminal.console import make_console, text

    inspection = inspect(
        args.prefix,
        args.model,
        words=args.words,
        allow_other_weights=args.allow_other_weights,
    )
    if args.json:
        content = dataclasses.asdict(inspection)
        print(printable(json.dumps(content, indent=2, ensure_ascii=False, default=str)))
        return 0 if _finite(inspection.norms) else 1
    console = make_console()
    console.print(text(_verdict(inspection), "bold"), soft_wrap=True)
    if inspection.note is not None:
        console.print(text(inspection.note))
    console.print(_overview(inspection))
    for name in dict.fromkeys(norms.of for norms in inspection.norms):
        console.print(_norms(name, [norms for norms in inspection.norms if norms.of == name]))
    if inspection.nearest is not None:
        console.print(_words(inspection))
    return 0 if _finite(inspection.norms) else 1


def _verdict(inspection: Inspection) -> str:
    path, card = inspection.path, inspection.card
    if not _finite(inspection.norms):
        broken = next(norms for norms in inspection.norms if not _finite([norms]))
        layer = "" if broken.layer is None else f" of layer {broken.layer}"
        return f"{path}: the {broken.of}{layer} are NaN or infinite; train this prefix again"
    trained = "not trained" if card.steps is None else f"trained for {card.steps:,} steps"
    content = f"{card.length} slots of kind {card.kind} for {card.backbone.source}"
    return f"{path}: intact; {content}, {trained}"


def _finite(norms: Sequence[Norms]) -> bool:
    return all(math.isfinite(entry.max) and math.isfinite(entry.mean) for entry in norms)


def _overview(inspection: Inspection) -> Table:
    card, g = inspection.card, inspection.card.geometry
    rows: dict[str, str | None] = {
        "method": _fields(card.method),
        "initialized from": card.init,
        "trained": None if card.steps is None else f"{card.steps:,} steps",
        "prefix": f"{card.length} slots of kind {card.kind}",
        "task": _task(card),
        "positions": None
        if not card.positions
        else f"{card.positions[0]} to {card.positions[-1]}, text from {card.text_position}"
        + (", pinned" if card.pinned else ""),
        "size": f"{inspection.parameters:,} parameters, {inspection.bytes:,} bytes on disk",
        "backbone": f"{card.backbone.source} ({card.backbone.model_type}, {card.backbone.dtype}"
        + ("" if card.backbone.quantize == "none" else f", {card.backbone.quantize}")
        + ")",
        "fingerprint": card.backbone.fingerprint,
        "shape": f"width {g.d_model}, vocabulary {g.vocab:,}",
        **{
            name: f"{site.layers} layers, {site.query_heads} query and {site.kv_heads} key/value "
            f"heads of {site.head_dim}"
            for name, site in g.sites.items()
        },
        "tokenizer": None
        if card.tokenizer is None
        else f"{card.tokenizer.name}, {card.tokenizer.size:,} tokens",
        "metrics": _fields(card.metrics),
        "created": f"{card.created} by prefix_jax {card.package}",
    }
    for name, value in (card.task or {}).items():
        if name not in ("name", "labels"):
            rows[f"task: {name}"] = None if value is None else repr(value)
    return _grid(f"{inspection.path}", rows)


def _task(card: Card) -> str | None:
    if card.task is None:
        return None
    labels = ", ".join(card.task.get("labels") or ())
    named = f"{card.task['name']}{f' ({labels})' if labels else ''}"
    size = sum(math.prod(shape) for shape in card.head_shapes.values())
    return f"{named}, with a head of {size:,} parameters" if size else named


def _fields(values: dict[str, object]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if value is not None
    )


def _grid(title: str, rows: dict[str, str | None]) -> Table:
    from prefix_jax.terminal.console import text

    table = _table(title, "", "")
    table.show_header = False
    for name, value in rows.items():
        if value:
            table.add_row(text(name, "bold"), text(value))
    return table


def _norms(name: str, norms: list[Norms]) -> Table:
    from rich.bar import Bar

    table = _table(f"Norms of {name}", "layer", "min", "mean", "max", "mean, as a bar")
    longest = max((entry.mean for entry in norms if _finite([entry])), default=0) or 1.0
    for entry in norms:
        numbers = (f"{x:,.2f}" for x in (entry.min, entry.mean, entry.max))
        layer = "-" if entry.layer is None else str(entry.layer)
        bar = Bar(longest, 0, entry.mean, width=24) if _finite([entry]) else ""
        table.add_row(layer, *numbers, bar)
    return table


def _words(inspection: Inspection) -> Table:
    from prefix_jax.terminal.console import text

    table = _table("Words nearest each soft token, by cosine similarity", "slot", "words")
    for slot, neighbours in enumerate(inspection.nearest or ()):
        words = "  ".join(f"{word.text!r} {word.cosine:.2f}" for word in neighbours)
        table.add_row(str(slot), text(words))
    return table


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    from prefix_jax.terminal.console import text

    table = Table(title=text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column)
    return table
