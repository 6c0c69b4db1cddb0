"""The KV cache of the engine: one row per running continuation.

A row's columns are the slots of its prefix, then the tokens of its text:

    column       0 … P - 1       P, P + 1, …
    position     0 … P - 1       text_position, text_position + 1, …

A prefix is therefore a warm start: it is copied into the row once, and attention treats it like any
other columns. Three of its properties need more than positions. A pinned prefix ignores sliding
windows (`Layout.pinned_B`). Slots with a bias, and layers that a prefix does not cover, have a bias
per column (`Columns.bias_BNS`). Terms outside the softmax are no columns; a row keeps a copy of its
own (`RowLayer.outside`).

Because every column up to a token's own precedes it, the causal mask compares columns, and only
windows compare positions. A prefix thus stays visible to text that starts at position 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.attention_inputs import rotary_angles
from prefix_jax.backbones.stacking import Params
from prefix_jax.engine.warm import Warm
from prefix_jax.mesh import BATCH_AXES, HEAD_AXIS
from prefix_jax.nn.attention.mask import MaskAndBias
from prefix_jax.nn.layers import AttentionInputs, KeysValues
from prefix_jax.prefix import Gated, Memory, OutsideRows, SiteShape


@flax.struct.dataclass
class Columns:
    """The columns of one layer, a `LayerCache`.

    Attributes:
        k_BKSH, v_BKSH: keys and values.
        bias_BNS: added to the attention logits of each query head.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    bias_BNS: jax.Array

    def write(self, new: KeysValues, column: jax.Array) -> Self:
        """Returns a copy with the keys and values of new tokens.

        Args:
            new: of the next tokens of every row.
            column: the first column to write in each row, [B].
        """

        def put(old_BKSH: jax.Array, new_BKTH: jax.Array) -> jax.Array:
            return jax.vmap(
                lambda old, new, column: jax.lax.dynamic_update_slice(old, new, (0, column, 0))
            )(old_BKSH, new_BKTH.astype(old_BKSH.dtype), column)

        return dataclasses.replace(
            self, k_BKSH=put(self.k_BKSH, new.k_BKSH), v_BKSH=put(self.v_BKSH, new.v_BKSH)
        )

    def read(self, masking: MaskAndBias) -> tuple[jax.Array, jax.Array, MaskAndBias]:
        """Returns k_BSKH and v_BSKH, and adds the columns' bias to the masking."""
        bias_BNTS = self.bias_BNS[:, :, None].astype(jnp.float32)
        if masking.bias_BNTS is not None:
            bias_BNTS = bias_BNTS + masking.bias_BNTS
        masking = dataclasses.replace(masking, bias_BNTS=bias_BNTS)
        return self.k_BKSH.swapaxes(1, 2), self.v_BKSH.swapaxes(1, 2), masking


@flax.struct.dataclass
class RowLayer:
    """One layer of the cache.

    Attributes:
        columns: keys and values of prefix and text.
        outside: the terms of each row outside the softmax; None if no row has had one.
    """

    columns: Columns
    outside: OutsideRows | None = None


@flax.struct.dataclass
class RowCache:
    """The cache of all rows, one `RowLayer` per layer."""

    layers: tuple[RowLayer, ...]

    @classmethod
    def empty(cls, shape: SiteShape, rows: int, width: int, dtype: Any) -> RowCache:
        """A cache of `rows` rows of `width` columns."""

        def layer() -> RowLayer:
            kv = (rows, shape.kv_heads, width, shape.head_dim)
            bias_BNS = jnp.zeros((rows, shape.query_heads, width), dtype)
            return RowLayer(Columns(jnp.zeros(kv, dtype), jnp.zeros(kv, dtype), bias_BNS))

        return cls(tuple(layer() for _ in range(shape.layers)))

    @property
    def width(self) -> int:
        """S, the number of columns per row."""
        return self.layers[0].columns.k_BKSH.shape[2]

    def resize(self, width: int) -> RowCache:
        """Returns a copy with more columns, or without the last ones."""

        def resize(x: jax.Array, axis: int) -> jax.Array:
            if width <= x.shape[axis]:
                return jax.lax.slice_in_dim(x, 0, width, axis=axis)
            return jnp.pad(
                x, [(0, width - size if i == axis else 0) for i, size in enumerate(x.shape)]
            )

        def layer(layer: RowLayer) -> RowLayer:
            c = layer.columns
            columns = Columns(*(resize(x, 2) for x in (c.k_BKSH, c.v_BKSH, c.bias_BNS)))
            return dataclasses.replace(layer, columns=columns)

        return RowCache(tuple(map(layer, self.layers)))

    def fits(self, warm: Warm) -> bool:
        """Whether rows have room for the terms of a prefix outside the softmax."""
        outside = self.layers[0].outside
        if warm.gated_k_LPKH is not None:
            gated = None if outside is None else outside.gated
            if gated is None or gated.k_LPKH.shape[1] < warm.gated_k_LPKH.shape[1]:
                return False
        return warm.m_LNHH is None or (outside is not None and outside.memory is not None)

    def with_outside(self, warm: Warm) -> RowCache:
        """Returns a copy with room for the terms of a prefix outside the softmax."""
        return RowCache(
            tuple(
                dataclasses.replace(layer, outside=_room_for(layer, warm)) for layer in self.layers
            )
        )

    def start(self, row: jax.Array, warm: Warm | None) -> RowCache:
        """Returns a copy in which a row contains nothing but its prefix.

        The whole row is overwritten: values from an earlier request that are NaN would spread even
        through weights of zero.
        """

        def overwrite(x: jax.Array, new: jax.Array | None) -> jax.Array:
            content = jnp.zeros(x.shape[1:], x.dtype)
            if new is not None:
                content = jax.lax.dynamic_update_slice(
                    content, new.astype(x.dtype), (0,) * content.ndim
                )
            return jax.lax.dynamic_update_index_in_dim(x, content, row, 0)

        def layer(index: int, layer: RowLayer) -> RowLayer:
            c, outside = layer.columns, layer.outside

            def part(name: str) -> jax.Array | None:
                x = None if warm is None else getattr(warm, name)
                return None if x is None else x[index]

            columns = Columns(
                overwrite(c.k_BKSH, part("k_LKPH")),
                overwrite(c.v_BKSH, part("v_LKPH")),
                overwrite(c.bias_BNS, part("bias_LNP")),
            )
            if outside is None:
                return RowLayer(columns)
            gated = outside.gated
            if gated is not None:
                gated = Gated(
                    overwrite(gated.k_LPKH, part("gated_k_LPKH")),
                    overwrite(gated.v_LPKH, part("gated_v_LPKH")),
                    overwrite(gated.gate_LN, part("gate_LN")),
                )
            memory = outside.memory
            if memory is not None:
                memory = Memory(overwrite(memory.m_LNHH, part("m_LNHH")))
            slots = jnp.int32(0) if warm is None else warm.gated_slots
            return RowLayer(columns, OutsideRows(gated, outside.slots_B.at[row].set(slots), memory))

        return RowCache(tuple(layer(i, x) for i, x in enumerate(self.layers)))

    def constrained(self) -> RowCache:
        """Splits rows and heads over the mesh of `jax.set_mesh`, as `decode` splits its cache."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return self
        tensor = mesh.shape[HEAD_AXIS]

        def constrain(x: jax.Array, heads: int | None) -> jax.Array:
            axes: list[Any] = [BATCH_AXES] + [None] * (x.ndim - 1)
            if heads is not None and x.shape[heads] % tensor == 0:
                axes[heads] = HEAD_AXIS
            return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))

        def layer(layer: RowLayer) -> RowLayer:
            c = layer.columns
            columns = Columns(*(constrain(x, 1) for x in (c.k_BKSH, c.v_BKSH, c.bias_BNS)))
            outside = jax.tree.map(lambda x: constrain(x, None), layer.outside)
            return RowLayer(columns, outside)

        return RowCache(tuple(map(layer, self.layers)))


def _room_for(layer: RowLayer, warm: Warm) -> OutsideRows | None:
    """The terms of a layer outside the softmax, extended by what a prefix needs."""
    columns, old = layer.columns, layer.outside
    B, K, _, H = columns.k_BKSH.shape
    N, dtype = columns.bias_BNS.shape[1], columns.k_BKSH.dtype
    gated, memory = (None, None) if old is None else (old.gated, old.memory)
    if warm.gate_LN is not None and warm.gated_k_LPKH is not None:
        P = warm.gated_k_LPKH.shape[1]
        if gated is None:
            slots = jnp.zeros((B, P, K, H), dtype)
            gated = Gated(slots, slots, jnp.zeros((B, N), jnp.float32))
        elif P > gated.k_LPKH.shape[1]:
            more = [(0, 0), (0, P - gated.k_LPKH.shape[1]), (0, 0), (0, 0)]
            k_BPKH, v_BPKH = (jnp.pad(x, more) for x in (gated.k_LPKH, gated.v_LPKH))
            gated = Gated(k_BPKH, v_BPKH, gated.gate_LN)
    if warm.m_LNHH is not None and memory is None:
        memory = Memory(jnp.zeros((B, N, H, H), dtype))
    if gated is None and memory is None:
        return None
    return OutsideRows(gated, jnp.zeros(B, jnp.int32) if old is None else old.slots_B, memory)


def take_rows(arrays: Any, rows_R: jax.Array | None) -> Any:
    """Selects some rows of every array; all rows for None."""
    if rows_R is None:
        return arrays
    return jax.tree.map(lambda x: x[rows_R], arrays)


def put_rows(arrays: Any, rows_R: jax.Array | None, new: Any) -> Any:
    """Replaces some rows of every array; all rows for None."""
    if rows_R is None:
        return new
    return jax.tree.map(lambda x, y: x.at[rows_R].set(y), arrays, new)


@flax.struct.dataclass
class Layout:
    """Which columns of each row are in use, and their positions. Small, and kept on the host.

    Attributes:
        slots_B: P, the number of columns of the prefix.
        text_position_B: the position of the first token of text.
        pinned_B: whether the prefix ignores sliding windows.
        length_B: the number of columns in use.
    """

    slots_B: Any
    text_position_B: Any
    pinned_B: Any
    length_B: Any

    def position(self, column_BX: jax.Array) -> jax.Array:
        """The positions of columns."""
        slots_B1, text_B1 = self.slots_B[:, None], self.text_position_B[:, None]
        position_BX = jnp.where(column_BX < slots_B1, column_BX, column_BX - slots_B1 + text_B1)
        return position_BX

    def inputs(
        self,
        arch: Architecture,
        params: Params,
        position_BT: jax.Array,
        column_BT: jax.Array,
        width: int,
        *,
        sliding: bool,
    ) -> AttentionInputs:
        """The inputs of self-attention for new tokens in layers of one kind.

        Args:
            arch: the architecture of the decoder.
            params: its weights, for the table of relative positions.
            position_BT, column_BT: the positions and columns of the tokens.
            width: S.
            sliding: whether the layers have a sliding window.
        """
        key_1S = jnp.arange(width)[None]
        mask_BTS = key_1S[:, None] <= column_BT[:, :, None]
        key_position_BS = self.position(key_1S)
        if sliding and arch.window is not None:
            distance_BTS = position_BT[:, :, None] - key_position_BS[:, None]
            pinned_BS = self.pinned_B[:, None] & (key_1S < self.slots_B[:, None])
            mask_BTS &= (distance_BTS < arch.window) | pinned_BS[:, None]
        bias_BNTS = None
        if arch.relative is not None:
            bias_BNTS = arch.relative.bias(params["relative_RN"], position_BT, key_position_BS)
        angles = rotary_angles(arch, position_BT, sliding)
        return AttentionInputs(MaskAndBias(mask_BTS, bias_BNTS=bias_BNTS), angles, self.length_B)
