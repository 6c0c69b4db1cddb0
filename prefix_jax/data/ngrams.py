"""An n-gram table of training targets: the most frequent next token after the last few tokens.

Speculative decoding drafts tokens from it. A wrong entry costs time and never changes a text, so
contexts are stored as 32-bit hashes, without a check for collisions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Self

import numpy as np

from prefix_jax.data.batch import Example

# The longest context, in tokens.
ORDER = 4
# Entries per bucket of the hash table.
WAYS = 4
# 256 KiB.
MAX_BUCKETS = 2**13
# Later targets are not counted.
MAX_TARGETS = 2**22
# A value has the token in its lower bits, and above them the share of contexts that it followed.
TOKEN_BITS = 22
ALWAYS = 2 ** (32 - TOKEN_BITS) - 1
# The key of an empty context.
NO_CONTEXT = np.uint32(2166136261)
_FACTOR = np.uint32(2654435769)


@dataclasses.dataclass(frozen=True)
class NgramTable:
    """A hash table from contexts of 1 to `ORDER` tokens to next tokens.

    Attributes:
        entry_G2W: uint32, the keys and the values of `WAYS` entries per bucket; a key of 0 marks
            an empty entry. G, the number of buckets, is a power of two.
    """

    entry_G2W: np.ndarray

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Self | None:
        """Counts the targets of text examples; None without targets.

        If there are more contexts than entries, the most frequent ones are kept.
        """
        keys, tokens, targets = [], [], 0
        for example in examples:
            column_M, token_M = example.index_M, example.label_M.astype(np.uint32)
            key_M = np.full(len(column_M), NO_CONTEXT)
            for order in range(ORDER):
                inside_M = column_M >= order
                before_M = example.ids_T[np.maximum(column_M - order, 0)].astype(np.uint32)
                key_M = extend_key(key_M, before_M)
                keys.append(finish_key(key_M[inside_M]))
                tokens.append(token_M[inside_M])
            targets += len(column_M)
            if targets >= MAX_TARGETS:
                break
        if not targets:
            return None
        return cls(_pack(*_most_frequent(np.concatenate(keys), np.concatenate(tokens))))

    @property
    def token_GW(self) -> np.ndarray:
        """The next token of every entry."""
        return self.entry_G2W[:, 1] & np.uint32(2**TOKEN_BITS - 1)


def shape_problems(shape: tuple[int, ...]) -> list[str]:
    """Lists what is wrong with the shape of a table in a file."""
    buckets = shape[0] if shape else 0
    if shape[1:] == (2, WAYS) and buckets & (buckets - 1) == 0 and 0 < buckets <= MAX_BUCKETS:
        return []
    return [f"the table has shape {shape}"]


def extend_key(key: Any, token: Any) -> Any:
    """Extends the key of a context by the token before it.

    Args:
        key: uint32, of NumPy or JAX.
        token: uint32, of the same shape.
    """
    key = (key ^ token) * _FACTOR
    return key ^ (key >> np.uint32(15))


def finish_key(key: Any) -> Any:
    """Returns the key of a whole context, which is not 0. The lowest bits select its bucket."""
    return key | np.uint32(2**31)


def _most_frequent(key_X: np.ndarray, token_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns distinct contexts, the most frequent first, and the value of each."""
    pair_Y, count_Y = np.unique(
        (key_X.astype(np.uint64) << np.uint64(32)) | token_X, return_counts=True
    )
    # By context, and the most frequent token of each first.
    key_Y = (pair_Y >> np.uint64(32)).astype(np.uint32)
    pair_order_Y = np.lexsort((-count_Y, key_Y))
    key_Z, first_Z = np.unique(key_Y[pair_order_Y], return_index=True)
    total_Z = np.add.reduceat(count_Y[pair_order_Y], first_Z)
    best_Z = pair_order_Y[first_Z]
    share_Z = (count_Y[best_Z] * ALWAYS // total_Z).astype(np.uint32)
    token_Z = pair_Y[best_Z].astype(np.uint32)  # the lower half
    order_Z = np.argsort(-total_Z, kind="stable")
    return key_Z[order_Z], (token_Z | (share_Z << np.uint32(TOKEN_BITS)))[order_Z]


def _pack(key_X: np.ndarray, value_X: np.ndarray) -> np.ndarray:
    """Fills the buckets of a table. Entries of full buckets are left out."""
    # A quarter of the entries stays empty, so that few buckets overflow.
    buckets = 1 << max(0, -(-len(key_X) * 4 // (3 * WAYS)) - 1).bit_length()
    buckets = min(buckets, MAX_BUCKETS)
    entry_G2W = np.zeros((buckets, 2, WAYS), np.uint32)
    bucket_X = key_X & np.uint32(buckets - 1)
    order_X = np.argsort(bucket_X, kind="stable")
    sorted_X = bucket_X[order_X]
    way_X = np.arange(len(sorted_X)) - np.searchsorted(sorted_X, sorted_X)
    kept_X = way_X < WAYS
    bucket_Y, way_Y, from_Y = sorted_X[kept_X], way_X[kept_X], order_X[kept_X]
    entry_G2W[bucket_Y, 0, way_Y] = key_X[from_Y]
    entry_G2W[bucket_Y, 1, way_Y] = value_X[from_Y]
    return entry_G2W
