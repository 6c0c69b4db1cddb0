"""The device mesh and the sharding of arrays.

A parameter's name ends in its axes (`q_DNH`), so one table from axis letters to mesh axes shards
every backbone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from prefix_jax.errors import MeshError

AXES = ("data", "fsdp", "sequence", "tensor")

# The rows of a batch are split over both, because fsdp devices hold different data.
BATCH_AXES = ("data", "fsdp")

# Splits the columns of rows that are too long for one device, or fewer than the devices.
COLUMN_AXIS = "sequence"

# Splits heads, features and the vocabulary.
HEAD_AXIS = "tensor"

# Devices along these axes hold different tokens and share one copy of the weights.
SHARE_AXES = ("fsdp", COLUMN_AXIS)

# Mesh axes that split each axis of the weights, by letter. Other letters are never split.
WEIGHT_AXES: Mapping[str, tuple[str, ...]] = {
    "D": SHARE_AXES,
    **dict.fromkeys("NKFV", (HEAD_AXIS,)),
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    sequence: int = 1,
) -> Mesh:
    """Makes a `data` × `fsdp` × `sequence` × `tensor` mesh. One size may be -1: it is inferred from
    the number of devices.

    Raises:
        MeshError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, sequence, tensor]
    asked = describe(dict(zip(AXES, sizes, strict=True)))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise MeshError(f"mesh {asked}: sizes must be positive, and only one may be -1")
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if int(np.prod(sizes)) != len(devices):
        raise MeshError(
            f"mesh {asked} does not fit {len(devices)} devices; "
            "choose sizes whose product is the number of devices, or -1 for one of them"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def shards(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    """The number of shards along these axes of a mesh."""
    return math.prod(mesh.shape[axis] for axis in axes)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts that the rows of a batch are split into."""
    return shards(mesh, BATCH_AXES)


def check_rows(mesh: Mesh, rows: int, name: str) -> None:
    """Raises MeshError if `rows` rows do not divide over the mesh."""
    parts = batch_shards(mesh)
    if rows % parts:
        raise MeshError(
            f"{name} {rows} does not divide over {parts} batch shards "
            f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}); "
            f"choose a multiple of {parts}"
        )


def weight_spec(path: Sequence[Any], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The partition of a parameter, from the letters at the end of its name. The integers and
    scales of a quantised parameter are split alike, unless an axis of the scales is too small.

    Vectors are replicated, and so is any axis that its mesh axes do not divide (for example, 3 KV
    heads over 2 devices).
    """
    # A quantised parameter's leaves are attributes below its name.
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    letters = names[-1].rsplit("_", 1)[-1]
    if len(letters) == len(shape) - 1:
        letters = "L" + letters
    if len(letters.removeprefix("L")) < 2:
        return PartitionSpec()
    split = [
        # A mesh axis can split only one axis of an array: in a square matrix, the first.
        None if letter in letters[:place] else WEIGHT_AXES.get(letter)
        for place, letter in enumerate(letters)
    ]
    return PartitionSpec(
        *(
            axes if axes and size % shards(mesh, axes) == 0 else None
            for axes, size in zip(split, shape, strict=True)
        )
    )


def weight_shardings(params: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a backbone's (abstract) parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, weight_spec(path, leaf.shape, mesh)), params
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Replicates an array on every device: used for prefixes and optimizer state, which are
    small."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, ndim: int, leading: int = 0) -> NamedSharding:
    """Splits rows over the batch axes; `leading` axes (micro-batches) precede the rows."""
    if ndim <= leading:
        return replicated(mesh)
    spec = [None] * leading + [BATCH_AXES] + [None] * (ndim - leading - 1)
    return NamedSharding(mesh, PartitionSpec(*spec))


def place_rows(batch: Any, mesh: Mesh, leading: int = 0) -> Any:
    """Places a batch of NumPy arrays on the mesh, with rows over the batch axes.

    With several hosts, each host passes its own rows; scalars must be equal on all hosts.
    """

    def place(leaf: np.ndarray) -> jax.Array:
        sharding = rows_sharding(mesh, np.ndim(leaf), leading)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, batch)


def on_mesh_of(arrays: Any) -> AbstractContextManager[Any]:
    """Context for programs that read these arrays: sets their mesh, which is required to split
    kernels over its devices. Does nothing if the arrays are not on a mesh of `AXES`."""
    for leaf in jax.tree.leaves(arrays):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if isinstance(mesh, Mesh) and mesh.axis_names == AXES:
            return jax.set_mesh(mesh)
    return contextlib.nullcontext()


def constrain_tokens(x_BT: jax.Array) -> jax.Array:
    """Constrains x_BT or x_BTD to the sharding of tokens, inside a function jitted under
    `jax.set_mesh`: rows are split over the batch axes (a single row is replicated), columns over
    the column axis if it divides them. Does nothing outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x_BT
    rows = None if x_BT.shape[0] == 1 else BATCH_AXES
    columns = None if x_BT.shape[1] % column_shards() else COLUMN_AXIS
    spec = PartitionSpec(rows, columns, *(None for _ in x_BT.shape[2:]))
    return jax.lax.with_sharding_constraint(x_BT, spec)


def look_up(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Looks up rows of a table, x_BTD. Works under `jax.set_mesh` and outside a mesh.

    If devices hold parts of D and of the batch, each device looks up its part of D for its
    neighbours' tokens too, and the devices exchange the resulting activations. XLA by itself would
    gather the whole table.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or table_VD.shape[1] % shards(mesh, SHARE_AXES):
        return table_VD[ids_BT]
    rows = None if ids_BT.shape[0] % row_shards() else "data"
    columns = None if ids_BT.shape[1] % column_shards() else COLUMN_AXIS
    constrain = jax.lax.with_sharding_constraint
    x_BTD = table_VD[constrain(ids_BT, PartitionSpec(rows, None))]
    x_BTD = constrain(x_BTD, PartitionSpec(rows, None, SHARE_AXES))
    # XLA exchanges along one axis of an array at a time: first columns, then rows.
    if column_shards() > 1:
        x_BTD = constrain(x_BTD, PartitionSpec(rows, columns, "fsdp"))
    if rows is None:
        x_BTD = constrain(x_BTD, PartitionSpec(None, columns, None))
    return constrain_tokens(x_BTD)


def row_shards() -> int:
    """The number of parts that rows are split into inside a jitted function; 1 outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_shards(mesh)


def column_shards() -> int:
    """The number of parts that columns are split into inside a jitted function; 1 outside a
    mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[COLUMN_AXIS]


def agreed(value: int) -> int:
    """Broadcasts the value of the first process. Every process must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def describe(mesh: Mesh | Mapping[str, int]) -> str:
    """Formats mesh sizes for messages: "data=4 x fsdp=2 x tensor=1". `sequence` appears only if it
    is not 1."""
    shape = mesh.shape if isinstance(mesh, Mesh) else mesh
    return " x ".join(
        f"{axis}={size}" for axis, size in shape.items() if axis != COLUMN_AXIS or size != 1
    )
