"""What a decoding loop carries from token to token.

A row belongs to a prompt, and its T = M query tokens are the M continuations of it (samples, or
beams). All of them attend to one copy of the prompt's keys and values, and what they have
generated is appended to the same row, M columns a step, so that nothing is ever copied or
reordered: who descends from whom is a matter of the attention mask.

Axes: B prompts · M continuations of each · W columns of prompt and continuation together ·
U generated tokens · n candidates.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.backbones.stack import Cache, Encoded


@flax.struct.dataclass
class Draws:
    """Continuations that do not know of each other: greedy or sampled.

    Attributes:
        logprob_BMU: the log-probability of each token under the model, before any processor.
        count_BM: tokens generated, an end-of-text token included.
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
        logprob_BMU: of their tokens.
        lineage_BMU: at which place among the beams the ancestor of each stood, step by step.
        final_score_BM: summed log-probabilities over length to the power of the length penalty,
            of the finished hypotheses, best first; about -1e9 where there is none yet.
        final_ids_BMW, final_logprob_BMU, final_count_BM: what they are.
        final_BM: which of them exist.
        open_B: whether a running beam could still become better than a finished one.
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
        cache: keys and values: the prompts' columns, then M columns for every step.
        ids_BMW: prompt and continuation without a gap, from column 0 on.
        prompt_B: the lengths of the prompts.
        step: tokens generated so far.
        found: what the search knows besides: `Draws` or `Beams`.
        invalid_B: whether the model gave NaN or infinite logits for a continuation that had not
            ended. Such a row ends there.
        encoded: of an encoder-decoder, one copy of what each row's encoder read, for all of its
            continuations. Its prompt is then the start token alone.
    """

    cache: Cache
    ids_BMW: jax.Array
    prompt_B: jax.Array
    step: jax.Array
    found: Any
    invalid_B: jax.Array
    encoded: Encoded | None = None

    def append(self, ids_BMW: jax.Array, token_BM: jax.Array) -> jax.Array:
        """`ids_BMW` with the next tokens written behind."""
        here_BW = jnp.arange(ids_BMW.shape[2]) == (self.prompt_B + self.step)[:, None]
        return jnp.where(here_BW[:, None], token_BM[:, :, None], ids_BMW)

    @property
    def last_BM(self) -> jax.Array:
        """The tokens generated last."""
        column_B = self.prompt_B + self.step - 1
        return jnp.take_along_axis(self.ids_BMW, column_B[:, None, None], axis=2)[:, :, 0]
