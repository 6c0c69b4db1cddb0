"""Tests speculative decoding: drafts change the number of steps, and never a text."""

from __future__ import annotations

import dataclasses
import functools

import engines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import alone, model, prefixes

from prefix_jax.config import DecodeConfig
from prefix_jax.data.batch import Example
from prefix_jax.data.ngrams import WAYS, NgramTable
from prefix_jax.engine import EngineCore, Handle, Request, programs
from prefix_jax.engine.drafts import MAX_TOKENS, Tables, best_length, propose
from prefix_jax.errors import ConfigError

K = 3
GREEDY = DecodeConfig(max_new_tokens=24)
SAMPLED = DecodeConfig(max_new_tokens=24, temperature=0.05, seed=3)
# Random models repeat themselves, so drafts from the row's own text are often right.
TEXTS = [[7, 8, 9], [3, 3, 4, 3], [9], [5, 6, 5, 6, 5], [1, 2], [8, 7, 6]]


@functools.cache
def drafting() -> EngineCore:
    """An engine that always verifies drafts."""
    core = engines.core("llama", num_speculative_tokens=K)
    core._relative_cost = 1.0
    return core


def finish(core: EngineCore, *handles: Handle) -> None:
    while not all(handle.done for handle in handles):
        core.step()


def assert_same(handle: Handle, index: int, texts: list[list[int]]) -> None:
    """Checks a request against plain decoding with `Generator`."""
    request = handle.request
    expected = alone("llama", request.prefix, texts, request.config)[index]
    assert handle.generation is not None
    for sample, same in zip(handle.generation.samples, expected.samples, strict=True):
        assert (sample.ids, sample.text, sample.finish) == (same.ids, same.text, same.finish)
        np.testing.assert_allclose(sample.logprobs, same.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        GREEDY,
        SAMPLED,
        dataclasses.replace(SAMPLED, temperature=1.5, top_k=20, top_p=0.9, num_samples=2),
        dataclasses.replace(GREEDY, repetition_penalty=1.2),
        dataclasses.replace(GREEDY, no_repeat_ngram_size=3, banned_words=("%&",)),
    ],
    ids=["greedy", "cold", "warm", "penalty", "bans"],
)
def test_texts_are_those_of_plain_decoding(config: DecodeConfig) -> None:
    core, before = drafting(), dataclasses.replace(drafting().stats)
    kinds = (None, "kv", "bias", "adapter", "plus", "hidden")
    handles = [
        core.submit(Request(ids, kind, config, index=index))
        for index, (ids, kind) in enumerate(zip(TEXTS, kinds, strict=True))
    ]
    finish(core, *handles)
    for index, handle in enumerate(handles):
        assert_same(handle, index, TEXTS)
    drafted = core.stats.drafted_tokens - before.drafted_tokens
    accepted = core.stats.accepted_tokens - before.accepted_tokens
    assert 0 < accepted <= drafted


def test_ends_inside_accepted_drafts() -> None:
    core, ids = drafting(), [7, 8, 9]
    (free,) = alone("llama", "kv", [ids], GREEDY)
    produced, (sample,) = prefixes("llama")["kv"], free.samples
    for count in (6, 7, 8, 9):  # more than the tokens of one step
        short = dataclasses.replace(GREEDY, max_new_tokens=count)
        stop = dataclasses.replace(GREEDY, stop=(sample.text[count - 2 : count],))
        limited, stopped = (core.submit(Request(ids, "kv", config)) for config in (short, stop))
        eos = (sample.ids[count - 1],)
        core.bank.add("ending", produced, engines.card(model("llama"), produced), eos, None)
        ended = core.submit(Request(ids, "ending", GREEDY))
        finish(core, limited, stopped, ended)
        assert_same(limited, 0, [ids])
        assert_same(stopped, 0, [ids])
        assert ended.generation is not None
        first = sample.ids.index(eos[0]) + 1
        assert ended.generation.samples[0].ids == sample.ids[:first]
        assert ended.generation.samples[0].finish == "eos"


def test_steps_without_useful_drafts_read_one_token() -> None:
    core = engines.core("llama", ["kv"], num_speculative_tokens=K)
    core._relative_cost = 1e9
    handle = core.submit(Request([7, 8, 9], "kv", GREEDY))
    finish(core, handle)
    assert_same(handle, 0, [[7, 8, 9]])
    assert core.stats.drafted_tokens == 0
    assert core.stats.steps == core.stats.generated_tokens == 24


def test_drafts_compile_one_program_per_width() -> None:
    core = drafting()
    finish(core, core.submit(Request([1, 1, 1], "kv", GREEDY)))
    before = programs.decode._cache_size()
    handles = [core.submit(Request(ids, "kv", SAMPLED)) for ids in ([5] * 9, [1, 2, 3])]
    finish(core, *handles)
    assert programs.decode._cache_size() == before


def test_draft_continues_the_longest_and_latest_match() -> None:
    rows = [
        [1, 2, 3, 9, 2, 3, 8, 1, 2, 3],  # three tokens match, not the later two
        [4, 5, 4, 6, 4],  # the latest of two equal matches
        [5, 6, 5, 6],  # continues beyond its own end
        [1, 2, 3],  # nothing matches
    ]
    ids_BS = np.zeros((4, 16), np.int32)  # zeros after the end are no text
    for row, ids in enumerate(rows):
        ids_BS[row, : len(ids)] = ids
    length_B = jnp.array([len(ids) for ids in rows])
    draft_BK, offered_B = jax.jit(propose, static_argnums=3)(None, jnp.array(ids_BS), length_B, 5)
    assert offered_B.tolist() == [5, 5, 5, 0]
    assert draft_BK[:3].tolist() == [[9, 2, 3, 8, 1], [6, 4, 6, 4, 6], [5, 6, 5, 6, 5]]


def test_number_of_drafted_tokens() -> None:
    with pytest.raises(ConfigError, match="num_speculative_tokens must be at least 0, got -1"):
        engines.core("llama", [], num_speculative_tokens=-1)
    lengths = [best_length("cpu", rows) for rows in (1, 4, 16, 64)]
    assert lengths == sorted(lengths, reverse=True)
    assert best_length("tpu", 1) == MAX_TOKENS


def table(*texts: list[int]) -> NgramTable:
    """The n-gram table of texts whose tokens are all targets except the first."""
    examples = [
        Example.of_text(np.array(ids, np.int32), np.arange(len(ids)) > 0, "here") for ids in texts
    ]
    ngrams = NgramTable.of(examples)
    assert ngrams is not None
    return ngrams


def test_table_drafts_the_most_frequent_token_after_the_longest_context() -> None:
    ngrams = table([1, 2, 3], [1, 2, 3], [1, 2, 5], [4, 2, 6, 7, 8])
    tables = Tables.empty(3, 2 * len(ngrams.entry_G2W), WAYS)
    tables = tables.start(jnp.int32(1), jnp.array(ngrams.entry_G2W))
    ids_BS = jnp.zeros((3, 8), jnp.int32).at[:2, :2].set(jnp.array([1, 2])).at[2, 0].set(1)
    tables = tables.start(jnp.int32(2), jnp.array(ngrams.entry_G2W))
    length_B = jnp.array([2, 2, 1])
    draft_BK, offered_B = jax.jit(propose, static_argnums=3)(tables, ids_BS, length_B, 3)
    assert offered_B.tolist() == [0, 1, 2]  # nothing follows 3
    assert draft_BK[1, 0] == 3
    assert draft_BK[2, :2].tolist() == [2, 3]
    token_B, share_B = tables.look_up(jnp.array([[2, 1, -1, -1]] * 3), length_B)
    assert token_B[1] == 3
    np.testing.assert_allclose(share_B[:2], [0, 2 / 3], atol=1e-3)
    left = tables.start(jnp.int32(1), None)
    assert propose(left, ids_BS, length_B, 3)[1].tolist() == [0, 0, 2]


def test_prefix_drafts_from_its_own_table() -> None:
    core, ids = drafting(), [7, 8, 9]
    (free,) = alone("llama", "hidden", [ids], GREEDY)
    produced = prefixes("llama")["hidden"]
    card = engines.card(model("llama"), produced)
    ngrams = table([*ids, *free.samples[0].ids])
    core.bank.add("table", produced, card, (), None, ngrams)
    before = dataclasses.replace(core.stats)
    # The neighbour without a table is not affected.
    handles = [core.submit(Request(ids, name, GREEDY)) for name in ("table", "kv")]
    finish(core, *handles)
    assert_same_as("hidden", handles[0], ids)
    assert_same(handles[1], 0, [ids])
    core.bank.remove("table")
    assert core.stats.accepted_tokens - before.accepted_tokens >= 24 * K // (K + 1)


def assert_same_as(kind: str, handle: Handle, ids: list[int]) -> None:
    """Checks a request against plain decoding with the prefix `kind`."""
    (expected,) = alone("llama", kind, [ids], handle.request.config)
    assert handle.generation is not None
    assert handle.generation.samples[0].ids == expected.samples[0].ids
