"""Tests the engine: other rows never change the text of a row."""

from __future__ import annotations

import dataclasses
import functools
import random

import engines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import GREEDY, alone, assert_equal, finish, model, prefixes, prompts

from prefix_jax.config import DecodeConfig
from prefix_jax.engine import EngineCore, Request, programs
from prefix_jax.errors import (
    ConfigError,
    ContextError,
    DataError,
    MeshError,
    NonFiniteError,
    PrefixError,
)
from prefix_jax.mesh import make_mesh, weight_shardings
from prefix_jax.prefix import KVPrefix, Prefix, Site

SAMPLED = DecodeConfig(max_new_tokens=8, temperature=1.5, top_k=20, top_p=0.9, min_p=0.01, seed=3)
ALL = (None, *prefixes("llama"))


@functools.cache
def shared(name: str) -> EngineCore:
    """An engine that several tests use, one after the other."""
    return engines.core(name, num_speculative_tokens=3)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", ALL),
        ("gpt2", (None, "kv", "position", "embeds", "hidden")),
        # Rows outgrow the window of 4, so prefixes leave it unless they are pinned.
        ("mistral", (None, "kv", "pinned", "bias")),
        # Windows and frequencies differ between layers.
        ("gemma3", (None, "long", "pinned", "layers", "adapter")),
        # An encoder, relative positions, and soft tokens before the encoder.
        ("t5", (None, "kv", "bias", "layers", "embeds", "adapter", "plus")),
        # Learned positions, and a forced first token.
        ("bart", (None, "kv", "encoder", "cross", "embeds")),
    ],
)
def test_rows_of_different_prefixes_are_the_same_alone(name, kinds) -> None:
    core = shared(name)
    texts = prompts(len(kinds))
    handles = [
        core.submit(Request(ids, kind, GREEDY)) for ids, kind in zip(texts, kinds, strict=True)
    ]
    finish(core, *handles)
    for handle, kind, ids in zip(handles, kinds, texts, strict=True):
        (expected,) = alone(name, kind, [ids], GREEDY)
        assert_equal(handle.generation, expected)


def test_samples_are_those_of_a_generator() -> None:
    core, texts = shared("llama"), prompts(4)
    configs = [
        SAMPLED,
        dataclasses.replace(SAMPLED, num_samples=2, seed=9),
        DecodeConfig(max_new_tokens=8, temperature=0.7, repetition_penalty=1.3),
        DecodeConfig(max_new_tokens=6, min_new_tokens=4, repetition_penalty=2.0),
    ]
    handles = [
        core.submit(Request(ids, "kv", config, index=index))
        for index, (ids, config) in enumerate(zip(texts, configs, strict=True))
    ]
    finish(core, *handles)
    for index, (handle, config) in enumerate(zip(handles, configs, strict=True)):
        assert_equal(handle.generation, alone("llama", "kv", texts, config)[index])


def test_rows_have_their_own_constraints() -> None:
    core = engines.core("llama", ["kv"], rows=4)
    texts = [[7], [3, 3, 4, 3], [9, 8], [5, 6, 5]]
    free = alone("llama", "kv", texts, DecodeConfig(max_new_tokens=12))
    often = [generation.text for generation in free]
    configs = [
        DecodeConfig(max_new_tokens=12, no_repeat_ngram_size=2),
        DecodeConfig(max_new_tokens=12, no_repeat_ngram_size=1),
        # A character, and a word of two tokens and one of three.
        DecodeConfig(max_new_tokens=12, banned_words=(often[2][0], often[2][2:4], often[2][5:8])),
        DecodeConfig(max_new_tokens=12),
    ]
    handles = [
        core.submit(Request(ids, "kv", config)) for ids, config in zip(texts, configs, strict=True)
    ]
    finish(core, *handles)
    changed = 0
    for index, (handle, config) in enumerate(zip(handles, configs, strict=True)):
        (expected,) = alone("llama", "kv", [texts[index]], config)
        assert_equal(handle.generation, expected)
        changed += expected.text != free[index].text
    assert changed == 3


def test_a_prompt_in_chunks_gives_the_same_text() -> None:
    (ids,) = prompts(1, seed=1)
    ids = (ids * 8)[:45]
    small, whole = shared("llama"), engines.core("llama", ["kv"], chunk=64)
    config = DecodeConfig(max_new_tokens=6)
    handles = [core.submit(Request(ids, "kv", config)) for core in (small, whole)]
    finish(small, handles[0])
    finish(whole, handles[1])
    assert handles[1].generation is not None
    assert_equal(handles[0].generation, handles[1].generation)
    assert_equal(handles[0].generation, alone("llama", "kv", [ids], config)[0])


def test_long_and_short_rows_resize_the_cache() -> None:
    core = engines.core("llama", ["kv"], rows=2)
    short, long = prompts(1, 4)[0], [7] * 50
    config = DecodeConfig(max_new_tokens=9)
    first = core.submit(Request(short, "kv", config))
    core.step()
    second = core.submit(Request(long, "kv", dataclasses.replace(config, max_new_tokens=8)))
    finish(core, first, second)
    third = core.submit(Request(short, "kv", config))
    finish(core, third)
    for handle in (first, third):
        assert_equal(handle.generation, alone("llama", "kv", [short], config)[0])
    assert second.generation is not None
    assert len(second.generation.samples[0].ids) == 8


def test_events_add_up_to_the_generation() -> None:
    core = shared("llama")
    config = DecodeConfig(max_new_tokens=9, temperature=1.0, num_samples=2)
    handle = core.submit(Request([1, 2, 3], "hidden", config))
    events = finish(core, handle)
    assert handle.generation is not None
    for number, sample in enumerate(handle.generation.samples):
        of_sample = [event for event in events if event.sample == number]
        assert sum((event.ids for event in of_sample), ()) == sample.ids
        assert sum((event.logprobs for event in of_sample), ()) == sample.logprobs
        assert "".join(event.text for event in of_sample) == sample.text
        assert [event.finish for event in of_sample if event.finish] == [sample.finish]


def test_texts_end_at_stop_texts_and_end_tokens() -> None:
    core = engines.core("llama", ["kv"], rows=2)
    (free,) = alone("llama", "kv", [[4, 5]], GREEDY)
    sample = free.samples[0]
    stop = dataclasses.replace(GREEDY, stop=(sample.text[3:5],))
    stopped = core.submit(Request([4, 5], "kv", stop))
    finish(core, stopped)
    (expected,) = alone("llama", "kv", [[4, 5]], stop)
    assert_equal(stopped.generation, expected)
    produced = prefixes("llama")["kv"]
    eos = (*range(40, 49), sample.ids[3])  # more than rows have room for at first
    core.bank.add("ending", produced, engines.card(model("llama"), produced), eos, None)
    ended = core.submit(Request([4, 5], "ending", GREEDY))
    finish(core, ended)
    assert ended.generation is not None
    ends = next(i for i, token in enumerate(sample.ids) if token in eos)
    assert ended.generation.samples[0].ids == sample.ids[: ends + 1]
    assert ended.generation.samples[0].finish == "eos"


class TestJoiningAndLeaving:
    def test_cancelling_frees_the_row(self) -> None:
        core = engines.core("llama", ["kv", "plus"], rows=1)
        first = core.submit(Request([1, 2], "plus", DecodeConfig(max_new_tokens=40)))
        second = core.submit(Request([3], "kv", GREEDY))
        core.step()
        core.cancel(first)
        core.cancel(first)
        finish(core, second)
        assert core.idle
        assert first.cancelled
        assert first.done
        assert first.generation is None
        assert_equal(second.generation, alone("llama", "kv", [[3]], GREEDY)[0])

    def test_cancelling_removes_a_waiting_request(self) -> None:
        core = engines.core("llama", ["kv"], rows=1)
        first, second = (core.submit(Request([1], "kv", GREEDY)) for _ in range(2))
        core.cancel(second)
        events = finish(core, first)
        assert core.idle
        assert not [event for event in events if event.handle is second]

    def test_random_joins_leaves_and_replacements_change_no_answer(self) -> None:
        rng = random.Random(0)
        options = {"device_bytes": 40_000, "host_bytes": 0, "num_speculative_tokens": 2}
        core = engines.core("llama", rows=3, **options)
        config = DecodeConfig(max_new_tokens=7)
        names = [name for name in ALL if name != "long"]
        texts = prompts(6, 12, seed=2)
        # "changing" alternates between two prefixes.
        variants = ["kv", "hidden"]

        def put(kind: str) -> None:
            produced = prefixes("llama")[kind]
            core.bank.add("changing", produced, engines.card(model("llama"), produced), (), None)

        put(variants[0])
        current, pending, expected = variants[0], [], {}
        for _ in range(120):
            action = rng.random()
            if action < 0.4:
                name = rng.choice([*names, "changing"])
                handle = core.submit(Request(rng.choice(texts), name, config))
                pending.append(handle)
            elif action < 0.5 and pending:
                core.cancel(rng.choice(pending))
            elif action < 0.55:
                current = variants[variants.index(current) - 1]
                put(current)
            waiting = {sample.handle for sample in core._schedule.queue}
            core.step()
            for handle in pending:
                started = handle in waiting and handle not in {
                    sample.handle for sample in core._schedule.queue
                }
                if started and handle.request.prefix == "changing":
                    expected[handle] = current
        finish(core, *pending)
        answers = [handle for handle in pending if not handle.cancelled]
        assert len(answers) > 30
        assert len(answers) < len(pending)
        for handle in answers:
            kind = expected.get(handle, handle.request.prefix)
            (same,) = alone("llama", kind, [handle.request.ids], config)
            assert_equal(handle.generation, same)

    def test_running_row_keeps_the_prefix_that_it_started_with(self) -> None:
        core = engines.core("llama", ["kv", "long"], rows=1)
        running = core.submit(Request([1, 2], "kv", GREEDY))
        waiting = core.submit(Request([1, 2], "kv", GREEDY))
        core.step()
        produced = prefixes("llama")["long"]
        core.bank.add("kv", produced, engines.card(model("llama"), produced), (), None)
        finish(core, running, waiting)
        assert_equal(running.generation, alone("llama", "kv", [[1, 2]], GREEDY)[0])
        assert_equal(waiting.generation, alone("llama", "long", [[1, 2]], GREEDY)[0])

    def test_removed_prefix_fails_requests_that_wait(self) -> None:
        core = engines.core("llama", ["kv"], rows=1)
        running, waiting = (core.submit(Request([1], "kv", GREEDY)) for _ in range(2))
        core.step()
        core.bank.remove("kv")
        events = finish(core, running, waiting)
        assert running.generation is not None
        assert isinstance(waiting.error, PrefixError)
        assert [event for event in events if event.error is waiting.error]


def test_changes_of_prefixes_and_rows_compile_nothing() -> None:
    core = engines.core("llama", rows=2)
    compiled = [programs.start, programs.extend, programs.decode, programs.resize]

    def use(name: str | None, length: int) -> None:
        finish(core, core.submit(Request([5] * length, name, GREEDY)))

    # Twice: the first gated slots and the first matrices add arrays to the cache.
    for name in (*ALL, *ALL):
        use(name, 20)
    sizes = [program._cache_size() for program in compiled]
    lifts = core._lift._cache_size()
    rng = np.random.default_rng(5)
    for P in (6, 7, 8):  # the sizes of "embeds" and "kv" rounded up are 8, too
        slots = jnp.asarray(rng.normal(size=(2, 3, P, 2, 8)), jnp.float32)
        produced = Prefix(Site(KVPrefix(*slots)), text_position=P)
        core.bank.add("new", produced, engines.card(model("llama"), produced), (), None)
        use("new", 17 + P)
        x_PD = jnp.asarray(rng.normal(size=(P, 32)), jnp.float32)
        soft = type(prefixes("llama")["embeds"])(x_PD)
        core.bank.add("new", soft, engines.card(model("llama"), soft), (), None)
        use("new", 2)
    core.bank.remove("new")
    handles = [core.submit(Request([P], "kv", SAMPLED)) for P in range(5)]
    core.step()
    core.cancel(handles[1])
    finish(core, *handles)
    assert [program._cache_size() for program in compiled] == sizes
    assert core._lift._cache_size() == lifts


class TestErrors:
    @pytest.mark.parametrize(
        ("request_", "error", "message"),
        [
            (Request([1], "law", GREEDY), PrefixError, "no prefix 'law'; add it first, or give"),
            (Request([], "kv", GREEDY), DataError, "the prompt is empty"),
            (Request([77], "kv", GREEDY), DataError, "token id 77, outside the vocabulary"),
            (Request([1] * 60, "kv", GREEDY), ContextError, "60 tokens after a prefix of 5, and 8"),
            (
                Request([1], "kv", DecodeConfig(num_beams=2)),
                ConfigError,
                r"does not support beam search \(num_beams 2\); use Tuned.generate",
            ),
        ],
    )
    def test_wrong_request_is_refused_before_anything_runs(self, request_, error, message) -> None:
        core = shared("llama")
        with pytest.raises(error, match=message):
            core.submit(request_)
        assert core.idle

    def test_rows_have_a_maximum_length(self) -> None:
        core = engines.core("llama", ["kv"], max_length=16)
        core.check(Request([1] * 3, "kv", GREEDY))
        with pytest.raises(ContextError, match=r"4 tokens after 5 slots .* exceed max_length 16"):
            core.submit(Request([1] * 4, "kv", GREEDY))

    def test_broken_prefix_fails_its_own_rows_only(self) -> None:
        core = engines.core("llama", ["kv"], rows=2)
        slots = jnp.full((2, 3, 5, 2, 8), jnp.nan)
        broken = Prefix(Site(KVPrefix(*slots)), text_position=5)
        card = engines.card(model("llama"), broken)
        core.bank.add("broken", broken, card, (), None)
        bad = [core.submit(Request([1, 2], "broken", GREEDY)) for _ in range(2)]
        good = [core.submit(Request([1, 2], name, GREEDY)) for name in ("kv", None)]
        finish(core, *bad, *good)
        assert all(isinstance(handle.error, NonFiniteError) for handle in bad)
        # These rows held NaN before.
        for handle, kind in zip(good, ("kv", None), strict=True):
            assert_equal(handle.generation, alone("llama", kind, [[1, 2]], GREEDY)[0])

    @pytest.mark.parametrize("option", ["rows", "chunk", "decode_steps", "max_length"])
    def test_numbers_must_be_positive(self, option: str) -> None:
        with pytest.raises(ConfigError, match=f"{option} must be a positive integer, got 0"):
            EngineCore(model("llama"), **{option: 0})

    def test_several_processes_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(MeshError, match=r"got 2 processes; run one engine per host"):
            EngineCore(model("llama"))


def test_rows_and_heads_are_split_over_a_mesh() -> None:
    single = model("llama")
    mesh = make_mesh(2, 1, 2, devices=jax.devices()[:4])
    params = jax.device_put(single.params, weight_shardings(single.params, mesh))
    pretrained = dataclasses.replace(single, params=params, mesh=mesh)
    pretrained.__dict__["tokenizer"] = engines.tokenizer()
    # "kv" is shared and "bias", the second long prefix, is copied.
    core = EngineCore(pretrained, rows=4, chunk=32, share_slots=4, max_shared=1)
    kinds = ("kv", "bias", "adapter", "plus")
    for kind in kinds:
        produced = prefixes("llama")[kind]
        core.bank.add(kind, produced, engines.card(single, produced), (), None)
    texts = prompts(5)
    handles = [
        core.submit(Request(ids, kind, GREEDY))
        for ids, kind in zip(texts, (None, *kinds), strict=True)
    ]
    finish(core, *handles)
    k_BKSH = core._cache.layers[0].own.columns.k_BKSH
    assert k_BKSH.addressable_shards[0].data.shape[:2] == (2, 1)
    (kv, *_) = core.bank.use("kv").shared
    assert kv.k_KPH.addressable_shards[0].data.shape == (1, 8, 8)
    for handle, kind, ids in zip(handles, (None, *kinds), texts, strict=True):
        assert_equal(handle.generation, alone("llama", kind, [ids], GREEDY)[0])
