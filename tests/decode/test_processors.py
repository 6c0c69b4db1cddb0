"""Tests that processors match those of transformers (`tests/fixtures/make_decode.py`)."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.decode.processors import (
    Constraints,
    Sampling,
    constrain,
    forbid_ngrams,
    forbid_words,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    warp,
)

EXPECTED = np.load(Path(__file__).parents[1] / "fixtures" / "processors.npz")
IDS, SCORES = jnp.asarray(EXPECTED["ids"]), jnp.asarray(EXPECTED["scores"])
LENGTH = np.full(len(IDS), IDS.shape[1])
END = jnp.int32(9)
BANNED = (
    np.array([[7]]),
    np.array([[IDS[0, -1], 9]]),
    np.array([[IDS[1, -2], IDS[1, -1], 10]]),
)


def equal(actual, name: str) -> None:
    np.testing.assert_allclose(actual, EXPECTED[name], rtol=1e-6, atol=1e-6)


def padded(ids):
    """Adds columns after the tokens, whose contents must not matter."""
    return jnp.concatenate([ids, ids[:, ::-1]], axis=1)


@pytest.mark.parametrize("ids", [IDS, padded(IDS)], ids=["tight", "padded"])
class TestConstraints:
    def test_repetition_penalty(self, ids) -> None:
        equal(penalise_repetition(SCORES, ids, LENGTH, 1.7), "repetition")

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_ngrams(self, ids, n: int) -> None:
        equal(forbid_ngrams(SCORES, ids, LENGTH, n), f"ngram{n}")

    def test_banned_words(self, ids) -> None:
        scores = SCORES
        for banned in BANNED:
            scores = forbid_words(scores, ids, LENGTH, banned)
        equal(scores, "banned")

    def test_context_shorter_than_a_constraint_is_unchanged(self, ids) -> None:
        ones = np.ones(len(IDS), int)
        same = forbid_ngrams(SCORES, ids, ones, 3)
        same = forbid_words(same, ids, ones, BANNED[2])
        np.testing.assert_array_equal(same, SCORES)

    def test_everything_together_in_transformers_order(self, ids) -> None:
        constraints = Constraints(
            eos_E=jnp.array([2]),
            repetition_penalty=jnp.float32(1.7),
            banned=BANNED,
            no_repeat_ngram_size=2,
        )
        sampling = Sampling(jnp.float32(0.7), jnp.float32(0.8), jnp.float32(0.1), top_k=7)
        scores = constrain(SCORES, ids, LENGTH, jnp.int32(3), END, constraints)
        equal(warp(scores, sampling), "chain")


def test_temperature() -> None:
    equal(warp(SCORES, Sampling(jnp.float32(0.7))), "temperature")


def test_top_k() -> None:
    equal(keep_top_k(SCORES, 7), "top_k")


def test_top_p() -> None:
    equal(keep_top_p(SCORES, 0.8), "top_p")


def test_top_p_keeps_the_likeliest_token_whatever_its_probability() -> None:
    equal(keep_top_p(SCORES, 1e-6), "top_p_tiny")


def test_min_p() -> None:
    equal(keep_min_p(SCORES, 0.1), "min_p")


def test_text_does_not_end_before_its_minimum_length() -> None:
    constraints = Constraints(eos_E=jnp.array([2, 5]), min_new=jnp.int32(4))
    for step in range(6):
        scores = constrain(SCORES, IDS, LENGTH, jnp.int32(step), END, constraints)
        assert np.isneginf(scores[:, [2, 5]]).all() == (step < 4)
        assert np.isfinite(np.delete(scores, [2, 5], axis=1)).all()
