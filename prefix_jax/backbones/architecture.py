"""Architecture: the numbers and variants that define a transformer of any family."""

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

# The positions of a model without a maximum length (T5).
UNLIMITED = 2**31 - 1

_LAYER_KINDS = ("full_attention", "sliding_attention")

Norm = Literal["rms", "rms_plus_one", "layer"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape and the variant of a stack of transformer layers, and of the model around it.

    A decoder-only or encoder-only model is one stack. An encoder-decoder is the architecture of its
    decoder, with that of its encoder in `encoder`.

    Attributes:
        model_type: `model_type` in the checkpoint's configuration ("mistral", "qwen3", …).
        layers: L.
        d_model: D.
        heads, kv_heads, head_dim: N, K and H.
        d_ff: F.
        vocab: V.
        max_positions: the length of the position table, or the longest context that the model
            was trained for, including the prefix. A decoder and its encoder each have their own.
        norm: "rms", "rms_plus_one" (its scale is stored as the difference from 1, as in Gemma) or
            "layer".
        epsilon: epsilon of the norms.
        activation: activation of the feed-forward network, by its Hugging Face name.
        gated: whether the feed-forward network has a gate.
        causal: whether tokens attend to earlier tokens only; False is an encoder.
        norm_at: where a sublayer f is normalised: "before" x + f(norm(x)), "after"
            norm(x + f(x)), or "around" x + norm(f(norm(x))).
        final_norm: whether a norm follows the last layer.
        parallel: whether attention and feed-forward network have the same input (GPT-NeoX).
        rotary: rotary frequencies; None for learned or relative positions.
        sliding_rotary: rotary frequencies of sliding layers, if they differ (Gemma 3).
        relative: buckets of relative positions (T5), or None.
        positions: rows of the table of learned positions; 0 if there is none.
        position_offset: the row of position 0: 2 in BART and OPT, after the padding's in RoBERTa.
        token_types: rows of the table of token types (BERT); 0 if there is none.
        own_tokens: whether the encoder has its own token embeddings (an untied BART or T5).
        embed_dim: width of the embeddings, which a projection maps to D (ELECTRA); None for D.
        embed_scale: multiplies the token embeddings.
        embed_norm: whether a norm follows the embeddings.
        qkv_bias, out_bias, mlp_bias: whether these projections have biases.
        qk_norm: whether queries and keys are normalised per head (Qwen 3, Gemma 3).
        attention_scale: multiplies the logits of attention; None for H ** -0.5.
        attention_softcap, logit_softcap: bounds of attention's and of the head's logits (Gemma 2).
        window: sliding-window size in positions, including the query's own.
        sliding: for every layer, whether it has the window; empty if no layer has.
        tied: whether the head is the token embedding.
        head_scale: multiplies the input of a tied head (T5).
        head_bias: whether the head has a bias.
        pooler: whether the checkpoint has a pretrained pooler of the first token (BERT).
        encoder: the encoder that this decoder attends to; None for a single stack.
        start_id: the first input token of an encoder-decoder's decoder.
        first_id: the forced first output token, or None (BART, for summaries).
        last_id: the forced output token at the maximum length, or None (BART).
        end_ids: tokens that end a text according to the checkpoint's files. Generation adds those
            of the tokenizer (`data.ends`).
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
        """Raises ValueError or BackboneError if no model can have these values."""
        check_fields(self, error=ValueError)
        activation(self.activation)
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads are not a multiple of {self.kv_heads} key/value heads"
            )
        if self.sliding and len(self.sliding) != self.layers:
            raise ValueError(
                f"sliding has {len(self.sliding)} entries, expected {self.layers}, one per layer"
            )
        for rotary in (self.rotary, self.sliding_rotary):
            if rotary is not None:
                rotary.check(self.head_dim)

    @property
    def geometry(self) -> Geometry:
        """The dimensions that a prefix depends on."""
        shape = self._site
        if self.encoder is not None:
            sites = {"decoder": shape, "cross": shape, "encoder": self.encoder._site}
        else:
            sites = {"decoder" if self.causal else "encoder": shape}
        return Geometry(self.d_model, self.vocab, **sites, embed_dim=self.embed_dim)

    @property
    def _site(self) -> SiteShape:
        return SiteShape(self.layers, self.heads, self.kv_heads, self.head_dim)


def layer_kinds(config: Mapping[str, Any], layers: int) -> Sequence[str] | None:
    """The `layer_types` of a configuration, or None.

    Raises:
        BackboneError: it does not list one of the two supported kinds for every layer.
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
    """The architecture of an encoder-decoder, with the forced tokens of its outputs.

    Args:
        encoder, decoder: the two stacks.
        config: a Hugging Face configuration.
        start: the key of the decoder's first input token if `decoder_start_token_id` is absent.

    Raises:
        BackboneError: one of these keys is not a single token id.
    """

    def token(key: str) -> int | None:
        token_id = config.get(key)
        if token_id is None:
            return None
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise BackboneError(f"{key} is {token_id!r}; only a single token is supported")
        if not 0 <= token_id < decoder.vocab:
            raise BackboneError(
                f"{key} is {token_id}, outside the vocabulary (size {decoder.vocab}); "
                "copy the value from the original checkpoint"
            )
        return token_id

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
