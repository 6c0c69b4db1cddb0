"""Greedy decoding and sampling."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.decode.processors import Constraints, Sampling, constrain, warp
from prefix_jax.decode.state import Draws, State
from prefix_jax.decode.topk import top_k


@flax.struct.dataclass
class Draw:
    """Chooses the next token of each continuation independently.

    Attributes:
        constraints: limits on the next token.
        sampling: the distribution to sample from; None decodes greedily.
        key_BM: with `sampling`, one random key per continuation, so that samples do not depend
            on the other rows of the batch.
        width: the number of continuations M per prompt.
    """

    constraints: Constraints
    sampling: Sampling | None
    key_BM: Any
    width: int = flax.struct.field(pytree_node=False, default=1)

    def start(self, ids_BMW: jax.Array, real_B: jax.Array, capacity: int) -> Draws:
        """Returns the initial state. Padding rows count as done."""
        B, M, _ = ids_BMW.shape
        return Draws(
            logprob_BMU=jnp.zeros((B, M, capacity)),
            count_BM=jnp.zeros((B, M), jnp.int32),
            done_BM=jnp.broadcast_to(~real_B[:, None], (B, M)),
        )

    def running(self, state: State) -> jax.Array:
        """Returns whether any continuation has not ended."""
        return ~state.search_state.done_BM.all()

    def lineage(self, state: State) -> None:
        """Returns None: continuations are branches of their prompt and use the ordinary mask."""
        return None

    def choose(self, state: State, logits_BMV: jax.Array, end: jax.Array) -> State:
        """Appends one token to every continuation."""
        draws: Draws = state.search_state
        B, M, V = logits_BMV.shape
        logits_RV = logits_BMV.reshape(B * M, V)
        length_R = jnp.repeat(state.prompt_B + state.step, M)
        ids_RW = state.ids_BMW.reshape(B * M, -1)
        scores_RV = constrain(logits_RV, ids_RW, length_R, state.step, end, self.constraints)
        if self.sampling is None:
            token_R = top_k(scores_RV, 1)[1][:, 0]
        else:
            key_R = jax.vmap(jax.random.fold_in, (0, None))(self.key_BM.reshape(-1), state.step)
            token_R = jax.vmap(jax.random.categorical)(key_R, warp(scores_RV, self.sampling))
        logprob_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=1)[:, 0]
        log_total_R = jax.nn.logsumexp(logits_RV, axis=-1)
        logprob_R -= log_total_R
        # A single NaN or positive infinity among the logits makes the sum non-finite.
        invalid_BM = ~jnp.isfinite(log_total_R).reshape(B, M) & ~draws.done_BM

        token_BM = token_R.reshape(B, M).astype(jnp.int32)
        ended_BM = jnp.isin(token_BM, self.constraints.eos_E)
        return dataclasses.replace(
            state,
            ids_BMW=state.append(state.ids_BMW, token_BM),
            step=state.step + 1,
            invalid_B=state.invalid_B | invalid_BM.any(axis=1),
            search_state=Draws(
                logprob_BMU=draws.logprob_BMU.at[:, :, state.step].set(logprob_R.reshape(B, M)),
                count_BM=draws.count_BM + ~draws.done_BM,
                done_BM=draws.done_BM | ended_BM | invalid_BM | (state.step + 1 >= end),
            ),
        )
