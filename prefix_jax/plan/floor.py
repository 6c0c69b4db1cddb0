"""Minimum floating-point operations of a prefix tuning step."""

from __future__ import annotations

import dataclasses

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.prefix import (
    Adapter,
    Embeds,
    Gated,
    Hidden,
    KVPrefix,
    Memory,
    Prefix,
    Produced,
    Site,
)


@dataclasses.dataclass(frozen=True)
class Floor:
    """Minimum operations of a step in matrix products, by part. A multiply-add counts as two.

    W is the number of weights in one layer's matrices, D(N + 2K)H + NHD + 2DF (3DF if gated). They
    are frozen:

        layers      4 · B·T · L·W           2 forward and 2 for the gradient of the activations;
                                            the 2 for the gradient of the weights are not needed
        attention   12 · B·T · (T·L + P·J) · NH
                                            logits and weighted sum are 2 each; their backward pass
                                            is twice that: the gradients of weights, values, queries
                                            and keys. J layers have slots, inside or outside the
                                            softmax
                    6 · B·T · J · NHH       for a memory: its product, and the gradients of queries
                                            and memory
        head        4 · B·M · D·V           like `layers`, only at targets
        lift        0                       for keys and values, and memories
                    4 · P · J·2DKH          for hidden and adapter states: their keys and values
                    4 · P · L·W + 12 · P·P · L·NH
                                            for soft tokens: a forward pass of one row of P (in a
                                            bank, of one row per prefix)

    Attention is dense: T keys for every query, masked or not. The gradient of the first layer's
    input, which frozen embeddings do not need, and the end of the last layer of the lift are
    counted although they could be omitted, because all scanned layers are equal: together less than
    1/(2L). A method's own networks are not counted.

    An encoder-decoder also reads sources of S tokens. Soft tokens (in a bank, those of one prefix)
    extend a source by P and need no lift. The encoder has its own W, L, N and H, and each decoder
    layer has the projections of an attention from T to S:

        layers      4 · B·S · L·W           of the encoder
                    4 · B · L · (T·2DNH + S·2DKH)
        attention   12 · B·S · (S·L + P·J) · NH
                                            of the encoder
                    12 · B·T · (S·L + P·J) · NH
                                            from the decoder

    If nothing at the encoder is trained, no gradient flows back into it: its factors, and those of
    the keys and values of S, become 2 instead of 4 and 4 instead of 12; the attention of the T
    queries to S has a factor of 8.
    """

    layers: int
    attention: int
    head: int
    lift: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.layers + self.attention + self.head + self.lift


def floor(
    arch: Architecture,
    *,
    rows: int,
    tokens: int,
    targets: int,
    produced: Produced | None,
    source: int = 0,
) -> Floor:
    """Computes the floor of one training step of a decoder or an encoder-decoder.

    Args:
        arch: architecture of the frozen backbone.
        rows: B.
        tokens: T per row.
        targets: M per row.
        produced: the (abstract) output of the method; None without a prefix.
        source: S, the encoder tokens per row.
    """
    L, D = arch.layers, arch.d_model
    NH, KH = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    weights = _weights(arch)
    at = _Added.of(produced.decoder) if isinstance(produced, Prefix) else _Added()
    lift = 0
    soft, prompts = 0, 1
    if isinstance(produced, Embeds):
        prompts = produced.bank_size or 1
        soft = len(produced.x_PD) // prompts
    if soft and arch.encoder is None:
        at = _Added(slots=prompts * soft * L)
        lift = prompts * (4 * soft * L * weights + 12 * soft * soft * L * NH)
    elif isinstance(produced, Hidden | Adapter):
        at = _Added(slots=produced.h_LPD.shape[0] * produced.h_LPD.shape[1])
        lift = 4 * at.slots * 2 * D * KH
    layers = 4 * tokens * L * weights
    attention = at.cost(tokens, 12 * tokens * L, arch)
    if arch.encoder is not None:
        encoder, S = arch.encoder, source + soft
        sites = produced if isinstance(produced, Prefix) else Prefix()
        through = soft > 0 or sites.encoder is not None
        back = 4 if through else 2
        layers += back * S * (encoder.layers * _weights(encoder) + L * 2 * D * KH)
        layers += 4 * tokens * L * 2 * D * NH
        own = (12 if through else 4) * S * encoder.layers
        attention += _Added.of(sites.encoder).cost(S, own, encoder)
        across = (12 if through else 8) * S * L
        attention += _Added.of(sites.cross).cost(tokens, across, arch)
    return Floor(
        layers=rows * layers,
        attention=rows * attention,
        head=4 * rows * targets * D * arch.vocab,
        lift=lift,
    )


@dataclasses.dataclass(frozen=True)
class _Added:
    """Slots and memories that a prefix adds to an attention, over all layers.

    Attributes:
        slots: P · J.
        memories: J.
    """

    slots: int = 0
    memories: int = 0

    @classmethod
    def of(cls, site: Site | None) -> _Added:
        slots = memories = 0
        for part in () if site is None else (site.inside, site.outside):
            if isinstance(part, KVPrefix | Gated):
                slots += part.k_LPKH.shape[0] * part.length
            elif isinstance(part, Memory):
                memories += part.m_LNHH.shape[0]
        return cls(slots, memories)

    def cost(self, queries: int, tokens: int, arch: Architecture) -> int:
        """Operations of an attention of `queries` queries, each of which costs `tokens` · NH
        without a prefix."""
        NH = arch.heads * arch.head_dim
        return queries * NH * (tokens + 12 * self.slots + 6 * self.memories * arch.head_dim)


def _weights(arch: Architecture) -> int:
    """W, for self-attention and feed-forward."""
    D, NH, KH = arch.d_model, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    return D * (NH + 2 * KH) + NH * D + (3 if arch.gated else 2) * D * arch.d_ff
