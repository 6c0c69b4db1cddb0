"""What a transformer looks like, whatever its family: the numbers that shape it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prefix_jax.errors import BackboneError
from prefix_jax.nn.activations import activation
from prefix_jax.nn.relative import Relative
from prefix_jax.nn.rotary import Rotary
from prefix_jax.prefix import Geometry, SiteShape
from prefix_jax.validation import Count, PositiveFloat, PositiveInt, Probability, check_fields

# The positions of a model whose table and training set no bound (T5).
UNLIMITED = 2**31 - 1

_LAYER_KINDS = ("full_attention", "sliding_attention")

Norm = Literal["rms", "rms_plus_one", "layer"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape and the variant of a stack of transformer layers, and of the model around it.

    A decoder and an encoder are one such stack. An encoder-decoder is the decoder's, with the
    encoder's in `encoder`.

    Attributes:
        model_type: the name that its checkpoint gives itself ("mistral", "qwen3", …).
        layers: L.
        d_model: D.
        heads, kv_heads, head_dim: N, K and H.
        d_ff: F.
        vocab: V.
        max_positions: the length of the position table, or the longest context that the model
            was trained for; prefix included. Of a decoder and its encoder, each has its own.
        norm: "rms", "rms_plus_one" (its stored scale counts from 1, as Gemma's) or "layer".
        epsilon: of the norms.
        activation: of the feed-forward, by its Hugging Face name.
        gated: whether the feed-forward has a gate.
        causal: whether a token sees earlier ones alone; False is an encoder.
        norm_at: where a sublayer f is normalised: "before" x + f(norm(x)), "after"
            norm(x + f(x)), or "around" x + norm(f(norm(x))).
        final_norm: whether a norm follows the last layer.
        parallel: attention and feed-forward read the same input and are added up (GPT-NeoX).
        rotary: rotary frequencies; None where positions are learned or relative.
        sliding_rotary: those of sliding layers; None for `rotary` (Gemma 3 has two).
        relative: buckets of relative positions (T5); None for none.
        positions: rows of the table of learned positions; 0 for none.
        position_offset: the row of position 0 (BART and OPT have 2, RoBERTa one behind padding).
        token_types: rows of the table of token types (BERT); 0 if there is none.
        own_tokens: whether an encoder embeds tokens with a table of its own and not the decoder's
            (an untied BART or T5).
        embed_dim: width of the embeddings, which a projection brings to D (ELECTRA); None for D.
        embed_scale: multiplies the token embeddings.
        embed_norm: whether a norm follows the embeddings.
        qkv_bias, out_bias, mlp_bias: which projections add biases.
        qk_norm: whether queries and keys are normalised per head (Qwen 3).
        attention_scale: multiplies attention's logits; None for H ** -0.5.
        attention_softcap, logit_softcap: bounds of attention's and of the head's logits (Gemma 2).
        window: how many positions back a sliding layer sees, its own included.
        sliding: for every layer, whether it uses `window`.
        tied: whether the head is the token embedding.
        head_scale: multiplies what a tied head reads (T5).
        head_bias: whether the head adds a bias.
        pooler: whether the checkpoint has the layer through which a pretrained encoder gave its
            first token to a head (BERT).
        encoder: the stack whose output this one attends to; None for a single stack.
        start_id: the token that a decoder with an encoder begins with.
        first_id: the token that it has to write first; None for any (BART, for summaries).
        last_id: the token that it has to write at the greatest length; None for any (BART).
        end_ids: tokens that end a text according to the checkpoint's files; those of the tokenizer
            are added where text is generated (`data.ends`).
    """

    model_type: str
    layers: PositiveInt
    d_model: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    d_ff: PositiveInt
    vocab: PositiveInt
    max_positions: PositiveInt
    norm: Norm
    epsilon: Probability
    activation: str
    gated: bool
    causal: bool = True
    norm_at: Literal["before", "after", "around"] = "before"
    final_norm: bool = True
    parallel: bool = False
    rotary: Rotary | None = None
    sliding_rotary: Rotary | None = None
    relative: Relative | None = None
    positions: Count = 0
    position_offset: Count = 0
    token_types: Count = 0
    own_tokens: bool = False
    embed_dim: PositiveInt | None = None
    embed_scale: PositiveFloat | None = None
    embed_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: PositiveFloat | None = None
    attention_softcap: PositiveFloat | None = None
    logit_softcap: PositiveFloat | None = None
    window: PositiveInt | None = None
    sliding: tuple[bool, ...] = ()
    tied: bool = True
    head_scale: PositiveFloat | None = None
    head_bias: bool = False
    pooler: bool = False
    encoder: Architecture | None = None
    start_id: Count | None = None
    first_id: Count | None = None
    last_id: Count | None = None
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError or BackboneError where no model could have these values."""
        check_fields(self, error=ValueError)
        activation(self.activation)
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} key/value heads do not share {self.heads} heads")
        if self.sliding and len(self.sliding) != self.layers:
            raise ValueError(f"{len(self.sliding)} layers have a kind, expected {self.layers}")
        for rotary in (self.rotary, self.sliding_rotary):
            if rotary is not None:
                rotary.check(self.head_dim)

    @property
    def geometry(self) -> Geometry:
        """The part of the shape that a prefix has to match."""
        own = self._site
        if self.encoder is not None:
            sites = {"decoder": own, "cross": own, "encoder": self.encoder._site}
        else:
            sites = {"decoder" if self.causal else "encoder": own}
        return Geometry(self.d_model, self.vocab, **sites, embed_dim=self.embed_dim)

    @property
    def _site(self) -> SiteShape:
        return SiteShape(self.layers, self.heads, self.kv_heads, self.head_dim)


def layer_kinds(config: Mapping[str, Any], layers: int) -> Sequence[str] | None:
    """The `layer_types` of a configuration; None where it has none.

    Raises:
        BackboneError: they are not one of the two kinds that are supported for every layer.
    """
    kinds: Sequence[str] | None = config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise BackboneError(f"layer_types must list one kind for each of {layers} layers")
    if other := [kind for kind in kinds if kind not in _LAYER_KINDS]:
        raise BackboneError(f"layer_types has {other[0]!r}; supported: {', '.join(_LAYER_KINDS)}")
    return kinds


def encoder_decoder(
    encoder: Architecture, decoder: Architecture, config: Mapping[str, Any], start: str
) -> Architecture:
    """The decoder's architecture with its encoder, and with the tokens that frame what it writes.

    Args:
        encoder, decoder: the two stacks.
        config: a Hugging Face configuration.
        start: the key of the token that it begins with where the configuration does not say.

    Raises:
        BackboneError: one of these is not one token.
    """

    def token(key: str) -> int | None:
        found = config.get(key)
        if found is None:
            return None
        if not isinstance(found, int) or isinstance(found, bool):
            raise BackboneError(f"{key} is {found!r}; only a single token is supported")
        if not 0 <= found < decoder.vocab:
            raise BackboneError(
                f"{key} is {found}, outside the vocabulary (size {decoder.vocab}); "
                "copy the value from the original checkpoint"
            )
        return found

    start_id = token("decoder_start_token_id")
    if start_id is None and config[start] is not None:
        start_id = token(start)
    return dataclasses.replace(
        decoder,
        encoder=encoder,
        start_id=start_id,
        first_id=token("forced_bos_token_id"),
        last_id=token("forced_eos_token_id"),
    )
