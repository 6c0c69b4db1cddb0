"""Tests what requests can ask for beyond text: log-probabilities and guides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import decoders
import engines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import V
from engines import model

from prefix_jax.config import DecodeConfig
from prefix_jax.engine import EngineCore, Event, Request
from prefix_jax.errors import ConfigError, DataError

GREEDY = DecodeConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def core() -> EngineCore:
    return engines.core("llama", ["kv", "plus"])


def run(core: EngineCore, *requests: Request) -> list[list[Event]]:
    """The events of each request."""
    handles = [core.submit(request) for request in requests]
    events: dict = {handle: [] for handle in handles}
    while not core.idle:
        for event in core.step():
            events[event.handle].append(event)
    return [events[handle] for handle in handles]


def distribution(kind: str | None, ids: list[int]) -> np.ndarray:
    """Log-probabilities of the token after each token of a text, [T, V]."""
    pretrained = model("llama")
    produced = None if kind is None else engines.prefixes("llama")[kind]
    prefix = decoders.lift(pretrained.backbone, pretrained.params, produced)
    h_1TD, _ = decoders.hidden(
        pretrained.backbone,
        pretrained.unstacked(),
        jnp.array([ids]),
        decoders.present(1, len(ids)),
        prefix,
    )
    logits_1TV = pretrained.backbone.unembed(pretrained.unstacked(), h_1TD)
    return np.asarray(jax.nn.log_softmax(logits_1TV[0]))


def assert_top(top: list, expected_TV: np.ndarray, count: int) -> None:
    for pairs, expected_V in zip(top, expected_TV, strict=True):
        best = np.argsort(-expected_V)[:count]
        assert [token for token, _ in pairs] == best.tolist()
        np.testing.assert_allclose([value for _, value in pairs], expected_V[best], atol=1e-4)


@pytest.mark.parametrize("kind", [None, "kv", "plus"])
def test_prompts_and_tokens_have_the_log_probabilities_of_the_model(core, kind) -> None:
    # Two chunks, next to rows that ask for less.
    ids = np.random.default_rng(1).integers(0, V, 40).tolist()
    scored = Request(ids, kind, GREEDY, top_logprobs=3, score_prompt=True)
    unscored = Request([1, 2], "kv", GREEDY), Request(ids[:33], kind, GREEDY)
    events, plain, _ = run(core, scored, *unscored)
    handle = events[0].handle
    new = [token for event in events for token in event.ids]
    expected_TV = distribution(kind, ids + new)[:-1]
    before_TV, after_TV = np.split(expected_TV, [len(ids) - 1])
    scores = handle.prompt_scores
    np.testing.assert_allclose(
        [score.logprob for score in scores],
        np.take_along_axis(before_TV, np.array(ids[1:])[:, None], axis=1)[:, 0],
        atol=1e-4,
    )
    assert_top([score.top for score in scores], before_TV, 3)
    assert_top([top for event in events for top in event.top], after_TV, 3)
    assert all(top == () for event in plain for top in event.top)


def test_samples_of_a_prompt_share_its_scores(core) -> None:
    config = DecodeConfig(max_new_tokens=2, temperature=1.0, num_samples=3)
    (events,) = run(core, Request([3, 4, 5], None, config, score_prompt=True))
    assert len(events[0].handle.prompt_scores) == 2


class Fixed:
    """Allows one token at a time."""

    def __init__(self, ids: list[int], rejected: int | None = None):
        self._ids: Iterator[int] = iter(ids)
        self._rejected = rejected
        self.accepted: list[int] = []

    def allowed(self) -> np.ndarray:
        words = np.zeros(-(-V // 32), np.uint32)
        token = next(self._ids)
        words[token // 32] = 1 << (token % 32)
        return words

    def accept(self, token: int) -> None:
        if token == self._rejected:
            raise DataError("rejected")
        self.accepted.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guide_chooses_the_tokens_of_its_row_only(core, temperature) -> None:
    guides, config = [], DecodeConfig(max_new_tokens=6, temperature=temperature)
    ids = [33, 0, 31, 32, 49, 5]

    def guide(eos: Sequence[int]) -> Fixed:
        assert eos == ()
        guides.append(Fixed(ids))
        return guides[-1]

    (alone,) = run(core, Request([1, 2, 3], "kv", config))
    guided, free = run(
        core, Request([1, 2, 3], "kv", config, guide=guide), Request([1, 2, 3], "kv", config)
    )
    assert [token for event in guided for token in event.ids] == ids == guides[0].accepted
    assert free[0].handle.generation.samples[0].ids == alone[0].handle.generation.samples[0].ids


def test_a_failing_guide_ends_its_request_only(core) -> None:
    def unusable(eos: Sequence[int]) -> Fixed:
        raise DataError("unusable")

    failed, rejected, free = run(
        core,
        Request([1], None, GREEDY, guide=unusable),
        Request([1], None, GREEDY, guide=lambda _: Fixed([7, 8, 9, 7, 8, 9], rejected=9)),
        Request([1], None, GREEDY),
    )
    assert (str(failed[-1].error), str(rejected[-1].error)) == ("unusable", "rejected")
    assert free[-1].finish == "length"


def test_wrong_requests_are_refused(core) -> None:
    with pytest.raises(ConfigError, match="top_logprobs must be between 0 and 20, got 21"):
        core.submit(Request([1], top_logprobs=21))
    with pytest.raises(ConfigError, match="an encoder-decoder has no log-probabilities"):
        engines.core("t5", []).submit(Request([1], score_prompt=True))
