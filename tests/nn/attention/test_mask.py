"""Masks follow from (segment, branch, position)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_jax.nn.attention.mask import TokenLayout, causal_mask, prefix_mask

small = st.integers(0, 3)


@st.composite
def places(draw: st.DrawFn) -> np.ndarray:
    """(segment, branch, position) of 6 tokens in each of 2 rows."""
    return np.array(draw(st.lists(st.tuples(small, small, small), min_size=12, max_size=12)))


def as_tokens(places: np.ndarray) -> TokenLayout:
    return TokenLayout(*(jnp.asarray(column.reshape(2, 6)) for column in places.T))


@settings(max_examples=50)
@given(places(), places(), st.sampled_from([None, 1, 2, 5]))
def test_token_sees_its_segment_its_branch_and_the_source_up_to_its_position(q, k, window):
    mask_BTS = np.asarray(causal_mask(as_tokens(q), as_tokens(k), window))
    for b, t, s in np.ndindex(*mask_BTS.shape):
        segment, branch, position = q[6 * b + t]
        key_segment, key_branch, key_position = k[6 * b + s]
        expected = (
            segment == key_segment
            and key_segment != 0
            and key_branch in (0, branch)
            and key_position <= position
            and (window is None or position - key_position < window)
        )
        assert mask_BTS[b, t, s] == expected


@settings(max_examples=20)
@given(places(), places(), st.lists(st.booleans(), min_size=72, max_size=72))
def test_lineage_replaces_only_branches(q, k, lineage):
    lineage_BTS = jnp.asarray(lineage).reshape(2, 6, 6)
    one_branch = k.copy()
    one_branch[:, 1] = 0
    np.testing.assert_array_equal(
        causal_mask(as_tokens(q), as_tokens(k), None, lineage_BTS),
        causal_mask(as_tokens(q), as_tokens(one_branch)) & lineage_BTS,
    )


def test_plain_positions_start_at_the_first_real_token():
    present = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    tokens = TokenLayout.plain(present)
    np.testing.assert_array_equal(tokens.position_BT[0, 2:], [0, 1, 2])
    np.testing.assert_array_equal(tokens.position_BT[1, :3], [0, 1, 2])
    np.testing.assert_array_equal(tokens.segment_BT, present)
    assert (tokens.position_BT >= 0).all()


def test_padding_neither_sees_nor_is_seen():
    tokens = TokenLayout.plain(jnp.array([[0, 1, 1, 0]], bool))
    mask_TS = np.asarray(causal_mask(tokens, tokens))[0]
    np.testing.assert_array_equal(mask_TS, [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0] * 4])


@given(st.integers(0, 12), st.integers(1, 6), st.sampled_from([None, 1, 3, 8]))
def test_window_treats_prefix_slots_like_tokens(position, length, window):
    seen_P = np.asarray(prefix_mask(jnp.array([[position]]), jnp.arange(length), window))[0, 0]
    expected = [window is None or position - slot < window for slot in range(length)]
    np.testing.assert_array_equal(seen_P, expected)
