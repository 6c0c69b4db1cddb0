"""The floor is the sum of the operations of all parts."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.families import gpt2, llama, t5
from prefix_jax.methods import (
    HiddenPrefixTuning,
    LlamaAdapter,
    Method,
    MultitaskPromptTuning,
    PrefixTuning,
    PrefixTuningPlus,
    PromptTuning,
)
from prefix_jax.plan.floor import floor
from prefix_jax.prefix import Embeds, Prefix, Produced

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
    """Abstract output of a method for the Llama."""
    return jax.eval_shape(lambda: method(method.init(jax.random.key(0), LLAMA.geometry, None)))


PREFIX = made_by(PrefixTuning(5))


@pytest.mark.parametrize("arch", [LLAMA, GPT2])
def test_layers_cost_four_times_their_weights_per_token(arch: llama.Architecture) -> None:
    params = jax.eval_shape(Backbone(arch).init, jax.random.key(0))
    matrices = [leaf for path, leaf in jax.tree.leaves_with_path(params["layers"])
                if "bias" not in str(path[-1]) and leaf.ndim > 2]  # fmt: skip
    weights = sum(math.prod(leaf.shape) for leaf in matrices)
    assert floor(arch, **SHAPE, produced=None).layers == 4 * 2 * 10 * weights


def test_attention_covers_tokens_and_prefix() -> None:
    def attention(produced: Produced | None) -> int:
        return floor(LLAMA, **SHAPE, produced=produced).attention

    a_slot = 12 * 2 * 10 * 48
    assert attention(None) == 10 * 3 * a_slot
    assert attention(PREFIX) == (10 + 5) * 3 * a_slot
    assert attention(made_by(HiddenPrefixTuning(5))) == (10 + 5) * 3 * a_slot
    assert attention(made_by(PromptTuning(5))) == (10 + 5) * 3 * a_slot
    # Only some layers have slots.
    assert attention(made_by(PrefixTuning(5, layers=(1,)))) == (10 * 3 + 5) * a_slot
    assert attention(made_by(LlamaAdapter(5, layers=2))) == (10 * 3 + 5 * 2) * a_slot


def test_memory_costs_one_slot_per_two_features() -> None:
    plus = floor(LLAMA, **SHAPE, produced=made_by(PrefixTuningPlus()))
    bare = floor(LLAMA, **SHAPE, produced=None)
    assert plus.attention - bare.attention == 6 * 2 * 10 * 3 * 48 * 8


def test_head_counts_only_targets() -> None:
    assert floor(LLAMA, **SHAPE, produced=PREFIX).head == 4 * 2 * 4 * 24 * 100


def test_lift_is_free_for_keys_and_values_and_one_short_row_for_soft_tokens() -> None:
    def lift(method: Method) -> int:
        return floor(LLAMA, **SHAPE, produced=made_by(method)).lift

    one_row = floor(LLAMA, rows=1, tokens=5, targets=0, produced=None)
    assert lift(PrefixTuning(5)) == lift(PrefixTuningPlus()) == 0
    assert lift(PromptTuning(5)) == one_row.total
    assert lift(HiddenPrefixTuning(5)) == 4 * 5 * 3 * 2 * 24 * 16
    assert lift(LlamaAdapter(5, layers=2)) == 4 * 5 * 2 * 2 * 24 * 16


def test_lift_of_a_bank_is_one_row_per_prefix() -> None:
    alone = floor(LLAMA, **SHAPE, produced=made_by(MultitaskPromptTuning(5)))
    bank = made_by(MultitaskPromptTuning(5, datasets=("a", "b", "c")))
    together = floor(LLAMA, **SHAPE, produced=bank)
    assert together.lift == 3 * alone.lift
    # Attention is dense: every token has all slots of the bank as keys.
    assert together.attention == floor(LLAMA, **SHAPE, produced=made_by(PromptTuning(15))).attention


def test_total_is_the_sum_of_all_parts() -> None:
    least = floor(LLAMA, **SHAPE, produced=made_by(HiddenPrefixTuning(5)))
    assert least.total == sum(dataclasses.asdict(least).values())


P = 5
T5 = t5.architecture(tiny.T5_CONFIG)
TWO_SIDED = {"rows": 2, "tokens": 10, "targets": 4, "source": 30}


class TestEncoderDecoders:
    @staticmethod
    def produced(*sites: str) -> Prefix:
        method = PrefixTuning(P, sites=sites)
        geometry = T5.geometry
        return jax.eval_shape(lambda: method(method.init(jax.random.key(0), geometry, None)))

    def test_layers_include_encoder_and_decoder(self) -> None:
        params = jax.eval_shape(Backbone(T5).init, jax.random.key(0))

        def matrices(layers: Any, *names: str) -> int:
            return sum(
                leaf.size
                for path, leaf in jax.tree.leaves_with_path(layers)
                if leaf.ndim > 2 and path[0].key in names
            )

        decoder, encoder = params["layers"], params["encoder"]["layers"]
        memory = sum(decoder["cross"][name].size for name in ("k_DKH", "v_DKH"))
        least = floor(T5, **TWO_SIDED, produced=self.produced("encoder")).layers
        assert least == 4 * 2 * (
            30 * (matrices(encoder, "attn", "mlp") + memory)
            + 10 * (matrices(decoder, "attn", "mlp", "cross") - memory)
        )

    def test_attention_covers_the_slots_of_every_site(self) -> None:
        NH, everywhere = 40, self.produced("encoder", "decoder", "cross")
        assert floor(T5, **TWO_SIDED, produced=everywhere).attention == 12 * 2 * NH * (
            30 * (30 + P) * 3 + 10 * (10 + P) * 2 + 10 * (30 + P) * 2
        )

    def test_soft_tokens_extend_the_source(self) -> None:
        soft = Embeds(jax.ShapeDtypeStruct((P, 32), jnp.float32))
        longer = TWO_SIDED | {"source": 30 + P}
        bare = floor(T5, **longer, produced=self.produced("encoder"))
        minimum = floor(T5, **TWO_SIDED, produced=soft)
        assert (minimum.layers, minimum.lift) == (bare.layers, 0)

    def test_bank_extends_each_source_by_one_prefix(self) -> None:
        x_PD = jax.ShapeDtypeStruct((P, 32), jnp.float32)
        bank = jax.ShapeDtypeStruct((3 * P, 32), jnp.float32)
        alone, together = Embeds(x_PD), Embeds(bank, bank_size=3)
        assert floor(T5, **TWO_SIDED, produced=together) == floor(T5, **TWO_SIDED, produced=alone)

    def test_frozen_encoder_has_no_backward_pass(self) -> None:
        through = floor(T5, **TWO_SIDED, produced=self.produced("encoder"))
        beside = floor(T5, **TWO_SIDED, produced=self.produced("decoder"))
        writing = floor(T5, **TWO_SIDED | {"source": 0}, produced=None).layers
        assert 2 * beside.layers - writing == through.layers
