"""Memory and time of a decoding step of the engine on TPUs, from the TPU compiler.

    python benchmarks/engine_plan.py

Llama-3-8B in bfloat16 on v5e:2x4, matrices and KV heads split over the eight chips. 64 rows
generate one token each after 1,024 tokens of text: without prefixes, with mixed prefixes of up to
64 slots in the rows, with one and with four cartridges of 2,048 slots that rows share, and with
terms outside the softmax. No chip is needed, and nothing is measured on one.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import common
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prefix_jax import config as configs
from prefix_jax.backbones.backbone import Backbone
from prefix_jax.engine.cache import Layout, RowCache, RowLayer, RowSite
from prefix_jax.engine.programs import hidden
from prefix_jax.engine.sampling import Settings, choose
from prefix_jax.mesh import BATCH_AXES, HEAD_AXIS, weight_shardings
from prefix_jax.plan.abstract import AbstractRun, everywhere, placed
from prefix_jax.plan.decode import unstacked
from prefix_jax.plan.hlo import parse
from prefix_jax.plan.roofline import roofline
from prefix_jax.plan.topology import Topology
from prefix_jax.prefix import Gated, Memory, OutsideRows, SharedSlots

MODEL, TOPOLOGY = "llama-3-8b", "v5e:2x4"
ROWS, TEXT, SLOTS, CARTRIDGE, GATED = 64, 1024, 64, 2048, 16


@dataclasses.dataclass(frozen=True)
class Case:
    """A step.

    Attributes:
        title: the first cell of its row.
        columns: of each row of the cache.
        shared: the number of shared cartridges.
        gated: gated slots per row.
        memory: whether rows have matrices outside the softmax.
    """

    title: str
    columns: int = TEXT
    shared: int = 0
    gated: int = 0
    memory: bool = False


CASES = (
    Case("no prefix"),
    Case(f"prefixes of up to {SLOTS} slots, mixed", TEXT + SLOTS),
    Case(f"one shared cartridge of {CARTRIDGE:,}", shared=1),
    Case(f"four shared cartridges of {CARTRIDGE:,}", shared=4),
    Case(f"the cartridge copied into rows ({CARTRIDGE:,})", TEXT + CARTRIDGE),
    Case(f"adapters of {GATED} slots (gates)", gated=GATED),
    Case("prefix tuning+ (matrices)", memory=True),
)


def abstract_cache(case: Case, backbone: Backbone, mesh: Mesh) -> RowCache:
    """The shapes and shardings of the cache."""
    geometry, shape = backbone.geometry, backbone.geometry.main
    cache = jax.eval_shape(lambda: RowCache.empty(geometry, ROWS, case.columns, jnp.bfloat16))
    N, K, H = shape.query_heads, shape.kv_heads, shape.head_dim

    def of(*size: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((ROWS, *size), dtype)

    def with_outside(site: RowSite) -> RowSite:
        gated = memory = None
        if case.gated:
            slots = of(case.gated, K, H)
            gated: Any = Gated(slots, slots, of(N, dtype=jnp.float32))
        if case.memory:
            memory = Memory(of(N, H, H))
        if gated is None and memory is None:
            return site
        return RowSite(site.columns, OutsideRows(gated, of(dtype=jnp.int32), memory))

    layers = tuple(RowLayer(with_outside(layer.own)) for layer in cache.layers)

    def place(leaf: Any, heads: bool) -> Any:
        axes = [BATCH_AXES, *([HEAD_AXIS] if heads else [])]
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return RowCache(
        tuple(
            RowLayer(
                RowSite(
                    jax.tree.map(lambda leaf: place(leaf, True), layer.own.columns),
                    jax.tree.map(lambda leaf: place(leaf, False), layer.own.outside),
                )
            )
            for layer in layers
        )
    )


def compile_step(case: Case) -> list[str]:
    """Compiles a step; returns the cells of its row."""
    topology = Topology.parse(TOPOLOGY)
    mesh = topology.mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 8})
    values = {
        "model": {"path": f"preset:{MODEL}"},
        "data": {"target": "{text}", "batch_size": ROWS},
        "method": {"name": "prefix", "length": 32},
        "train": {"steps": 1},
        "output_dir": "plan",
    }
    run = AbstractRun.of(configs.parse(values, []))
    backbone = run.model.backbone
    weights = unstacked(run.params(mesh)["backbone"])
    weights = placed(weights, weight_shardings(weights, mesh))
    cache = abstract_cache(case, backbone, mesh)
    shape = backbone.geometry.main
    heads = NamedSharding(mesh, PartitionSpec(HEAD_AXIS))

    def shared(*size: int) -> Any:
        return jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=heads)

    kv = shared(shape.kv_heads, CARTRIDGE, shape.head_dim)
    slots = SharedSlots(kv, kv, shared(shape.query_heads, CARTRIDGE))
    prefixes = ((slots,) * shape.layers,) * case.shared
    settings, layout = Settings.empty(ROWS, 8), Layout.empty(ROWS)
    ids_BS = jax.ShapeDtypeStruct((ROWS, TEXT), jnp.int32)

    def step(weights: Any, cache: RowCache, prefixes: Any, layout: Any, settings: Any, ids: Any):
        text_B = layout.length_B - layout.slots_B
        last_B1 = jnp.take_along_axis(ids, text_B[:, None], axis=1)
        real_B1 = jnp.ones((ROWS, 1), bool)
        h_B1D, cache = hidden(backbone, weights, cache, prefixes, None, layout, last_B1, real_B1)
        logits_BV = backbone.unembed(weights, h_B1D)[:, 0]
        arch = backbone.arch
        chosen = choose(logits_BV, ids, text_B + 1, settings, None, arch.first_id, arch.last_id)
        return cache.constrained(), chosen

    with jax.set_mesh(mesh):
        small = everywhere((jax.eval_shape(lambda: layout), settings_of(settings), ids_BS), mesh)
        lowered = jax.jit(step, donate_argnums=1).lower(weights, cache, prefixes, *small)
    compiled = lowered.compile()
    stats, text = compiled.memory_analysis(), compiled.as_text()
    assert stats is not None
    assert text is not None
    least = roofline(parse(text), topology, list(mesh.devices.flat), causal=True)
    held = sum(_bytes(leaf) for leaf in jax.tree.leaves((cache, prefixes)))
    return [
        case.title,
        f"{held / 2**30:.2f}",
        f"{(stats.peak_memory_in_bytes - stats.argument_size_in_bytes) / 2**20:.0f}",
        f"{least.bytes_accessed / 2**30:.2f}",
        f"{1e3 * least.seconds:.2f}",
        least.bound,
    ]


def settings_of(settings: Settings) -> Any:
    """The shapes of the settings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), settings)


def _bytes(leaf: Any) -> int:
    size: int = leaf.dtype.itemsize
    for axis in leaf.sharding.shard_shape(leaf.shape):
        size *= axis
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    common.output_argument(parser, "engine_plan")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for case in CASES:
        rows.append(compile_step(case))
        print(*rows[-1], sep=" | ", flush=True)
    common.write_table(
        args.output,
        f"A decoding step per chip: {MODEL}, {TOPOLOGY}, {ROWS} rows after {TEXT:,} tokens",
        ["step", "cache, GiB", "temporaries, MiB", "traffic, GiB", "step, ms", "bound"],
        rows,
    )


if __name__ == "__main__":
    main()
