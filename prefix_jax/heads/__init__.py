"""Task heads: they read a backbone's last hidden states and train together with the prefix."""

from prefix_jax.heads.head import Head, make_head

__all__ = ["Head", "make_head"]
