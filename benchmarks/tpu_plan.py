"""Memory and time of prefix tuning on TPUs, from the TPU compiler, on any machine.

    python benchmarks/tpu_plan.py --part batches [--only NAME] [--goals]

Parts: `batches` (the largest global batch that fits), `flops` (of the step, relative to the
minimum), `collectives` (communication of each layout), `auto` (`mesh: auto` against every mesh),
`full` (against full fine-tuning), `long` (long rows), `depth` (compilation time). Rows have 2,048
tokens (except in `long`), all of them targets, and a prefix of 32 slots of keys and values. Each
part writes the table benchmarks/results/tpu_plan_PART.md row by row; existing rows are not compiled
again. `--part batches --goals` compiles only the steps of the goals, into tpu_plan_goals.md.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import common
import jax

from prefix_jax import config as configs
from prefix_jax.nn.remat import Remat
from prefix_jax.plan.abstract import AbstractRun, BatchShape
from prefix_jax.plan.auto import choose_mesh, meshes
from prefix_jax.plan.batch import largest_batch
from prefix_jax.plan.plan import Plan, compile_step
from prefix_jax.plan.report import as_json, line
from prefix_jax.plan.topology import Topology

TOKENS = 2048
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A step.

    Attributes:
        model: a preset.
        topology: the chips.
        mesh: data, fsdp and tensor.
        sequence: the fourth mesh axis.
        rows: rows per step; in a batch search, the goal.
        remat, quantize: as in the `model` section of a config.
        method: as in a config.
        tokens: tokens per row.
    """

    model: str
    topology: str
    mesh: tuple[int, int, int]
    rows: int
    remat: str = "full"
    quantize: str = "none"
    method: str = "prefix"
    tokens: int = TOKENS
    sequence: int = 1

    @property
    def name(self) -> str:
        """The first cell of the row; also for --only."""
        mesh = "x".join(map(str, self.mesh))
        if self.sequence > 1:
            mesh += f"+{self.sequence}"
        parts = (self.model, self.topology, mesh, self.quantize, self.remat, self.method)
        rows = str(self.rows) if self.tokens == TOKENS else f"{self.rows}x{self.tokens}"
        return "/".join((*parts, rows))

    def run(self) -> AbstractRun:
        method = {"name": "prefix", "length": 32} if self.method == "prefix" else "full"
        values = {
            "model": {"path": f"preset:{self.model}", "remat": self.remat},
            "data": {"target": "{text}", "batch_size": self.rows, "max_length": self.tokens},
            "method": method,
            "train": {"steps": 1},
            "output_dir": "plan",
        }
        return AbstractRun.of(configs.parse(values, [f"model.quantize={self.quantize}"]))

    def prepared(self) -> tuple[AbstractRun, BatchShape, Topology]:
        run = self.run()
        return run, run.batch_shape(), Topology.parse(self.topology)

    def plan(self) -> Plan:
        run, shape, topology = self.prepared()
        return compile_step(run, shape, topology, topology.mesh(self.sizes))

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the mesh axes."""
        data, fsdp, tensor = self.mesh
        return {"data": data, "fsdp": fsdp, "sequence": self.sequence, "tensor": tensor}


# The goals of the project, and the results of a prototype.
BATCHES = (
    Case("llama-3-8b", "v5e:2x4", (1, 8, 1), 48),
    Case("llama-3-8b", "v5e:2x2", (1, 4, 1), 16, quantize="int8"),
    Case("llama-3-8b", "v5e:1x1", (1, 1, 1), 4, quantize="int8"),
    Case("llama-3-8b", "v5e:1x1", (1, 1, 1), 8, quantize="int4"),
    Case("llama-3-70b", "v5p:2x2x1", (1, 4, 1), 16),
    Case("llama-3-70b", "v5e:4x4", (1, 16, 1), 16, quantize="int8"),
    # Steps that do not fit, to see by how much.
    Case("llama-3-8b", "v5e:1x1", (1, 1, 1), 1),
    Case("llama-3-70b", "v5e:4x4", (1, 16, 1), 16),
    Case("gemma-3-27b", "v6e:2x4", (1, 8, 1), 8),
    Case("qwen3-32b", "v6e:2x4", (1, 8, 1), 8),
    Case("mistral-7b", "v6e:1x1", (1, 1, 1), 1),
    Case("t5-xxl", "v5e:2x4", (1, 8, 1), 8),
    Case("llama-3-70b", "tpu7x:2x2x1", (1, 8, 1), 8),
)

FLOPS = (
    *(Case("llama-3-8b", "v5p:2x2x1", (4, 1, 1), 4, remat=remat) for remat in get_args(Remat)),
    Case("llama-3-8b", "v5e:2x4", (1, 8, 1), 24, remat="attention"),
    Case("llama-3-8b", "v5e:2x4", (1, 8, 1), 24, remat="projections"),
    Case("llama-3-8b", "v5e:2x4", (1, 8, 1), 24, remat="mlp"),
    Case("llama-3-8b", "v5e:2x4", (1, 8, 1), 48),
    # Slightly below the largest batches, at which XLA starts to rematerialise products by itself.
    Case("llama-3-8b", "v5e:2x2", (1, 4, 1), 64, quantize="int8"),
    Case("llama-3-8b", "v5e:1x1", (1, 1, 1), 9, quantize="int8"),
    Case("llama-3-8b", "v5e:1x1", (1, 1, 1), 12, quantize="int4"),
)

COLLECTIVES = (
    Case("llama-3.2-3b", "v5e:2x4", (8, 1, 1), 8),
    Case("llama-3.2-3b", "v5e:2x4", (1, 8, 1), 8),
    Case("llama-3.2-3b", "v5e:2x4", (1, 1, 8), 8),
    Case("llama-3.2-3b", "v5e:2x4", (2, 4, 1), 8),
    Case("llama-3.2-3b", "v5e:2x4", (2, 1, 4), 8),
)

AUTO = (
    Case("smollm2-135m", "v5e:2x2", (-1, 1, 1), 16),
    Case("gpt2-xl", "v5e:2x2", (-1, 1, 1), 16, tokens=768),
    Case("llama-3.2-1b", "v5e:2x4", (-1, 1, 1), 16),
    Case("llama-3.2-3b", "v5e:2x4", (-1, 1, 1), 16),
    Case("llama-3-8b", "v5e:2x4", (-1, 1, 1), 16),
    Case("llama-3-8b", "v5p:2x2x1", (-1, 1, 1), 16),
)

FULL = tuple(
    Case("llama-3.2-1b", "v5p:2x2x1", (1, 4, 1), 8, method=method, remat=remat)
    for method in ("prefix", "full")
    for remat in ("none", "full")
)

# One row per device, and fewer rows than devices, which then share layers or columns.
LONG = (
    Case("llama-3.1-8b", "v5e:2x4", (1, 8, 1), 8, tokens=8192),
    Case("llama-3.1-8b", "v5e:2x4", (1, 8, 1), 8, tokens=32768),
    Case("llama-3.1-8b", "v5e:2x4", (1, 2, 4), 2, tokens=32768),
    Case("llama-3.1-8b", "v5e:2x4", (1, 2, 1), 2, tokens=32768, sequence=4),
    Case("llama-3.1-8b", "v5e:2x4", (1, 1, 8), 1, tokens=32768),
    Case("llama-3.1-8b", "v5e:2x4", (1, 1, 1), 1, tokens=32768, sequence=8),
    Case("llama-3.1-8b", "v5e:2x4", (1, 1, 8), 1, tokens=131072 - 32),
    Case("llama-3.1-8b", "v5e:2x4", (1, 1, 1), 1, tokens=131072 - 32, sequence=8),
)

DEPTH = Case("llama-3-8b", "v5e:2x4", (1, 8, 1), 16)


def batches(case: Case, goals: bool) -> Row:
    """Finds the largest batch, or checks whether the goal fits."""
    run, shape, topology = case.prepared()
    if goals:
        plan = case.plan()
        return {"plan": as_json(plan)}
    mesh = topology.mesh(case.sizes)
    largest = largest_batch(run, shape, topology, mesh, lambda plan: print("   ", line(plan)))
    above = largest.above
    return {
        "plan": as_json(largest.plan),
        "compiled": largest.compiled,
        "does not fit": above and f"{above.batch.rows} rows, by {above.over / 2**30:.2f} GiB",
    }


def single(case: Case, _: bool) -> Row:
    """Compiles the step."""
    return {"plan": as_json(case.plan())}


def auto(case: Case, _: bool) -> Row:
    """Compares the mesh that auto chooses with every mesh."""
    run, shape, topology = case.prepared()
    choice = choose_mesh(run, shape, topology, lambda plan: print("   ", line(plan)))
    plans = list(choice.compiled)
    for mesh in meshes(run, shape, topology):
        if all(plan.mesh != mesh for plan in plans):
            plans.append(compile_step(run, shape, topology, topology.mesh(mesh)))
            print("   ", line(plans[-1]))
    times = [plan.roofline.seconds for plan in plans if plan.roofline is not None]
    chosen = choice.best.roofline
    return {
        "plan": as_json(choice.best),
        "chosen": ", ".join(
            f"{axis} {size}" for axis, size in choice.best.mesh.items() if size > 1
        ),
        "chosen / best": chosen and f"{chosen.seconds / min(times):.3f}",
        "compiled": len(choice.compiled),
        "meshes": len(plans),
    }


def depth(layers: int) -> Row:
    """Measures the compilation time with the given number of layers."""
    run, shape, topology = DEPTH.prepared()
    backbone = run.model.backbone
    arch = dataclasses.replace(backbone.arch, layers=layers)
    model = dataclasses.replace(run.model, backbone=dataclasses.replace(backbone, arch=arch))
    run = dataclasses.replace(run, model=model)
    plan = compile_step(run, shape, topology, topology.mesh(DEPTH.sizes))
    return {"plan": as_json(plan)}


CASES: dict[str, tuple[tuple[Case, ...], Callable[[Case, bool], Row]]] = {
    "batches": (BATCHES, batches),
    "flops": (FLOPS, single),
    "collectives": (COLLECTIVES, single),
    "auto": (AUTO, auto),
    "full": (FULL, single),
    "long": (LONG, single),
}


def work(part: str, goals: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Computations of the rows of a part, by name."""
    if part == "depth":
        for layers in (8, 16, 32):
            yield f"{layers} layers", lambda layers=layers: depth(layers)
        return
    cases, measure = CASES[part]
    for case in cases:
        yield case.name, lambda case=case: measure(case, goals)


def cells(plan: dict[str, Any]) -> Row:
    """The columns that describe a plan; those of a step that does not fit are empty."""
    memory, roofline, floor = plan["memory"], plan["roofline"], plan["floor"]
    row: Row = {
        "rows": plan["batch"]["rows"],
        "GiB": f"{plan['needs'] / 2**30:.2f} of {plan['limit'] / 2**30:.2f}",
        "fits": "yes" if plan["fits"] else "no",
        "arguments, GiB": memory and f"{memory['arguments'] / 2**30:.2f}",
        "temporaries, GiB": memory and f"{memory['temporaries'] / 2**30:.2f}",
    }
    columns = ("TFLOP", "FLOPs / minimum", "GiB sent", "of which", "step, ms", "bound")
    if roofline is None:
        return row | dict.fromkeys((*columns, "compilation, s"), "")
    exchanges = (f"{k} {x['sent'] / 2**30:.2f}" for k, x in roofline["exchanges"].items())
    values = (
        f"{roofline['flops'] / 1e12:.1f}",
        floor and f"{roofline['flops'] * plan['devices'] / floor:.3f}",
        f"{roofline['sent'] / 2**30:.2f}",
        ", ".join(exchanges),
        f"{1e3 * roofline['seconds']:.0f}",
        roofline["bound"],
    )
    seconds = f"{plan['compile_seconds']:.0f}"
    return row | dict(zip(columns, values, strict=True)) | {"compilation, s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=(*CASES, "depth"), required=True)
    parser.add_argument("--only", metavar="TEXT", help="only rows whose name contains this text")
    parser.add_argument(
        "--goals", action="store_true", help="for batches: only check whether the goals fit"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")

    part = "goals" if args.goals else args.part
    output = args.output or common.RESULTS / f"tpu_plan_{part}.md"
    title = f"TPU plans, per chip: {part}"
    rows = common.read_rows(output, title)
    for name, measure in work(args.part, args.goals):
        if name in rows or (args.only is not None and args.only not in name):
            continue
        print(name, flush=True)
        result = measure()
        row = {"step": name} | cells(result.pop("plan")) | result
        rows[name] = ["" if cell is None else str(cell) for cell in row.values()]
        common.write_table(output, title, list(row), list(rows.values()))


if __name__ == "__main__":
    main()
