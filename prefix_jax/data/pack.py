"""Packs examples into rows with little padding, using few shapes.

XLA recompiles for every batch shape, and a padding token costs as much as a real one. A layout
therefore has one of a few `Shape`s, which `choose_shapes` picks once per dataset, and
longest-processing-time-first scheduling (Graham 1969) spreads the examples over its rows.

Targets with the same source share its tokens: they become branches of one segment. The last token
of an example predicts nothing and is left out.

In an encoder-decoder a row has two sides: the sources that the encoder reads, and the segments of
the decoder, each of which attends to the source of the same number. Targets with the same source
share it and the decoder's start token.

A layout depends only on the lengths of the batch's examples and the options, never on earlier
batches, so every host computes the same layout and a resumed run repeats it.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from prefix_jax.data.batch import Batch, Example, Source
from prefix_jax.errors import DataError
from prefix_jax.nn.attention.mask import TokenLayout

# Costs relative to one token through the layers: a token's attention, per column of the row, and
# a target's logits. From the FLOPs of a 135M model (SmolLM2); the ratios shrink for larger models.
ATTENTION_COST = 1 / 3000
TARGET_COST = 1 / 4


class Shape(NamedTuple):
    """The shape of a micro-batch.

    Attributes:
        rows: the number of rows R.
        columns: tokens T per row.
        targets: targets M per row.
        sources: encoder tokens S per row in an encoder-decoder, else 0.
    """

    rows: int
    columns: int
    targets: int
    sources: int = 0

    @property
    def cost(self) -> float:
        """The cost, as a number of tokens through the layers."""
        token = 1 + ATTENTION_COST * (self.columns + self.sources)
        source = 1 + ATTENTION_COST * self.sources
        return self.rows * (
            self.columns * token + self.targets * TARGET_COST + self.sources * source
        )


class Item(NamedTuple):
    """The sizes of an example that packing needs.

    Attributes:
        source: the number of the example's source; items with equal numbers have the same `read`
            and `shared` tokens.
        shared: tokens before the first target.
        own: tokens from there to the last target.
        targets: the number of targets.
        read: tokens that an encoder reads.
    """

    source: int
    shared: int
    own: int
    targets: int
    read: int = 0

    @property
    def common(self) -> int:
        """Tokens that items with the same source share, on both sides."""
        return self.read + self.shared


class Block(NamedTuple):
    """Examples that share one source in one row, by their index in the batch."""

    members: tuple[int, ...]
    columns: int
    targets: int
    sources: int

    @property
    def size(self) -> int:
        """Tokens on both sides."""
        return self.columns + self.sources


@dataclasses.dataclass(frozen=True)
class Layout:
    """The placement of a batch's examples in rows.

    Attributes:
        shape: the shape of a micro-batch.
        rows: the blocks of each row, micro-batch after micro-batch.
        items: the sizes of the examples.
        branches: whether blocks may have several examples.
    """

    shape: Shape
    rows: tuple[tuple[Block, ...], ...]
    items: tuple[Item, ...]
    branches: bool = True


@dataclasses.dataclass(frozen=True)
class Packing:
    """Options of a layout.

    Attributes:
        pack: put several examples into a row. Otherwise row i is example i, padded on the right.
        rows_multiple: the number of rows of a micro-batch is a multiple of this (the mesh's batch
            shards).
        grad_accum_steps: micro-batches per batch, all of one shape.
        shapes: preferred shapes, from `choose_shapes`. A batch that fits none of these gets a shape
            from a coarse ladder.
        branches: whether examples may share their source in a row: see `branching`. Without
            branches, the attention kernels do half the work.
    """

    pack: bool = True
    rows_multiple: int = 1
    grad_accum_steps: int = 1
    shapes: tuple[Shape, ...] = ()
    branches: bool = True


def measure(examples: Sequence[Example]) -> list[Item]:
    """Measures examples and numbers their sources.

    Raises:
        DataError: an example has no target, or its first token is a target.
    """
    sources: dict[tuple[Any, ...], int] = {}
    items = []
    for example in examples:
        index_M = example.index_M
        if not len(index_M) or index_M[0] < 0:
            raise DataError(
                f"{example.origin}: {'a target at' if len(index_M) else 'no target after'} its "
                "first token; every target needs a token before it"
            )
        shared = example.source_length
        laid = len(example.ids_T) if example.whole else int(index_M[-1]) + 1
        none = np.empty(0, np.int32)
        read = none if example.source_ids_S is None else example.source_ids_S
        what = read, example.ids_T[:shared], example.token_type_T, example.part_T
        text = ((none if array is None else array).tobytes() for array in what)
        # Datasets do not share equal texts, because each has its own prefix.
        key = (example.dataset, *text)
        source = sources.setdefault(key, len(sources))
        items.append(Item(source, shared, laid - shared, len(index_M), len(read)))
    return items


def branching(items: Sequence[Item], pack: bool) -> bool:
    """Returns whether any examples of a run can share a source as branches.

    The answer is the same for all batches of the run, so they use the same programs.
    """
    return pack and len({item.source for item in items}) < len(items)


def arrange(items: Sequence[Item], packing: Packing) -> Layout:
    """Finds the cheapest layout of a batch."""
    rows_of: dict[int, list[list[Block]]] = {}

    def layout(shape: Shape) -> Layout:
        rows = tuple(map(tuple, rows_of[shape.rows]))
        return Layout(shape, rows, tuple(items), packing.branches)

    for shape in sorted(packing.shapes, key=lambda shape: (shape.cost, shape)):
        if not packing.pack and shape.rows * packing.grad_accum_steps < len(items):
            continue
        if shape.rows not in rows_of:
            rows_of[shape.rows] = _spread(items, shape.rows, packing)
        extent = _extent(rows_of[shape.rows])
        if all(need <= there for need, there in zip(extent, shape[1:], strict=True)):
            return layout(shape)
    shapes = []
    for rows in _row_counts(len(items), packing):
        rows_of[rows] = _spread(items, rows, packing)
        shapes.append(Shape(rows, *(_round_up(size, 4) for size in _extent(rows_of[rows]))))
    return layout(min(shapes, key=lambda shape: (shape.cost, shape)))


def choose_shapes(
    batches: Sequence[Sequence[Item]], packing: Packing, *, limit: int = 16, gain: float = 0.003
) -> tuple[Shape, ...]:
    """Chooses a set of shapes with a low total cost for these batches.

    Greedily adds the shape that lowers the total cost most.

    Args:
        batches: a sample of the batches to arrange.
        packing: the options; ignores its `shapes`.
        limit: the maximum number of shapes.
        gain: the fraction of the cost that another shape must save to be worth compiling.
    """
    counts = _row_counts(max(map(len, batches)), packing)
    extent_NC3 = np.array(
        [[_extent(_spread(items, rows, packing)) for rows in counts] for items in batches]
    )
    options = sorted(
        {
            (i, Shape(rows, *(_round_up(int(size), 16) for size in extent)))
            for extent_C3 in extent_NC3
            for i, (rows, extent) in enumerate(zip(counts, extent_C3, strict=True))
        }
    )
    at = [i for i, _ in options]
    room_S3 = np.array([shape[1:] for _, shape in options])
    cost_S = np.array([shape.cost for _, shape in options])
    fits_NS = (extent_NC3[:, at] <= room_S3).all(-1)
    # A batch that fits no shape costs the most, so the first shapes cover every batch.
    none = 2 * cost_S.max()
    cost_NS = np.where(fits_NS, cost_S, none)
    chosen: list[int] = []
    cost_N = np.full(len(batches), none)
    while len(chosen) < limit:
        total_S = np.minimum(cost_NS, cost_N[:, None]).sum(0)
        best = int(total_S.argmin())
        if chosen and cost_N.sum() - total_S[best] < gain * total_S[best]:
            break
        chosen.append(best)
        cost_N = np.minimum(cost_N, cost_NS[:, best])
    return tuple(options[i][1] for i in chosen)


def collate(
    layout: Layout,
    examples: Sequence[Example],
    *,
    part: tuple[int, int] = (0, 1),
) -> Batch:
    """Writes a layout's rows as numpy arrays, [R, T], or [A, R, T] for A > 1 micro-batches.

    Args:
        layout: the layout of the whole batch, from `arrange`.
        examples: the examples of the whole batch.
        part: (i, n) writes only host i's rows, the i-th of n equal parts of each micro-batch. The
            count of examples still covers the whole batch.
    """
    shape = layout.shape
    grad_accum_steps = len(layout.rows) // shape.rows
    index, count = part
    size = shape.rows // count
    of_tokens, of_targets = (
        (grad_accum_steps, size, shape.columns),
        (grad_accum_steps, size, shape.targets),
    )
    ids, segment, branch, position = (_zeros(*of_tokens) for _ in range(4))
    token_type = None if examples[0].token_type_T is None else _zeros(*of_tokens)
    bank_index = None if examples[0].dataset is None else _zeros(*of_tokens)
    column, label = _zeros(*of_targets), _zeros(*of_targets, dtype=examples[0].label_M.dtype)
    weight = _zeros(*of_targets, dtype=np.float32)
    question = _zeros(*of_targets) if examples[0].candidates else None
    read_ids, read_segment, read_position = (
        _zeros(grad_accum_steps, size, shape.sources) for _ in range(3)
    )
    read_bank_index = None if bank_index is None else np.zeros_like(read_ids)
    counts = _zeros(grad_accum_steps, dtype=np.float32)
    for number, blocks in enumerate(layout.rows):
        micro, row = divmod(number, shape.rows)
        counts[micro] += sum(len(block.members) for block in blocks)
        row -= index * size
        if not 0 <= row < size:
            continue
        start = slot = read_start = asked = 0
        g = 1
        for block in blocks:
            first, shared = examples[block.members[0]], layout.items[block.members[0]].shared
            if first.source_ids_S is not None:
                stretch = micro, row, slice(read_start, read_start + block.sources)
                read_ids[stretch], read_segment[stretch] = first.source_ids_S, g
                read_position[stretch] = np.arange(block.sources)
                if read_bank_index is not None:
                    read_bank_index[stretch] = first.dataset
                read_start += block.sources
            end = start + shared
            stretch = micro, row, slice(start, end)
            parts, position[stretch] = _parts(first, shared)
            ids[stretch], segment[stretch] = first.ids_T[:shared], g + parts
            if token_type is not None:
                token_type[stretch] = first.token_type_T
            for b, member in enumerate(block.members, 1):
                example, own = examples[member], layout.items[member].own
                stretch = micro, row, slice(end, end + own)
                ids[stretch] = example.ids_T[shared : shared + own]
                branch[stretch], segment[stretch] = b, g
                position[stretch] = np.arange(shared, shared + own)
                # The column that predicts the first target may be in the shared source.
                at = example.index_M
                slots = micro, row, slice(slot, slot + len(at))
                column[slots] = np.where(at < shared, start, end - shared) + at
                label[slots] = example.label_M
                weight[slots] = 1
                if question is not None:
                    asked += 1
                    weight[slots], question[slots] = np.arange(len(at)) == 0, asked
                end, slot = end + own, slot + len(at)
            if bank_index is not None:
                bank_index[micro, row, start:end] = first.dataset
            start, g = end, g + 1 + int(parts.max(initial=0))
    batch: Batch = Batch(
        ids_BT=ids,
        layout=TokenLayout(
            segment, branch if layout.branches else None, position, token_type, bank_index
        ),
        index_BM=column,
        label_BM=label,
        weight_BM=weight,
        examples=counts,
        source=None
        if examples[0].source_ids_S is None
        else Source(
            read_ids,
            TokenLayout(read_segment, None, read_position, bank_index_BT=read_bank_index),
        ),
        question_BM=question,
    )
    return batch if grad_accum_steps > 1 else jax.tree.map(lambda leaf: leaf[0], batch)


def _parts(example: Example, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the part of each of the first `count` tokens, and its position in that part."""
    columns = np.arange(count)
    if example.part_T is None:
        return np.zeros_like(columns), columns
    starts = np.flatnonzero(np.diff(example.part_T, prepend=-1))
    return example.part_T, columns - starts[example.part_T]


def _zeros(*shape: int, dtype: Any = np.int32) -> Any:
    # Returns Any because the fields of a batch are typed as device arrays.
    return np.zeros(shape, dtype)


def _spread(items: Sequence[Item], rows: int, packing: Packing) -> list[list[Block]]:
    """Spreads the items over the rows of all micro-batches as evenly as possible."""
    rows *= packing.grad_accum_steps
    spread: list[list[Block]] = [[] for _ in range(rows)]
    if not packing.pack:
        for i in range(len(items)):
            spread[i].append(_block(items, [i]))
        return spread
    if packing.branches:
        blocks = _blocks(items, rows)
    else:
        # This includes an example that occurs twice in a batch across an epoch boundary.
        blocks = [_block(items, [i]) for i in range(len(items))]
    free = [(0, row) for row in range(rows)]
    for block in sorted(blocks, key=lambda block: (-block.size, block.members)):
        filled, row = free[0]
        spread[row].append(block)
        heapq.heapreplace(free, (filled + block.size, row))
    return spread


def _blocks(items: Sequence[Item], rows: int) -> list[Block]:
    """Makes one block per source, or several if one would exceed its share of the rows."""
    groups: dict[int, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(item.source, []).append(i)
    whole = [_block(items, members) for members in groups.values()]
    share = max(
        -(-sum(block.size for block in whole) // rows),
        max(item.common + item.own for item in items),
    )
    blocks = []
    for block in whole:
        common = items[block.members[0]].common
        if block.size <= share:
            blocks.append(block)
            continue
        pieces: list[list[int]] = [[] for _ in range(-(-(block.size - common) // (share - common)))]
        filled = [(0, piece) for piece in range(len(pieces))]
        for member in sorted(block.members, key=lambda i: (-items[i].own, i)):
            length, piece = filled[0]
            pieces[piece].append(member)
            heapq.heapreplace(filled, (length + items[member].own, piece))
        blocks += [_block(items, piece) for piece in pieces if piece]
    return blocks


def _block(items: Sequence[Item], members: Sequence[int]) -> Block:
    return Block(
        members=tuple(members),
        columns=items[members[0]].shared + sum(items[i].own for i in members),
        targets=sum(items[i].targets for i in members),
        sources=items[members[0]].read,
    )


def _extent(spread: Sequence[Sequence[Block]]) -> tuple[int, int, int]:
    """Returns the maximum columns, targets and source columns over the rows."""
    columns = max(sum(block.columns for block in row) for row in spread)
    targets = max(sum(block.targets for block in row) for row in spread)
    sources = max(sum(block.sources for block in row) for row in spread)
    return columns, targets, sources


def _row_counts(examples: int, packing: Packing) -> list[int]:
    """Lists row counts to try, from one to the number of examples, in steps of 1.3 to 1.5."""
    unit = packing.rows_multiple
    most = -(-examples // (unit * packing.grad_accum_steps)) * unit
    if not packing.pack:
        return [most]
    steps = [1, *(k << j for k in (2, 3) for j in range(most.bit_length()))]
    return sorted({min(unit * step, most) for step in steps})


def _round_up(length: int, steps: int) -> int:
    """Rounds up to a ladder: multiples of 8 first, then `steps` (or more) values per octave."""
    step = max(8, (1 << max(length - 1, 1).bit_length() - 1) // steps)
    return -(-length // step) * step
