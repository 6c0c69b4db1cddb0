"""From examples to the batch of a step, and from records to examples."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import grain

from prefix_jax.data.batch import Batch, Example
from prefix_jax.data.order import Order
from prefix_jax.data.pack import (
    Packing,
    arrange,
    branching,
    choose_shapes,
    materialise,
    measure,
)
from prefix_jax.data.prepare import prepare as prepare_records
from prefix_jax.data.source import Record, read_records
from prefix_jax.data.template import Template, render, render_chat
from prefix_jax.data.tokens import EncoderDecoder, Examples, tokenize
from prefix_jax.errors import ConfigError, MeshError

if TYPE_CHECKING:  # its import takes seconds
    from transformers import PreTrainedTokenizerBase

# Shapes are chosen from so many examples of the first steps, in between 16 and 512 steps: enough
# to see how batches vary, little enough to lay out in a second.
_SAMPLE = 16_384


def load_examples(
    records: str | os.PathLike[str] | Iterable[Mapping[str, Any] | Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prepare: str | None = None,
    input: str | None = None,
    target: str | None = None,
    messages: str | None = None,
    references: str | None = None,
    loss: Literal["target", "all"] = "target",
    max_length: int | None = None,
    truncate: Literal["left", "right"] = "left",
    on_overflow: Literal["error", "drop"] = "error",
    tfds_dir: str | os.PathLike[str] | None = None,
    encoder_decoder: EncoderDecoder | None = None,
    end_ids: Sequence[int] = (),
) -> Examples:
    """Reads, renders and tokenises examples.

    Args:
        records: a .jsonl, .csv or .parquet file, `tfds:NAME/SPLIT`, or an iterable of mappings.
        tokenizer: of Hugging Face transformers.
        prepare: what records of a published set need first: a name of `PREPARE`.
        input: template of the text that is given, with fields in braces; None gives nothing.
        target: template of the text to learn. A field that holds a list gives one example for each
            of its texts.
        messages: the field that holds a chat, instead of `input` and `target`.
        references: the field that holds the acceptable targets, for evaluation; None takes the
            rendered targets.
        loss: which tokens are learnt, those of the "target" (of a chat, the assistant's turns) or
            "all".
        max_length: tokens of an example at most, or of what an encoder reads; None sets no limit.
        truncate: the side at which an input that is too long is cut. A target is never cut.
        on_overflow: "error", or "drop" an example whose target alone is too long.
        tfds_dir: the data directory of TensorFlow Datasets; None takes its default.
        encoder_decoder: what an encoder-decoder needs; None for a single stack.
        end_ids: end tokens that the checkpoint states (`Architecture.end_ids`), for chats.

    Returns:
        A list of examples that also names the records which were truncated or dropped.

    Raises:
        DataError: a record, a file or a template cannot become examples.
        ConfigError: neither or both of `target` and `messages` are given, or an encoder-decoder
            is given `messages`.
    """
    if encoder_decoder is not None and messages is not None:
        raise ConfigError(
            "data.messages: a chat is one text of many turns, and this model reads its input with "
            "an encoder; take templates (data.input, data.target), or a decoder"
        )
    if (target is None) == (messages is None) or (messages is not None and input is not None):
        raise ConfigError("give either a target template (and an input), or the field of messages")
    read = prepare_records(read_records(records, tfds_dir=tfds_dir), prepare)
    if messages is not None:
        rendered = [render_chat(record, messages, tokenizer) for record in read]
    else:
        assert target is not None  # as checked above
        given = None if input is None else Template(input)
        learnt = Template(target)
        rendered = [
            one
            for record in read
            for one in render(record, input=given, target=learnt, references=references)
        ]
    return tokenize(
        rendered,
        tokenizer,
        loss=loss,
        max_length=max_length,
        truncate=truncate,
        on_overflow=on_overflow,
        encoder_decoder=encoder_decoder,
        end_ids=end_ids,
    )


class Pipeline:
    """The batches of a training run: `batch(step)` is a pure function.

    Every host holds all examples, lays out the whole batch, which costs little, and writes its own
    rows alone. So shapes agree across hosts, and targets meet their source wherever it stands.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int = 0,
        pack: bool = True,
        group_by_source: bool = False,
        rows_multiple: int = 1,
        accumulate: int = 1,
        part: tuple[int, int] = (0, 1),
    ):
        """Measures the examples and chooses the shapes of their batches.

        Args:
            examples: what to train on.
            batch_size: examples in a step, over all hosts and micro-batches.
            seed: of the order.
            pack: put several examples into a row; otherwise each has a row of its own.
            group_by_source: keep examples of one source adjacent in the order, so that they meet in
                a row and share its tokens.
            rows_multiple: the mesh's batch shards, which the rows of a micro-batch divide over.
            accumulate: micro-batches in a step; above 1, batches have a leading axis.
            part: (i, n) for host i of n; it gets the i-th part of each micro-batch's rows.

        Raises:
            MeshError: the batch does not divide over shards and micro-batches, or the shards over
                hosts.
            DataError: an example has nothing to learn.
        """
        if batch_size % (rows_multiple * accumulate):
            raise MeshError(
                f"batch_size {batch_size} does not divide over {rows_multiple} batch shards x "
                f"{accumulate} micro-batches; "
                f"choose a multiple of {rows_multiple * accumulate}"
            )
        _check_hosts(rows_multiple, part[1])
        self._examples = examples
        self._items = measure(examples)
        self._part = part
        groups = [item.source for item in self._items] if group_by_source else None
        self.order = Order(len(examples), batch_size, seed=seed, groups=groups)
        packing = Packing(
            pack=pack,
            rows_multiple=rows_multiple,
            accumulate=accumulate,
            branches=branching(self._items, pack),
        )
        sample = range(min(max(_SAMPLE // batch_size, 16), 512))
        batches = [[self._items[i] for i in self.order.step(step)] for step in sample]
        self.packing = dataclasses.replace(packing, shapes=choose_shapes(batches, packing))

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every example was seen."""
        return self.order.steps_per_epoch

    def batch(self, step: int) -> Batch:
        """The batch of a step, as numpy arrays; on several hosts, this host's rows of it."""
        indices = self.order.step(step)
        layout = arrange([self._items[i] for i in indices], self.packing)
        return materialise(layout, [self._examples[i] for i in indices], part=self._part)

    def batch_sources(self, step: int) -> list[str]:
        """Where the examples of a step came from, for messages."""
        return [self._examples[i].source for i in self.order.step(step)]

    def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The batches of steps `start` to `stop` (without end if None), made ahead in a thread."""
        steps = grain.MapDataset.range(start, sys.maxsize if stop is None else stop)
        # One thread: the work holds Python's lock, and is far quicker than a step.
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(steps.map(self.batch).to_iter_dataset(ahead))


def evaluation_batches(
    examples: Sequence[Example],
    batch_size: int,
    *,
    pack: bool = True,
    rows_multiple: int = 1,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Every example once, in batches of one of few shapes; the last one may hold more padding.

    Packed, examples of one source come together and share its tokens. Without packing they keep
    their order, one a row: row i of the b-th batch is example b · batch_size + i.

    Args:
        examples: what to evaluate.
        batch_size: examples in a batch.
        pack: put several examples into a row.
        rows_multiple: the mesh's batch shards, which the rows divide over.
        part: (i, n) for host i of n, as in `Pipeline`.

    Raises:
        MeshError: the shards do not divide over the hosts.
        DataError: an example has nothing to score.
    """
    _check_hosts(rows_multiple, part[1])
    items = measure(examples)
    order = sorted(range(len(items)), key=lambda i: items[i].source) if pack else range(len(items))
    chunks = [order[i : i + batch_size] for i in range(0, len(items), batch_size)]
    packing = Packing(pack=pack, rows_multiple=rows_multiple, branches=branching(items, pack))
    measured = [[items[i] for i in chunk] for chunk in chunks]
    if measured:
        # These batches are all there are: a shape that saves less than one is not worth compiling.
        shapes = choose_shapes(measured, packing, gain=1 / len(measured))
        packing = dataclasses.replace(packing, shapes=shapes)
    return (
        materialise(arrange(batch, packing), [examples[i] for i in chunk], part=part)
        for chunk, batch in zip(chunks, measured, strict=True)
    )


def _check_hosts(rows_multiple: int, hosts: int) -> None:
    if rows_multiple % hosts:
        raise MeshError(
            f"{rows_multiple} batch shards do not divide over {hosts} hosts; "
            "choose a mesh whose data x fsdp axes are a multiple of the hosts"
        )
