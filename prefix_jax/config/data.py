"""The `data` section: records, templates and batches."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from prefix_jax.validation import Interval, check_conditions, check_fields, renamed

Preparing = Literal["e2e", "web_nlg", "dart", "copa", "sst2", "mrpc", "rte"]


@renamed(task="dataset")
@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training and evaluation data, and how records become tokens.

    Relative paths are relative to the working directory. An example is either an input and a
    target, rendered from templates with `{field}`, or a chat.

    Attributes:
        train: training records: a .jsonl, .csv or .parquet file, or `tfds:NAME/SPLIT`. None if they
            come from Python. Files are limited to 8 GiB, and lines and rows to 16 million
            characters.
        dev: like `train`, for evaluation during training; None for no such evaluation. A run warns
            if its dev or test records equal its training records.
        test: like `train`, for evaluation after training; None for no such evaluation.
        prepare: preprocessing for a published dataset, which adds fields that the templates use
            (see `data/prepare.py`); None for none.
        input: template of the input; None for no input (plain language modelling).
        pair: template of the second text, for tasks that read two; with `task.name: span`, of the
            text to search.
        target: template of the text to learn.
        messages: field with a chat, a list of {"role": …, "content": …}. Excludes `input` and
            `target`, and does not work with encoder-decoders.
        references: field with all acceptable targets, for evaluation; None uses the rendered
            target. Only records for generation metrics need it.
        dataset: field with the name of a record's dataset, to train several datasets with one
            prefix each (`method.name: multitask`); None trains a single prefix.
        loss: which tokens to learn: "target" tokens (in a chat, the assistant's turns) or "all",
            which encoder-decoders do not support.
        reduction: "token" averages the loss over the target tokens of a step; "example" sums it
            over the targets of an example and averages over examples (Li & Liang 2021).
        max_length: maximum tokens of an example, not counting the prefix; None for the limit of the
            backbone's positions. With an encoder-decoder, maximum tokens of the input.
        truncate: side on which the input of a long example is cut. Targets are never cut.
        on_overflow: what to do with an example whose target is too long.
        pack: pack several examples into one row; each attends to itself and the prefix only. Has no
            effect on soft tokens in front of an encoder, where every example has its own row.
        group_by_source: put targets with the same input into one row, which encodes the input once.
        batch_size: examples per optimizer step, over all hosts and micro-batches.
        tfds_dir: data directory of TensorFlow Datasets; None for its default.
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
    dataset: str | None = None
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
                "messages excludes input and target; give either a chat or templates",
            ),
            (
                not self.group_by_source or self.pack,
                "group_by_source shares tokens within packed rows; set pack: true",
            ),
        )
