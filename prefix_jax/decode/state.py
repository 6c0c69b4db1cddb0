"""The carry of the decoding loop.

Each row holds one prompt, and its T = M query tokens belong to the prompt's M continuations
(samples or beams). All of them attend to one copy of the prompt's keys and values. Their own keys
and values are appended to the same row, M columns per step. Nothing is copied or reordered: the
attention mask encodes which columns a continuation descends from.

Axes: B prompts · M continuations per prompt · W columns of prompt and continuation together ·
U generated tokens · n candidates.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.backbones.cache import Cache, Encoded


@flax.struct.dataclass
class Draws:
    """Independent continuations, greedy or sampled.

    Attributes:
        logprob_BMU: the log-probability of each token under the model, before any processor.
        count_BM: the number of generated tokens, including an end-of-text token.
        done_BM: whether the continuation has ended.
    """

    logprob_BMU: jax.Array
    count_BM: jax.Array
    done_BM: jax.Array


@flax.struct.dataclass
class Beams:
    """The running and the finished hypotheses of a beam search.

    Attributes:
        score_BM: summed log-probabilities of the running beams, best first.
        logprob_BMU: the log-probabilities of their tokens.
        lineage_BMU: the beam index of each beam's ancestor at every step.
        final_score_BM: scores of the finished hypotheses, best first: summed log-probability
            divided by length to the power of the length penalty. About -1e9 for empty entries.
        final_ids_BMW, final_logprob_BMU, final_count_BM: tokens, log-probabilities and lengths of
            the finished hypotheses.
        final_BM: which finished hypotheses exist.
        open_B: whether a running beam could still beat a finished hypothesis.
    """

    score_BM: jax.Array
    logprob_BMU: jax.Array
    lineage_BMU: jax.Array
    final_score_BM: jax.Array
    final_ids_BMW: jax.Array
    final_logprob_BMU: jax.Array
    final_count_BM: jax.Array
    final_BM: jax.Array
    open_B: jax.Array


@flax.struct.dataclass
class State:
    """A batch of prompts with their continuations.

    Attributes:
        cache: keys and values: the prompts' columns, then M columns per step.
        ids_BMW: prompt and continuation without a gap, from column 0.
        prompt_B: the lengths of the prompts.
        step: the number of tokens generated so far.
        search_state: the state of the search: `Draws` or `Beams`.
        invalid_B: whether the model gave NaN or infinite logits for a continuation that had not
            ended. Such a row ends at that step.
        encoded: in an encoder-decoder, the encoder output of each row, shared by all its
            continuations. The prompt is then only the start token.
    """

    cache: Cache
    ids_BMW: jax.Array
    prompt_B: jax.Array
    step: jax.Array
    search_state: Any
    invalid_B: jax.Array
    encoded: Encoded | None = None

    def append(self, ids_BMW: jax.Array, token_BM: jax.Array) -> jax.Array:
        """Appends the next tokens to `ids_BMW`."""
        here_BW = jnp.arange(ids_BMW.shape[2]) == (self.prompt_B + self.step)[:, None]
        return jnp.where(here_BW[:, None], token_BM[:, :, None], ids_BMW)

    @property
    def last_BM(self) -> jax.Array:
        """The most recently generated tokens."""
        column_B = self.prompt_B + self.step - 1
        return jnp.take_along_axis(self.ids_BMW, column_B[:, None, None], axis=2)[:, :, 0]
