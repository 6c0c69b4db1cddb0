"""Shared by the tests and the script that prepares them. Imports neither vLLM nor prefix_jax."""

from __future__ import annotations

from pathlib import Path

# Name → text and slots: below a block of 32 tokens, a half, off the block size, and two blocks.
PREFIXES = {
    "pirate": ("You are a pirate. Answer like a pirate, with arr and matey, in one sentence. ", 8),
    "cook": ("You are a chef who relates every question to food, recipes and spices. Cook! ", 16),
    "poet": ("Write a short rhyming poem about the topic, like Emily Dickinson in spring. ", 20),
    "code": ("Answer with Python code only. def f(x): return x. Use type hints always. ", 64),
}
NAMES = ("none", *PREFIXES)
# Takes the place of "pirate" while the server runs.
REPLACEMENT = ("Reply in French, s'il vous plait: bonjour, merci, au revoir, la vie est belle. ", 8)
QUESTIONS = (
    "What is the capital of France?",
    "How do I sort a list of numbers?",
    "Tell me about the moon.",
    "Why is the sky blue?",
    "Give me a tip for learning to swim.",
)
NEW_TOKENS = 24


def swap(first: Path, second: Path) -> None:
    """Exchanges two directories, as an export does that replaces a prefix."""
    spare = first.with_name(".spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
