"""Chooses the next token of every row, each with settings of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.config import DecodeConfig
from prefix_jax.decode.options import sample_keys
from prefix_jax.decode.processors import (
    NEVER,
    forbid,
    forbid_ngrams_of_rows,
    forbid_words_of_rows,
    force,
    keep_min_p,
    keep_top_k_of_rows,
    keep_top_p,
    penalise_repetition,
)
from prefix_jax.decode.sizes import bucket
from prefix_jax.decode.topk import top_k
from prefix_jax.errors import ConfigError

# The value of `top_k` that keeps all tokens.
_ALL = np.iinfo(np.int32).max


@flax.struct.dataclass
class Settings:
    """The settings of every row: NumPy arrays on the host, so that no value recompiles a program.

    Attributes:
        prompt_B: the number of prompt tokens.
        max_new_B, min_new_B: limits of the number of generated tokens.
        temperature_B: 0 decodes greedily.
        top_k_B, top_p_B, min_p_B: the distribution to sample from; see `decode.Sampling`.
        penalty_B: the repetition penalty; 1 is off.
        ngram_B: the size of n-grams that must not occur twice; 0 is off.
        banned_BXY: token sequences that must not be completed; -1 fills up, on the left.
        key_B2: the random key of each continuation, as uint32 words.
        eos_BE: the tokens that end a text; -1 fills up.
    """

    prompt_B: Any
    max_new_B: Any
    min_new_B: Any
    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any
    penalty_B: Any
    ngram_B: Any
    banned_BXY: Any
    key_B2: Any
    eos_BE: Any

    @classmethod
    def empty(cls, rows: int, eos: int) -> Settings:
        """Settings of `rows` rows with up to `eos` end tokens."""
        return cls(
            prompt_B=np.ones(rows, np.int32),
            max_new_B=np.ones(rows, np.int32),
            min_new_B=np.zeros(rows, np.int32),
            temperature_B=np.zeros(rows, np.float32),
            top_k_B=np.full(rows, _ALL, np.int32),
            top_p_B=np.ones(rows, np.float32),
            min_p_B=np.zeros(rows, np.float32),
            penalty_B=np.ones(rows, np.float32),
            ngram_B=np.zeros(rows, np.int32),
            banned_BXY=np.full((rows, 1, 1), -1, np.int32),
            key_B2=np.zeros((rows, _key_words()), np.uint32),
            eos_BE=np.full((rows, eos), -1, np.int32),
        )

    def with_room(self, eos: Sequence[int], banned: Sequence[Sequence[int]]) -> Settings:
        """Returns settings with room for these end tokens and banned sequences.

        More room compiles the decoding program again; sizes are rounded to powers of two.
        """
        longest = max(map(len, banned), default=0)
        missing = (bucket(len(banned)), bucket(longest))
        X, Y = (
            max(0, new - old) for new, old in zip(missing, self.banned_BXY.shape[1:], strict=True)
        )
        E = max(0, len(eos) - self.eos_BE.shape[1])
        if not (E or X or Y):
            return self
        return dataclasses.replace(
            self,
            eos_BE=np.pad(self.eos_BE, ((0, 0), (0, E)), constant_values=-1),
            banned_BXY=np.pad(self.banned_BXY, ((0, 0), (0, X), (Y, 0)), constant_values=-1),
        )

    def set_row(
        self,
        row: int,
        config: DecodeConfig,
        prompt: int,
        key: np.ndarray,
        eos: Sequence[int],
        banned: Sequence[Sequence[int]],
    ) -> None:
        """Writes the settings of a row in place, after `with_room`."""
        self.prompt_B[row] = prompt
        self.max_new_B[row] = config.max_new_tokens
        self.min_new_B[row] = config.min_new_tokens
        self.temperature_B[row] = config.temperature
        self.top_k_B[row] = _ALL if config.top_k is None else config.top_k
        self.top_p_B[row] = 1 if config.top_p is None else config.top_p
        self.min_p_B[row] = 0 if config.min_p is None else config.min_p
        self.penalty_B[row] = config.repetition_penalty
        self.ngram_B[row] = config.no_repeat_ngram_size
        self.key_B2[row] = key
        self.eos_BE[row] = -1
        self.eos_BE[row, : len(eos)] = eos
        self.banned_BXY[row] = -1
        for number, ids in enumerate(banned):
            self.banned_BXY[row, number, -len(ids) :] = ids


def check_supported(config: DecodeConfig, name: str) -> None:
    """Raises ConfigError if the engine does not support a setting."""
    if config.num_beams > 1:
        raise ConfigError(
            f"{name}: the engine does not support beam search (num_beams {config.num_beams}); use "
            "Tuned.generate (prefix-jax generate), which decodes one prefix at a time"
        )


def keys_of(config: DecodeConfig, index: int) -> np.ndarray:
    """The random key of every sample of a request, uint32 [samples, words].

    They are those of `Generator.generate` for a prompt with this index, so that a sample depends
    only on the seed, the index and the distribution.
    """
    if config.temperature == 0:
        return np.zeros((config.num_samples, _key_words()), np.uint32)
    key_1M = sample_keys(config.seed, np.array([index], np.int32), config.num_samples)
    return np.asarray(jax.random.key_data(key_1M))[0]


def _key_words() -> int:
    """The size of a random key, which depends on JAX's default generator."""
    return int(jax.random.key_data(jax.random.key(0)).shape[0])


def choose(
    logits_BV: jax.Array,
    ids_BS: jax.Array,
    length_B: jax.Array,
    settings: Settings,
    allowed_BW: jax.Array | None,
    first: int | None,
    last: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses the next token of every row.

    Each processor runs only if a row uses it: `jax.lax.cond` decides at run time.

    Args:
        logits_BV: the model's logits.
        ids_BS: the prompt and the generated tokens of each row.
        length_B: their number.
        settings: of each row.
        allowed_BW: the tokens that guides allow, as bits of uint32 words; None for all.
        first, last: the tokens that the model must generate first and at the length limit; None
            for any.

    Returns:
        token_B; its log-probability under the model, before any processor; and whether the logits
        are NaN or infinite.
    """
    s = settings
    step_B = length_B - s.prompt_B
    scores_BV = logits_BV
    if allowed_BW is not None:
        scores_BV = jnp.where(_bits(allowed_BW, scores_BV.shape[1]), scores_BV, NEVER)
    scores_BV = _if(
        (s.penalty_B != 1).any(),
        lambda x_BV: penalise_repetition(x_BV, ids_BS, length_B, s.penalty_B[:, None]),
        scores_BV,
    )
    scores_BV = _if(
        (s.ngram_B > 0).any(),
        lambda x_BV: forbid_ngrams_of_rows(x_BV, ids_BS, length_B, s.ngram_B),
        scores_BV,
    )
    scores_BV = _if(
        (s.banned_BXY >= 0).any(),
        lambda x_BV: forbid_words_of_rows(x_BV, ids_BS, length_B, s.banned_BXY),
        scores_BV,
    )
    early_B = step_B < s.min_new_B
    scores_BV = _if(
        early_B.any(),
        lambda x_BV: forbid(x_BV, s.eos_BE, early_B[:, None] & (s.eos_BE >= 0)),
        scores_BV,
    )
    for token, here_B in ((first, step_B == 0), (last, step_B == s.max_new_B - 1)):
        if token is not None:
            scores_BV = jnp.where(here_B[:, None], force(scores_BV, jnp.int32(token)), scores_BV)
    token_B = top_k(scores_BV, 1)[1][:, 0].astype(jnp.int32)
    sampled_B = s.temperature_B > 0
    token_B = jax.lax.cond(
        sampled_B.any(),
        lambda: jnp.where(sampled_B, _sample(scores_BV, step_B, s), token_B),
        lambda: token_B,
    )
    log_total_B = jax.nn.logsumexp(logits_BV, axis=-1)
    logprob_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0] - log_total_B
    # A single NaN or positive infinity among the logits makes the sum non-finite.
    return token_B, logprob_B, ~jnp.isfinite(log_total_B)


def _sample(scores_BV: jax.Array, step_B: jax.Array, s: Settings) -> jax.Array:
    """Samples a token for every row, with the processors in the order of `decode.warp`."""
    temperature_B = jnp.where(s.temperature_B > 0, s.temperature_B, 1)
    scores_BV = scores_BV / temperature_B[:, None]
    V = scores_BV.shape[1]
    scores_BV = _if(
        (s.top_k_B < V).any(), lambda x_BV: keep_top_k_of_rows(x_BV, s.top_k_B), scores_BV
    )
    limited_B1 = s.top_p_B[:, None] < 1
    scores_BV = _if(
        limited_B1.any(),
        lambda x_BV: jnp.where(limited_B1, keep_top_p(x_BV, s.top_p_B[:, None]), x_BV),
        scores_BV,
    )
    scores_BV = keep_min_p(scores_BV, s.min_p_B[:, None])
    key_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(s.key_B2), step_B)
    return jax.vmap(jax.random.categorical)(key_B, scores_BV).astype(jnp.int32)


def top_logprobs(logits_RV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the most probable tokens of each row, most probable first, and their
    log-probabilities under the model, before any processor."""
    values_RX, ids_RX = top_k(logits_RV, count)
    return ids_RX.astype(jnp.int32), values_RX - jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)


def _bits(words_BW: jax.Array, count: int) -> jax.Array:
    """Unpacks the first `count` bits of each row, lowest bit first."""
    bits_BWX = (words_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits_BWX.reshape(len(words_BW), -1)[:, :count].astype(bool)


def _if(condition: jax.Array, change: Any, x: jax.Array) -> jax.Array:
    """Applies a function if a condition holds."""
    changed: jax.Array = jax.lax.cond(condition, change, lambda x: x, x)
    return changed
