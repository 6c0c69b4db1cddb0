"""Small random decoders of every kind, compiled once for all tests, and batches for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.families import gemma, gpt2, llama, neox, opt
from prefix_jax.backbones.stacking import Params
from prefix_jax.backbones.starts import starts_from_text
from prefix_jax.data.batch import Batch, Example
from prefix_jax.data.pack import Packing, arrange, collate, measure
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.nn.remat import Remat

V = 50

_LLAMA = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": V,
    "max_position_embeddings": 64,
}
_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (gpt2, {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": V}),
    "llama": (llama, {"model_type": "llama", "tie_word_embeddings": True} | _LLAMA),
    # Untied, grouped, q/k norms, and a window in all layers but the first.
    "qwen3": (
        llama,
        {
            "model_type": "qwen3",
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        }
        | _LLAMA,
    ),
    "mistral": (llama, {"model_type": "mistral", "sliding_window": 4} | _LLAMA),
    # Soft caps that take effect, and a window in the first and the last layer.
    "gemma2": (
        gemma,
        {
            "model_type": "gemma2",
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 4,
        }
        | _LLAMA,
    ),
    # Two rotaries: the last layer has no window and other frequencies than the first two.
    "gemma3": (
        gemma,
        {
            "model_type": "gemma3_text",
            "head_dim": 16,
            "rope_theta": 1000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_local_base_freq": 100.0,
            "sliding_window": 4,
            "sliding_window_pattern": 3,
        }
        | _LLAMA,
    ),
    "opt": (
        opt,
        {
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "vocab_size": V,
            "max_position_embeddings": 64,
        },
    ),
    # Parallel attention and feed-forward network; half of each head rotates.
    "neox": (neox, {"rotary_pct": 0.5} | _LLAMA),
}


@functools.cache
def decoder(name: str, remat: Remat = "none") -> Backbone:
    """A decoder of 3 layers, D = 32 and V = 50."""
    family, config = _CONFIGS[name]
    return Backbone(family.architecture(config), remat)


def weights(backbone: Backbone, seed: int = 0, dtype: Any = jnp.float32) -> Params:
    """Random weights, large enough that attention is far from uniform. A new copy each time."""
    params = _init(backbone, jax.random.key(seed))
    return jax.tree.map(lambda x: (x * 5 if x.ndim > 1 else x).astype(dtype), params)


_init = jax.jit(Backbone.init, static_argnums=0)
hidden = jax.jit(Backbone.hidden, static_argnums=0)
lift = jax.jit(Backbone.lift, static_argnums=0)
read = jax.jit(starts_from_text, static_argnums=0)


def token_ids(*shape: int, seed: int = 0) -> jax.Array:
    """Random token ids."""
    return jax.random.randint(jax.random.key(seed), shape, 0, V)


def present(rows: int, columns: int) -> TokenLayout:
    """Rows without padding."""
    return TokenLayout.plain(jnp.ones((rows, columns), bool))


def examples(count: int, seed: int = 0) -> list[Example]:
    """Random examples of 5 to 9 tokens, of which 1 to 4 are targets. Some share their source."""
    rng = np.random.default_rng(seed)
    sources = [rng.integers(0, V, size) for size in rng.integers(4, 6, max(1, count // 2))]
    examples = []
    for number in range(count):
        source, target = sources[number % len(sources)], rng.integers(0, V, rng.integers(1, 5))
        ids = np.concatenate([source, target]).astype(np.int32)
        learnt = np.arange(len(ids)) >= len(source)
        examples.append(Example.of_text(ids, learnt, f"example {number}"))
    return examples


def batch_of(examples: Sequence[Example], accumulate: int = 1, rows_multiple: int = 1) -> Batch:
    """Packs examples into micro-batches."""
    packing = Packing(rows_multiple=rows_multiple, grad_accum_steps=accumulate)
    batch = collate(arrange(measure(examples), packing), examples)
    return batch if accumulate > 1 else jax.tree.map(lambda leaf: leaf[None], batch)
