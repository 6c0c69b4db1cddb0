"""The `task` section: what the model is asked to do."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from prefix_jax.validation import Fraction, Interval, Size, check_fields

# The names of `prefix_jax.tasks.TASKS`; "generate" stands for its "text" and "chat".
TaskName = Literal["generate", "classify", "regress", "tag", "span", "choice", "rank"]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Text generation, or a task whose head trains together with the prefix.

    `prefix_jax.tasks.make_task` builds the task from this section and the templates in `data`, and
    refuses fields that the task does not have.

    Attributes:
        name: "generate" text; "classify" a text or a pair; "regress" a number; "tag" every word;
            find the "span" of a text that answers a question; make a "choice" among texts; or
            "rank" them.
        label: field with the label: a name or number; the tags of all words, in a list; the
            answers, in SQuAD's form ({"text": […], "answer_start": […]}); the number of the right
            choice, counted from 0; or the relevances of all texts, in a list.
        labels: names of the labels, in order; None collects them from the training data and sorts
            them. A number in the data is an index into these names, unless a name is itself a
            number.
        words: for "tag", the field with the list of words.
        choices: for "choice" and "rank", templates of the texts. A field with a list expands to one
            text per item.
        stride: for "span", the overlap in tokens between windows of a long text.
        answer_tokens: for "span", the maximum length of an answer.
        unanswerable: for "span", whether questions may have no answer (SQuAD 2.0).
        dropout: dropout rate on the head's input, as in the model's own heads.
        reads_soft: for "classify" and "regress" with soft tokens in front of an encoder: the head
            reads the first soft token instead of the first token of the text, as in PEFT.
    """

    name: TaskName = "generate"
    label: str = "label"
    labels: tuple[str, ...] | None = None
    words: str = "tokens"
    choices: tuple[str, ...] | None = None
    stride: Annotated[int, Interval(ge=0, le=2**24)] = 128
    answer_tokens: Size = 30
    unanswerable: bool = False
    dropout: Fraction = 0.1
    reads_soft: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
