"""JAX's splash attention with one static mask, on one device.

The derivative that JAX defines assumes a softmax over only the tokens. The backward kernels are
therefore called directly, with the output and the denominator of the whole softmax, including the
prefix, which is exact.
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
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

from prefix_jax.mesh import COLUMN_AXIS, column_shards
from prefix_jax.nn.attention import tiles
from prefix_jax.nn.attention.mask import AttentionMask
from prefix_jax.nn.attention.zigzag import original_columns

# Columns per tile: a row is padded to a multiple of it, and shorter rows are not worth a kernel.
LANES = 128

# The largest block of a row that a kernel processes at once: 512 x 512 float32 weights occupy 1 MiB
# of the 16 MiB of VMEM per core.
BLOCK = 512

# Ids that match nothing: padding, and queries and keys that a run skips.
NO_QUERY, NO_KEY = -1, -2

_interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Makes programs traced inside use the kernels on any platform, in Pallas's (slow) interpret
    mode. For tests."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def interpreting() -> bool:
    """True inside `interpreted`."""
    return _interpreting.get()


# Query arrays, [B, K, G, T, …], or key arrays, [B, S, K, H].
Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """The kernels with one static mask.

    Attributes:
        softcap: bounds the logits, or None.
        causal: whether a query sees no later key.
        window: size of the causal window in columns, including the query's own; None for unlimited.
        shards: the number of devices that share the queries of a row; each has all of its keys.
        zigzag: whether these devices hold the columns in zigzag order.
    """

    softcap: float | None
    causal: bool
    window: int | None
    shards: int = 1
    zigzag: bool = False

    @classmethod
    def over_mesh(
        cls, softcap: float | None, mask: AttentionMask, window: int | None, columns: int
    ) -> Run:
        """A run on the mesh of `jax.set_mesh`, which repeats the work if it does not divide the
        columns."""
        shards = 1 if columns % column_shards() else column_shards()
        return cls(softcap, mask.causal, window, shards, mask.zigzag)

    def forward(
        self, queries: Arrays, keys: Arrays, ids: list[SegmentIds]
    ) -> tuple[Arrays, Arrays]:
        """(q,), (k, v) → (out, log_denominator) and (), in float32, merged over all `ids`."""
        parts = [self._forward(queries, keys, run_ids) for run_ids in ids]
        out, log_denominator = parts[0]
        for out_more, log_denominator_more in parts[1:]:
            both = jnp.logaddexp(log_denominator, log_denominator_more)
            out = out * jnp.exp(log_denominator - both) + out_more * jnp.exp(
                log_denominator_more - both
            )
            log_denominator = both
        return (out.astype(jnp.float32), log_denominator), ()

    def backward(
        self, queries: Arrays, keys: Arrays, ids: list[SegmentIds]
    ) -> tuple[Arrays, Arrays]:
        """(q, out, log_denominator, dout), (k, v) → (dq,) and (dk, dv), in float32."""
        parts = [self._backward(queries, keys, run_ids) for run_ids in ids]
        dq, dk, dv = (functools.reduce(jnp.add, grads) for grads in zip(*parts, strict=True))
        return (dq,), (dk, dv)

    def _forward(
        self, queries: Arrays, keys: Arrays, ids: SegmentIds
    ) -> tuple[jax.Array, jax.Array]:
        G, T = queries[0].shape[2:4]
        queries, keys, ids = _to_kernel_layout(queries, keys, ids)
        kernel = self._kernel(G, T, queries[0].shape[3], keys[0].shape[2])
        out, (log_denominator,) = _map_heads(kernel, queries, keys, ids)
        return out[:, :, :, :T], log_denominator[:, :, :, :T, None]

    def _backward(self, queries: Arrays, keys: Arrays, ids: SegmentIds) -> tuple[jax.Array, ...]:
        (G, T), S = queries[0].shape[2:4], keys[0].shape[1]
        queries, keys, ids = _to_kernel_layout(queries, keys, ids)
        kernel = self._kernel(G, T, queries[0].shape[3], keys[0].shape[2])

        def head(
            q: jax.Array,
            out: jax.Array,
            log_denominator: jax.Array,
            dout: jax.Array,
            k: jax.Array,
            v: jax.Array,
            ids: SegmentIds,
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
                res=(q, k, v, ids, None, out, log_denominator[..., 0], *infos),
                do=dout,
            )[3:6]

        dq, dk, dv = _map_heads(head, queries, keys, ids)
        as_keys = (x[:, :, :S].swapaxes(1, 2).astype(jnp.float32) for x in (dk, dv))
        return (dq[:, :, :, :T].astype(jnp.float32), *as_keys)

    def _kernel(self, G: int, columns: int, T: int, S: int) -> kernels.SplashAttentionKernel:
        """The kernel of one key head and its G query heads.

        Args:
            G: query heads.
            columns: queries of a row on one device.
            T, S: queries and keys, in whole blocks.
        """
        # Without a causal mask, all devices have the same mask.
        shards = self.shards if self.causal else 1
        mask: masks.Mask = masks.FullMask((T, S))
        if self.causal:
            total = shards * columns
            queries: np.ndarray = np.arange(total, dtype=np.int32)
            if self.zigzag:
                queries = original_columns(total, shards)
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
        return kernel if shards == 1 else _device_part(kernel, shards)


def _device_part(
    kernel: kernels.SplashAttentionKernel, shards: int
) -> kernels.SplashAttentionKernel:
    """The part of a kernel for the queries of this device."""
    device = jax.lax.axis_index(COLUMN_AXIS)

    def part(x: Any, axis: int) -> Any:
        if x is None:
            return None
        size = x.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(x, device * size, size, axis)

    def select(info: Any) -> Any:
        return info._replace(
            data_next=part(info.data_next, 1),
            mask_next=part(info.mask_next, 1),
            block_mask=part(info.block_mask, 1),
            q_sequence=part(info.q_sequence, 0),
        )

    infos = map(select, (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info))
    return kernels.SplashAttentionKernel(*infos, **kernel.kwargs)


def _block(columns: int) -> int:
    """Columns per block: the row is split into the fewest equal blocks of at most `BLOCK`."""
    count = -(-columns // BLOCK)
    return -(-columns // (count * LANES)) * LANES


def _to_kernel_layout(
    queries: Arrays, keys: Arrays, ids: SegmentIds
) -> tuple[Arrays, Arrays, SegmentIds]:
    """Converts to the layout of the kernels: key heads before columns, whole blocks of columns."""

    def pad(x: jax.Array, axis: int, value: int = 0) -> jax.Array:
        columns = x.shape[axis]
        more = -columns % _block(columns)
        width = [(0, more if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, width, constant_values=value) if more else x

    return (
        tuple(pad(x_BKGTH, 3) for x_BKGTH in queries),
        tuple(pad(x_BSKH.swapaxes(1, 2), 2) for x_BSKH in keys),
        SegmentIds(pad(ids.q, 1, NO_QUERY), pad(ids.kv, 1, NO_KEY)),
    )


def _map_heads(function: Callable[..., Any], queries: Arrays, keys: Arrays, ids: SegmentIds) -> Any:
    """Maps a function (*queries, *keys, ids) of one key head over all rows and key heads."""

    def row(queries: Arrays, keys: Arrays, ids: SegmentIds) -> Any:
        return jax.vmap(lambda queries, keys: function(*queries, *keys, ids))(queries, keys)

    return jax.vmap(row)(queries, keys, ids)
