"""The `task` section: what the model is asked to do."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from prefix_jax.validation import Fraction, Interval, Size, check_conditions, check_fields

TaskName = Literal["generate", "classify", "regress", "tag", "span", "choice"]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Text generation, or a task whose head trains together with the prefix.

    Attributes:
        name: "generate" text; "classify" a text or a pair; "regress" a number; "tag" every word;
            find the "span" of a text that answers a question; or make a "choice" among texts.
        label: field with the label: a name or number; the tags of all words, in a list; the
            answers, in SQuAD's form ({"text": […], "answer_start": […]}); or the number of the
            right choice, counted from 0.
        labels: names of the labels, in order; None collects them from the training data and sorts
            them. A number in the data is an index into these names, unless a name is itself a
            number.
        words: for "tag", the field with the list of words.
        choices: for "choice", templates of the texts to choose from. A field with a list expands to
            one choice per item.
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
        check_conditions(
            (
                not self.reads_soft or self.name in ("classify", "regress"),
                f"reads_soft requires name: classify or regress, got {self.name}; leave it out",
            ),
            (
                (self.choices is not None) == (self.name == "choice"),
                "choices and name: choice require each other; give both or neither",
            ),
            (
                self.labels is None or len(set(self.labels)) == len(self.labels) >= 2,
                f"labels must be at least two different names, got {list(self.labels or ())}",
            ),
            (
                self.name != "tag" or all(label.strip() for label in self.labels or ()),
                "labels contains an empty tag, which F1 cannot count; give it a name",
            ),
        )
