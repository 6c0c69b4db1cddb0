"""The sizes that programs are compiled for."""

from __future__ import annotations


def bucket(size: int, smallest: int = 1) -> int:
    """Rounds a size up to a power of two, at least `smallest`; 0 stays 0."""
    return max(smallest, 1 << (size - 1).bit_length()) if size > 0 else 0


def prompt_bucket(size: int) -> int:
    """Rounds like `bucket`, or to three quarters of that, since padding costs as much as text."""
    power = bucket(size, 16)
    return power * 3 // 4 if 16 < size <= power * 3 // 4 else power
