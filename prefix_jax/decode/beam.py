"""Beam search that returns the same hypotheses as transformers 5."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.decode.processors import Constraints, constrain
from prefix_jax.decode.state import Beams, State
from prefix_jax.decode.topk import top_k

# Excludes a candidate but, unlike minus infinity, keeps the order among excluded candidates.
_OUT = -1e9


@flax.struct.dataclass
class Beam:
    """Keeps the M likeliest running beams of each prompt, and its M best finished hypotheses.

    The score of a finished hypothesis is its summed log-probability divided by its length
    (including the end-of-text token) to the power of `length_penalty`. The search ends when M
    hypotheses have finished and the best running beam would not beat the worst of them if it ended
    now. With `early_stopping` it ends as soon as M have finished. With `patient` it ends only when
    the best running beam could not win even if all its remaining tokens had probability 1.

    Attributes:
        constraints: limits on the next token.
        length_penalty: values above 0 favour long texts.
        early_stopping: whether M finished hypotheses end the search.
        patient: whether running beams are judged by their best possible score; this is
            early_stopping="never" in transformers.
        width: the number of beams M.
    """

    constraints: Constraints
    length_penalty: jax.Array
    early_stopping: jax.Array
    patient: jax.Array
    width: int = flax.struct.field(pytree_node=False)

    def start(self, ids_BMW: jax.Array, real_B: jax.Array, capacity: int) -> Beams:
        """Returns the initial state: all beams are identical, so only the first may be extended."""
        B, M, _ = ids_BMW.shape
        excluded_BM = jnp.full((B, M), _OUT)
        return Beams(
            score_BM=excluded_BM.at[:, 0].set(0),
            logprob_BMU=jnp.zeros((B, M, capacity)),
            lineage_BMU=jnp.zeros((B, M, capacity), jnp.int32),
            final_score_BM=excluded_BM,
            final_ids_BMW=ids_BMW,
            final_logprob_BMU=jnp.zeros((B, M, capacity)),
            final_count_BM=jnp.zeros((B, M), jnp.int32),
            final_BM=jnp.broadcast_to(~real_B[:, None], (B, M)),
            open_B=real_B,
        )

    def running(self, state: State) -> jax.Array:
        """Returns whether any prompt's search may still find better hypotheses."""
        return self._running_B(state.search_state).any()

    def _running_B(self, beams: Beams) -> jax.Array:
        full_B = beams.final_BM.all(axis=1)
        return beams.open_B & ~(full_B & self.early_stopping)

    def lineage(self, state: State) -> jax.Array:
        """Masks the cached columns that each beam descends from, bool [B, M, S]."""
        M = self.width
        lineage_BMU = state.search_state.lineage_BMU
        generated_BMUM = lineage_BMU[..., None] == jnp.arange(M)
        generated_BMS = generated_BMUM.reshape(*lineage_BMU.shape[:2], -1)
        prompt = state.cache.layout.segment_BT.shape[1] - generated_BMS.shape[2]
        return jnp.pad(generated_BMS, ((0, 0), (0, 0), (prompt, 0)), constant_values=True)

    def choose(self, state: State, logits_BMV: jax.Array, end: jax.Array) -> State:
        """Extends every beam by one token, and moves those that end to the finished ones."""
        beams: Beams = state.search_state
        B, M, V = logits_BMV.shape
        logprobs_RV = jax.nn.log_softmax(logits_BMV.reshape(B * M, V), axis=-1)
        # A single NaN or positive infinity among the logits makes the whole row NaN.
        invalid_B = jnp.isnan(logprobs_RV[:, 0]).reshape(B, M).any(axis=1) & beams.open_B
        length_R = jnp.repeat(state.prompt_B + state.step, M)
        ids_RW = state.ids_BMW.reshape(B * M, -1)
        scores_RV = constrain(logprobs_RV, ids_RW, length_R, state.step, end, self.constraints)

        # Enough candidates to keep M running even if every beam ends with every end token.
        n = max(2, 1 + len(self.constraints.eos_E)) * M
        score_Rn, token_Rn = top_k(scores_RV, min(n, V))
        logprob_Rn = jnp.take_along_axis(logprobs_RV, token_Rn, axis=1)
        score_Bn = (score_Rn.reshape(B, M, -1) + beams.score_BM[:, :, None]).reshape(B, -1)
        score_Bn, place_Bn = jax.lax.top_k(score_Bn, n)
        parent_Bn = place_Bn // token_Rn.shape[1]
        token_Bn = jnp.take_along_axis(token_Rn.reshape(B, -1), place_Bn, axis=1)
        logprob_Bn = jnp.take_along_axis(logprob_Rn.reshape(B, -1), place_Bn, axis=1)
        ids_BnW = state.append(_pick(state.ids_BMW, parent_Bn), token_Bn)
        logprob_BnU = _pick(beams.logprob_BMU, parent_Bn).at[:, :, state.step].set(logprob_Bn)
        ends_Bn = jnp.isin(token_Bn, self.constraints.eos_E) | (state.step + 1 >= end)

        # The M best candidates that continue. Their keys and values are not moved.
        score_BM, next_BM = jax.lax.top_k(score_Bn + ends_Bn * _OUT, M)
        parent_BM = _pick(parent_Bn, next_BM)
        lineage_BMU = _pick(beams.lineage_BMU, parent_BM).at[:, :, state.step].set(jnp.arange(M))

        # The M best among the finished hypotheses and the candidates that end now. Candidates
        # after the first M only replace beams that end; they never finish themselves.
        ends_Bn &= jnp.arange(n) < M
        length = (state.step + 1).astype(jnp.float32)
        final_score_Bn = score_Bn / length**self.length_penalty
        final_score_Bn += ~(ends_Bn & self._running_B(beams)[:, None]) * _OUT

        def merge(old_BM: jax.Array, new_Bn: jax.Array) -> jax.Array:
            return _pick(jnp.concatenate([old_BM, new_Bn], axis=1), best_BM)

        final_score_BM, best_BM = jax.lax.top_k(
            jnp.concatenate([beams.final_score_BM, final_score_Bn], axis=1), M
        )
        count_Bn = jnp.broadcast_to(state.step + 1, (B, n))
        final_BM = merge(beams.final_BM, ends_Bn)
        # Only a positive penalty favours long hypotheses.
        longest = self.patient & (self.length_penalty > 0)
        best_possible_B = score_BM[:, 0] / jnp.where(longest, end, length) ** self.length_penalty
        worst_BM = jnp.where(final_BM, final_score_BM.min(axis=1, keepdims=True), _OUT)
        return dataclasses.replace(
            state,
            ids_BMW=_pick(ids_BnW, next_BM),
            step=state.step + 1,
            invalid_B=state.invalid_B | invalid_B,
            search_state=Beams(
                score_BM=score_BM,
                logprob_BMU=_pick(logprob_BnU, next_BM),
                lineage_BMU=lineage_BMU,
                final_score_BM=final_score_BM,
                final_ids_BMW=merge(beams.final_ids_BMW, ids_BnW),
                final_logprob_BMU=merge(beams.final_logprob_BMU, logprob_BnU),
                final_count_BM=merge(beams.final_count_BM, count_Bn),
                final_BM=final_BM,
                open_B=beams.open_B
                & ~invalid_B
                & (best_possible_B[:, None] > worst_BM).any(axis=1),
            ),
        )


def _pick(x: jax.Array, index_Bn: jax.Array) -> jax.Array:
    """Gathers entries of axis 1, with separate indices for each prompt."""
    return jnp.take_along_axis(x, index_Bn.reshape(*index_Bn.shape, *[1] * (x.ndim - 2)), axis=1)
