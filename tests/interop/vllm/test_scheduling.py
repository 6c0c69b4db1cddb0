"""The scheduler's half loads the slots that vLLM does not have, and fails closed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from prefix_jax.interop.vllm import export_vllm
from prefix_jax.interop.vllm.plugin.scheduling import Scheduler
from prefix_jax.interop.vllm.plugin.stored import Prefixes, Shape
from prefix_jax.prefix import Embeds

BOS = 1


def request(prefixes: Prefixes | None, ids: list[int], **fields) -> SimpleNamespace:
    """A request as vLLM's scheduler has it, for the prefix "six" unless it is None."""
    params, salt = None, None
    if prefixes is not None:
        prompt, extra = prefixes["six"].request(ids, BOS)
        ids, salt = prompt["prompt_token_ids"], prompt["cache_salt"]
        params = extra["kv_transfer_params"]
    values = {
        "request_id": "r1",
        "kv_transfer_params": params,
        "cache_salt": salt,
        "prompt_token_ids": ids,
        "num_tokens": len(ids),
        "skip_reading_prefix_cache": False,
    }
    return SimpleNamespace(**values | fields)


@pytest.fixture
def prefixes(served: Path) -> Prefixes:
    return Prefixes(served)


@pytest.fixture
def scheduler(prefixes: Prefixes, shape: Shape) -> Scheduler:
    return Scheduler(prefixes, shape, BOS)


def refused(scheduler: Scheduler, wrong: SimpleNamespace, cached: int = 0) -> None:
    """Asserts that a request ends with an error, at its first block that nobody shares."""
    assert scheduler.match(wrong, cached) == (1, False)
    scheduler.allocated(wrong, [7, 8, 9], 1)
    (load,) = scheduler.take()
    assert load.prefix is None
    assert load.begin == cached


def test_request_without_prefix_loads_nothing(scheduler: Scheduler) -> None:
    assert scheduler.match(request(None, [5, 6]), 0) == (0, False)
    assert scheduler.take() == []


@pytest.mark.parametrize(("cached", "loaded"), [(0, 6), (4, 2), (6, 0), (8, 0)])
def test_slots_outside_the_cache_are_loaded(
    cached: int, loaded: int, scheduler: Scheduler, prefixes: Prefixes
) -> None:
    text = request(prefixes, [5, 6, 7, 8])
    assert scheduler.match(text, cached) == (loaded, False)
    if loaded:
        scheduler.allocated(text, [7, 8], loaded)
        (load,) = scheduler.take()
        assert load.prefix == prefixes["six"]
        assert (load.blocks, load.begin, load.end) == ((7, 8), cached, 6)
    assert scheduler.take() == []


def test_wrong_requests_are_refused(scheduler: Scheduler, prefixes: Prefixes) -> None:
    right = request(prefixes, [5, 6])
    for fields in (
        {"kv_transfer_params": {"prefix": "absent"}},
        {"kv_transfer_params": {"prefix": ["six"]}},
        {"kv_transfer_params": {"prefix": "../six"}},
        {"kv_transfer_params": None},  # the salt of a prefix without its slots
        {"cache_salt": None},
        {"cache_salt": "prefix:0"},
        {"prompt_token_ids": [5] * 9},
        {"prompt_token_ids": [BOS] * 6},
        {"prompt_token_ids": None},
        {"skip_reading_prefix_cache": True},
    ):
        refused(scheduler, request(prefixes, [5, 6], **fields))
    # The next request is served.
    assert scheduler.match(right, 0) == (6, False)


def test_refusal_never_touches_shared_blocks(scheduler: Scheduler, prefixes: Prefixes) -> None:
    refused(scheduler, request(prefixes, [5] * 9, kv_transfer_params=None), cached=8)


def test_refusal_ignores_requests_to_skip_the_cache(
    scheduler: Scheduler, prefixes: Prefixes
) -> None:
    """vLLM would drop the refusal of such a request and answer with the bare model."""
    wrong = request(prefixes, [5, 6], skip_reading_prefix_cache=True)
    refused(scheduler, wrong)
    assert not wrong.skip_reading_prefix_cache


def test_request_with_one_token_is_never_answered_by_the_bare_model(scheduler: Scheduler) -> None:
    wrong = request(None, [5], kv_transfer_params={"prefix": "six"})
    assert scheduler.match(wrong, 0) == (None, False)


def test_salt_of_a_client_follows_that_of_the_prefix(
    scheduler: Scheduler, prefixes: Prefixes
) -> None:
    salted = request(prefixes, [5, 6], cache_salt=f"{prefixes['six'].salt}:tenant")
    assert scheduler.match(salted, 0) == (6, False)
    scheduler.allocated(salted, [7, 8], 6)
    (load,) = scheduler.take()
    assert load.prefix == prefixes["six"]
    refused(scheduler, request(prefixes, [5, 6], cache_salt=f"{prefixes['six'].salt}tenant"))


def test_cancelled_refusals_are_forgotten(scheduler: Scheduler) -> None:
    wrong = request(None, [5], kv_transfer_params={"prefix": "six"})
    scheduler.match(wrong, 0)
    scheduler.finished(wrong)
    scheduler.finished(wrong)
    assert not scheduler.refused


def test_replacing_a_prefix_changes_new_requests_only(
    forms, save, served: Path, scheduler: Scheduler, prefixes: Prefixes, pretrained
) -> None:
    running = request(prefixes, [5, 6])
    waiting = request(prefixes, [5, 6], request_id="r2")
    assert scheduler.match(running, 0) == (6, False)
    shifted = Embeds(forms["embeds"].x_PD[:4] + 0.1)
    export_vllm(save(shifted), served / "six", replace=True, model=pretrained)
    # A preempted request continues with the prefix that it began with.
    assert scheduler.match(running, 0) == (6, False)
    assert scheduler.match(waiting, 0) == (6, False)
    assert scheduler.match(request(prefixes, [5, 6]), 0) == (4, False)


def test_prefix_that_was_never_used_and_is_replaced_is_refused(
    forms, save, served: Path, scheduler: Scheduler, prefixes: Prefixes, pretrained
) -> None:
    late = request(prefixes, [5, 6])
    shifted = Embeds(forms["embeds"].x_PD + 0.1)
    export_vllm(save(shifted), served / "six", replace=True, model=pretrained)
    refused(scheduler, late)


def test_nothing_raises(scheduler: Scheduler) -> None:
    """An exception would stop vLLM's engine."""
    assert scheduler.match(SimpleNamespace(request_id="r", num_tokens=3), 0) == (1, False)  # type: ignore[arg-type]
