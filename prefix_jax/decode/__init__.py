"""Generation: a prefix is a warm cache that text follows."""

from prefix_jax.decode.continuation import Continuation, Generation
from prefix_jax.decode.generate import Generator

__all__ = ["Continuation", "Generation", "Generator"]
