import itertools
import time

import jax
import numpy as np
import pytest

from prefix_jax.data.batch import Example
from prefix_jax.data.pipeline import Pipeline, evaluation_batches
from prefix_jax.errors import MeshError


def make_examples(count=37, sources=9):
    rng = np.random.default_rng(0)
    starts = [rng.integers(1, 50, rng.integers(3, 20)).tolist() for _ in range(sources)]
    examples = []
    for n in range(count):
        source = starts[n % sources]
        target = rng.integers(100, 200, rng.integers(1, 15)).tolist()
        ids = np.array([*source, *target], np.int32)
        learnt = np.arange(len(ids)) >= len(source)
        examples.append(Example.of_text(ids, learnt, f"a.jsonl:{n + 1}"))
    return examples


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def targets(batch):
    """Returns the labels with non-zero weight, sorted."""
    return np.sort(batch.label_BM[batch.weight_BM > 0]).tolist()


@pytest.mark.parametrize("options", [{}, {"group_by_source": True}, {"pack": False}])
def test_batch_depends_only_on_step(options):
    pipeline = Pipeline(make_examples(), batch_size=8, seed=1, **options)
    two = Pipeline(make_examples(), batch_size=8, seed=1, **options)
    steps = [pipeline.batch(step) for step in range(12)]
    for step in reversed(range(12)):
        equal(two.batch(step), steps[step])


def test_iteration_resumes_at_any_step_with_the_same_bytes():
    pipeline = Pipeline(make_examples(), batch_size=8)
    whole = list(pipeline.iterate(0, 10))
    assert len(whole) == 10
    for resumed, batch in zip(pipeline.iterate(6), whole[6:], strict=False):
        equal(resumed, batch)


def test_iteration_prefetches_in_a_thread():
    threads = []

    class Watched(Pipeline):
        def batch(self, step):
            threads.append(step)
            return super().batch(step)

    batches = Watched(make_examples(), batch_size=8).iterate()
    next(batches)
    for _ in range(200):
        if len(threads) > 2:
            break
        time.sleep(0.01)
    assert threads[:3] == [0, 1, 2]


def test_an_epoch_trains_on_every_target_once():
    examples = make_examples(40)
    pipeline = Pipeline(examples, batch_size=8, group_by_source=True)
    assert pipeline.steps_per_epoch == 5
    seen = sorted(itertools.chain(*(targets(pipeline.batch(step)) for step in range(5))))
    assert seen == sorted(int(i) for example in examples for i in example.ids_T[example.target_T])


def test_grouping_by_source_packs_fewer_tokens():
    laid = [
        sum((pipeline.batch(step).layout.segment_BT > 0).sum() for step in range(9))
        for pipeline in (
            Pipeline(make_examples(72), batch_size=8, group_by_source=grouped)
            for grouped in (True, False)
        )
    ]
    assert laid[0] < 0.8 * laid[1]


def test_sources_name_the_examples_of_a_batch():
    examples = make_examples()
    pipeline = Pipeline(examples, batch_size=8)
    names = pipeline.batch_origins(3)
    assert len(names) == 8
    labels = [
        i
        for example in examples
        if example.origin in names
        for i in example.ids_T[example.target_T]
    ]
    assert targets(pipeline.batch(3)) == sorted(labels)


def test_hosts_agree_on_the_shape_and_share_the_rows():
    parts = [
        Pipeline(make_examples(), batch_size=8, rows_multiple=4, part=(i, 2)).batch(5)
        for i in range(2)
    ]
    whole = Pipeline(make_examples(), batch_size=8, rows_multiple=4).batch(5)
    assert parts[0].ids_BT.shape == parts[1].ids_BT.shape
    np.testing.assert_array_equal(np.concatenate([p.ids_BT for p in parts]), whole.ids_BT)
    assert parts[0].examples == parts[1].examples == 8


def test_micro_batches_together_contain_the_step():
    apart = Pipeline(make_examples(), batch_size=8, grad_accum_steps=4).batch(2)
    whole = Pipeline(make_examples(), batch_size=8).batch(2)
    assert apart.ids_BT.shape[0] == apart.examples.shape[0] == 4
    assert targets(apart) == targets(whole)


@pytest.mark.parametrize("options", [{"rows_multiple": 3}, {"grad_accum_steps": 16}])
def test_rejects_batch_size_that_is_not_divisible(options):
    with pytest.raises(MeshError, match="batch_size 8 is not divisible"):
        Pipeline(make_examples(), batch_size=8, **options)
    with pytest.raises(MeshError, match="2 batch shards are not divisible by 4 hosts"):
        Pipeline(make_examples(), batch_size=8, rows_multiple=2, part=(0, 4))
    with pytest.raises(MeshError, match="2 batch shards are not divisible by 4 hosts"):
        evaluation_batches(make_examples(), 8, rows_multiple=2, part=(0, 4))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("count", [1, 8, 37])
def test_evaluation_sees_every_example_once_in_few_shapes(pack, count):
    examples = make_examples(count)
    batches = list(evaluation_batches(examples, 8, pack=pack, rows_multiple=2))
    assert sum(batch.examples for batch in batches) == count
    assert sorted(itertools.chain(*map(targets, batches))) == sorted(
        int(i) for example in examples for i in example.ids_T[example.target_T]
    )
    assert len({(batch.ids_BT.shape, batch.index_BM.shape) for batch in batches}) <= 4


def test_unpacked_evaluation_keeps_the_order():
    examples = make_examples(11)
    batches = list(evaluation_batches(examples, 4, pack=False))
    rows = [row for batch in batches for row in batch.weight_BM.sum(1)]
    assert rows[:11] == [example.target_T.sum() for example in examples]


def test_nothing_to_evaluate_gives_no_batches():
    assert list(evaluation_batches([], 8)) == []
