"""What a step of prefix tuning has to compute, in floating-point operations."""

from __future__ import annotations

import dataclasses

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.prefix import Embeds, Hidden, Prefix


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least that a step computes in matrix products, by part; a multiply-add counts as two.

    With W the weights of one layer's matrices, D(N + 2K)H + NHD + 2DF (3DF if gated), and frozen:

        layers      4 · B·T · L·W           2 forward, 2 for the gradient of the activations; the
                                            2 for the gradient of the weights are not needed
        attention   12 · B·T · (T + P) · L·NH
                                            logits and mix take 2 each; their backward twice that:
                                            the gradients of weights, values, queries and keys
        head        4 · B·M · D·V           only where there is a target, as in `layers`
        lift        0                       for keys and values
                    4 · P · L·2DKH          for hidden states: their keys and values
                    4 · P · L·W + 12 · P·P · L·NH
                                            for soft tokens: a forward pass of one row of P

    Attention is dense: T keys for every query, masked or not. What the first layer could leave
    out (no gradient flows on from it to frozen embeddings) and what the last layer of the lift
    could is counted nevertheless, since scanned layers are all alike: less than 1/(2L) in all.
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
    arch: Architecture,
    *,
    rows: int,
    tokens: int,
    targets: int,
    length: int,
    produces: type[Embeds] | type[Hidden] | type[Prefix],
) -> Floor:
    """The floor of one training step.

    Args:
        arch: of the frozen backbone.
        rows: B.
        tokens: T, of each row.
        targets: M, of each row.
        length: P.
        produces: what the method makes, which decides what the lift costs.
    """
    L, D, F, V = arch.layers, arch.d_model, arch.d_ff, arch.vocab
    NH, KH = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    weights = D * (NH + 2 * KH) + NH * D + (3 if arch.gated else 2) * D * F
    lift = {
        Prefix: 0,
        Hidden: 4 * length * L * 2 * D * KH,
        Embeds: 4 * length * L * weights + 12 * length * length * L * NH,
    }
    return Floor(
        layers=4 * rows * tokens * L * weights,
        attention=12 * rows * tokens * (tokens + length) * L * NH,
        head=4 * rows * targets * D * V,
        lift=lift[produces],
    )
