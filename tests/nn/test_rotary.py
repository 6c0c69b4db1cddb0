"""Rotary frequencies and scalings match the formulas of their sources."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.nn.rotary import Rotary, rotate


def test_plain_frequencies_are_powers_of_theta():
    np.testing.assert_allclose(Rotary(10000.0).frequencies(8), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_linear_scaling_divides_positions():
    plain, scaled = Rotary(10000.0), Rotary(10000.0, "linear", factor=4.0)
    position = jnp.array([[0, 4, 40]])
    for ours, theirs in zip(
        scaled.angles(position, 8), plain.angles(position // 4, 8), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_llama3_keeps_short_wavelengths_divides_long_ones_and_interpolates_between():
    """Llama 3.1's published values: theta 500000, factor 8, bounds 1 and 4, context 8192."""
    rotary = Rotary(500000.0, "llama3", 8.0, 8192, low=1.0, high=4.0)
    plain, scaled = Rotary(500000.0).frequencies(128), rotary.frequencies(128)
    wavelength = 2 * np.pi / plain.astype(np.float64)
    short, long = wavelength < 8192 / 4, wavelength > 8192 / 1
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    for index in np.flatnonzero(~short & ~long):
        smooth = (8192 / wavelength[index] - 1) / (4 - 1)
        expected = (1 - smooth) * plain[index] / 8 + smooth * plain[index]
        np.testing.assert_allclose(scaled[index], expected, rtol=1e-5)
    assert (~short & ~long).sum() > 3


@pytest.mark.parametrize("high", [0.5, 1.0])
def test_llama3_needs_a_high_factor_above_the_low_one(high):
    rotary = Rotary(500000.0, "llama3", 8.0, 8192, low=1.0, high=high)
    with pytest.raises(ValueError, match="high_freq_factor must be greater than low_freq_factor"):
        rotary.check(64)


def test_yarn_interpolates_slow_dimensions_and_keeps_fast_ones():
    """Peng et al. 2023, equations 17 to 23, with the rounding of their code."""
    theta, H, original, factor = 10000.0, 64, 2048, 4.0
    scaled = Rotary(theta, "yarn", factor, original, low=1.0, high=32.0).frequencies(H)
    plain = Rotary(theta).frequencies(H)

    def dimension(rotations: float) -> float:
        return H * np.log(original / (rotations * 2 * np.pi)) / (2 * np.log(theta))

    first, last = np.floor(dimension(32)), np.ceil(dimension(1))
    assert 0 < first < last < H // 2
    for d in range(H // 2):
        slow = np.clip((d - first) / (last - first), 0, 1)
        expected = slow * plain[d] / factor + (1 - slow) * plain[d]
        np.testing.assert_allclose(scaled[d], expected, rtol=1e-5)


def test_yarn_without_rounding_has_fractional_ramp_bounds():
    arguments = (10000.0, "yarn", 4.0, 2048, 1.0, 32.0)
    rounded = Rotary(*arguments).frequencies(64)
    exact = Rotary(*arguments, truncate=False).frequencies(64)
    assert not np.allclose(rounded, exact, rtol=1e-3)
    np.testing.assert_allclose(rounded[[0, -1]], exact[[0, -1]], rtol=1e-6)


def test_attention_scales_cos_and_sin():
    plain, hot = Rotary(100.0), Rotary(100.0, attention=1.5)
    position = jnp.arange(5)[None]
    for ours, theirs in zip(hot.angles(position, 4), plain.angles(position, 4), strict=True):
        np.testing.assert_allclose(ours, 1.5 * theirs, rtol=1e-6)


def test_rotation_keeps_norms_and_products_depend_only_on_distance():
    rotary, H = Rotary(100.0), 8
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, H))

    def at(x: jax.Array, position: int) -> jax.Array:
        return rotate(x, *rotary.angles(jnp.array([[position]]), H))[0, 0, 0]

    np.testing.assert_allclose(at(q, 0), q[0, 0, 0], rtol=1e-6)
    assert float(jnp.linalg.norm(at(q, 7))) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-5)
    near = at(q, 5) @ at(k, 2)
    assert float(near) == pytest.approx(float(at(q, 103) @ at(k, 100)), abs=1e-4)
    assert float(near) != pytest.approx(float(at(q, 6) @ at(k, 2)), abs=1e-3)


def test_rotation_pairs_dimensions_of_the_two_halves():
    """Dimension i rotates with dimension i + H/2, as in Hugging Face checkpoints."""
    rotary = Rotary(100.0)
    x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)
    out = rotate(x, *rotary.angles(jnp.array([[1]]), 4))[0, 0, 0]
    np.testing.assert_allclose(out, [np.cos(1), 0, np.sin(1), 0], atol=1e-6)


def test_bfloat16_stays_bfloat16():
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    assert rotate(x, *Rotary(100.0).angles(jnp.array([[3]]), 4)).dtype == jnp.bfloat16


def test_share_rotates_only_the_first_dimensions():
    """A head of 8 with share 0.5 is a rotated head of 4 and 4 unchanged dimensions."""
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    position = jnp.array([[0, 5, 90]])
    angles = Rotary(100.0, share=0.5).angles(position, 8)
    assert angles[0].shape == (1, 3, 4)
    out = rotate(x, *angles)
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(
        out[..., :4], rotate(x[..., :4], *Rotary(100.0).angles(position, 4))
    )
