"""Exports prefixes as PEFT adapters, if PEFT can express them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prefix_jax import artifact
from prefix_jax.artifact import Card
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.errors import PrefixError
from prefix_jax.interop.backbone import backbone_of
from prefix_jax.interop.export import baked
from prefix_jax.interop.peft import heads
from prefix_jax.interop.peft.files import VERSION, write
from prefix_jax.interop.peft.layout import flatten, stored_layers
from prefix_jax.interop.peft.reading import task_type
from prefix_jax.methods.multitask import PARTS, read_parts
from prefix_jax.prefix import Embeds, Hidden, KVPrefix, Prefix, Produced
from prefix_jax.tasks import from_card
from prefix_jax.untrusted.paths import expand

_OURS = "or keep it in our own format (--to safetensors, see docs/export.md)"
# Models without a KV cache in transformers; PEFT passes keys and values through the cache.
_WITHOUT_CACHE = {"distilbert"}

Config = dict[str, Any]
Arrays = dict[str, np.ndarray]


def export_peft(
    source: str | Path,
    output: str | Path,
    *,
    bake: bool = False,
    model: Pretrained | str | Path | None = None,
    allow_other_weights: bool = False,
) -> Config:
    """Writes a stored prefix as an adapter that `PeftModel.from_pretrained` loads.

    Args:
        source: a stored prefix, or a run. A multitask run becomes MULTITASK_PROMPT_TUNING, whose
            task_ids follow the order of `method.datasets` (sorted by default).
        output: the directory to write, which must be absent or empty.
        bake: convert hidden states and soft tokens to keys and values, which needs the backbone.
        model: for `bake`, see `backbone_of`.
        allow_other_weights: for `bake`, see `backbone_of`.

    Returns:
        The contents of `adapter_config.json`.

    Raises:
        PrefixError: PEFT cannot express the prefix, or the output is not empty.
        BackboneError: the backbone cannot be loaded.
        CheckpointError: the adapter cannot be written.
    """
    if (expand(source, PrefixError) / PARTS).is_file():
        if bake:
            raise PrefixError(
                f"{source} is a multitask run, and each dataset has its own keys and values; bake "
                "the prefix of one dataset (in its folder prefixes)"
            )
        config, arrays = several_tasks(source)
        write(output, config, arrays)
        return config
    produced, card = artifact.load(source)
    if bake and not isinstance(produced, Prefix):
        pretrained = backbone_of(card, model, allow_other_weights=allow_other_weights)
        produced, card = baked(produced, card, pretrained)
    head = None if card.head is None else artifact.load_head(source)
    config, arrays = to_peft(produced, card, head)
    write(output, config, arrays)
    return config


def to_peft(
    produced: Produced, card: Card, head: Mapping[str, Any] | None = None
) -> tuple[Config, Arrays]:
    """Returns configuration and arrays of an adapter that computes the same function as a prefix.

    Args:
        produced: the prefix.
        card: its card.
        head: the arrays of its head, if it has one.

    Raises:
        PrefixError: PEFT cannot express the prefix; the message names the part and an alternative.
    """
    if isinstance(produced, Prefix) and produced.embeds_PD is not None and not produced.sites:
        produced = Embeds(produced.embeds_PD)
    config, arrays = _prefix(produced, card)
    if card.head is not None and card.task is not None and head is not None:
        task = from_card(card.task)
        more, of_head = heads.to_arrays(
            head, task, card.head, produced, card.backbone.model_type, card.geometry
        )
        config, arrays = config | more, arrays | of_head
    return config, arrays


def _prefix(produced: Produced, card: Card) -> tuple[Config, Arrays]:
    if isinstance(produced, Embeds):
        return _soft_tokens(produced, card)
    if isinstance(produced, Prefix):
        return _keys_values(_join(produced, card), card)
    if isinstance(produced, Hidden):
        raise PrefixError(
            "PEFT does not support hidden states as prefixes; convert them to keys and values "
            f"(--bake), {_OURS}"
        )
    raise PrefixError(
        "PEFT's ADAPTION_PROMPT has no gates per head and no choice of layers, so it can only be "
        f"imported; train keys and values (method.name=prefix), {_OURS}"
    )


def several_tasks(run: str | Path) -> tuple[Config, Arrays]:
    """Returns configuration and arrays of the adapter for a multitask run.

    Raises:
        PrefixError: the run is damaged, or PEFT cannot express its prompts.
    """
    path = expand(run, PrefixError)
    arrays = read_parts(path / PARTS)
    places = sorted((path / artifact.PREFIXES).glob("*"))
    if not places:
        raise PrefixError(f"{path} has {PARTS} but no {artifact.PREFIXES}; copy it again")
    embeds, card = artifact.load(places[0])
    if not isinstance(embeds, Embeds):
        raise PrefixError(f"{places[0]} has no soft tokens, unlike {PARTS}; copy the run again")
    head = None if card.head is None else artifact.load_head(places[0])
    config, others = to_peft(embeds, card, head)
    tasks, _, ranks = arrays["prefix_task_cols"].shape
    config |= {
        "num_ranks": ranks,
        "num_tasks": tasks,
        "peft_type": "MULTITASK_PROMPT_TUNING",
        "prompt_tuning_init_state_dict_path": None,
        "prompt_tuning_init_task": 0,
    }
    return config, others | arrays


def _join(prefix: Prefix, card: Card) -> KVPrefix:
    """Returns the keys and values of a prefix that has nothing else.

    Raises:
        PrefixError: the prefix has other parts.
    """
    main = card.geometry.main_site
    if others := [name for name in prefix.sites if name != main]:
        raise PrefixError(
            "PEFT supports prefixes only in the self-attention of the decoder, but this one also "
            f"has {' and '.join(others)}; train with method.sites=[decoder], {_OURS}"
        )
    site = prefix.sites.get(main)
    parts = {
        "soft tokens in addition to keys and values": prefix.embeds_PD is not None,
        "gates or matrices outside the softmax": site is not None and site.outside is not None,
        "some layers only": site is not None and site.layers is not None,
        "biases on slots": site is not None
        and site.inside is not None
        and site.inside.bias_LPN is not None
        and bool(np.any(np.asarray(site.inside.bias_LPN) != 0)),
    }
    if unsupported := [part for part, there in parts.items() if there]:
        raise PrefixError(
            f"PEFT cannot express {', '.join(unsupported)}; train method.name=prefix for all "
            f"layers, {_OURS}"
        )
    if site is None or site.inside is None:
        raise PrefixError(f"the prefix has no keys and values for PEFT; {_OURS[3:]}")
    if prefix.pinned:
        raise PrefixError(
            "PEFT cannot keep a prefix visible to sliding windows; train with method.pinned=false, "
            f"{_OURS}"
        )
    if prefix.text_position != site.length:
        raise PrefixError(
            f"in PEFT, text after {site.length} slots starts at position {site.length}, but with "
            f"this prefix at {prefix.text_position}; train with method.text_position=null, {_OURS}"
        )
    if card.backbone.model_type in _WITHOUT_CACHE:
        raise PrefixError(
            f"PEFT does not support keys and values for {card.backbone.model_type}; train soft "
            f"tokens (method.name=prompt), {_OURS}"
        )
    return site.inside


def _keys_values(inside: KVPrefix, card: Card) -> tuple[Config, Arrays]:
    geometry = card.geometry
    shape, doubled = geometry.main, len(geometry.sites) > 1
    width = shape.kv_heads * shape.head_dim
    config = _config(card) | {
        "num_attention_heads": shape.kv_heads,
        "num_layers": stored_layers(shape.layers, doubled),
        "num_transformer_submodules": 2 if doubled else 1,
        "token_dim": width,
    }
    if card.method.get("name") == "cartridge":
        config |= {"peft_type": "CARTRIDGE", "num_frozen_tokens": card.method.get("frozen", 1)}
    else:
        config |= {
            "peft_type": "PREFIX_TUNING",
            "encoder_hidden_size": width,
            "init_weights": None,
            "prefix_projection": False,
        }
    k_LPKH, v_LPKH = jax.device_get((inside.k_LPKH, inside.v_LPKH))
    return config, {"prompt_embeddings": flatten(k_LPKH, v_LPKH, doubled)}


def _soft_tokens(embeds: Embeds, card: Card) -> tuple[Config, Arrays]:
    geometry = card.geometry
    # PEFT copies these from the stack that reads the soft tokens, but never uses them.
    shape = geometry.encoder or geometry.main
    config = _config(card) | {
        "num_attention_heads": shape.query_heads,
        "num_layers": shape.layers,
        # PEFT's default for an encoder-decoder, 2, adds a second half, which is never read.
        "num_transformer_submodules": 1,
        "token_dim": geometry.input_dim,
    }
    if card.method.get("name") == "ptuning":
        config |= {
            "peft_type": "P_TUNING",
            "encoder_dropout": 0.0,
            "encoder_hidden_size": geometry.input_dim,
            "encoder_num_layers": 2,
            "encoder_reparameterization_type": "MLP",
        }
    else:
        config |= {
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_kwargs": None,
            "tokenizer_name_or_path": None,
        }
    return config, {"prompt_embeddings": np.asarray(embeds.x_PD)}


def _config(card: Card) -> Config:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": card.backbone.source,
        "inference_mode": True,
        "modules_to_save": None,
        "num_virtual_tokens": card.length,
        "peft_version": VERSION,
        "revision": None,
        "task_type": task_type(card.geometry),
    }
