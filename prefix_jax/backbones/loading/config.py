"""Reads the configuration of a pretrained model and its architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.families import FAMILIES
from prefix_jax.backbones.loading import gguf
from prefix_jax.backbones.loading.ends import ends_of_directory, ends_of_gguf
from prefix_jax.backbones.loading.schema import check_config
from prefix_jax.errors import BackboneError
from prefix_jax.untrusted.json import read_json_object
from prefix_jax.untrusted.paths import expand

# Tokens that `generate` of transformers places at the start and the end of a text.
_FORCED = {"forced_bos_token_id", "forced_eos_token_id"}
_GENERATION = {"decoder_start_token_id", *_FORCED}
# Bytes of a config.json. With every token of a vocabulary in it, a few MB.
_CONFIG_LIMIT = 16 * 2**20


def read_architecture(path: Path) -> Architecture:
    """Reads the architecture of a model, with the end tokens of a decoder.

    Args:
        path: a directory in Hugging Face layout or a GGUF file.

    Raises:
        BackboneError: the configuration is absent, unreadable, unsupported or incomplete.
    """
    arch = architecture(read_config(path), str(path))
    if not arch.causal:
        return arch
    if path.is_dir():
        config = _read_mapping(path / "config.json") or {}
        generation = _read_mapping(path / "generation_config.json")
        end_ids = ends_of_directory(path, config, generation, arch.vocab)
    else:
        end_ids = ends_of_gguf(gguf.open_gguf(path), arch.vocab)
    return dataclasses.replace(arch, end_ids=end_ids)


def read_config(path: Path) -> dict[str, Any]:
    """Reads the configuration of a model, with the keys of Hugging Face's `config.json`.

    Args:
        path: a directory in Hugging Face layout or a GGUF file.

    Raises:
        BackboneError: the configuration is absent or unreadable.
    """
    if not path.is_dir():
        return gguf.open_gguf(path).config()
    config = _read_mapping(path / "config.json")
    if config is None:
        raise BackboneError(f"{path} has no config.json, so it is not in Hugging Face layout")
    # As in transformers, generation_config.json, if it exists, decides which tokens are forced.
    generation = _read_mapping(path / "generation_config.json")
    if generation is None:
        return config
    forced = {key: generation.get(key) for key in _FORCED}
    return {key: generation[key] for key in _GENERATION & generation.keys()} | config | forced


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a configuration describes.

    Args:
        config: the result of `read_config`.
        where: its origin, for messages.

    Raises:
        BackboneError: the configuration is unsupported or incomplete.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise BackboneError(
            f"{where} is of the unsupported architecture {model_type!r}; "
            f"supported: {', '.join(FAMILIES)}"
        )
    check_config(config, f"the configuration of {where}")
    if config.get("per_layer_config"):
        raise BackboneError(
            f"{where}: per_layer_config is not supported; every layer must have "
            "the same configuration (except for layer_types)"
        )
    try:
        arch: Architecture = FAMILIES[model_type].architecture(config)
    except KeyError as error:
        raise BackboneError(f"the configuration of {where} lacks {error}") from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        # For example a number that is null or zero: families compute with the values directly.
        raise BackboneError(
            f"the configuration of {where} is not valid for {model_type}: {error}; compare it with "
            "the original checkpoint"
        ) from error
    return arch


def _read_mapping(file: Path) -> dict[str, Any] | None:
    """Reads and checks a configuration file; None if there is no such file.

    Raises:
        BackboneError: it cannot be read, or contains values that no model has.
    """
    if not expand(file, BackboneError).exists():
        return None
    content = read_json_object(file, BackboneError, limit=_CONFIG_LIMIT)
    check_config(content, str(file))
    return content
