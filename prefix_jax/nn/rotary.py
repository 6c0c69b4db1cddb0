"""Rotary position embeddings (Su et al. 2021) and the scalings that checkpoints use."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.validation import (
    Count,
    NonNegativeFloat,
    PositiveFloat,
    Share,
    check_fields,
)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The frequencies of a rotary embedding.

    Attributes:
        theta: the base of the wavelengths.
        scaling: "none", "linear" (positions divided by `factor`), "llama3" (Llama 3.1: long
            wavelengths divided, short ones kept) or "yarn" (Peng et al. 2023).
        factor: the factor by which the context was extended.
        original_length: the context length before scaling (llama3 and yarn).
        low: llama3's low_freq_factor, or yarn's beta_slow.
        high: llama3's high_freq_factor, or yarn's beta_fast.
        attention: multiplies cos and sin; yarn's attention_factor.
        truncate: whether yarn rounds the bounds of its ramp to whole dimensions.
        share: the fraction of a head's dimensions that rotate (GPT-NeoX).
    """

    theta: PositiveFloat
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: PositiveFloat = 1.0
    original_length: Count = 0
    low: NonNegativeFloat = 1.0
    high: NonNegativeFloat = 1.0
    attention: NonNegativeFloat = 1.0
    truncate: bool = True
    share: Share = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError if a value has the wrong type or is out of range."""
        check_fields(self, error=ValueError)

    def check(self, head_dim: int) -> None:
        """Raises ValueError if heads of this size cannot be rotated."""
        turning = int(head_dim * self.share)
        if turning % 2:
            raise ValueError(f"{turning} of {head_dim} dimensions rotate, expected an even number")
        if self.scaling == "llama3" and self.high <= self.low:
            raise ValueError(
                f"high_freq_factor must be greater than low_freq_factor ({self.low}), "
                f"got {self.high}"
            )
        with np.errstate(all="ignore"):
            if not np.isfinite(self.frequencies(turning)).all():
                raise ValueError(f"{self} has frequencies that are not finite")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position, float32 [H / 2]."""
        plain = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.scaling == "none":
            scaled = plain
        elif self.scaling == "linear":
            scaled = plain / self.factor
        elif self.scaling == "llama3":
            wavelength = 2 * math.pi / plain
            keep = (self.original_length / wavelength - self.low) / (self.high - self.low)
            keep = np.clip(keep, 0, 1)
            scaled = keep * plain + (1 - keep) * plain / self.factor
        else:
            scaled = self._yarn(plain, head_dim)
        return scaled.astype(np.float32)

    def _yarn(self, plain: np.ndarray, head_dim: int) -> np.ndarray:
        def dimension(rotations: float) -> float:
            turns = self.original_length / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(self.theta))

        first, last = dimension(self.high), dimension(self.low)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = (np.arange(head_dim // 2) - first) / ((last - first) or 1e-3)
        keep = 1 - np.clip(ramp, 0, 1)
        return keep * plain + (1 - keep) * plain / self.factor

    def angles(self, position_BT: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """cos_BTH and sin_BTH of the rotated dimensions, float32. The second half repeats the
        first."""
        turning = int(head_dim * self.share)
        angle = position_BT[..., None].astype(jnp.float32) * self.frequencies(turning)
        angle = jnp.concatenate([angle, angle], axis=-1)
        return jnp.cos(angle) * self.attention, jnp.sin(angle) * self.attention


def rotate(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Rotates the two halves of each head by the angles of their positions.

    If there are fewer angles than H, only the first dimensions rotate.
    """
    turning = cos_BTH.shape[-1]
    x, rest = x_BTNH[..., :turning], x_BTNH[..., turning:]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    out = (x * cos_BTH[:, :, None] + turned * sin_BTH[:, :, None]).astype(x_BTNH.dtype)
    return jnp.concatenate([out, rest], axis=-1) if rest.shape[-1] else out
