"""Heads: what reads the last hidden states of a backbone, and trains beside the prefix."""

from prefix_jax.heads.head import Head, make_head

__all__ = ["Head", "make_head"]
