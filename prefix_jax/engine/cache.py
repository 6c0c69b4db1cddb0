"""The KV cache of the engine: one row per running continuation.

A row's columns are the slots of its prefix, then the tokens of its text:

    column       0 … P - 1       P, P + 1, …
    position     0 … P - 1       text_position, text_position + 1, …

A short prefix is therefore a warm start: it is copied into the row once, and attention treats it
like any other columns. Three of its properties need more than positions. A pinned prefix ignores
sliding windows (`Layout.pinned_B`). Slots with a bias, and layers that a prefix does not cover,
have a bias per column (`Columns.bias_BNS`). Terms outside the softmax are not columns; each row
keeps a copy of its own (`RowSite.outside`).

A long prefix is shared: its slots are not in the cache, the columns of its rows begin with the
text, and attention reads the bank's arrays (`Site.shared`) next to the columns, in one softmax. The
layout has the index of the one that a row uses.

Because every column up to a token's own precedes it, the causal mask compares columns, and only
windows compare positions. A prefix thus stays visible to text that starts at position 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.attention_inputs import rotary_angles
from prefix_jax.backbones.stacking import Params
from prefix_jax.engine.warm import Warm, WarmSite
from prefix_jax.mesh import BATCH_AXES, HEAD_AXIS
from prefix_jax.nn.attention.mask import MaskAndBias
from prefix_jax.nn.layers import AttentionInputs, KeysValues
from prefix_jax.prefix import Gated, Geometry, Memory, OutsideRows, SiteShape


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
class RowSite:
    """One attention of one layer.

    Attributes:
        columns: keys and values of prefix and text.
        outside: the terms of each row outside the softmax; None if no row has had one.
    """

    columns: Columns
    outside: OutsideRows | None = None

    @classmethod
    def empty(cls, shape: SiteShape, rows: int, width: int, dtype: Any) -> RowSite:
        """An attention of `rows` rows of `width` columns."""
        kv = (rows, shape.kv_heads, width, shape.head_dim)
        bias_BNS = jnp.zeros((rows, shape.query_heads, width), dtype)
        return cls(Columns(jnp.zeros(kv, dtype), jnp.zeros(kv, dtype), bias_BNS))

    def resize(self, width: int) -> RowSite:
        """Returns a copy with more columns, or without the last ones."""

        def resize(x_BNS: jax.Array) -> jax.Array:
            missing = width - x_BNS.shape[2]
            if missing <= 0:
                return jax.lax.slice_in_dim(x_BNS, 0, width, axis=2)
            return jnp.pad(x_BNS, [(0, missing if i == 2 else 0) for i in range(x_BNS.ndim)])

        return dataclasses.replace(self, columns=jax.tree.map(resize, self.columns))

    def fits(self, warm: WarmSite | None) -> bool:
        """Checks whether rows have room for the terms of a prefix outside the softmax."""
        if warm is None:
            return True
        outside = self.outside
        if warm.gated_k_LPKH is not None:
            gated = None if outside is None else outside.gated
            if gated is None or gated.k_LPKH.shape[1] < warm.gated_k_LPKH.shape[1]:
                return False
        return warm.m_LNHH is None or (outside is not None and outside.memory is not None)

    def with_outside(self, warm: WarmSite | None) -> RowSite:
        """Returns a copy with room for the terms of a prefix outside the softmax."""
        if warm is None or self.fits(warm):
            return self
        B, K, _, H = self.columns.k_BKSH.shape
        N, dtype, old = self.columns.bias_BNS.shape[1], self.columns.k_BKSH.dtype, self.outside
        gated, memory = (None, None) if old is None else (old.gated, old.memory)
        if warm.gated_k_LPKH is not None:
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
        slots_B = jnp.zeros(B, jnp.int32) if old is None else old.slots_B
        return RowSite(self.columns, OutsideRows(gated, slots_B, memory))

    def start(self, row: jax.Array, warm: WarmSite | None, bias: float = 0.0) -> RowSite:
        """Returns a copy in which a row contains nothing but its prefix.

        The whole row is overwritten: values from an earlier request that are NaN would spread even
        through weights of zero.

        Args:
            row: the row.
            warm: one layer of its prefix, with all columns that the row begins with.
            bias: the bias of the other columns.
        """
        warm = warm or WarmSite()

        def overwrite(x: jax.Array, new: jax.Array | None, fill: float = 0.0) -> jax.Array:
            content = jnp.full(x.shape[1:], fill, x.dtype)
            if new is not None:
                content = jax.lax.dynamic_update_slice(
                    content, new.astype(x.dtype), (0,) * content.ndim
                )
            return jax.lax.dynamic_update_index_in_dim(x, content, row, 0)

        columns = Columns(
            overwrite(self.columns.k_BKSH, warm.k_LKPH),
            overwrite(self.columns.v_BKSH, warm.v_LKPH),
            overwrite(self.columns.bias_BNS, warm.bias_LNP, bias),
        )
        if self.outside is None:
            return RowSite(columns)
        gated, memory = self.outside.gated, self.outside.memory
        if gated is not None:
            gated = Gated(
                overwrite(gated.k_LPKH, warm.gated_k_LPKH),
                overwrite(gated.v_LPKH, warm.gated_v_LPKH),
                overwrite(gated.gate_LN, warm.gate_LN),
            )
        if memory is not None:
            memory = Memory(overwrite(memory.m_LNHH, warm.m_LNHH))
        slots = 0 if warm.gated_slots_L is None else warm.gated_slots_L
        slots_B = self.outside.slots_B.at[row].set(slots)
        return RowSite(columns, OutsideRows(gated, slots_B, memory))


@flax.struct.dataclass
class RowLayer:
    """One layer of the cache.

    Attributes:
        own: self-attention.
        cross: attention to the encoder's output, whose columns are the slots of the prefix and the
            encoder's tokens; the bias masks all other columns. None without an encoder.
    """

    own: RowSite
    cross: RowSite | None = None


@flax.struct.dataclass
class RowCache:
    """The cache of all rows, one `RowLayer` per layer."""

    layers: tuple[RowLayer, ...]

    @classmethod
    def empty(cls, geometry: Geometry, rows: int, width: int, dtype: Any) -> RowCache:
        """A cache of `rows` rows of `width` columns in every attention."""
        own, cross = geometry.sites["decoder"], geometry.cross

        def layer() -> RowLayer:
            return RowLayer(
                RowSite.empty(own, rows, width, dtype),
                None if cross is None else RowSite.empty(cross, rows, width, dtype),
            )

        return cls(tuple(layer() for _ in range(own.layers)))

    @property
    def width(self) -> int:
        """S, the number of columns per row."""
        return self.layers[0].own.columns.k_BKSH.shape[2]

    @property
    def cross_width(self) -> int:
        """The number of columns per row of cross-attention; 0 without an encoder."""
        cross = self.layers[0].cross
        return 0 if cross is None else cross.columns.k_BKSH.shape[2]

    def resize(self, width: int, cross_width: int) -> RowCache:
        """Returns a copy with more columns, or without the last ones."""
        return self._map(lambda site: site.resize(width), lambda site: site.resize(cross_width))

    def fits(self, warm: Warm) -> bool:
        """Checks whether rows have room for the terms of a prefix outside the softmax."""
        layer = self.layers[0]
        return layer.own.fits(warm.decoder) and (
            layer.cross is None or layer.cross.fits(warm.cross)
        )

    def with_outside(self, warm: Warm) -> RowCache:
        """Returns a copy with room for the terms of a prefix outside the softmax."""
        return self._map(
            lambda site: site.with_outside(warm.decoder), lambda site: site.with_outside(warm.cross)
        )

    def constrained(self) -> RowCache:
        """Splits rows and heads over the mesh of `jax.set_mesh`, as `decode` splits its cache."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return self
        tensor = mesh.shape[HEAD_AXIS]

        def constrain(x: jax.Array, heads: int | None = None) -> jax.Array:
            axes: list[Any] = [BATCH_AXES] + [None] * (x.ndim - 1)
            if heads is not None and x.shape[heads] % tensor == 0:
                axes[heads] = HEAD_AXIS
            return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))

        def split(site: RowSite) -> RowSite:
            columns = jax.tree.map(lambda x: constrain(x, 1), site.columns)
            return RowSite(columns, jax.tree.map(constrain, site.outside))

        return self._map(split, split)

    def _map(
        self, own: Callable[[RowSite], RowSite], cross: Callable[[RowSite], RowSite]
    ) -> RowCache:
        """Changes the attentions of every layer."""
        return RowCache(
            tuple(
                RowLayer(own(layer.own), None if layer.cross is None else cross(layer.cross))
                for layer in self.layers
            )
        )


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
    """The columns in use and their positions, per row. Small, and kept on the host.

    Attributes:
        slots_B: P, the number of columns of the prefix.
        text_position_B: the position of the first token of text.
        pinned_B: whether the prefix ignores sliding windows.
        length_B: the number of columns in use.
        shared_B: the index of the row's prefix among those that are shared.
        shared_slots_B: the number of its slots; 0 if the row has no shared prefix.
    """

    slots_B: Any
    text_position_B: Any
    pinned_B: Any
    length_B: Any
    shared_B: Any
    shared_slots_B: Any

    @classmethod
    def empty(cls, rows: int) -> Layout:
        """The layout of empty rows, in host memory."""
        numbers = (np.zeros(rows, np.int32) for _ in range(5))
        slots_B, text_position_B, length_B, shared_B, shared_slots_B = numbers
        pinned_B = np.zeros(rows, bool)
        return cls(slots_B, text_position_B, pinned_B, length_B, shared_B, shared_slots_B)

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
        shared: Sequence[int],
        *,
        sliding: bool,
    ) -> AttentionInputs:
        """The inputs of self-attention for new tokens in layers of one kind.

        Args:
            arch: the architecture of the decoder.
            params: its weights, for the table of relative positions.
            position_BT, column_BT: the positions and columns of the tokens.
            width: S.
            shared: the numbers of slots of the shared prefixes, padding included.
            sliding: whether the layers have a sliding window.
        """
        key_1S = jnp.arange(width)[None]
        mask_BTS = key_1S[:, None] <= column_BT[:, :, None]
        key_position_BS = self.position(key_1S)
        window = arch.window if sliding else None
        if window is not None:
            distance_BTS = position_BT[:, :, None] - key_position_BS[:, None]
            pinned_BS = self.pinned_B[:, None] & (key_1S < self.slots_B[:, None])
            mask_BTS &= (distance_BTS < window) | pinned_BS[:, None]
        bias_BNTS = None
        if arch.relative is not None:
            bias_BNTS = arch.relative.bias(params["relative_RN"], position_BT, key_position_BS)
        masking = MaskAndBias(mask_BTS, self._shared_mask(position_BT, shared, window), bias_BNTS)
        return AttentionInputs(masking, rotary_angles(arch, position_BT, sliding), self.length_B)

    def _shared_mask(
        self, position_BT: jax.Array, shared: Sequence[int], window: int | None
    ) -> jax.Array | None:
        """True where a token sees a slot of a shared prefix, for the slots of all of them one after
        another, [B, T, P]; None without shared prefixes."""
        masks = []
        for index, P in enumerate(shared):
            slot_P = jnp.arange(P)
            used_B = jnp.where(self.shared_B == index, self.shared_slots_B, 0)
            mask_BTP = (slot_P < used_B[:, None])[:, None]
            if window is not None:
                inside_BTP = position_BT[:, :, None] - slot_P < window
                mask_BTP &= inside_BTP | self.pinned_B[:, None, None]
            masks.append(jnp.broadcast_to(mask_BTP, (*position_BT.shape, P)))
        return jnp.concatenate(masks, axis=-1) if masks else None
