"""Produces the batches of training and evaluation."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import grain

from prefix_jax.data.batch import Batch, Example
from prefix_jax.data.pack import (
    Packing,
    arrange,
    branching,
    choose_shapes,
    collate,
    measure,
)
from prefix_jax.data.sampler import EpochSampler
from prefix_jax.errors import MeshError

# Number of examples from the first steps (16 to 512 steps) that shapes are chosen from: enough to
# show how batches vary, and few enough to lay out in a second.
_SAMPLE = 16_384


class Pipeline:
    """The batches of a training run; `batch(step)` is a pure function.

    Every host has all examples, computes the layout of the whole batch, which is cheap, and writes
    only its own rows. Shapes therefore agree across hosts, and targets always find their source.
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
        grad_accum_steps: int = 1,
        part: tuple[int, int] = (0, 1),
    ):
        """Measures the examples and chooses the shapes of their batches.

        Args:
            examples: the training examples.
            batch_size: examples per step, over all hosts and micro-batches.
            seed: the seed of the order.
            pack: put several examples into a row; otherwise each has its own row.
            group_by_source: keep examples with the same source adjacent in the order, so that they
                share its tokens in a row.
            rows_multiple: the mesh's batch shards; the rows of a micro-batch are a multiple of
                this.
            grad_accum_steps: micro-batches per step; above 1, batches have a leading axis.
            part: (i, n) for host i of n, which gets the i-th part of each micro-batch's rows.

        Raises:
            MeshError: the batch is not divisible by shards times micro-batches, or the shards are
                not divisible by the hosts.
            DataError: an example has no target.
        """
        if batch_size % (rows_multiple * grad_accum_steps):
            raise MeshError(
                f"batch_size {batch_size} is not divisible by {rows_multiple} batch shards x "
                f"{grad_accum_steps} micro-batches; "
                f"choose a multiple of {rows_multiple * grad_accum_steps}"
            )
        _check_hosts(rows_multiple, part[1])
        self._examples = examples
        self._items = measure(examples)
        self._part = part
        groups = [item.source for item in self._items] if group_by_source else None
        self.sampler = EpochSampler(len(examples), batch_size, seed=seed, groups=groups)
        packing = Packing(
            pack=pack,
            rows_multiple=rows_multiple,
            grad_accum_steps=grad_accum_steps,
            branches=branching(self._items, pack),
        )
        sample = range(min(max(_SAMPLE // batch_size, 16), 512))
        batches = [[self._items[i] for i in self.sampler.step(step)] for step in sample]
        self.packing = dataclasses.replace(packing, shapes=choose_shapes(batches, packing))

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps until every example has been seen."""
        return self.sampler.steps_per_epoch

    def batch(self, step: int) -> Batch:
        """Returns a step's batch as numpy arrays; with several hosts, only this host's rows."""
        indices = self.sampler.step(step)
        layout = arrange([self._items[i] for i in indices], self.packing)
        return collate(layout, [self._examples[i] for i in indices], part=self._part)

    def batch_origins(self, step: int) -> list[str]:
        """Returns the origins of a step's examples, for messages."""
        return [self._examples[i].origin for i in self.sampler.step(step)]

    def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yields the batches of steps `start` to `stop` (None: endless), prefetched in a thread."""
        steps = grain.MapDataset.range(start, sys.maxsize if stop is None else stop)
        # One thread is enough: the work holds the GIL and is much faster than a step.
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
    """Yields every example once, in batches of few shapes; the last one may have more padding.

    With packing, examples with the same source are adjacent and share its tokens. Without packing
    they keep their order, one per row: row i of batch b is example b · batch_size + i.

    Args:
        examples: the examples to evaluate.
        batch_size: examples per batch.
        pack: put several examples into a row.
        rows_multiple: the mesh's batch shards; the number of rows is a multiple of this.
        part: (i, n) for host i of n, as in `Pipeline`.

    Raises:
        MeshError: the shards are not divisible by the hosts.
        DataError: an example has no target.
    """
    _check_hosts(rows_multiple, part[1])
    items = measure(examples)
    order = sorted(range(len(items)), key=lambda i: items[i].source) if pack else range(len(items))
    chunks = [order[i : i + batch_size] for i in range(0, len(items), batch_size)]
    packing = Packing(pack=pack, rows_multiple=rows_multiple, branches=branching(items, pack))
    measured = [[items[i] for i in chunk] for chunk in chunks]
    if measured:
        # There are no other batches: a shape that saves less than one batch is not worth compiling.
        shapes = choose_shapes(measured, packing, gain=1 / len(measured))
        packing = dataclasses.replace(packing, shapes=shapes)
    return (
        collate(arrange(batch, packing), [examples[i] for i in chunk], part=part)
        for chunk, batch in zip(chunks, measured, strict=True)
    )


def _check_hosts(rows_multiple: int, hosts: int) -> None:
    if rows_multiple % hosts:
        raise MeshError(
            f"{rows_multiple} batch shards are not divisible by {hosts} hosts; "
            "choose a mesh whose data x fsdp axes are a multiple of the hosts"
        )
