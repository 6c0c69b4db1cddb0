"""What is known of a stored prefix, and which backbones it fits."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any, Literal

from prefix_jax.errors import PrefixError
from prefix_jax.prefix import Geometry, Hidden, Prefix, Produced

FORMAT_VERSION = 1

Kind = Literal["embeds", "hidden", "kv"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneCard:
    """The frozen model that a prefix belongs to.

    Attributes:
        source: where it was loaded from: a path, a hub id or a package.
        model_type: the name that its checkpoint gives its architecture.
        fingerprint: of its weights.
        dtype: of its weights while the prefix was trained.
    """

    source: str
    model_type: str
    fingerprint: str
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerCard:
    """The tokenizer of the training data.

    Attributes:
        name: of its class.
        size: the number of its tokens.
        sha256: of its vocabulary.
    """

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, name: str, vocabulary: Mapping[str, int]) -> TokenizerCard:
        """From the id of every token."""
        content = json.dumps(sorted(vocabulary.items())).encode()
        return cls(name=name, size=len(vocabulary), sha256=hashlib.sha256(content).hexdigest())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateCard:
    """How records became the tokens that the prefix was trained on.

    Attributes:
        input, target: templates with `{field}`.
        messages: the field that held a chat.
        references: the field that held every acceptable target.
        loss: which tokens were learnt: "target" or "all".
        max_length: tokens of an example at most; None allowed what the backbone allows.
        truncate: the side on which longer inputs were cut: "left" or "right".
        on_overflow: what happened to longer targets: "error" or "drop".
    """

    input: str | None = None
    target: str | None = None
    messages: str | None = None
    references: str | None = None
    loss: Literal["target", "all"] = "target"
    max_length: int | None = None
    truncate: Literal["left", "right"] = "left"
    on_overflow: Literal["error", "drop"] = "error"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of a stored prefix. `make_card` fills in what follows from the prefix itself.

    Attributes:
        format_version: of the directory's layout.
        kind: "embeds", "hidden" or "kv", for `Embeds`, `Hidden` and `Prefix`.
        length: P.
        positions: where the prefix's slots stand.
        offset: the position of the first token of text.
        pinned: whether the prefix stays visible when a sliding window has moved past it.
        geometry: of the backbone.
        backbone: the model that it was made for.
        method: the name and the fields of the method that made it.
        init: what it was before training.
        steps: optimizer steps of training.
        template: of the training data.
        decode: how text is generated unless one says otherwise: fields of `DecodeConfig`.
        tokenizer: of the training data.
        metrics: results on held-out data; what is not finite is stored as None.
        package: the version of prefix_jax that made it.
        created: when, ISO 8601, UTC.
    """

    format_version: int = FORMAT_VERSION
    kind: Kind
    length: int
    positions: tuple[int, ...]
    offset: int
    pinned: bool
    geometry: Geometry
    backbone: BackboneCard
    method: dict[str, Any]
    init: str | None
    steps: int | None
    template: TemplateCard | None
    decode: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerCard | None
    metrics: dict[str, Any]
    package: str
    created: str


def make_card(
    produced: Produced,
    geometry: Geometry,
    backbone: BackboneCard,
    *,
    method: Mapping[str, Any] | None = None,
    init: str | None = None,
    steps: int | None = None,
    template: TemplateCard | None = None,
    decode: Mapping[str, Any] | None = None,
    tokenizer: TokenizerCard | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Card:
    """The card of a prefix that was made just now. The arguments are the fields of `Card`.

    Raises:
        PrefixError: the prefix has no slots.
    """
    kind, length, offset, pinned = facts(produced)
    return Card(
        kind=kind,
        length=length,
        positions=tuple(range(length)),
        offset=offset,
        pinned=pinned,
        geometry=geometry,
        backbone=backbone,
        method=dict(method or {}),
        init=init,
        steps=steps,
        template=template,
        decode=dict(decode or {}),
        tokenizer=tokenizer,
        metrics=dict(metrics or {}),
        package=_package_version(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def check(
    card: Card, geometry: Geometry, fingerprint: str, *, allow_other_weights: bool = False
) -> None:
    """Checks that a stored prefix belongs to a backbone.

    Args:
        card: of the prefix.
        geometry: of the backbone.
        fingerprint: of the backbone's weights.
        allow_other_weights: accept a backbone of the same shape with other weights: a quantised
            copy, say, whose fingerprint differs.

    Raises:
        PrefixError: it does not.
    """
    made_for = f"{card.backbone.source} ({card.backbone.model_type})"
    if card.geometry != geometry:
        ours, theirs = dataclasses.asdict(card.geometry), dataclasses.asdict(geometry)
        lines = (
            f"    {name}: {ours[name]} in the prefix, {theirs[name]} in the backbone"
            + (" (differs)" if ours[name] != theirs[name] else "")
            for name in ours
        )
        raise PrefixError(
            f"the prefix was made for {made_for}, and this backbone has another shape:\n"
            + "\n".join(lines)
            + "\nload the backbone that it was made for, or train a prefix for this one"
        )
    if card.backbone.fingerprint != fingerprint and not allow_other_weights:
        raise PrefixError(
            f"the prefix was made for {made_for} with weights {card.backbone.fingerprint}, and "
            f"this backbone has weights {fingerprint}; load the one that it was made for, or "
            "accept another, a quantised copy say, with allow_other_weights=True "
            "(--allow-other-weights)"
        )


def facts(produced: Produced) -> tuple[Kind, int, int, bool]:
    """Kind, length, offset and whether it is pinned."""
    if isinstance(produced, Prefix):
        if produced.length == 0:
            raise PrefixError("the prefix has no slots: there is nothing to store")
        return "kv", produced.length, produced.offset, produced.pinned
    if isinstance(produced, Hidden):
        length = produced.h_LPD.shape[1]
        return "hidden", length, length, False
    length = produced.x_PD.shape[0]
    return "embeds", length, length, False


def _package_version() -> str:
    try:
        return importlib.metadata.version("prefix-jax")
    except importlib.metadata.PackageNotFoundError:
        return "uninstalled source"
