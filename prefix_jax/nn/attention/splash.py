"""Token attention on TPUs, which never writes a T x S array to memory.

The kernels are JAX's splash attention (`splash_run`). This module translates the mask for them and
splits the work over devices.

A kernel has a static mask over columns (causal, with or without a window) and requires the ids of
query and key to be equal. Ids are segments. With branches, two runs over the same keys are needed:
in one, an id is a segment and branch; the other lets the branches see their source, branch 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds
from jax.sharding import PartitionSpec

from prefix_jax.mesh import BATCH_AXES, COLUMN_AXIS, HEAD_AXIS, row_shards
from prefix_jax.nn.attention.dense import MASKED
from prefix_jax.nn.attention.mask import AttentionMask, MaskAndBias
from prefix_jax.nn.attention.splash_run import LANES, NO_KEY, NO_QUERY, Arrays, Run, interpreting
from prefix_jax.nn.attention.zigzag import reorder

# Ids of a segment and branch are segment * 2 ** 15 + branch, and must fit an int32.
_BRANCHES = 2**15


def fits(q_BKGTH: jax.Array, k_BSKH: jax.Array, masking: MaskAndBias) -> bool:
    """True if the kernels support this attention, judging by shapes and static values.

    They support no bias on logits (T5), no arbitrary mask (beam search), and no mask in which
    columns and positions differ: a cache whose columns are not those of the queries, or a window
    over a target that branches from a source further back. They are split over the mesh of
    `jax.set_mesh`; with several devices but no mesh, the program may span all devices, so the
    kernels are not used.
    """
    mask = masking.mask
    if not isinstance(mask, AttentionMask) or masking.bias_BNTS is not None:
        return False
    T, S = q_BKGTH.shape[3], k_BSKH.shape[1]
    if mask.causal and T != S:
        return False
    branched = mask.causal and mask.keys.branch_BT is not None
    if branched and (mask.window is not None or S > _BRANCHES):
        return False
    if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1 and not interpreting():
        return False
    return min(T, S) >= LANES


def forward(
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    masking: MaskAndBias,
    prefix_max_BKGT1: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Like `dense.forward`."""
    mask = _symbolic(masking)

    def attend(window: int | None) -> Any:
        run = Run.over_mesh(softcap, mask, window, q_BKGTH.shape[3])
        return _over_mesh(run, Run.forward, (q_BKGTH,), (k_BSKH, v_BSKH), _ids(mask))

    (out_BKGTH, log_denominator_BKGT1), _ = _by_window(mask, attend)
    max_BKGT1 = log_denominator_BKGT1
    if prefix_max_BKGT1 is not None:
        max_BKGT1 = jnp.maximum(max_BKGT1, prefix_max_BKGT1)
    denominator_BKGT1 = jnp.exp(log_denominator_BKGT1 - max_BKGT1)
    return out_BKGTH * denominator_BKGT1, denominator_BKGT1, max_BKGT1


def backward(
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    masking: MaskAndBias,
    out_BKGTH: jax.Array,
    log_denominator_BKGT1: jax.Array,
    dout_BKGTH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Like `dense.backward`."""
    mask = _symbolic(masking)
    # The kernels mask with much smaller logits, so a query that sees nothing has zero weights.
    log_denominator_BKGT1 = jnp.maximum(log_denominator_BKGT1, MASKED)
    queries = q_BKGTH, out_BKGTH, log_denominator_BKGT1, dout_BKGTH

    def gradients(window: int | None) -> Any:
        run = Run.over_mesh(softcap, mask, window, q_BKGTH.shape[3])
        return _over_mesh(run, Run.backward, queries, (k_BSKH, v_BSKH), _ids(mask))

    (dq_BKGTH,), (dk_BSKH, dv_BSKH) = _by_window(mask, gradients)
    return dq_BKGTH, dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype), None


def _over_mesh(
    run: Run,
    compute: Callable[..., tuple[Arrays, Arrays]],
    queries: Arrays,
    keys: Arrays,
    ids: list[SegmentIds],
) -> tuple[Arrays, Arrays]:
    """Splits rows, columns and key heads over devices, because the compiler cannot partition a
    kernel.

    A mesh axis that does not divide rows, columns or heads repeats the work. If the heads axis
    divides only the query heads, each key head is copied, and each copy serves a part of its
    queries.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return compute(run, queries, keys, ids)
    B, K, G = queries[0].shape[:3]
    shards = mesh.shape[HEAD_AXIS]
    copies = shards // K if shards % K == 0 and G % (shards // K) == 0 else 1
    heads = HEAD_AXIS if K * copies % shards == 0 else None
    rows = BATCH_AXES if B % row_shards() == 0 else None
    columns = COLUMN_AXIS if run.shards > 1 else None
    key_columns = None if keys[0].shape[1] % run.shards else columns
    queries_spec = PartitionSpec(rows, heads, None, columns)
    keys_spec = PartitionSpec(rows, key_columns, heads)

    def split_heads(x: jax.Array, K: int) -> jax.Array:
        return x.reshape(B, K, -1, *x.shape[3:])

    def on_device(
        queries: Arrays, keys: Arrays, ids_q: list[jax.Array], ids_kv: list[jax.Array]
    ) -> tuple[Arrays, Arrays]:
        if key_columns:
            keys = jax.tree.map(
                lambda x: jax.lax.all_gather(x, COLUMN_AXIS, axis=1, tiled=True), keys
            )
        keys, ids_kv = _reordered(run, (keys, ids_kv), back=True)
        ids = [SegmentIds(q, kv) for q, kv in zip(ids_q, ids_kv, strict=True)]
        queries_out, keys_out = compute(run, queries, keys, ids)
        keys_out = _reordered(run, keys_out, back=False)
        if key_columns:
            keys_out = jax.tree.map(
                lambda x: jax.lax.psum_scatter(x, COLUMN_AXIS, scatter_dimension=1, tiled=True),
                keys_out,
            )
        elif columns:
            keys_out = jax.lax.psum(keys_out, COLUMN_AXIS)
        return queries_out, keys_out

    split = jax.shard_map(
        on_device,
        in_specs=(queries_spec, keys_spec, PartitionSpec(rows, columns), PartitionSpec(rows)),
        out_specs=(queries_spec, keys_spec),
        check_vma=False,
    )
    queries, keys = split(
        tuple(split_heads(x_BKGTH, K * copies) for x_BKGTH in queries),
        tuple(jnp.repeat(x_BSKH, copies, axis=2) for x_BSKH in keys),
        [run_ids.q for run_ids in ids],
        [run_ids.kv for run_ids in ids],
    )
    sums = (x.reshape(*x.shape[:2], K, copies, -1).sum(axis=3) for x in keys)
    return tuple(split_heads(x_BKGTH, K) for x_BKGTH in queries), tuple(sums)


def _reordered(run: Run, tree: Any, back: bool) -> Any:
    """Reorders key arrays to the zigzag layout of the queries or, with `back`, to row order."""
    if not (run.causal and run.zigzag):
        return tree
    return jax.tree.map(lambda x: reorder(x, run.shards, 1, back), tree)


def _by_window(mask: AttentionMask, compute: Callable[[int | None], Any]) -> Any:
    """Computes with the window in the layers that have one: a kernel's mask is static, but the
    layers of a scan may differ."""
    if mask.narrow is None:
        return compute(mask.window)
    return jax.lax.cond(mask.narrow, lambda: compute(mask.window), lambda: compute(None))


def _ids(mask: AttentionMask) -> list[SegmentIds]:
    """The ids of each run."""
    queries, keys = mask.queries, mask.keys

    def run(q_BT: jax.Array, k_BS: jax.Array, use_q_BT: Any, use_k_BS: Any) -> SegmentIds:
        return SegmentIds(
            jnp.where((queries.segment_BT > 0) & use_q_BT, q_BT, NO_QUERY),
            jnp.where((keys.segment_BT > 0) & use_k_BS, k_BS, NO_KEY),
        )

    segment_BT, branch_BT = keys.segment_BT, keys.branch_BT
    if branch_BT is None or not mask.causal:
        return [run(queries.segment_BT, segment_BT, True, True)]
    # Causal attention of a row to itself: queries and keys are the same tokens.
    branch_id_BT = segment_BT * _BRANCHES + branch_BT
    return [
        run(branch_id_BT, branch_id_BT, True, True),
        run(segment_BT, segment_BT, branch_BT > 0, branch_BT == 0),
    ]


def _symbolic(masking: MaskAndBias) -> AttentionMask:
    assert isinstance(masking.mask, AttentionMask)  # checked by `fits`
    return masking.mask
