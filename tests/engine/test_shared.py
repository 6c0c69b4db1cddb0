"""Tests prefixes that rows share instead of copying them."""

from __future__ import annotations

import gc
import weakref

import engines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import GREEDY, alone, assert_equal, finish, model, prompts

from prefix_jax.engine import EngineCore, Request, programs
from prefix_jax.errors import ConfigError, NonFiniteError
from prefix_jax.prefix import KVPrefix, Prefix, Produced, Site


def core(name: str = "llama", kinds: list[str] | None = None, **options) -> EngineCore:
    """An engine that shares all prefixes with slots inside the softmax."""
    return engines.core(name, kinds, **{"share_slots": 4, **options})


def slots(P: int, seed: int = 0, text_position: int | None = None) -> Prefix:
    k, v = np.random.default_rng(seed).normal(size=(2, 3, P, 2, 8))
    position = P if text_position is None else text_position
    return Prefix(Site(KVPrefix(jnp.asarray(k), jnp.asarray(v))), text_position=position)


def add(core: EngineCore, name: str, produced: Produced) -> None:
    core.bank.add(name, produced, engines.card(model("llama"), produced), (), None)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", (None, "bias", "long", "layers", "position", "kv", "adapter")),
        # Rows outgrow the window of some layers, so prefixes leave it unless they are pinned.
        ("gemma3", (None, "long", "pinned")),
    ],
)
def test_shared_and_copied_prefixes_mix(name, kinds) -> None:
    # Four rows, of which at most two prefixes are shared: the others are copied.
    mixed = core(name, max_shared=2)
    texts = prompts(len(kinds))
    if name == "llama":
        texts[1] = (texts[1] * 45)[:45]  # two chunks
    handles = [
        mixed.submit(Request(ids, kind, GREEDY)) for ids, kind in zip(texts, kinds, strict=True)
    ]
    most = 0
    while not mixed.idle:
        mixed.step()
        most = max(most, len(mixed._schedule.share()))
    assert most == 2
    for handle, kind, ids in zip(handles, kinds, texts, strict=True):
        assert_equal(handle.generation, alone(name, kind, [ids], GREEDY)[0])


def test_threshold_is_the_number_of_slots() -> None:
    below = core(kinds=["kv", "long"], share_slots=5)
    assert not below.bank.find("kv").slots.shared
    assert below.bank.find("long").slots.shared
    never = core(kinds=["long"], share_slots=None)
    assert not never.bank.find("long").slots.shared
    with pytest.raises(ConfigError, match="share_slots must be a positive integer, got 0"):
        core(share_slots=0)


def test_rows_hold_their_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, P = 16, 256
    shared = core(kinds=[], rows=rows)
    add(shared, "cartridge", slots(P, text_position=20))
    handles = [shared.submit(Request([i], "cartridge", GREEDY)) for i in range(rows)]
    temporaries = []

    def decode(*args, **options):
        compiled = run.lower(*args, **options).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
        return run(*args, **options)

    run = programs.decode
    monkeypatch.setattr(programs, "decode", decode)
    shared.step()
    monkeypatch.undo()
    assert shared._cache.width == 64
    # No temporary is as large as a copy of one layer's keys for every row.
    assert temporaries[0] < rows * P * 2 * 8 * 4
    finish(shared, *handles)


def test_replaced_prefixes_compile_nothing_and_are_released() -> None:
    shared = core(kinds=[], rows=2, decode_steps=1)
    compiled = [programs.start, programs.extend, programs.decode]

    def both(first: Prefix, second: Prefix) -> None:
        """A row uses the first prefix when the second replaces it and another row starts."""
        add(shared, "changing", first)
        running = shared.submit(Request([1, 2], "changing", GREEDY))
        shared.step()
        old = weakref.ref(shared.bank.use("changing"))
        add(shared, "changing", second)
        new = shared.submit(Request([1, 2], "changing", GREEDY))
        shared.step()
        assert len(shared._schedule.share()) == 2
        gc.collect()
        assert old() is not None
        finish(shared, running, new)
        gc.collect()
        assert old() is None
        texts = [handle.generation.samples[0].ids for handle in (running, new)]
        for prefix, ids in zip((first, second), texts, strict=True):
            add(expected, "same", prefix)
            handle = expected.submit(Request([1, 2], "same", GREEDY))
            finish(expected, handle)
            assert handle.generation.samples[0].ids == ids

    expected = core(kinds=[], rows=2, share_slots=None)
    both(slots(8, 1), slots(7, 2))
    sizes = [program._cache_size() for program in compiled]
    both(slots(5, 3), slots(6, 4))
    assert [program._cache_size() for program in compiled] == sizes


def test_evicted_prefix_stays_with_its_rows_and_is_not_loaded_twice() -> None:
    size = core(kinds=["kv"]).bank.find("kv").bytes
    shared = core(kinds=["kv", "hidden"], rows=3, decode_steps=1, device_bytes=size)
    first = shared.submit(Request([1], "kv", GREEDY))
    shared.step()
    second = shared.submit(Request([1], "hidden", GREEDY))
    shared.step()
    assert shared.bank.find("kv").tier == "host"
    third = shared.submit(Request([2], "kv", GREEDY))
    shared.step()
    assert len(shared._schedule.share()) == 2
    finish(shared, first, second, third)
    for handle in (first, second, third):
        request = handle.request
        assert_equal(handle.generation, alone("llama", request.prefix, [request.ids], GREEDY)[0])


def test_broken_shared_prefix_fails_its_own_rows_only() -> None:
    shared = core(kinds=["kv"], rows=3)
    add(shared, "broken", jax.tree.map(lambda x: x * jnp.nan, slots(7)))
    # Prompts of one token, so that all rows decode in the first step.
    bad, good, bare = (shared.submit(Request([1], name, GREEDY)) for name in ("broken", "kv", None))
    finish(shared, bad, good, bare)
    assert isinstance(bad.error, NonFiniteError)
    for handle in (good, bare):
        assert_equal(handle.generation, alone("llama", handle.request.prefix, [[1]], GREEDY)[0])
