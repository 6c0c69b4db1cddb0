"""The sections that say what examples are: where they come from, and what is made of them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from prefix_jax.validation import Fraction, Interval, Size, check_conditions, check_fields

Preparing = Literal["e2e", "web_nlg", "dart", "copa", "sst2", "mrpc", "rte"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they become tokens.

    Relative paths are relative to the working directory. An example is either an input and a
    target, rendered from templates with `{field}`, or a chat.

    Attributes:
        train: a .jsonl, .csv or .parquet file, or `tfds:NAME/SPLIT`. None when the records come
            from Python. A file has at most 8 GiB, and a line or row 16 million characters.
        dev: like `train`, for evaluation during training; None does without. A run whose dev or
            test records equal its training records gets a warning.
        test: like `train`, for the evaluation after training; None does without.
        prepare: what records of a published set need before templates render them: each name
            adds a field (see `data/prepare.py`); None adds nothing.
        input: template of the text that is given; None gives nothing (plain text modelling).
        pair: template of a second text, for a task that reads two; of the text to search, for
            `task.name: span`.
        target: template of the text to learn.
        messages: the field that holds a chat, a list of {"role": …, "content": …}. Excludes
            `input` and `target`; not for encoder-decoders.
        references: the field that holds every acceptable target, for evaluation; None takes the
            rendered target. Only records of which text is measured need it.
        task: the field that names the task of a record, where several train together, each with a
            prefix of its own (`method.name: multitask`); None trains one.
        loss: learn "target" tokens only (of a chat, the assistant's turns) or "all" tokens, which
            an encoder-decoder cannot.
        reduction: the loss of a step is the mean over its target "token"s, or the sum over each
            "example"'s targets, averaged over examples (Li & Liang 2021).
        max_length: tokens of an example at most, the prefix not counted; None allows what the
            backbone's positions allow. For an encoder-decoder, tokens of its input at most.
        truncate: the side on which an example that is too long loses tokens of its input. The
            target is never cut.
        on_overflow: what happens to an example whose target alone is too long.
        pack: put several examples into one row; each still sees itself and the prefix only.
            Behind soft tokens before an encoder, each has a row of its own whatever stands here.
        group_by_source: let targets that share their input meet in one row and share its tokens.
        batch_size: examples per optimizer step, over all hosts and micro-batches.
        tfds_dir: the data directory of TensorFlow Datasets; None takes its default.
    """

    train: str | None = None
    dev: str | None = None
    test: str | None = None
    prepare: Preparing | None = None
    input: str | None = None
    pair: str | None = None
    target: str | None = None
    messages: str | None = None
    references: str | None = None
    task: str | None = None
    loss: Literal["target", "all"] = "target"
    reduction: Literal["token", "example"] = "token"
    max_length: Annotated[int, Interval(ge=2, le=2**24)] | None = None
    truncate: Literal["left", "right"] = "left"
    on_overflow: Literal["error", "drop"] = "error"
    pack: bool = True
    group_by_source: bool = False
    batch_size: Annotated[int, Interval(ge=1, le=2**16)] = 8
    tfds_dir: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        templates = self.input is not None or self.target is not None
        check_conditions(
            (
                not (templates and self.messages is not None),
                "messages excludes input and target: a chat has its own turns",
            ),
            (
                not self.group_by_source or self.pack,
                "group_by_source shares tokens inside packed rows: it needs pack: true",
            ),
        )


TaskName = Literal["generate", "classify", "regress", "tag", "span", "choice"]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What is made of a text: more text, or the answer of a head that trains beside the prefix.

    Attributes:
        name: "generate" text; "classify" a text, or a pair of them; "regress" a number; "tag" every
            word; mark the "span" of a text that answers a question; or make a "choice" among texts.
        label: the field of what is to be found: a label; a number; the tags of all words, in a
            list; the answers, as SQuAD has them ({"text": […], "answer_start": […]}); the choice,
            counted from 0.
        labels: the names of the labels, in order; None collects them from the training data,
            sorted. A number in the data counts them from 0, unless the name of a label is itself
            a number: then it is a name.
        words: for "tag", the field that holds the words, in a list.
        choices: for "choice", templates of the texts to choose among. A field that holds a list
            gives one for each of its texts.
        stride: for "span", how many tokens successive windows of a long text share.
        answer_tokens: for "span", how long an answer is at most.
        unanswerable: for "span", whether a question may have no answer (SQuAD 2.0).
        dropout: of the head's input, in training; where the model's own heads have it.
        reads_soft: for "classify" and "regress" by soft tokens before an encoder: the head reads
            the first of them in place of the text's first token, as in PEFT.
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
                "reads_soft is for name: classify and name: regress, whose heads read one token; "
                "leave it out",
            ),
            (
                (self.choices is not None) == (self.name == "choice"),
                "choices are the templates of the texts that name: choice chooses among; give them "
                "there, and there alone",
            ),
            (
                self.labels is None or len(set(self.labels)) == len(self.labels) >= 2,
                "labels names each label once, and at least two",
            ),
            (
                self.name != "tag" or all(label.strip() for label in self.labels or ()),
                "labels holds an empty tag, which has no meaning for F1; give it a name",
            ),
        )
