"""What is known of a stored prefix, and which backbones it fits."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any, Literal, cast

from flax.traverse_util import flatten_dict

from prefix_jax.artifact.arrays import PrefixSpec, prefix_spec
from prefix_jax.config import TaskConfig
from prefix_jax.errors import BackboneError, ConfigError, PrefixError
from prefix_jax.nn.activations import activation
from prefix_jax.nn.quantized import Quantize
from prefix_jax.prefix import Adapter, Geometry, Prefix, Produced, SiteName
from prefix_jax.validation import Count, PositiveInt, Probability, build, require

# 3 added the digest of the card, 4 renamed fields: `upgrade` reads the older ones.
FORMAT_VERSION = 4

TaskKind = Literal["classify", "regress", "tag", "span", "choice"]
# The fields of a head, and how many numbers a head of each kind makes where labels do not say.
HEAD_FIELDS: dict[str, Any] = {
    "kind": TaskKind,
    "outputs": PositiveInt,
    "activation": str | None,
    "pooled": bool,
    "bias": bool,
    "dropout": Probability,
    "drop_input": bool,
    "soft": bool,
}
_OUTPUTS = {"regress": 1, "span": 2, "choice": 1}


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
class TemplateCard:
    """How records became the tokens that the prefix was trained on.

    The fields are `DataConfig`'s as they were when it was stored: a file format, which keeps its
    names and defaults while those of the configuration may change.

    Attributes:
        prepare: what added fields to records of a published set.
        input, target: templates with `{field}`.
        pair: template of a second text, for a task with labels.
        messages: the field that held a chat.
        references: the field that held every acceptable target.
        task: the field that named a record's task, where several were trained together.
        loss: which tokens were learnt: "target" or "all".
        max_length: tokens of an example at most; None allowed what the backbone allows.
        truncate: the side on which longer inputs were cut: "left" or "right".
        on_overflow: what happened to longer targets: "error" or "drop".
    """

    prepare: str | None = None
    input: str | None = None
    pair: str | None = None
    target: str | None = None
    messages: str | None = None
    references: str | None = None
    task: str | None = None
    loss: Literal["target", "all"] = "target"
    max_length: PositiveInt | None = None
    truncate: Literal["left", "right"] = "left"
    on_overflow: Literal["error", "drop"] = "error"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskCard:
    """The task of a prefix that was trained together with a head.

    Attributes:
        config: the fields of `TaskConfig`, with the labels that were collected.
        head: the fields of the head.
        shapes: of its arrays, by name.
    """

    config: dict[str, Any]
    head: dict[str, Any]
    shapes: dict[str, tuple[PositiveInt, ...]]

    def check(self, d_model: int) -> None:
        """Checks that the task, the head and its arrays belong together.

        Args:
            d_model: D, the width of the backbone.

        Raises:
            ConfigError: they do not.
        """
        config = build(TaskConfig, self.config, "task.config")
        if unknown := sorted(self.head.keys() - HEAD_FIELDS.keys()):
            raise ConfigError(f"task.head has the unknown fields {', '.join(unknown)}")
        for name in self.head.keys() | {"kind", "outputs"}:
            require(self.head.get(name), HEAD_FIELDS[name], f"task.head.{name}", ConfigError)
        kind, outputs, D = self.head["kind"], self.head["outputs"], d_model
        if config.name != kind:
            raise ConfigError(f"task.config.name is {config.name}, and task.head.kind is {kind}")
        expected = _OUTPUTS.get(kind, len(config.labels or ()))
        if outputs != expected:
            raise ConfigError(
                f"task.head.outputs is {outputs}, expected {expected}, as task.config has it"
            )
        shapes: dict[str, tuple[int, ...]] = {"out_DY": (D, outputs)}
        if self.head.get("bias", True):
            shapes["out_bias_Y"] = (outputs,)
        if (function := self.head.get("activation")) is not None:
            try:
                activation(function)
            except BackboneError as error:
                raise ConfigError(f"task.head.activation: {error}") from None
            shapes |= {"dense_DE": (D, D), "dense_bias_E": (D,)}
        if {name: tuple(shape) for name, shape in self.shapes.items()} != shapes:
            raise ConfigError(f"task.shapes is {self.shapes}, expected {shapes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card(PrefixSpec):
    """What is known of a stored prefix. `make_card` fills in what follows from the prefix itself.

    Attributes:
        format_version: of the directory's layout.
        positions: where the prefix's slots stand; none for what stands beside the softmax.
        geometry: of the backbone.
        backbone: the model that it was made for.
        method: the name and the fields of the method that made it; of one of several tasks, its
            name, "task", too.
        init: what it was before training.
        steps: optimizer steps of training.
        template: of the training data.
        decode: how text is generated unless one says otherwise: fields of `DecodeConfig`.
        tokenizer: of the training data.
        task: what the head beside it answers; None where text is generated.
        metrics: results on held-out data; what is not finite is stored as None.
        package: the version of prefix_jax that made it.
        created: when, ISO 8601, UTC.
    """

    format_version: int = FORMAT_VERSION
    positions: tuple[Count, ...]
    geometry: Geometry
    backbone: BackboneCard
    method: dict[str, Any]
    init: str | None
    steps: Count | None
    template: TemplateCard | None
    decode: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerCard | None
    task: TaskCard | None = None
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
        if self.task is not None:
            self.task.check(self.geometry.d_model)

    @property
    def spec(self) -> PrefixSpec:
        """What has to agree with the prefix itself."""
        return PrefixSpec(**{f.name: getattr(self, f.name) for f in dataclasses.fields(PrefixSpec)})


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
    task: TaskCard | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Card:
    """The card of a prefix that was made just now. The arguments are the fields of `Card`.

    Raises:
        PrefixError: the prefix has no slots.
    """
    known = prefix_spec(produced)
    # What stands beside the softmax has no place among the tokens.
    slots = 0 if isinstance(produced, Adapter) else known.length
    if isinstance(produced, Prefix) and produced.embeds_PD is None:
        slots = max((site.length for site in produced.sites.values()), default=0)
    return Card(
        **dataclasses.asdict(known),
        positions=tuple(range(slots)),
        geometry=geometry,
        backbone=backbone,
        method=dict(method or {}),
        init=init,
        steps=steps,
        template=template,
        decode=dict(decode or {}),
        tokenizer=tokenizer,
        task=task,
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
