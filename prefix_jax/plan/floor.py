"""What a step of prefix tuning has to compute, in floating-point operations."""

from __future__ import annotations

import dataclasses

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.prefix import Adapter, Embeds, Gated, Hidden, KVPrefix, Memory, Prefix, Produced


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least that a step computes in matrix products, by part; a multiply-add counts as two.

    With W the weights of one layer's matrices, D(N + 2K)H + NHD + 2DF (3DF if gated), and frozen:

        layers      4 · B·T · L·W           2 forward, 2 for the gradient of the activations; the
                                            2 for the gradient of the weights are not needed
        attention   12 · B·T · (T·L + P·J) · NH
                                            logits and mix take 2 each; their backward twice that:
                                            the gradients of weights, values, queries and keys. J
                                            layers have slots, in the softmax or beside it
                    6 · B·T · J · NHH       for a memory: its product, and the gradients of queries
                                            and memory
        head        4 · B·M · D·V           only where there is a target, as in `layers`
        lift        0                       for keys and values, and memories
                    4 · P · J·2DKH          for hidden and adapter states: their keys and values
                    4 · P · L·W + 12 · P·P · L·NH
                                            for soft tokens: a forward pass of one row of P

    Attention is dense: T keys for every query, masked or not. What the first layer could leave
    out (no gradient flows on from it to frozen embeddings) and what the last layer of the lift
    could is counted nevertheless, since scanned layers are all alike: less than 1/(2L) in all.
    Networks of a method's own that make what it produces are not counted.
    """

    layers: int
    attention: int
    head: int
    lift: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.layers + self.attention + self.head + self.lift


def floor(
    arch: Architecture, *, rows: int, tokens: int, targets: int, produced: Produced | None
) -> Floor:
    """The floor of one training step of a decoder.

    Args:
        arch: of the frozen backbone.
        rows: B.
        tokens: T, of each row.
        targets: M, of each row.
        produced: the (abstract) value that the method makes; None without a prefix.
    """
    L, D, F, V = arch.layers, arch.d_model, arch.d_ff, arch.vocab
    NH, KH = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    weights = D * (NH + 2 * KH) + NH * D + (3 if arch.gated else 2) * D * F
    slots, memories, lift = 0, 0, 0
    if isinstance(produced, Embeds):
        length = len(produced.x_PD)
        slots = length * L
        lift = 4 * length * L * weights + 12 * length * length * L * NH
    elif isinstance(produced, Hidden | Adapter):
        slots = produced.h_LPD.shape[0] * produced.h_LPD.shape[1]
        lift = 4 * slots * 2 * D * KH
    elif isinstance(produced, Prefix) and produced.decoder is not None:
        for part in (produced.decoder.join, produced.decoder.beside):
            if isinstance(part, KVPrefix | Gated):
                slots += part.k_LPKH.shape[0] * part.length
            elif isinstance(part, Memory):
                memories += part.m_LNHH.shape[0]
    return Floor(
        layers=4 * rows * tokens * L * weights,
        attention=12 * rows * tokens * (tokens * L + slots) * NH
        + 6 * rows * tokens * memories * NH * arch.head_dim,
        head=4 * rows * targets * D * V,
        lift=lift,
    )
