"""The floor is the sum of what every part has to compute."""

import dataclasses
import math

import jax
import pytest

from prefix_jax.backbones import gpt2, llama
from prefix_jax.backbones.backbone import Backbone
from prefix_jax.plan.floor import floor
from prefix_jax.prefix import Embeds, Hidden, Prefix

LLAMA = llama.architecture(
    {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 40,
        "vocab_size": 100,
    }
)
GPT2 = gpt2.architecture(
    {
        "model_type": "gpt2",
        "n_layer": 3,
        "n_embd": 24,
        "n_head": 6,
        "n_positions": 64,
        "vocab_size": 100,
    }
)
SHAPE = {"rows": 2, "tokens": 10, "targets": 4, "length": 5}


@pytest.mark.parametrize("arch", [LLAMA, GPT2])
def test_layers_cost_four_times_their_matrices_a_token(arch: llama.Architecture) -> None:
    params = jax.eval_shape(Backbone(arch).init, jax.random.key(0))
    matrices = [leaf for path, leaf in jax.tree.leaves_with_path(params["layers"])
                if "bias" not in str(path[-1]) and leaf.ndim > 2]  # fmt: skip
    weights = sum(math.prod(leaf.shape) for leaf in matrices)
    assert floor(arch, **SHAPE, produces=Prefix).layers == 4 * 2 * 10 * weights


def test_attention_reads_tokens_and_prefix() -> None:
    assert floor(LLAMA, **SHAPE, produces=Prefix).attention == 12 * 2 * 10 * 15 * 3 * 48


def test_the_head_counts_targets_alone() -> None:
    assert floor(LLAMA, **SHAPE, produces=Prefix).head == 4 * 2 * 4 * 24 * 100


def test_the_lift_is_free_for_keys_and_values_and_one_short_row_for_soft_tokens() -> None:
    one_row = floor(LLAMA, rows=1, tokens=5, targets=0, length=0, produces=Prefix)
    assert floor(LLAMA, **SHAPE, produces=Prefix).lift == 0
    assert floor(LLAMA, **SHAPE, produces=Embeds).lift == one_row.total
    assert floor(LLAMA, **SHAPE, produces=Hidden).lift == 4 * 5 * 3 * 2 * 24 * 16


def test_the_total_is_all_parts() -> None:
    least = floor(LLAMA, **SHAPE, produces=Hidden)
    assert least.total == sum(dataclasses.asdict(least).values())
