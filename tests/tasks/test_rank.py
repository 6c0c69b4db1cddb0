"""Tests ranking: examples, loss, predictions and scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import example, read, scores

from prefix_jax.errors import DataError
from prefix_jax.nn.loss import candidate_losses, listwise_losses
from prefix_jax.tasks import Rank

TASK = Rank("{q}", ("{texts}",))
RECORD = {"q": "the film", "texts": ["good", "very bad", "was"], "label": [2, 0, 1]}


def test_every_text_has_a_relevance(bert: Any) -> None:
    (example,) = read(bert, TASK, RECORD)
    assert example.label_M.tolist() == [2.0, 0.0, 1.0]
    assert example.label_M.dtype == np.float32
    assert (example.references, example.targets) == (("good",), 1)
    for label in ([1, 0], "good", [0, 0, 0], [1, -1, 0], [1, "x", 0]):
        with pytest.raises(DataError, match=r"record 1: .*(relevance|must be a number)"):
            read(bert, TASK, RECORD | {"label": label})


def test_loss_is_cross_entropy_with_normalised_relevances() -> None:
    score_BM = jnp.array([[1.0, -2.0, 0.5, 3.0, 9.0]])
    relevance_BM = jnp.array([[2.0, 0.0, 1.0, 5.0, 7.0]])
    question_BM = jnp.array([[1, 1, 1, 2, 0]])  # the last is padding
    logp_M = jax.nn.log_softmax(score_BM[0, :3])
    expected = -(2 * logp_M[0] + logp_M[2]) / 3
    loss_B = listwise_losses(score_BM, relevance_BM, question_BM)
    np.testing.assert_allclose(loss_B, [expected], rtol=1e-6)


def test_loss_of_a_pair_is_that_of_a_choice() -> None:
    score_BM, label_BM = jnp.array([[0.3, -1.2]]), jnp.array([[1, 0]])
    question_BM, weight_BM = jnp.array([[1, 1]]), jnp.array([[1.0, 0.0]])
    np.testing.assert_allclose(
        listwise_losses(score_BM, label_BM.astype(jnp.float32), question_BM),
        candidate_losses(score_BM[..., None], label_BM, weight_BM, question_BM),
        rtol=1e-6,
    )


def test_ranks_by_score() -> None:
    fields = {"candidates": True, "choices": ("one", "two", "three")}
    examples = [
        example(np.float32([0, 3, 1]), "two", **fields),
        example(np.float32([1, 0, 0]), "one", **fields),
    ]
    outputs = [[[0], [5], [1]], [[1], [2], [0]]]
    assert scores(TASK, examples, outputs) == {"ndcg": 81.55, "mrr": 75}
    first, second = TASK.predictions(examples, [np.array(out, np.float32) for out in outputs])
    assert (first.prediction, second.prediction) == ("two", "two")
    assert first.scores == {"0": 0, "1": 5, "2": 1}
