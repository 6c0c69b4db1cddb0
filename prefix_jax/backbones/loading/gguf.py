"""Reads GGUF, the file format of llama.cpp: metadata, and tensors in any quantisation."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from prefix_jax.backbones.families import gemma, gpt2, llama
from prefix_jax.backbones.families.names import NameTable
from prefix_jax.errors import BackboneError
from prefix_jax.nn.rotary import Rotary
from prefix_jax.untrusted.gguf import Metadata, read_header
from prefix_jax.untrusted.paths import explain
from prefix_jax.untrusted.safetensors import map_array
from prefix_jax.validation import PositiveFloat, PositiveInt, Probability

# By llama.cpp's name of the architecture.
TABLES: dict[str, NameTable] = {
    "gpt2": gpt2.GGUF_NAMES,
    "llama": llama.GGUF_NAMES,
    "qwen2": llama.QWEN_GGUF_NAMES,
    "qwen3": llama.QWEN_GGUF_NAMES,
    "gemma": gemma.GGUF_NAMES,
    "gemma2": gemma.GGUF_NAMES,
    "gemma3": gemma.GGUF_NAMES,
}
# llama.cpp identifies the 27B models, which scale queries differently, by their number of layers.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_PLAIN = {
    GGMLQuantizationType.F64: np.dtype(np.float64),
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_CHUNK = 1 << 22  # values dequantised at a time


def open_gguf(path: Path) -> GGUF:
    """Reads the header of a file. The last one is cached, for configuration, weights and tokenizer.

    Raises:
        BackboneError: see `GGUF`.
    """
    try:
        modified = path.stat().st_mtime_ns
    except OSError as failure:
        raise BackboneError(f"{path}: cannot be read ({explain(failure)})") from None
    return _open(path, modified)


@functools.lru_cache(maxsize=1)
def _open(path: Path, modified: int) -> GGUF:
    return GGUF(path)


class GGUF:
    """A GGUF file.

    Attributes:
        path: the path of the file.
        metadata: its keys and values.
        architecture: llama.cpp's name of the model type: "llama", "qwen2", ….
        shapes: the shape of every tensor, outermost axis first.

    Raises:
        BackboneError: the file is not GGUF, truncated, or of another byte order.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata, self._tensors = read_header(path, BackboneError)
        self.architecture: str = self.metadata.get("general.architecture", str, "unnamed")
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, dequantised to float32 if it is stored in blocks."""
        tensor = self._tensors[name]
        if tensor.kind in _PLAIN:
            return self._map(_PLAIN[tensor.kind], tensor.offset, tensor.shape)
        stored = self._map(np.dtype(np.uint8), tensor.offset, tensor.stored_shape)
        out = np.empty(tensor.shape, np.float32)
        step = max(1, _CHUNK // (out.size // len(out)))
        try:
            for row in range(0, len(out), step):
                out[row : row + step] = dequantize(stored[row : row + step], tensor.kind)
        except NotImplementedError:
            raise BackboneError(
                f"{self.path}: {name} is stored as {tensor.kind.name}, which this "
                "version cannot dequantise"
            ) from None
        return out

    def _map(self, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        return map_array(self.path, dtype, offset, shape, BackboneError)

    def config(self) -> dict[str, Any]:
        """Converts the metadata to the keys of a Hugging Face `config.json`.

        Raises:
            BackboneError: the architecture is not supported, a key is missing, or the rotary
                frequencies have an unknown scaling.
        """
        if self.architecture not in TABLES:
            raise BackboneError(
                f"{self.path} is a GGUF file of the unsupported architecture "
                f"{self.architecture!r}; supported: {', '.join(TABLES)}; for others, use a "
                "checkpoint in Hugging Face layout"
            )
        get = _Keys(self.metadata, self.architecture)
        tokens = self.shapes.get("token_embd.weight", ())
        if len(tokens) != 2:
            raise BackboneError(
                f"{self.path} has no token_embd.weight, so it is not a language model"
            )
        shared = {
            "model_type": self.architecture,
            "vocab_size": tokens[0],
            "tie_word_embeddings": "output.weight" not in self.shapes,
        }
        if self.architecture == "gpt2":
            return shared | {
                "n_layer": get("block_count", PositiveInt),
                "n_embd": get("embedding_length", PositiveInt),
                "n_head": get("attention.head_count", PositiveInt),
                "n_inner": get("feed_forward_length", PositiveInt),
                "n_positions": get("context_length", PositiveInt),
                "layer_norm_epsilon": get("attention.layer_norm_epsilon", Probability),
                "activation_function": "gelu_new",
            }
        heads = get("attention.head_count", PositiveInt)
        head_dim = get(
            "attention.key_length", PositiveInt, get("embedding_length", PositiveInt) // heads
        )
        decoder = shared | {
            "num_hidden_layers": get("block_count", PositiveInt),
            "hidden_size": get("embedding_length", PositiveInt),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", PositiveInt, heads),
            "head_dim": head_dim,
            "intermediate_size": get("feed_forward_length", PositiveInt),
            "max_position_embeddings": get("context_length", PositiveInt),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon", Probability),
            "attention_bias": "blk.0.attn_q.bias" in self.shapes,
            "mlp_bias": "blk.0.ffn_gate.bias" in self.shapes,
            "rope_theta": get("rope.freq_base", PositiveFloat, 10000.0),
            "rope_scaling": self._rope_scaling(get, head_dim),
        }
        if self.architecture in ("gemma2", "gemma3"):
            decoder |= self._gemma(get, head_dim)
        return decoder

    def _gemma(self, get: _Keys, head_dim: int) -> dict[str, Any]:
        """Keys of Gemma 2 and 3, some of which llama.cpp only has in its code."""
        layers, heads = get("block_count", PositiveInt), get("attention.head_count", PositiveInt)
        large = layers == _LAYERS_OF_27B[self.architecture]
        shared = {
            "query_pre_attn_scalar": get("embedding_length", PositiveInt) // heads
            if large
            else head_dim,
            "sliding_window": get("attention.sliding_window", PositiveInt),
        }
        if self.architecture == "gemma2":
            return shared | {
                "attn_logit_softcapping": get("attn_logit_softcapping", PositiveFloat),
                "final_logit_softcapping": get("final_logit_softcapping", PositiveFloat),
            }
        pattern = get("attention.sliding_window_pattern", PositiveInt | list[bool], 6)
        if isinstance(pattern, int):
            shared["sliding_window_pattern"] = pattern
        else:
            kinds = ("full_attention", "sliding_attention")
            shared["layer_types"] = [kinds[slides] for slides in pattern]
        return shared | {
            "model_type": "gemma3_text",
            "rope_local_base_freq": get("rope.freq_base_swa", PositiveFloat, 10000.0),
            "final_logit_softcapping": get("final_logit_softcapping", PositiveFloat, None),
        }

    def _rope_scaling(self, get: _Keys, head_dim: int) -> dict[str, Any] | None:
        if "rope_freqs.weight" in self.shapes:
            return self._llama3_scaling(get("rope.freq_base", PositiveFloat, 10000.0), head_dim)
        kind = get("rope.scaling.type", str, "none")
        if kind == "none":
            return None
        return {
            "rope_type": kind,
            "factor": get("rope.scaling.factor", PositiveFloat),
            "original_max_position_embeddings": get(
                "rope.scaling.original_context_length",
                PositiveInt,
                get("context_length", PositiveInt),
            ),
        }

    def _llama3_scaling(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Recovers Llama 3's scaling from the divisors of the frequencies that llama.cpp stores.

        Llama 3.1 to 3.3 differ only in the largest divisor; the other constants are checked.
        """
        divisors = self.read("rope_freqs.weight")
        factor = float(divisors.max())
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        llama3 = Rotary(theta, "llama3", factor, 8192, low=1.0, high=4.0)
        expected = Rotary(theta).frequencies(head_dim) / llama3.frequencies(head_dim)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
            raise BackboneError(f"{self.path}: rope_freqs.weight is not a scaling of Llama 3")
        return scaling


class _Keys:
    """Reads metadata keys below the architecture's name, with the arguments of `Metadata.get`."""

    def __init__(self, metadata: Metadata, architecture: str):
        self._metadata, self._architecture = metadata, architecture

    def __call__(self, key: str, hint: Any, *default: Any) -> Any:
        return self._metadata.get(f"{self._architecture}.{key}", hint, *default)
