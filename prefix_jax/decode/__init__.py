"""Text generation: the prefix is a warm key-value cache, and the prompt follows it."""

from prefix_jax.decode.continuation import Continuation, Generation
from prefix_jax.decode.generate import Generator

__all__ = ["Continuation", "Generation", "Generator"]
