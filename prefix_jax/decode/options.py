"""Builds a search from the decoding options."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from prefix_jax.config import DecodeConfig
from prefix_jax.decode.beam import Beam
from prefix_jax.decode.draw import Draw
from prefix_jax.decode.loop import Search
from prefix_jax.decode.processors import Constraints, Sampling
from prefix_jax.errors import ConfigError
from prefix_jax.untrusted.tokenizer import token_ids


def make_search(
    config: DecodeConfig,
    tokenizer: PreTrainedTokenizerFast,
    eos: Sequence[int],
    prompts: Sequence[int],
    first: int | None = None,
    last: int | None = None,
) -> Search:
    """Builds the search for a decoding configuration.

    Args:
        config: decoding options.
        tokenizer: encodes banned words.
        eos: the tokens that end a text.
        prompts: the prompt index of each row of the batch; it seeds sampling.
        first: the token that the model must generate first; None for any.
        last: the token that the model must generate at the length limit; None for any.
    """
    constraints = Constraints(
        eos_E=jnp.array(eos, jnp.int32),
        min_new=_unless(0, config.min_new_tokens, np.int32),
        repetition_penalty=_unless(1, config.repetition_penalty),
        banned=banned_sequences(config.banned_words, tokenizer, eos),
        no_repeat_ngram_size=config.no_repeat_ngram_size or None,
        first=_unless(-1, first, np.int32),
        last=_unless(-1, last, np.int32),
    )
    if config.num_beams > 1:
        return Beam(
            constraints,
            length_penalty=jnp.float32(config.length_penalty),
            early_stopping=jnp.bool_(config.early_stopping is True),
            patient=jnp.bool_(config.early_stopping == "never"),
            width=config.num_beams,
        )
    if config.temperature == 0:
        return Draw(constraints, None, None)
    sampling = Sampling(
        temperature=jnp.float32(config.temperature),
        top_p=_unless(1, config.top_p),
        min_p=_unless(0, config.min_p),
        top_k=config.top_k,
    )
    numbers = np.array(prompts, np.int32)
    return Draw(
        constraints,
        sampling,
        sample_keys(config.seed, numbers, config.num_samples),
        config.num_samples,
    )


def banned_sequences(
    words: Sequence[str], tokenizer: PreTrainedTokenizerFast, eos: Sequence[int]
) -> tuple[jax.Array, ...]:
    """Encodes banned words, both at the start of a text and after a space.

    Returns one array [words, length] per length. A single end-of-text token is never banned.
    """
    if not words:
        return ()
    forms = [form for word in words for form in (word, f" {word}")]
    encoded = token_ids(tokenizer, forms, "decode.banned_words", ConfigError)
    sequences = sorted({tuple(ids) for ids in encoded} - {(token,) for token in eos})
    return tuple(
        jnp.array([ids for ids in sequences if len(ids) == length], jnp.int32)
        for length in sorted({len(ids) for ids in sequences})
    )


def _unless(
    off: float, value: float | None, dtype: type[np.number] = np.float32
) -> jax.Array | None:
    """Returns the value as an array, so that changing it does not recompile; None if it is off."""
    return None if value is None or value == off else jnp.asarray(value, dtype)


def sample_keys(seed: int, prompt_B: np.ndarray, samples: int) -> jax.Array:
    """Derives one random key per sample of each prompt, [B, M]."""
    fold = jax.vmap(jax.random.fold_in, (0, None))
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), prompt_B)
    return jax.vmap(fold, (None, 0), out_axes=1)(key_B, np.arange(samples))
