"""Plans as tables, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from prefix_jax.mesh import describe
from prefix_jax.plan.auto import Choice
from prefix_jax.plan.batch import Largest
from prefix_jax.plan.plan import Plan
from prefix_jax.plan.remedies import Remedy
from prefix_jax.terminal.console import text

GIB = 2**30
# A smaller batch is mentioned if it is faster by at least this factor.
_QUICKER = 1.02


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures of a plan: bytes, seconds and operations, per device unless noted otherwise."""
    content = dataclasses.asdict(plan)
    content |= {"fits": plan.fits, "over": plan.over, "tokens_per_second": plan.tokens_per_second}
    if plan.roofline is not None:
        content["roofline"] |= {"bound": plan.roofline.bound, "sent": plan.roofline.sent}
    return content


def largest_as_json(largest: Largest) -> dict[str, Any]:
    """The rows that fit, and the plans on either side of the limit."""
    return {
        "rows": largest.rows,
        "compiled": largest.compiled,
        "plan": as_json(largest.plan),
        "quickest": as_json(largest.quickest),
        "above": None if largest.above is None else as_json(largest.above),
    }


def table(plan: Plan) -> Table:
    """Formats a plan as a table."""
    grid = Table(
        title=text(_title(plan)), title_justify="left", box=box.SIMPLE_HEAD, show_header=False
    )
    grid.add_column("what", no_wrap=True)
    grid.add_column("time", justify="right", no_wrap=True)
    grid.add_column("figures")
    for line_of in _lines(plan):
        grid.add_row(*line_of)
    return grid


def line(plan: Plan) -> str:
    """Summarises a plan in one line."""
    shape = f"{plan.batch.rows} rows on {describe(plan.mesh)}"
    if plan.roofline is None:
        return f"{shape}: {lacking(plan)} over the limit"
    return f"{shape}: {gib(plan.needs)}, at least {_ms(plan.roofline.seconds)}"


def compared(choice: Choice) -> Table:
    """Formats the compiled meshes as a table."""
    compiled, possible = len(choice.compiled), choice.possible
    grid = Table(
        title=f"Compiled {compiled} of {possible} meshes",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("mesh", "memory", "step", "sent", "bound by"):
        grid.add_column(name, justify="left" if name in ("mesh", "bound by") else "right")
    for plan in choice.compiled:
        minimum = plan.roofline
        mark = " (chosen)" if plan is choice.best else ""
        grid.add_row(
            describe(plan.mesh) + mark,
            gib(plan.needs) if plan.fits else f"[red]{lacking(plan)} over the limit[/]",
            "" if minimum is None else _ms(minimum.seconds),
            "" if minimum is None else gib(minimum.sent),
            "" if minimum is None else minimum.bound,
        )
    return grid


def advice(tried: Sequence[Remedy]) -> str:
    """Lists the changes tried to make a step fit, and their results."""
    lines = ["Changes tried to make it fit:"]
    for remedy in tried:
        plan = remedy.plan
        if plan.roofline is None:
            came = f"still {lacking(plan)} over the limit"
        else:
            came = (
                f"fits, {gib(plan.needs)} per device, "
                f"at least {_ms(plan.roofline.seconds)} per step"
            )
        lines.append(f"  {remedy.settings}: {came}")
    if not any(remedy.plan.fits for remedy in tried):
        lines.append("No change is enough; use more chips or shorter rows (data.max_length).")
    return "\n".join(lines)


def largest_line(largest: Largest) -> str:
    """Summarises a batch search in a sentence or two."""
    plan = largest.plan
    where = f" on {describe(plan.mesh)}" if plan.devices > 1 else ""
    count = f"{plan.batch.rows} row{'s' if plan.batch.rows > 1 else ''}"
    if not largest.rows:
        return f"No batch fits{where}: {count} would be {lacking(plan)} over the limit."
    if largest.above is None:
        text = f"{count} fit{where} ({gib(plan.needs)} per device); more were not tried"
    else:
        text = (
            f"The largest batch that fits{where} has {count} ({gib(plan.needs)} per device); "
            f"{largest.above.batch.rows} would be {lacking(largest.above)} over the limit"
        )
    text += f". Compiled {largest.compiled} program{'s' if largest.compiled > 1 else ''}."
    rate, best = largest.plan.tokens_per_second, largest.quickest.tokens_per_second
    if rate and best and best > _QUICKER * rate:
        text += (
            f" At most {rate:,.0f} tokens per second with {count}, {best:,.0f} with "
            f"{largest.quickest.batch.rows}."
        )
    return text


def _title(plan: Plan) -> str:
    chips = f"{plan.chips} chip{'s' if plan.chips > 1 else ''}"
    if plan.devices != plan.chips:
        chips += f", {plan.devices} devices"
    job = plan.method if plan.job == "train" else f"decoding with {plan.method}"
    weights = "" if plan.quantize == "none" else f" in {plan.quantize}"
    return f"{plan.model}{weights}, {job}, on {plan.topology} ({chips}), {describe(plan.mesh)}"


def _lines(plan: Plan) -> list[tuple[str, str, str]]:
    lines = [("step", "", _shape(plan))]
    if plan.memory is None:
        text = (
            f"[red]does not fit[/]: needs {gib(plan.needs)} of {gib(plan.limit)} per device, "
            f"{lacking(plan)} over the limit"
        )
    else:
        memory = plan.memory
        text = (
            f"[green]fits[/]: {gib(memory.total)} of {gib(memory.limit)} per device "
            f"({100 * memory.total / memory.limit:.0f} %): weights {gib(memory.weights)}, other "
            f"arguments {gib(max(memory.arguments - memory.weights, 0))}, temporaries "
            f"{gib(memory.temporaries)}"
        )
    lines.append(("memory", "", text))
    minimum = plan.roofline
    if minimum is not None:
        flops = f"{_flop(minimum.flops)} per device"
        if plan.floor is not None:
            ratio = minimum.flops * plan.devices / plan.floor
            flops += f", {ratio:.2f} x the minimum with dense attention"
        lines += [
            ("compute", _ms(minimum.compute), flops),
            ("memory traffic", _ms(minimum.memory), f"{gib(minimum.bytes_accessed)} per device"),
            ("network", _ms(minimum.network), f"{gib(minimum.sent)} sent by each device"),
            *(
                (f"  {kind}", _ms(x.seconds), f"{x.count:,}, {gib(x.sent)} in total")
                for kind, x in minimum.exchanges.items()
            ),
            (
                "step, at least",
                _ms(minimum.seconds),
                f"bound by {minimum.bound}; at most {plan.tokens_per_second or 0:,.0f} tokens per "
                "second",
            ),
        ]
    lines.append(("compiled in", f"{plan.compile_seconds:.0f} s", ""))
    return lines


def _shape(plan: Plan) -> str:
    shape = plan.batch
    if plan.job == "decode":
        return f"one token for each of {shape.rows} rows, after up to {shape.tokens:,} others"
    text = f"{shape.rows} rows of {shape.tokens:,} tokens, {shape.targets:,} of them targets"
    if shape.source:
        text = f"{shape.rows} sources of {shape.source:,} tokens, {shape.tokens:,} targets for each"
    return text + (f", in {shape.micro} micro-batches" if shape.micro > 1 else "")


def lacking(plan: Plan) -> str:
    """Formats the memory over the limit. For some programs, the compiler reports only hundredths of
    a GiB."""
    return gib(plan.over) if plan.over else "less than 0.01 GiB"


def gib(count: float) -> str:
    """Formats bytes with a unit."""
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def _flop(count: float) -> str:
    return f"{count / 1e12:,.2f} TFLOP" if count >= 1e11 else f"{count / 1e9:,.3f} GFLOP"


def _ms(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.2f} s"
    # Decoding a token may take less than a millisecond.
    digits = 3 if 0 < seconds < 1e-3 else 1
    return f"{1e3 * seconds:,.{digits}f} ms"
