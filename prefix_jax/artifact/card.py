"""The card of a stored prefix: its metadata, and the backbones that it fits."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any, cast

from flax.traverse_util import flatten_dict

from prefix_jax.artifact.arrays import PrefixSpec, prefix_spec
from prefix_jax.errors import BackboneError, ConfigError, PrefixError
from prefix_jax.nn.activations import activation
from prefix_jax.nn.head import Head
from prefix_jax.nn.quantized import Quantize
from prefix_jax.prefix import Adapter, Geometry, Prefix, Produced, SiteName
from prefix_jax.validation import Count

# Earlier formats are upgraded as they are read: see `upgrade.py`.
FORMAT_VERSION = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneCard:
    """The frozen model that a prefix belongs to.

    Attributes:
        source: where it was loaded from: a path, a hub id or a package.
        model_type: the name that its checkpoint gives its architecture.
        fingerprint: of its weights.
        dtype: of its weights while the prefix was trained.
        quantize: how they were quantised.
    """

    source: str
    model_type: str
    fingerprint: str
    dtype: str
    quantize: Quantize = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerCard:
    """The tokenizer of the training data.

    Attributes:
        name: of its class.
        size: the number of its tokens.
        sha256: of its vocabulary.
    """

    name: str
    size: Count
    sha256: str

    @classmethod
    def of(cls, name: str, vocabulary: Mapping[str, int]) -> TokenizerCard:
        """From the id of every token."""
        content = json.dumps(sorted(vocabulary.items())).encode()
        return cls(name=name, size=len(vocabulary), sha256=hashlib.sha256(content).hexdigest())


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetCard:
    """The dataset of a prefix that was trained on a mixture.

    Attributes:
        field: the field of a record that names its dataset.
        name: the name of this prefix's dataset.
    """

    field: str
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card(PrefixSpec):
    """The metadata of a stored prefix. `make_card` derives what follows from the prefix itself.

    Attributes:
        format_version: the version of the directory's layout.
        positions: the positions of the prefix's slots; empty if its output is outside the softmax.
        geometry: the shape of the backbone.
        backbone: the model that it was made for.
        method: the name and the fields of the method that made it.
        init: the prefix before training, in words.
        steps: optimizer steps of training.
        task: what it was trained to do: the name of the task and its fields, templates included.
            None if that is unknown, as in an imported adapter.
        head: the head that was trained with it; None if the language model's own answers.
        dataset: its dataset, if it was trained on a mixture.
        decode: the default decoding options: fields of `DecodeConfig`.
        tokenizer: the tokenizer of the training data.
        metrics: results on held-out data; None for values that are not finite.
        package: the version of prefix_jax that made it.
        created: the time of creation, ISO 8601, UTC.
    """

    format_version: int = FORMAT_VERSION
    positions: tuple[Count, ...]
    geometry: Geometry
    backbone: BackboneCard
    method: dict[str, Any]
    init: str | None
    steps: Count | None
    task: dict[str, Any] | None
    head: Head | None = None
    dataset: DatasetCard | None = None
    decode: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerCard | None
    metrics: dict[str, Any]
    package: str
    created: str

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range or two contradict each other."""
        super().__post_init__()
        if self.positions != tuple(range(len(self.positions))):
            raise ConfigError("positions must count from 0")
        sites = self.geometry.sites
        for name, layers in self.layers.items():
            site = self.geometry.main if name == "adapter" else sites.get(cast(SiteName, name))
            if site is None:
                raise ConfigError(f"layers: there is no {name} in the geometry")
            if list(layers) != sorted(set(layers) & set(range(site.layers))) or not layers:
                raise ConfigError(
                    f"layers.{name} must ascend from 0 to at most {site.layers - 1}, got {layers}"
                )
        if self.task is not None and not isinstance(self.task.get("name"), str):
            raise ConfigError("task must have a name")
        if self.head is not None and self.task is None:
            raise ConfigError("head: a head needs a task")
        if self.head is not None and self.head.activation is not None:
            try:
                activation(self.head.activation)
            except BackboneError as error:
                raise ConfigError(f"head.activation: {error}") from None

    @property
    def spec(self) -> PrefixSpec:
        """What has to agree with the prefix itself."""
        return PrefixSpec(**{f.name: getattr(self, f.name) for f in dataclasses.fields(PrefixSpec)})

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the head's arrays by name; empty without a head."""
        return {} if self.head is None else self.head.shapes(self.geometry.d_model)


def make_card(
    produced: Produced,
    geometry: Geometry,
    backbone: BackboneCard,
    *,
    method: Mapping[str, Any] | None = None,
    init: str | None = None,
    steps: int | None = None,
    task: Mapping[str, Any] | None = None,
    head: Head | None = None,
    dataset: DatasetCard | None = None,
    decode: Mapping[str, Any] | None = None,
    tokenizer: TokenizerCard | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Card:
    """Makes the card of a new prefix. The arguments are the fields of `Card`.

    Raises:
        PrefixError: the prefix has no slots.
    """
    spec = prefix_spec(produced)
    # Slots outside the softmax have no position among the tokens.
    slots = 0 if isinstance(produced, Adapter) else spec.length
    if isinstance(produced, Prefix) and produced.embeds_PD is None:
        slots = max((site.length for site in produced.sites.values()), default=0)
    return Card(
        **dataclasses.asdict(spec),
        positions=tuple(range(slots)),
        geometry=geometry,
        backbone=backbone,
        method=dict(method or {}),
        init=init,
        steps=steps,
        task=None if task is None else dict(task),
        head=head,
        dataset=dataset,
        decode=dict(decode or {}),
        tokenizer=tokenizer,
        metrics=dict(metrics or {}),
        package=_package_version(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def check(
    card: Card,
    geometry: Geometry,
    fingerprint: str,
    quantize: Quantize = "none",
    *,
    allow_other_weights: bool = False,
) -> None:
    """Checks that a stored prefix belongs to a backbone.

    Args:
        card: of the prefix.
        geometry: of the backbone.
        fingerprint: of the backbone's weights.
        quantize: how these are quantised.
        allow_other_weights: accept a backbone of the same shape with other weights: a quantised
            copy, say, whose fingerprint differs.

    Raises:
        PrefixError: it does not.
    """
    made_for = f"{card.backbone.source} ({card.backbone.model_type})"
    if card.geometry != geometry:
        ours, theirs = _numbers(card.geometry), _numbers(geometry)
        lines = (
            f"    {name}: {ours.get(name)} in the prefix, {theirs.get(name)} in the backbone"
            + (" (differs)" if ours.get(name) != theirs.get(name) else "")
            for name in {**ours, **theirs}
        )
        raise PrefixError(
            f"the prefix was made for {made_for}, and this backbone has another shape:\n"
            + "\n".join(lines)
            + "\nload the backbone that it was made for, or train a prefix for this one"
        )
    if card.backbone.fingerprint != fingerprint and not allow_other_weights:
        own, other = card.backbone.fingerprint, fingerprint
        if card.backbone.quantize != quantize:
            own += f" (quantize: {card.backbone.quantize})"
            other += f" (quantize: {quantize})"
        raise PrefixError(
            f"the prefix was made for {made_for} with weights {own}, and this backbone has "
            f"weights {other}; load the one that it was made for, or accept another, a quantised "
            "copy say, with allow_other_weights=True (--allow-other-weights)"
        )


def _numbers(geometry: Geometry) -> dict[str, int]:
    """Its numbers by dotted names; attentions that there are not have none."""
    flat: dict[str, int] = flatten_dict(dataclasses.asdict(geometry), sep=".")
    return {name: value for name, value in flat.items() if value is not None}


def _package_version() -> str:
    try:
        return importlib.metadata.version("prefix-jax")
    except importlib.metadata.PackageNotFoundError:
        return "uninstalled source"
