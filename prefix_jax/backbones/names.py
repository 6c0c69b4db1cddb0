"""How the tensors of a checkpoint become the parameters of a backbone.

A table has one row per parameter: the tensor's name in the checkpoint (`{l}` stands for the layer),
the parameter's path, and how the one is stored in the other. Everything is checked against the
shapes in the checkpoint's headers before any weight is read.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
from flax.traverse_util import flatten_dict

from prefix_jax.errors import BackboneError

Shape = tuple[int, ...]
_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight of a matrix product, stored with its axes flattened to two.

    Attributes:
        inputs: how many leading axes of the parameter are inputs: 1 for `q_DNH`, 2 for `o_NHD`.
        transposed: stored [out, in], as `torch.nn.Linear` does; else [in, out], as embeddings and
            GPT-2's `Conv1D` are.
        part, parts: the parameter is one of several fused along the outputs.
        interleaved: llama.cpp stores the two halves of each head's rotary dimensions interleaved.
    """

    inputs: int = 1
    transposed: bool = True
    part: int = 0
    parts: int = 1
    interleaved: bool = False

    def stored(self, shape: Shape) -> Shape:
        """The shape in the checkpoint of a parameter of this shape."""
        rows, columns = math.prod(shape[: self.inputs]), math.prod(shape[self.inputs :])
        return (columns * self.parts, rows) if self.transposed else (rows, columns * self.parts)

    def __call__(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """The parameter, as a view of the stored tensor wherever strides can express it."""
        x = x.T if self.transposed else x
        columns = x.shape[1] // self.parts
        x = x[:, self.part * columns : (self.part + 1) * columns]
        return _split_halves(x, shape) if self.interleaved else x.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Vector:
    """A bias or a scale, stored flat; attributes as in `Matrix`."""

    part: int = 0
    parts: int = 1
    interleaved: bool = False

    def stored(self, shape: Shape) -> Shape:
        """The shape in the checkpoint of a parameter of this shape."""
        return (math.prod(shape) * self.parts,)

    def __call__(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """The parameter, from the stored tensor."""
        x = x.reshape(self.parts, -1)[self.part]
        return _split_halves(x, shape) if self.interleaved else x.reshape(shape)


def _split_halves(x: np.ndarray, shape: Shape) -> np.ndarray:
    """Undoes llama.cpp's reordering of the last axis, H, from (half, H/2) to (H/2, half)."""
    *heads, H = shape
    return x.reshape(*heads, H // 2, 2).swapaxes(-1, -2).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its name in the checkpoint, its path with slashes, how it is stored."""

    name: str
    path: str
    storage: Matrix | Vector


@dataclasses.dataclass(frozen=True)
class NameTable:
    """The checkpoint names of one family in one format.

    Attributes:
        rows: every parameter that some model of the family has.
        prefix: may stand before each name (checkpoints of the bare model leave it out).
        ignored: patterns of tensors that hold nothing to load.
    """

    rows: tuple[Row, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Where one parameter comes from.

    Attributes:
        path: in the parameter tree.
        shape: of the parameter, with the layers' axis.
        names: the tensors in the checkpoint; one for each layer if `stacked`, else one.
        storage: how each of them is stored.
        stacked: whether the leading axis counts layers.
    """

    path: tuple[str, ...]
    shape: Shape
    names: tuple[str, ...]
    storage: Matrix | Vector
    stacked: bool


def match(
    table: NameTable, params: Mapping, stored: Mapping[str, Shape], where: str
) -> list[Parameter]:
    """Finds the checkpoint's tensors for every parameter.

    Args:
        table: the names.
        params: the parameter tree, of anything that has a shape. Parameters under "layers" have
            a leading axis of layers.
        stored: the shape of every tensor in the checkpoint.
        where: the checkpoint, for messages.

    Raises:
        BackboneError: tensors are missing, unexpected or of another shape; all are listed.
    """
    actual = {name.removeprefix(table.prefix): name for name in stored}
    rows = {tuple(row.path.split("/")): row for row in table.rows}
    found: list[Parameter] = []
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for path, leaf in flatten_dict(dict(params)).items():
        row, shape = rows[path], tuple(leaf.shape)
        stacked = path[0] == "layers"
        count = shape[0] if stacked else 1
        names = [row.name.format(l=layer) for layer in range(count)]
        expected = row.storage.stored(shape[1:] if stacked else shape)
        used.update(names)
        missing += [name for name in names if name not in actual]
        misshapen += [
            f"{name}: {stored[actual[name]]} instead of {expected}"
            for name in names
            if name in actual and stored[actual[name]] != expected
        ]
        sources = tuple(actual.get(name, name) for name in names)
        found.append(Parameter(path, shape, sources, row.storage, stacked))
    ignored = re.compile("|".join(table.ignored) or r"(?!)")
    unexpected = [
        actual[name] for name in actual if name not in used and not ignored.fullmatch(name)
    ]
    problems = [
        _listed(kind, names)
        for kind, names in (
            ("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen)
        )
        if names
    ]  # fmt: skip
    if problems:
        raise BackboneError(
            f"the tensors in {where} do not fit its configuration\n" + "\n".join(problems)
        )
    return found


def _listed(kind: str, names: Iterable[str]) -> str:
    names = sorted(set(names), key=_natural)
    lines = [f"  {len(names)} {kind}:", *(f"    {name}" for name in names[:_LISTED])]
    if len(names) > _LISTED:
        lines.append(f"    … and {len(names) - _LISTED} more")
    return "\n".join(lines)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D+)(\d*)", name)]


_linear = Matrix()
_stored = Matrix(transposed=False)
_vector = Vector()


def _gpt2_conv(part: int) -> Matrix:
    return Matrix(transposed=False, part=part, parts=3)


HF_GPT2 = NameTable(
    prefix="transformer.",
    rows=(
        Row("wte.weight", "embed/tokens_VD", _stored),
        Row("wpe.weight", "embed/positions_TD", _stored),
        Row("h.{l}.ln_1.weight", "layers/attn_norm/scale_D", _vector),
        Row("h.{l}.ln_1.bias", "layers/attn_norm/bias_D", _vector),
        Row("h.{l}.attn.c_attn.weight", "layers/attn/q_DNH", _gpt2_conv(0)),
        Row("h.{l}.attn.c_attn.weight", "layers/attn/k_DKH", _gpt2_conv(1)),
        Row("h.{l}.attn.c_attn.weight", "layers/attn/v_DKH", _gpt2_conv(2)),
        Row("h.{l}.attn.c_attn.bias", "layers/attn/q_bias_NH", Vector(0, 3)),
        Row("h.{l}.attn.c_attn.bias", "layers/attn/k_bias_KH", Vector(1, 3)),
        Row("h.{l}.attn.c_attn.bias", "layers/attn/v_bias_KH", Vector(2, 3)),
        Row("h.{l}.attn.c_proj.weight", "layers/attn/o_NHD", Matrix(2, transposed=False)),
        Row("h.{l}.attn.c_proj.bias", "layers/attn/o_bias_D", _vector),
        Row("h.{l}.ln_2.weight", "layers/mlp_norm/scale_D", _vector),
        Row("h.{l}.ln_2.bias", "layers/mlp_norm/bias_D", _vector),
        Row("h.{l}.mlp.c_fc.weight", "layers/mlp/up_DF", _stored),
        Row("h.{l}.mlp.c_fc.bias", "layers/mlp/up_bias_F", _vector),
        Row("h.{l}.mlp.c_proj.weight", "layers/mlp/down_FD", _stored),
        Row("h.{l}.mlp.c_proj.bias", "layers/mlp/down_bias_D", _vector),
        Row("ln_f.weight", "final_norm/scale_D", _vector),
        Row("ln_f.bias", "final_norm/bias_D", _vector),
        Row("lm_head.weight", "head/unembed_DV", _linear),
    ),
    # The causal mask was once saved as a buffer, and a tied head is saved by some writers.
    ignored=(r"h\.\d+\.attn\.(masked_)?bias", r"lm_head\.weight"),
)

HF_LLAMA = NameTable(
    prefix="model.",
    rows=(
        Row("embed_tokens.weight", "embed/tokens_VD", _stored),
        Row("layers.{l}.input_layernorm.weight", "layers/attn_norm/scale_D", _vector),
        Row("layers.{l}.self_attn.q_proj.weight", "layers/attn/q_DNH", _linear),
        Row("layers.{l}.self_attn.k_proj.weight", "layers/attn/k_DKH", _linear),
        Row("layers.{l}.self_attn.v_proj.weight", "layers/attn/v_DKH", _linear),
        Row("layers.{l}.self_attn.o_proj.weight", "layers/attn/o_NHD", Matrix(2)),
        Row("layers.{l}.self_attn.q_proj.bias", "layers/attn/q_bias_NH", _vector),
        Row("layers.{l}.self_attn.k_proj.bias", "layers/attn/k_bias_KH", _vector),
        Row("layers.{l}.self_attn.v_proj.bias", "layers/attn/v_bias_KH", _vector),
        Row("layers.{l}.self_attn.o_proj.bias", "layers/attn/o_bias_D", _vector),
        Row("layers.{l}.self_attn.q_norm.weight", "layers/attn/q_norm/scale_H", _vector),
        Row("layers.{l}.self_attn.k_norm.weight", "layers/attn/k_norm/scale_H", _vector),
        Row("layers.{l}.post_attention_layernorm.weight", "layers/mlp_norm/scale_D", _vector),
        Row("layers.{l}.mlp.gate_proj.weight", "layers/mlp/gate_DF", _linear),
        Row("layers.{l}.mlp.up_proj.weight", "layers/mlp/up_DF", _linear),
        Row("layers.{l}.mlp.down_proj.weight", "layers/mlp/down_FD", _linear),
        Row("layers.{l}.mlp.gate_proj.bias", "layers/mlp/gate_bias_F", _vector),
        Row("layers.{l}.mlp.up_proj.bias", "layers/mlp/up_bias_F", _vector),
        Row("layers.{l}.mlp.down_proj.bias", "layers/mlp/down_bias_D", _vector),
        Row("norm.weight", "final_norm/scale_D", _vector),
        Row("lm_head.weight", "head/unembed_DV", _linear),
    ),
    # Frequencies follow from the configuration, and a tied head is saved by some writers.
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight"),
)

GGUF_GPT2 = NameTable(
    rows=(
        Row("token_embd.weight", "embed/tokens_VD", _stored),
        Row("position_embd.weight", "embed/positions_TD", _stored),
        Row("blk.{l}.attn_norm.weight", "layers/attn_norm/scale_D", _vector),
        Row("blk.{l}.attn_norm.bias", "layers/attn_norm/bias_D", _vector),
        Row("blk.{l}.attn_qkv.weight", "layers/attn/q_DNH", Matrix(part=0, parts=3)),
        Row("blk.{l}.attn_qkv.weight", "layers/attn/k_DKH", Matrix(part=1, parts=3)),
        Row("blk.{l}.attn_qkv.weight", "layers/attn/v_DKH", Matrix(part=2, parts=3)),
        Row("blk.{l}.attn_qkv.bias", "layers/attn/q_bias_NH", Vector(0, 3)),
        Row("blk.{l}.attn_qkv.bias", "layers/attn/k_bias_KH", Vector(1, 3)),
        Row("blk.{l}.attn_qkv.bias", "layers/attn/v_bias_KH", Vector(2, 3)),
        Row("blk.{l}.attn_output.weight", "layers/attn/o_NHD", Matrix(2)),
        Row("blk.{l}.attn_output.bias", "layers/attn/o_bias_D", _vector),
        Row("blk.{l}.ffn_norm.weight", "layers/mlp_norm/scale_D", _vector),
        Row("blk.{l}.ffn_norm.bias", "layers/mlp_norm/bias_D", _vector),
        Row("blk.{l}.ffn_up.weight", "layers/mlp/up_DF", _linear),
        Row("blk.{l}.ffn_up.bias", "layers/mlp/up_bias_F", _vector),
        Row("blk.{l}.ffn_down.weight", "layers/mlp/down_FD", _linear),
        Row("blk.{l}.ffn_down.bias", "layers/mlp/down_bias_D", _vector),
        Row("output_norm.weight", "final_norm/scale_D", _vector),
        Row("output_norm.bias", "final_norm/bias_D", _vector),
        Row("output.weight", "head/unembed_DV", _linear),
    ),
)


def _gguf_llama(interleaved: bool) -> NameTable:
    rotary, rotary_bias = Matrix(interleaved=interleaved), Vector(interleaved=interleaved)
    return NameTable(
        rows=(
            Row("token_embd.weight", "embed/tokens_VD", _stored),
            Row("blk.{l}.attn_norm.weight", "layers/attn_norm/scale_D", _vector),
            Row("blk.{l}.attn_q.weight", "layers/attn/q_DNH", rotary),
            Row("blk.{l}.attn_k.weight", "layers/attn/k_DKH", rotary),
            Row("blk.{l}.attn_v.weight", "layers/attn/v_DKH", _linear),
            Row("blk.{l}.attn_output.weight", "layers/attn/o_NHD", Matrix(2)),
            Row("blk.{l}.attn_q.bias", "layers/attn/q_bias_NH", rotary_bias),
            Row("blk.{l}.attn_k.bias", "layers/attn/k_bias_KH", rotary_bias),
            Row("blk.{l}.attn_v.bias", "layers/attn/v_bias_KH", _vector),
            Row("blk.{l}.attn_output.bias", "layers/attn/o_bias_D", _vector),
            Row("blk.{l}.attn_q_norm.weight", "layers/attn/q_norm/scale_H", _vector),
            Row("blk.{l}.attn_k_norm.weight", "layers/attn/k_norm/scale_H", _vector),
            Row("blk.{l}.ffn_norm.weight", "layers/mlp_norm/scale_D", _vector),
            Row("blk.{l}.ffn_gate.weight", "layers/mlp/gate_DF", _linear),
            Row("blk.{l}.ffn_up.weight", "layers/mlp/up_DF", _linear),
            Row("blk.{l}.ffn_down.weight", "layers/mlp/down_FD", _linear),
            Row("blk.{l}.ffn_gate.bias", "layers/mlp/gate_bias_F", _vector),
            Row("blk.{l}.ffn_up.bias", "layers/mlp/up_bias_F", _vector),
            Row("blk.{l}.ffn_down.bias", "layers/mlp/down_bias_D", _vector),
            Row("output_norm.weight", "final_norm/scale_D", _vector),
            Row("output.weight", "head/unembed_DV", _linear),
        ),
        # Read with the configuration, as rotary scaling.
        ignored=(r"rope_freqs\.weight",),
    )


GGUF_LLAMA = _gguf_llama(interleaved=True)
GGUF_QWEN = _gguf_llama(interleaved=False)
