"""The tokens' part of attention on TPUs: no array of T x S ever reaches memory.

The kernels are JAX's splash attention. Its own derivative assumes a softmax over the tokens alone,
so the backward kernels are called here, with the output and the denominator of the whole softmax,
prefix included: that is exact.

A kernel compares columns, by a static mask (causal, a window), and ids, which have to be equal. Ids
are groups. Targets that branch from one source take two runs over the same keys: in one, ids are of
a group and branch; the other shows the source, branch 0, to the other branches.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from prefix_jax.mesh import BATCH_AXES, COLUMN_AXIS, HEAD_AXIS, column_shards, row_shards
from prefix_jax.nn import tiles
from prefix_jax.nn.columns import origin, reorder
from prefix_jax.nn.dense import MASKED
from prefix_jax.nn.mask import Seen, Sight

# Columns of a tile: fewer are not worth a kernel, and a row is padded to a multiple of it.
LANES = 128

# The longest block of a row that a kernel takes at once: its weights, 512 x 512 in float32, take
# 1 MiB of the 16 MiB of a core's fast memory.
BLOCK = 512

# Ids of a group and branch are group * 2 ** 15 + branch, and must fit an int32.
_BRANCHES = 2**15

# Ids of what matches nothing: padding, and queries and keys that a run leaves out.
_NO_QUERY, _NO_KEY = -1, -2

_interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Programs that are traced inside take this path on any platform, where Pallas interprets the
    kernels: slowly, for tests."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def interpreting() -> bool:
    """Whether this is inside of `interpreted`."""
    return _interpreting.get()


def fits(q_BKGTH: jax.Array, k_BSKH: jax.Array, seen: Seen) -> bool:
    """Whether the kernels compute this; shapes and what is static decide.

    They add no bias to logits (T5), know no mask of any form (beams), and none where columns
    count otherwise than positions: in a cache that has other columns than the queries', and in
    the window of a target that branches from a source further back. And they are split by the mesh
    of `jax.set_mesh`: where there is none, but several devices, the program may be of them all.
    """
    sight = seen.tokens
    if not isinstance(sight, Sight) or seen.bias_BNTS is not None:
        return False
    T, S = q_BKGTH.shape[3], k_BSKH.shape[1]
    if sight.causal and T != S:
        return False
    branched = sight.causal and sight.keys.branch_BT is not None
    if branched and (sight.window is not None or S > _BRANCHES):
        return False
    if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1 and not interpreting():
        return False
    return min(T, S) >= LANES


def forward(
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    seen: Seen,
    floor_BKGT1: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `dense.forward`."""
    sight = _sight(seen)

    def attended(window: int | None) -> Any:
        run = _Run.over_mesh(softcap, sight, window, q_BKGTH.shape[3])
        return _over_mesh(run, _Run.forward, (q_BKGTH,), (k_BSKH, v_BSKH), _ids(sight))

    (out_BKGTH, log_total_BKGT1), _ = _by_window(sight, attended)
    peak_BKGT1 = log_total_BKGT1
    if floor_BKGT1 is not None:
        peak_BKGT1 = jnp.maximum(peak_BKGT1, floor_BKGT1)
    total_BKGT1 = jnp.exp(log_total_BKGT1 - peak_BKGT1)
    return out_BKGTH * total_BKGT1, total_BKGT1, peak_BKGT1


def backward(
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    seen: Seen,
    out_BKGTH: jax.Array,
    log_total_BKGT1: jax.Array,
    dout_BKGTH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """As `dense.backward`."""
    sight = _sight(seen)
    # The logits that kernels mask are far below: a query that sees nothing has no weights.
    log_total_BKGT1 = jnp.maximum(log_total_BKGT1, MASKED)
    queries = q_BKGTH, out_BKGTH, log_total_BKGT1, dout_BKGTH

    def gradients(window: int | None) -> Any:
        run = _Run.over_mesh(softcap, sight, window, q_BKGTH.shape[3])
        return _over_mesh(run, _Run.backward, queries, (k_BSKH, v_BSKH), _ids(sight))

    (dq_BKGTH,), (dk_BSKH, dv_BSKH) = _by_window(sight, gradients)
    return dq_BKGTH, dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype), None


# What queries hold, [B, K, G, T, …], and what keys hold, [B, S, K, H].
Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class _Run:
    """The kernels with one static mask.

    Attributes:
        softcap: bounds the logits, or None.
        causal: whether a query sees no later key.
        window: of causal attention, how many columns back it sees, its own included; None for all.
        shards: how many devices share the queries of a row; each has all of its keys.
        dealt: whether these hold columns from either end of it.
    """

    softcap: float | None
    causal: bool
    window: int | None
    shards: int = 1
    dealt: bool = False

    @classmethod
    def over_mesh(
        cls, softcap: float | None, sight: Sight, window: int | None, columns: int
    ) -> _Run:
        """On the mesh of `jax.set_mesh`. A mesh that does not divide columns repeats the work."""
        shards = 1 if columns % column_shards() else column_shards()
        return cls(softcap, sight.causal, window, shards, sight.dealt)

    def forward(
        self, queries: Arrays, keys: Arrays, ids: list[kernels.SegmentIds]
    ) -> tuple[Arrays, Arrays]:
        """(q,), (k, v) → (out, log_total) and nothing; the runs of several ids merged. float32."""
        parts = [self._forward(queries, keys, one) for one in ids]
        out, log_total = parts[0]
        for out_more, log_total_more in parts[1:]:
            both = jnp.logaddexp(log_total, log_total_more)
            out = out * jnp.exp(log_total - both) + out_more * jnp.exp(log_total_more - both)
            log_total = both
        return (out.astype(jnp.float32), log_total), ()

    def backward(
        self, queries: Arrays, keys: Arrays, ids: list[kernels.SegmentIds]
    ) -> tuple[Arrays, Arrays]:
        """(q, out, log_total, dout), (k, v) → (dq,) and (dk, dv); all float32."""
        parts = [self._backward(queries, keys, one) for one in ids]
        dq, dk, dv = (functools.reduce(jnp.add, same) for same in zip(*parts, strict=True))
        return (dq,), (dk, dv)

    def _forward(
        self, queries: Arrays, keys: Arrays, ids: kernels.SegmentIds
    ) -> tuple[jax.Array, jax.Array]:
        G, T = queries[0].shape[2:4]
        queries, keys, ids = _laid(queries, keys, ids)
        kernel = self._kernel(G, T, queries[0].shape[3], keys[0].shape[2])
        out, (log_total,) = _each_head(kernel, queries, keys, ids)
        return out[:, :, :, :T], log_total[:, :, :, :T, None]

    def _backward(
        self, queries: Arrays, keys: Arrays, ids: kernels.SegmentIds
    ) -> tuple[jax.Array, ...]:
        (G, T), S = queries[0].shape[2:4], keys[0].shape[1]
        queries, keys, ids = _laid(queries, keys, ids)
        kernel = self._kernel(G, T, queries[0].shape[3], keys[0].shape[2])

        def head(
            q: jax.Array,
            out: jax.Array,
            log_total: jax.Array,
            dout: jax.Array,
            k: jax.Array,
            v: jax.Array,
            ids: kernels.SegmentIds,
        ) -> Any:
            infos = kernel.dq_mask_info, kernel.dkv_mask_info
            return kernels._splash_attention_bwd(
                save_residuals=False,
                mask_value=kernel.kwargs["mask_value"],
                is_mqa=True,
                block_sizes=kernel.kwargs["block_sizes"],
                residual_checkpoint_name=None,
                mask_function=kernel.kwargs["mask_function"],
                attn_logits_soft_cap=self.softcap,
                interpret=interpreting(),
                res=(q, k, v, ids, None, out, log_total[..., 0], *infos),
                do=dout,
            )[3:6]

        dq, dk, dv = _each_head(head, queries, keys, ids)
        as_keys = (x[:, :, :S].swapaxes(1, 2).astype(jnp.float32) for x in (dk, dv))
        return (dq[:, :, :, :T].astype(jnp.float32), *as_keys)

    def _kernel(self, G: int, columns: int, T: int, S: int) -> kernels.SplashAttentionKernel:
        """The kernel of one key head and its G query heads.

        Args:
            G: query heads.
            columns: queries of a row on one device.
            T, S: queries and keys, in whole blocks.
        """
        # Where all see all, devices do not differ.
        shards = self.shards if self.causal else 1
        mask: masks.Mask = masks.FullMask((T, S))
        if self.causal:
            every = shards * columns
            queries = origin(every, shards) if self.dealt else np.arange(every, dtype=np.int32)
            padding = [(0, 0), (0, T - columns)]
            queries = np.pad(queries.reshape(shards, columns), padding, mode="edge")
            mask = tiles.Causal(queries.reshape(-1), S, self.window)
        q, k = _block(T), _block(S)
        kernel = kernels.make_splash_mqa(
            masks.MultiHeadMask([mask] * G),
            block_sizes=kernels.BlockSizes(
                block_q=q,
                block_kv=k,
                block_q_dkv=q,
                block_kv_dkv=k,
                block_q_dq=q,
                block_kv_dq=k,
            ),
            save_residuals=True,
            attn_logits_soft_cap=self.softcap,
            interpret=interpreting(),
            head_shards=1,
            q_seq_shards=shards,
        )
        return kernel if shards == 1 else _own(kernel, shards)


def _own(kernel: kernels.SplashAttentionKernel, shards: int) -> kernels.SplashAttentionKernel:
    """The part of a kernel for the queries of this device."""
    place = jax.lax.axis_index(COLUMN_AXIS)

    def part(x: Any, axis: int) -> Any:
        if x is None:
            return None
        size = x.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(x, place * size, size, axis)

    def own(info: Any) -> Any:
        return info._replace(
            data_next=part(info.data_next, 1),
            mask_next=part(info.mask_next, 1),
            block_mask=part(info.block_mask, 1),
            q_sequence=part(info.q_sequence, 0),
        )

    infos = map(own, (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info))
    return kernels.SplashAttentionKernel(*infos, **kernel.kwargs)


def _block(columns: int) -> int:
    """The columns of a block: a row is the fewest of equal size that is at most `BLOCK`."""
    count = -(-columns // BLOCK)
    return -(-columns // (count * LANES)) * LANES


def _laid(
    queries: Arrays, keys: Arrays, ids: kernels.SegmentIds
) -> tuple[Arrays, Arrays, kernels.SegmentIds]:
    """As the kernels want them: key heads before columns, and columns in whole blocks."""

    def pad(x: jax.Array, axis: int, value: int = 0) -> jax.Array:
        columns = x.shape[axis]
        more = -columns % _block(columns)
        width = [(0, more if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, width, constant_values=value) if more else x

    return (
        tuple(pad(x_BKGTH, 3) for x_BKGTH in queries),
        tuple(pad(x_BSKH.swapaxes(1, 2), 2) for x_BSKH in keys),
        kernels.SegmentIds(pad(ids.q, 1, _NO_QUERY), pad(ids.kv, 1, _NO_KEY)),
    )


def _each_head(
    function: Callable[..., Any], queries: Arrays, keys: Arrays, ids: kernels.SegmentIds
) -> Any:
    """A function of what one key head holds, (*queries, *keys, ids), for every row and key head."""

    def row(queries: Arrays, keys: Arrays, ids: kernels.SegmentIds) -> Any:
        return jax.vmap(lambda queries, keys: function(*queries, *keys, ids))(queries, keys)

    return jax.vmap(row)(queries, keys, ids)


def _over_mesh(
    run: _Run,
    compute: Callable[..., tuple[Arrays, Arrays]],
    queries: Arrays,
    keys: Arrays,
    ids: list[kernels.SegmentIds],
) -> tuple[Arrays, Arrays]:
    """Gives each device its rows, columns and key heads, as the compiler cannot split a kernel by
    itself.

    An axis of the mesh that does not divide rows, columns or heads repeats the work. One that
    divides query heads alone gets copies of the key heads, each with a part of the queries.
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
    of_queries = PartitionSpec(rows, heads, None, columns)
    of_keys = PartitionSpec(rows, key_columns, heads)

    def regrouped(x: jax.Array, K: int) -> jax.Array:
        return x.reshape(B, K, -1, *x.shape[3:])

    def on_device(
        queries: Arrays, keys: Arrays, ids_q: list[jax.Array], ids_kv: list[jax.Array]
    ) -> tuple[Arrays, Arrays]:
        if key_columns:
            keys = jax.tree.map(
                lambda x: jax.lax.all_gather(x, COLUMN_AXIS, axis=1, tiled=True), keys
            )
        keys, ids_kv = _reordered(run, (keys, ids_kv), back=True)
        both = [kernels.SegmentIds(*one) for one in zip(ids_q, ids_kv, strict=True)]
        of_queries, of_keys = compute(run, queries, keys, both)
        of_keys = _reordered(run, of_keys, back=False)
        if key_columns:
            of_keys = jax.tree.map(
                lambda x: jax.lax.psum_scatter(x, COLUMN_AXIS, scatter_dimension=1, tiled=True),
                of_keys,
            )
        elif columns:
            of_keys = jax.lax.psum(of_keys, COLUMN_AXIS)
        return of_queries, of_keys

    split = jax.shard_map(
        on_device,
        in_specs=(of_queries, of_keys, PartitionSpec(rows, columns), PartitionSpec(rows)),
        out_specs=(of_queries, of_keys),
        check_vma=False,
    )
    queries, keys = split(
        tuple(regrouped(x_BKGTH, K * copies) for x_BKGTH in queries),
        tuple(jnp.repeat(x_BSKH, copies, axis=2) for x_BSKH in keys),
        [one.q for one in ids],
        [one.kv for one in ids],
    )
    summed = (x.reshape(*x.shape[:2], K, copies, -1).sum(axis=3) for x in keys)
    return tuple(regrouped(x_BKGTH, K) for x_BKGTH in queries), tuple(summed)


def _reordered(run: _Run, tree: Any, back: bool) -> Any:
    """What keys hold, dealt out as queries are, or (`back`) in the order of the row."""
    if not (run.causal and run.dealt):
        return tree
    return jax.tree.map(lambda x: reorder(x, run.shards, 1, back), tree)


def _by_window(sight: Sight, compute: Callable[[int | None], Any]) -> Any:
    """Computes with the window where it holds: a kernel's mask is static, and layers of one scan
    may differ."""
    if sight.narrow is None:
        return compute(sight.window)
    return jax.lax.cond(sight.narrow, lambda: compute(sight.window), lambda: compute(None))


def _ids(sight: Sight) -> list[kernels.SegmentIds]:
    """The ids of each run."""
    queries, keys = sight.queries, sight.keys

    def run(q_BT: jax.Array, k_BS: jax.Array, some_BT: Any, some_BS: Any) -> kernels.SegmentIds:
        return kernels.SegmentIds(
            jnp.where((queries.group_BT > 0) & some_BT, q_BT, _NO_QUERY),
            jnp.where((keys.group_BT > 0) & some_BS, k_BS, _NO_KEY),
        )

    group_BT, branch_BT = keys.group_BT, keys.branch_BT
    if branch_BT is None or not sight.causal:
        return [run(queries.group_BT, group_BT, True, True)]
    # Causal attention of a row to itself: queries and keys are the same tokens.
    own_BT = group_BT * _BRANCHES + branch_BT
    return [
        run(own_BT, own_BT, True, True),
        run(group_BT, group_BT, branch_BT > 0, branch_BT == 0),
    ]


def _sight(seen: Seen) -> Sight:
    assert isinstance(seen.tokens, Sight)  # as `fits` has found
    return seen.tokens
