"""Imports PEFT adapters as prefixes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from prefix_jax import artifact
from prefix_jax.artifact import Card
from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.config import DataConfig, TaskConfig
from prefix_jax.errors import BackboneError, PrefixError
from prefix_jax.interop.peft import heads
from prefix_jax.interop.peft.files import CONFIG, WEIGHTS, Files, read
from prefix_jax.interop.peft.layout import unflatten
from prefix_jax.prefix import Adapter, Embeds, Geometry, KVPrefix, Prefix, Produced, Site
from prefix_jax.tasks import GENERATE, TextTask, make_task, to_card

_MULTITASK = "MULTITASK_PROMPT_TUNING"
# PEFT's types → our methods. Stored adapters no longer contain a projection.
_METHODS = {
    "PREFIX_TUNING": "prefix",
    "CARTRIDGE": "cartridge",
    "PROMPT_TUNING": "prompt",
    "P_TUNING": "ptuning",
    _MULTITASK: "multitask",
    "ADAPTION_PROMPT": "adapter",
}
_ADAPTION = re.compile(r"base_model\.model\.model\.layers\.(\d{1,9})\.self_attn\.adaption_(\w+)")


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Settings that are missing from an adapter.

    Attributes:
        data: templates for records: `input`, `target`, `pair`, … of `DataConfig`.
        task: for a head, the record fields and the label names. The kind of task comes from the
            adapter.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)


@dataclasses.dataclass(frozen=True)
class Imported:
    """An imported adapter.

    Attributes:
        pretrained: the backbone.
        produced: the prefix.
        card: its metadata.
        head: the arrays of its head; None if it has no head.
    """

    pretrained: Pretrained
    produced: Produced
    card: Card
    head: dict[str, Any] | None = None


def import_peft(
    adapter: str | Path,
    model: Pretrained | str | Path | None = None,
    *,
    task: int | None = None,
    settings: ImportConfig = ImportConfig(),
) -> Imported:
    """Imports a PEFT adapter as a prefix that computes the same function.

    PREFIX_TUNING (with or without projection) and CARTRIDGE become keys and values; PROMPT_TUNING,
    P_TUNING and MULTITASK_PROMPT_TUNING become soft tokens; ADAPTION_PROMPT becomes a gated
    adapter. The heads of SEQ_CLS, TOKEN_CLS and QUESTION_ANS are imported too. With an
    encoder-decoder, keys and values belong to the decoder layers that read them in PEFT (see
    `layout`), and soft tokens precede the encoder's input, as in PEFT's generation.

    Args:
        adapter: a directory written by `PeftModel.save_pretrained`.
        model: the backbone, or a path to load it from; None loads the one named in the adapter.
        task: the task index in MULTITASK_PROMPT_TUNING, from 0; see `tasks_of`.
        settings: settings that are missing from the adapter.

    Raises:
        PrefixError: the adapter is damaged, of another type, or made for another backbone.
        BackboneError: the backbone cannot be loaded.
    """
    files = read(adapter)
    kind = _type_of(files)
    tasks = tasks_of(files)
    if tasks is None and task is not None:
        raise PrefixError(f"{adapter} is of type {kind}, which has no tasks; omit the task")
    if tasks is not None and (task is None or not 0 <= task < tasks):
        asked = "" if task is None else f", not task {task}"
        raise PrefixError(f"{adapter} has the tasks 0 to {tasks - 1}{asked}; choose one of them")
    pretrained = model if isinstance(model, Pretrained) else load(_source(files, model))
    arch = pretrained.backbone.arch
    _check_task_type(files, arch)
    if kind == "ADAPTION_PROMPT":
        produced: Produced = _adapter(files, arch)
    elif kind in ("PREFIX_TUNING", "CARTRIDGE"):
        produced = _keys_values(files, arch)
    else:
        produced = _soft_tokens(files, arch, task)
    weights = None
    if files.config.get("task_type") in heads.TASK_TYPES:
        weights, made_for = heads.from_arrays(
            files, pretrained, produced, settings.data, settings.task
        )
    else:
        made_for = make_task(settings.data, dataclasses.replace(settings.task, name=GENERATE))
    card = dataclasses.replace(
        _card(files, pretrained, produced, task),
        task=None if made_for == TextTask() else to_card(made_for),
        head=made_for.head(arch),
    )
    return Imported(pretrained, produced, card, weights)


def tasks_of(adapter: str | Path | Files) -> int | None:
    """Returns the number of tasks of an adapter; None unless it is a MULTITASK_PROMPT_TUNING.

    Raises:
        PrefixError: the adapter is damaged.
    """
    files = adapter if isinstance(adapter, Files) else read(adapter)
    if _type_of(files) != _MULTITASK:
        return None
    return len(files.array("prefix_task_cols", 3))


def _type_of(files: Files) -> str:
    kind = files.config.get("peft_type")
    if not isinstance(kind, str) or kind not in _METHODS:
        raise PrefixError(
            f"{files.where / CONFIG}: unsupported peft_type {kind!r}; expected one of "
            f"{', '.join(_METHODS)}"
        )
    return str(kind)


def _source(files: Files, model: str | Path | None) -> str | Path:
    source = files.config.get("base_model_name_or_path") if model is None else model
    if not source:
        raise BackboneError(
            f"{files.where / CONFIG} does not name its backbone; give its path (--model)"
        )
    return source


def task_type(geometry: Geometry) -> str:
    """Returns PEFT's task type for a backbone without a head."""
    if geometry.decoder is None:
        return "FEATURE_EXTRACTION"
    return "CAUSAL_LM" if geometry.encoder is None else "SEQ_2_SEQ_LM"


def _check_task_type(files: Files, arch: Architecture) -> None:
    stored, bare = files.config.get("task_type"), task_type(arch.geometry)
    of_heads = [] if arch.encoder is not None else sorted(heads.TASK_TYPES)
    if stored is not None and stored not in (bare, *of_heads):
        raise PrefixError(
            f"{files.where / CONFIG}: task_type is {stored}, but the backbone, a "
            f"{arch.model_type}, supports {', '.join([bare, *of_heads])}; give the "
            "backbone that the adapter was trained for"
        )
    unread = sorted(
        name
        for name in files.arrays
        if name.startswith("base_model.") and not _ADAPTION.fullmatch(name)
    )
    if unread and stored not in of_heads:
        raise PrefixError(
            f"{files.where / WEIGHTS} contains more than a prefix, {', '.join(unread)}, which is "
            f"not supported for {stored}; train the adapter again without modules_to_save"
        )


def _length(files: Files, flat: np.ndarray, copies: int) -> int:
    """Returns the length P, checked against the rows of `prompt_embeddings`."""
    P = files.number("num_virtual_tokens")
    if len(flat) != P * copies:
        times = "" if copies == 1 else f" times {copies} num_transformer_submodules"
        raise PrefixError(
            f"{files.where}: {CONFIG} has num_virtual_tokens {P}{times}, but prompt_embeddings in "
            f"{WEIGHTS} has {len(flat)} rows; the files do not belong together, copy both again"
        )
    return P


def _keys_values(files: Files, arch: Architecture) -> Prefix:
    flat, geometry = files.array("prompt_embeddings", 2), arch.geometry
    doubled = arch.encoder is not None
    if doubled and files.number("num_transformer_submodules", 2) != 2:
        raise PrefixError(
            f"{files.where / CONFIG}: num_transformer_submodules is "
            f"{files.config['num_transformer_submodules']}; for an encoder-decoder, PEFT then puts "
            "keys of one attention into the cache of another. Train it again with 2, the default"
        )
    P = _length(files, flat, 1)
    where = str(files.where / WEIGHTS)
    k_LPKH, v_LPKH = unflatten(flat, geometry.main, doubled, where)
    site = Site(KVPrefix(jnp.asarray(k_LPKH), jnp.asarray(v_LPKH)))
    return Prefix.of({geometry.main_site: site}, text_position=P)


def _soft_tokens(files: Files, arch: Architecture, task: int | None) -> Embeds:
    flat = files.array("prompt_embeddings", 2)
    # For an encoder-decoder there are two parts; the first precedes the encoder's input. PEFT reads
    # the second only in a forward pass of MULTITASK_PROMPT_TUNING without generation.
    parts = files.number("num_transformer_submodules", 1 if arch.encoder is None else 2)
    P = _length(files, flat, parts)
    width = arch.geometry.input_dim
    if flat.shape[1] != width:
        raise PrefixError(
            f"{files.where / WEIGHTS}: prompt_embeddings has width {flat.shape[1]}, but this "
            f"backbone has {width}; give the backbone that the adapter was trained for"
        )
    if task is not None:
        cols, rows = files.array("prefix_task_cols", 3), files.array("prefix_task_rows", 3)
        tasks, _, ranks = cols.shape
        expected = (tasks, len(flat), ranks), (tasks, ranks, width)
        if (cols.shape, rows.shape) != expected:
            raise PrefixError(
                f"{files.where / WEIGHTS}: prefix_task_cols and prefix_task_rows have shapes "
                f"{cols.shape} and {rows.shape}, which do not multiply to {flat.shape}"
            )
        flat = flat * (cols[task] @ rows[task])
    return Embeds(jnp.asarray(flat[:P]))


def _adapter(files: Files, arch: Architecture) -> Adapter:
    if arch.model_type not in ("llama", "mistral") or arch.out_bias:
        raise PrefixError(
            f"{files.where}: ADAPTION_PROMPT is supported only for llama and mistral without "
            f"biases; with a {arch.model_type}, PEFT adds the adapter's output after another "
            "projection, or adds that projection's bias twice. Train method.name=adapter here"
        )
    arrays: dict[str, dict[int, np.ndarray]] = {"prompt": {}, "gate": {}}
    for name in files.arrays:
        matched = _ADAPTION.fullmatch(name)
        if matched is None or matched[2] not in arrays:
            raise PrefixError(f"{files.where / WEIGHTS}: {name} is not part of ADAPTION_PROMPT")
        of = matched[2]
        arrays[of][int(matched[1])] = files.array(name, 3 if of == "prompt" else 1)
    layers, P, D = sorted(arrays["prompt"]), files.number("adapter_len"), arch.d_model
    count = files.number("adapter_layers")
    expected = list(range(arch.layers))[-count:]
    shapes = {x.shape for x in arrays["prompt"].values()} | {
        x.shape for x in arrays["gate"].values()
    }
    if not layers or len(layers) != count or layers != expected or layers != sorted(arrays["gate"]):
        raise PrefixError(
            f"{files.where / WEIGHTS}: there are prompts for the layers {layers} and gates for "
            f"{sorted(arrays['gate'])}; {CONFIG} has adapter_layers {count}, which are the top "
            f"layers of this backbone's {arch.layers}"
        )
    if shapes != {(1, P, D), (1,)}:
        raise PrefixError(
            f"{files.where / WEIGHTS}: the arrays have shapes {sorted(shapes)}; {CONFIG} and the "
            f"backbone require {(1, P, D)} and {(1,)}"
        )
    h_LPD = np.concatenate([arrays["prompt"][layer] for layer in layers])
    # One gate per layer, shared by its heads.
    gate_LN = np.stack([arrays["gate"][layer] for layer in layers])
    every = len(layers) == arch.layers
    return Adapter(jnp.asarray(h_LPD), jnp.asarray(gate_LN), None if every else tuple(layers))


def _card(files: Files, pretrained: Pretrained, produced: Produced, task: int | None) -> Card:
    kind = _type_of(files)
    method: dict[str, Any] = {
        "name": _METHODS[kind],
        "length": artifact.prefix_spec(produced).length,
    }
    if kind == "CARTRIDGE":
        method["frozen"] = files.number("num_frozen_tokens", 1)
    return artifact.make_card(
        produced,
        pretrained.backbone.geometry,
        pretrained.card,
        method=method,
        init=f"PEFT's {kind}" + ("" if task is None else f", task {task}"),
    )
