"""Tests tagging: examples, predictions and scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from heads import example, read, scores

from prefix_jax.errors import DataError
from prefix_jax.tasks import Tag

TAGS = Tag(labels=("O", "B"))


@pytest.mark.parametrize("kind", ["bert", "roberta", "decoder"])
def test_tag_is_predicted_from_first_token_of_word(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    words = ["xyz", "is", "-", "great"]
    record = {"tokens": words, "label": ["B", "O", "O", "B"]}
    (example,) = read(tokenizer, TAGS, record, causal=kind == "decoder")
    firsts = [
        tokenizer.decode([example.ids_T[column]]).strip(" #")[:1] for column in example.index_M
    ]
    # The space before a word may be part of its first token, or a separate token.
    assert all(first in ("", word[0]) or word.startswith(first)
               for first, word in zip(firsts, words, strict=True))  # fmt: skip
    assert example.label_M.tolist() == [1, 0, 0, 1]
    assert (np.diff(example.index_M) > 0).all()


def test_truncated_words_have_no_tag(bert: Any) -> None:
    record = {"tokens": ["good", "xyz", "film"], "label": ["B", "O", "B"]}
    examples = read(bert, TAGS, record, max_length=5)
    assert examples[0].references == ("B", "O")
    assert examples.truncated == ("record 1",)


def test_word_must_be_a_text_or_a_number(bert: Any) -> None:
    task = TAGS
    (example,) = read(bert, task, {"tokens": ["film", 3], "label": ["O", "B"]})
    assert example.prompt == "film 3"
    with pytest.raises(DataError, match=r"record 1: words in field 'tokens' must be .*, got list"):
        read(bert, task, {"tokens": ["film", ["a"]], "label": ["O", "B"]})
    with pytest.raises(DataError, match="record 1: not valid Unicode"):
        read(bert, task, {"tokens": ["film", "\ud800"], "label": ["O", "B"]})


def test_every_word_needs_a_tag(bert: Any) -> None:
    with pytest.raises(DataError, match="record 1: 1 tags in 'label' for 2 words in 'tokens'"):
        read(bert, TAGS, {"tokens": ["a", "b"], "label": ["O"]})


def test_entity_f1_counts_whole_entities() -> None:
    labels = ("O", "B-PER", "I-PER", "B-LOC")
    task = Tag(labels=labels)
    right = [[1, 2, 0, 3], [0, 3]]
    predicted = [[1, 0, 0, 3], [0, 3]]
    examples = [example(row, *(labels[i] for i in row)) for row in right]
    outputs = [np.eye(4)[row] for row in predicted]
    assert scores(task, examples, outputs) == {"accuracy": 83.333, "f1": 66.667}
    answer = task.predictions(examples, outputs)[0]
    assert (answer.prediction, answer.references) == ("B-PER O O B-LOC", ("B-PER I-PER O B-LOC",))
