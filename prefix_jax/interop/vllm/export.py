"""Exports a prefix for vLLM, with the plugin that serves it."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import yaml

from prefix_jax import artifact
from prefix_jax.artifact import Card
from prefix_jax.backbones.loading.find import find
from prefix_jax.backbones.loading.pretrained import Dtype, Pretrained, architecture_of
from prefix_jax.errors import BackboneError, CheckpointError, PrefixError
from prefix_jax.interop.backbone import backbone_of
from prefix_jax.interop.export import baked
from prefix_jax.interop.huggingface import write_huggingface
from prefix_jax.interop.vllm.plugin.stored import NAME
from prefix_jax.prefix import Adapter, Prefix
from prefix_jax.untrusted.paths import expand

# In the directory of all prefixes: the plugin, and vLLM's arguments.
PLUGIN, ARGUMENTS = "prefix_vllm", "vllm.yaml"
MODEL = "model"
_RESERVED = (PLUGIN, MODEL, ARGUMENTS)
_ARGUMENTS = {
    "middleware": [f"{PLUGIN}.models.PrefixModels"],
    # vLLM 0.30 and newer. Before, its routes need no option, and this line must be removed.
    "enable-scale-out": True,
    "kv-transfer-config": {
        "kv_connector": "PrefixConnector",
        "kv_role": "kv_consumer",
        "kv_connector_module_path": f"{PLUGIN}.connector",
    },
}


def export_vllm(
    source: str | Path,
    output: str | Path,
    *,
    replace: bool = False,
    write_model: bool = False,
    model: Pretrained | str | Path | None = None,
    allow_other_weights: bool = False,
) -> Card:
    """Writes a stored prefix for vLLM, and next to it what vLLM needs to serve it.

    The directory of `output` gets a copy of the plugin, `prefix_vllm/`, and the arguments of
    `vllm serve`, `vllm.yaml`. Several prefixes of one backbone share them. Soft tokens and hidden
    states are converted to keys and values, which needs the backbone.

    Args:
        source: a stored prefix, or a run.
        output: the directory to write, DIR/NAME. NAME becomes the prefix's model id.
        replace: replace an existing prefix; a running server uses the new one at once.
        write_model: also write the backbone as DIR/model in Hugging Face layout, if it is a GGUF
            file, which vLLM does not read.
        model: the backbone, see `backbone_of`.
        allow_other_weights: see `backbone_of`.

    Returns:
        The card of the prefix as written.

    Raises:
        PrefixError: vLLM cannot express the prefix; the message names the part and an alternative.
            Or NAME cannot be a model id, or the output exists.
        BackboneError: the backbone cannot be loaded.
        CheckpointError: a file cannot be written.
    """
    output = expand(output, PrefixError)
    if not NAME.fullmatch(output.name) or output.name in _RESERVED:
        raise PrefixError(
            f"{output}: {output.name!r} cannot be a model id in vLLM; use 1 to 128 letters (a-z), "
            "digits, '.', '_' and '-', the first a letter, digit or '_'; "
            f"{', '.join(_RESERVED)} are reserved"
        )
    if (output / "prefix.json").exists() and not replace:
        raise PrefixError(
            f"{output} already contains a prefix; choose another name, or replace it (--replace)"
        )
    produced, card = artifact.load(source)
    path = model if isinstance(model, str | Path) else card.backbone.source
    if write_model:
        _check_write_model(path, output.parent / MODEL)
    _check_task(card)
    if isinstance(produced, Adapter):
        raise PrefixError(_cannot(["gates outside the softmax (LLaMA-Adapter)"]))
    if not isinstance(produced, Prefix):
        pretrained = backbone_of(card, model, allow_other_weights=allow_other_weights)
        produced, card = baked(produced, card, pretrained)
    elif isinstance(model, str | Path):
        _check_geometry(card, model)
    produced = _without_zero_biases(produced)
    _check(produced, card, model)
    artifact.save(output, produced, card, "safetensors")
    try:
        _write_plugin(output.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {output.parent / PLUGIN}: {error.strerror}; free disk space and export "
            "again"
        ) from error
    if write_model:
        dtype: Dtype = "bfloat16" if card.backbone.dtype == "bfloat16" else "float32"
        write_huggingface(path, output.parent / MODEL, dtype)
    return card


def needs_conversion(source: str | Path) -> bool:
    """Returns whether a backbone is a GGUF file, which vLLM does not read."""
    try:
        return find(source).is_file()
    except BackboneError:
        return False


def _check_write_model(path: str | Path, target: Path) -> None:
    """Raises PrefixError if the backbone need not or cannot be written."""
    if target.exists():
        raise PrefixError(
            f"{target} exists; omit --write-model, since all prefixes of a directory share it"
        )
    if find(path).is_dir():
        raise PrefixError(
            f"{path} is in a layout that vLLM reads; omit --write-model and serve it from there"
        )


def _check_geometry(card: Card, model: str | Path) -> None:
    """Raises PrefixError if a model has another shape. Its weights are not read."""
    geometry = architecture_of(model).geometry
    artifact.check(card, geometry, card.backbone.fingerprint, card.backbone.quantize)


def _check_task(card: Card) -> None:
    if card.head is not None:
        raise PrefixError(
            "the prefix was trained with a head (labels, spans or scores), and vLLM generates text "
            "only; use prefix-jax predict"
        )
    if card.geometry.decoder is None or card.geometry.encoder is not None:
        raise PrefixError(
            f"{card.backbone.model_type} has an encoder, and vLLM accepts prefixes for decoders "
            "only; use prefix-jax generate or predict"
        )


def _check(prefix: Prefix, card: Card, model: Pretrained | str | Path | None) -> None:
    """Raises PrefixError if vLLM cannot express the prefix."""
    if unsupported := list(_unsupported(prefix)):
        raise PrefixError(_cannot(unsupported))
    if prefix.text_position != prefix.length:
        raise PrefixError(
            f"in vLLM, text after {prefix.length} slots starts at position {prefix.length}, but "
            f"with this prefix at {prefix.text_position}; train with method.text_position=null"
        )
    if prefix.pinned and _has_window(card, model):
        raise PrefixError(
            "vLLM cannot keep a prefix visible outside a sliding window; train with "
            "method.pinned=false"
        )


def _without_zero_biases(prefix: Prefix) -> Prefix:
    site = prefix.decoder
    if site is None or site.inside is None or site.inside.bias_LPN is None:
        return prefix
    if np.any(np.asarray(jax.device_get(site.inside.bias_LPN))):
        return prefix
    inside = dataclasses.replace(site.inside, bias_LPN=None)
    return dataclasses.replace(prefix, decoder=dataclasses.replace(site, inside=inside))


def _unsupported(prefix: Prefix) -> Iterator[str]:
    """Names the parts of a prefix that are not keys and values of the self-attention."""
    for name, site in prefix.sites.items():
        if name != "decoder":
            yield f"slots at the {name} site"
        if site.layers is not None:
            yield "slots in some layers only"
        if site.outside is not None:
            yield "gates or matrices outside the softmax"
        if site.inside is not None and site.inside.bias_LPN is not None:
            yield "biases on slots"


def _cannot(parts: list[str]) -> str:
    return (
        f"vLLM cannot express {', '.join(parts)}; train method.name=prefix, or use "
        "prefix-jax generate"
    )


def _has_window(card: Card, model: Pretrained | str | Path | None) -> bool:
    """Returns whether the backbone has sliding windows; true if it cannot be read."""
    if isinstance(model, Pretrained):
        return model.backbone.arch.window is not None
    try:
        return architecture_of(card.backbone.source if model is None else model).window is not None
    except BackboneError:
        return True


def _write_plugin(directory: Path) -> None:
    """Copies the plugin and writes vLLM's arguments, unless the user has edited them."""
    plugin = importlib.resources.files("prefix_jax.interop.vllm") / "plugin"
    target = directory / PLUGIN
    target.mkdir(exist_ok=True)
    for file in plugin.iterdir():
        if file.name.endswith(".py"):
            (target / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = directory / ARGUMENTS
    if not arguments.exists():
        arguments.write_text(yaml.safe_dump(_ARGUMENTS, sort_keys=False), encoding="utf-8")
