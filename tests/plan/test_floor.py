"""The floor is the sum of what every part has to compute."""

import dataclasses
import math

import jax
import pytest

from prefix_jax.backbones import gpt2, llama
from prefix_jax.backbones.backbone import Backbone
from prefix_jax.methods import (
    HiddenPrefixTuning,
    LlamaAdapter,
    Method,
    PrefixTuning,
    PrefixTuningPlus,
    PromptTuning,
)
from prefix_jax.plan.floor import floor
from prefix_jax.prefix import Produced

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
SHAPE = {"rows": 2, "tokens": 10, "targets": 4}


def made_by(method: Method) -> Produced:
    """What it produces for the Llama, abstractly."""
    return jax.eval_shape(lambda: method(method.init(jax.random.key(0), LLAMA.geometry, None)))


PREFIX = made_by(PrefixTuning(5))


@pytest.mark.parametrize("arch", [LLAMA, GPT2])
def test_layers_cost_four_times_their_matrices_a_token(arch: llama.Architecture) -> None:
    params = jax.eval_shape(Backbone(arch).init, jax.random.key(0))
    matrices = [leaf for path, leaf in jax.tree.leaves_with_path(params["layers"])
                if "bias" not in str(path[-1]) and leaf.ndim > 2]  # fmt: skip
    weights = sum(math.prod(leaf.shape) for leaf in matrices)
    assert floor(arch, **SHAPE, produced=None).layers == 4 * 2 * 10 * weights


def test_attention_reads_tokens_and_prefix() -> None:
    def attention(produced: Produced | None) -> int:
        return floor(LLAMA, **SHAPE, produced=produced).attention

    a_slot = 12 * 2 * 10 * 48
    assert attention(None) == 10 * 3 * a_slot
    assert attention(PREFIX) == (10 + 5) * 3 * a_slot
    assert attention(made_by(HiddenPrefixTuning(5))) == (10 + 5) * 3 * a_slot
    assert attention(made_by(PromptTuning(5))) == (10 + 5) * 3 * a_slot
    # Where some layers have slots alone.
    assert attention(made_by(PrefixTuning(5, layers=(1,)))) == (10 * 3 + 5) * a_slot
    assert attention(made_by(LlamaAdapter(5, layers=2))) == (10 * 3 + 5 * 2) * a_slot


def test_a_memory_costs_as_much_as_a_slot_for_every_two_features() -> None:
    plus = floor(LLAMA, **SHAPE, produced=made_by(PrefixTuningPlus()))
    bare = floor(LLAMA, **SHAPE, produced=None)
    assert plus.attention - bare.attention == 6 * 2 * 10 * 3 * 48 * 8


def test_the_head_counts_targets_alone() -> None:
    assert floor(LLAMA, **SHAPE, produced=PREFIX).head == 4 * 2 * 4 * 24 * 100


def test_the_lift_is_free_for_keys_and_values_and_one_short_row_for_soft_tokens() -> None:
    def lift(method: Method) -> int:
        return floor(LLAMA, **SHAPE, produced=made_by(method)).lift

    one_row = floor(LLAMA, rows=1, tokens=5, targets=0, produced=None)
    assert lift(PrefixTuning(5)) == lift(PrefixTuningPlus()) == 0
    assert lift(PromptTuning(5)) == one_row.total
    assert lift(HiddenPrefixTuning(5)) == 4 * 5 * 3 * 2 * 24 * 16
    assert lift(LlamaAdapter(5, layers=2)) == 4 * 5 * 2 * 2 * 24 * 16


def test_the_total_is_all_parts() -> None:
    least = floor(LLAMA, **SHAPE, produced=made_by(HiddenPrefixTuning(5)))
    assert least.total == sum(dataclasses.asdict(least).values())
