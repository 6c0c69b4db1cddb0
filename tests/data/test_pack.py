import dataclasses
import operator

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_jax.data.batch import Example
from prefix_jax.data.pack import (
    Packing,
    Shape,
    arrange,
    branching,
    choose_shapes,
    collate,
    measure,
)
from prefix_jax.errors import DataError


def example(source, target_T, start=0, name="x"):
    """Makes an example with a source, and a target with a mask of scored tokens."""
    ids = [*source, *range(1000 + start, 1000 + start + len(target_T))]
    learnt = np.array([False] * len(source) + list(target_T))
    return Example.of_text(np.array(ids, np.int32), learnt, name)


def two_sided(read, target_T, start=0, name="x"):
    """Makes an encoder-decoder example whose decoder starts with token 99."""
    pair = example([99], target_T, start, name)
    return dataclasses.replace(pair, source_ids_S=np.array(read, np.int32))


@st.composite
def batches(draw):
    """Generates examples of single stacks or encoder-decoders.

    There are few sources, so that some are shared, and targets with gaps, as in chats.
    """
    make = draw(st.sampled_from([example, two_sided]))
    sources = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=12), min_size=1))
    targets = st.lists(st.booleans(), max_size=12).map(lambda rest: [True, *rest])
    return [
        make(draw(st.sampled_from(sources)), draw(targets), start=20 * i, name=str(i))
        for i in range(draw(st.integers(1, 14)))
    ]


packings = st.builds(
    Packing, pack=st.booleans(), rows_multiple=st.integers(1, 3), grad_accum_steps=st.integers(1, 3)
)


def micro_batches(batch):
    if batch.ids_BT.ndim == 2:
        return [batch]
    return [jax.tree.map(operator.itemgetter(a), batch) for a in range(len(batch.ids_BT))]


def predictions(batch):
    """Lists for every target the encoder input, the tokens visible to its column, and its label."""
    pairs = []
    for micro in micro_batches(batch):
        at = micro.layout
        for row, (columns, labels, weights) in enumerate(
            zip(micro.index_BM, micro.label_BM, micro.weight_BM, strict=True)
        ):
            group, branch = at.segment_BT[row], at.branch_BT[row]
            position, ids = at.position_BT[row], micro.ids_BT[row]
            for q, label in zip(columns[weights > 0], labels[weights > 0], strict=True):
                assert group[q] > 0
                sees = (group == group[q]) & (position <= position[q])
                sees &= (branch == 0) | (branch == branch[q])
                seen = ids[sees][np.argsort(position[sees])]
                assert sorted(position[sees]) == list(range(len(seen)))
                pairs.append((*read_of(micro, row, group[q]), *seen.tolist(), int(label)))
    return sorted(pairs)


def read_of(micro, row, group):
    """Returns the encoder input of a group."""
    if micro.source is None:
        return ()
    at = micro.source.layout
    assert at.branch_BT is None
    here = at.segment_BT[row] == group
    assert at.position_BT[row][here].tolist() == list(range(here.sum()))
    return micro.source.ids_BS[row][here].tolist()


def read_by(example):
    return () if example.source_ids_S is None else example.source_ids_S.tolist()


@settings(deadline=None)
@given(batches(), packings)
def test_each_target_is_predicted_once_from_exactly_the_tokens_before_it(examples, packing):
    items = measure(examples)
    batch = collate(arrange(items, packing), examples)
    expected = sorted(
        (*read_by(example), *example.ids_T[: i + 1].tolist())
        for example in examples
        for i in np.flatnonzero(example.target_T)
    )
    assert predictions(batch) == expected
    assert batch.weight_BM.sum() == len(expected)
    assert set(np.unique(batch.weight_BM)) <= {0, 1}
    assert np.sum(batch.examples) == len(examples)


@settings(deadline=None)
@given(batches(), packings)
def test_rows_have_each_source_once_and_targets_without_last_token(examples, packing):
    layout = arrange(measure(examples), packing)
    batch = collate(layout, examples)
    laid = sum(
        layout.items[block.members[0]].shared + sum(layout.items[i].own for i in block.members)
        for row in layout.rows
        for block in row
    )
    assert (batch.layout.segment_BT > 0).sum() == laid
    sides = [(batch.ids_BT, batch.layout)]
    if batch.source is not None:
        read = sum(block.sources for row in layout.rows for block in row)
        assert (batch.source.layout.segment_BT > 0).sum() == read
        assert batch.read == laid + read
        sides.append((batch.source.ids_BS, batch.source.layout))
    for ids, at in sides:
        for leaf in jax.tree.leaves((ids, at)):
            assert not leaf[at.segment_BT == 0].any()
    assert sorted(i for row in layout.rows for block in row for i in block.members) == list(
        range(len(examples))
    )


@settings(deadline=None)
@given(batches(), packings)
def test_batch_has_shape_of_layout_and_divisible_rows(examples, packing):
    layout = arrange(measure(examples), packing)
    batch = collate(layout, examples)
    lead = (packing.grad_accum_steps,) if packing.grad_accum_steps > 1 else ()
    assert batch.ids_BT.shape == (*lead, layout.shape.rows, layout.shape.columns)
    assert batch.index_BM.shape == (*lead, layout.shape.rows, layout.shape.targets)
    assert batch.examples.shape == lead
    if batch.source is not None:
        assert batch.source.ids_BS.shape == (*lead, layout.shape.rows, layout.shape.sources)
    assert layout.shape.rows % packing.rows_multiple == 0
    assert layout.shape.columns % 8 == 0


@settings(deadline=None)
@given(batches(), packings)
def test_parts_of_hosts_form_the_whole_batch(examples, packing):
    layout = arrange(measure(examples), packing)
    whole = collate(layout, examples)
    n = packing.rows_multiple
    parts = [collate(layout, examples, part=(i, n)) for i in range(n)]
    axis = int(packing.grad_accum_steps > 1)
    joined = jax.tree.map(
        lambda *leaves: np.concatenate(leaves, axis) if leaves[0].ndim > axis else leaves[0], *parts
    )
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


@settings(deadline=None)
@given(batches(), packings, st.integers(0, 10**6))
def test_layout_does_not_depend_on_source_numbers(examples, packing, shift):
    items = measure(examples)
    renumbered = [item._replace(source=shift - item.source) for item in items]
    assert arrange(items, packing).rows == arrange(renumbered, packing).rows


@settings(deadline=None)
@given(batches(), packings)
def test_columns_are_in_causal_order(examples, packing):
    """Kernels compare columns: tokens attend only to earlier ones; positions are consecutive."""
    for micro in micro_batches(collate(arrange(measure(examples), packing), examples)):
        at = micro.layout
        for group, branch, position in zip(
            at.segment_BT, at.branch_BT, at.position_BT, strict=True
        ):
            for column in np.flatnonzero(group):
                sees = (group == group[column]) & (position <= position[column])
                sees &= (branch == 0) | (branch == branch[column])
                assert np.flatnonzero(sees).max() == column
                steps = np.diff(position[sees & (branch == branch[column])])
                assert (steps == 1).all()


def test_rows_branch_only_if_sources_are_shared():
    def tokens(sources, pack=True):
        examples = [example([7, source], [True] * 3) for source in sources]
        items = measure(examples)
        packing = Packing(pack=pack, branches=branching(items, pack))
        return collate(arrange(items, packing), examples).layout

    assert tokens([8, 9, 8]).branch_BT.any()
    assert tokens([8, 9, 8], pack=False).branch_BT is None
    assert tokens([8, 9, 10]).branch_BT is None


def test_example_repeated_across_epochs_is_not_merged():
    examples = [example([7, 8], [True, True])] * 2
    packing = Packing(branches=False)
    tokens = collate(arrange(measure(examples), packing), examples).layout
    assert tokens.branch_BT is None
    assert sorted(tokens.position_BT[tokens.segment_BT > 0]) == [0, 0, 1, 1, 2, 2]


def test_targets_of_one_source_share_its_tokens_as_branches():
    examples = [example([7, 8, 9], [True] * 3, start=10 * i) for i in range(3)]
    batch = collate(arrange(measure(examples), Packing()), examples)
    assert batch.ids_BT.shape[0] == 1
    # 3 source tokens and 2 of each target, whose last token predicts nothing.
    assert batch.layout.branch_BT[0, :9].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.layout.position_BT[0, :9].tolist() == [0, 1, 2, 3, 4, 3, 4, 3, 4]
    assert (batch.layout.segment_BT[0] > 0).sum() == 9
    assert batch.index_BM[0, :9].tolist() == [2, 3, 4, 2, 5, 6, 2, 7, 8]


def test_targets_of_one_source_share_its_encoder_input():
    examples = [two_sided([7, 8, 9], [True] * 3, start=10 * i) for i in range(3)]
    batch = collate(arrange(measure(examples), Packing()), examples)
    assert batch.source.ids_BS[0].tolist() == [7, 8, 9, 0, 0, 0, 0, 0]
    assert batch.source.layout.segment_BT[0, :4].tolist() == [1, 1, 1, 0]
    # The start token, and 2 tokens of each target.
    assert batch.layout.branch_BT[0, :7].tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert batch.layout.position_BT[0, :7].tolist() == [0, 1, 2, 1, 2, 1, 2]
    assert batch.index_BM[0, :9].tolist() == [0, 1, 2, 0, 3, 4, 0, 5, 6]


def test_equal_targets_of_other_sources_are_not_merged():
    examples = [two_sided([read], [True] * 2) for read in (7, 8)]
    batch = collate(arrange(measure(examples), Packing()), examples)
    groups = batch.layout.segment_BT[batch.layout.segment_BT > 0]
    assert sorted(groups.tolist()) == [1, 1, 2, 2]


def test_long_group_is_split_over_rows_and_repeats_its_source():
    examples = [example([5] * 10, [True] * 400, start=400 * i) for i in range(8)]
    layout = arrange(measure(examples), Packing(rows_multiple=4))
    assert layout.shape.rows >= 4
    assert layout.shape.columns < 1000
    assert all(row and len(row) == 1 for row in layout.rows)
    batch = collate(layout, examples)
    assert (batch.ids_BT[:, :10] == 5).all()


def test_without_packing_row_i_is_example_i():
    examples = [example([i + 1], [True] * (i + 1)) for i in range(5)]
    batch = collate(arrange(measure(examples), Packing(pack=False, rows_multiple=2)), examples)
    assert batch.ids_BT.shape[0] == 6
    assert batch.ids_BT[:, 0].tolist() == [1, 2, 3, 4, 5, 0]
    assert batch.weight_BM.sum(1).tolist() == [1, 2, 3, 4, 5, 0]


def lengths(count, seed):
    """Makes batches of 8 examples with lengths typical of data-to-text datasets."""
    rng = np.random.default_rng(seed)
    examples = [
        example([n] * int(rng.integers(20, 50)), [True] * int(rng.integers(15, 45)))
        for n in range(8 * count)
    ]
    items = measure(examples)
    return [items[i : i + 8] for i in range(0, len(items), 8)]


def test_few_chosen_shapes_fit_batches_with_little_padding():
    packing = Packing(shapes=choose_shapes(lengths(256, seed=0), Packing()))
    assert len(packing.shapes) <= 16
    layouts = [arrange(items, packing) for items in lengths(256, seed=1)]
    used = {layout.shape for layout in layouts}
    assert len(used - set(packing.shapes)) <= 2
    laid = sum(block.columns for layout in layouts for row in layout.rows for block in row)
    area = sum(layout.shape.rows * layout.shape.columns for layout in layouts)
    assert area / laid < 1.06


def test_another_shape_must_save_enough_to_compile():
    sample = lengths(64, seed=0)
    few, many = (choose_shapes(sample, Packing(), gain=gain) for gain in (0.02, 0.001))
    assert few == many[: len(few)]
    assert len(few) < len(many)
    assert len(choose_shapes(sample, Packing(), gain=0, limit=3)) == 3


def test_batch_uses_cheapest_fitting_shape_or_ladder():
    items = measure([example([1] * 20, [True] * 10), example([2] * 20, [True] * 10)])
    small, large = Shape(1, 64, 24), Shape(1, 128, 64)
    assert arrange(items, Packing(shapes=(large, small))).shape == small
    assert arrange(items, Packing(shapes=(large,))).shape == large
    assert arrange(items, Packing(shapes=(Shape(1, 8, 8),))).shape.columns >= 29


@pytest.mark.parametrize("target_T", [[False, False], [True, False]])
def test_rejects_example_without_target(target_T):
    bad = Example.of_text(np.array([1, 2], np.int32), np.array(target_T), "a.jsonl:9")
    with pytest.raises(DataError, match=r"a\.jsonl:9: "):
        measure([bad])
