"""A plan as a table, and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.table import Table

from prefix_jax.plan.plan import Plan

GIB = 2**30


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures of a plan: bytes, seconds and operations, of one device if nothing else is
    said."""
    found = dataclasses.asdict(plan)
    found |= {"fits": plan.fits, "over": plan.over, "tokens_per_second": plan.tokens_per_second}
    if plan.roofline is not None:
        found["roofline"] |= {"bound": plan.roofline.bound, "sent": plan.roofline.sent}
    return found


def table(plan: Plan) -> Table:
    """What a person wants to know."""
    made = Table(title=_title(plan), title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    made.add_column("what", no_wrap=True)
    made.add_column("figures")
    for what, figures in _lines(plan):
        made.add_row(what, figures)
    return made


def _title(plan: Plan) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    chips = f"{plan.chips} chip{'s' if plan.chips > 1 else ''}"
    if plan.devices != plan.chips:
        chips += f", {plan.devices} devices"
    return f"{plan.model}, {plan.method}, on {plan.topology} ({chips}), mesh {mesh}"


def _lines(plan: Plan) -> list[tuple[str, str]]:
    rows = plan.rows
    shape = f"{rows.rows} rows of {rows.tokens:,} tokens, {rows.targets:,} of them targets"
    if rows.source:
        shape = f"{rows.rows} sources of {rows.source:,} tokens, {rows.tokens:,} tokens written"
    if rows.micro > 1:
        shape += f", in {rows.micro} micro-batches"
    lines = [("step", shape)]
    percent = 100 * plan.needs / plan.limit
    if plan.memory is None:
        lines += [
            (
                "memory",
                f"[red]does not fit[/]: {gib(plan.needs)} of {gib(plan.limit)} a device, "
                f"{gib(plan.over)} too much",
            )
        ]
    else:
        memory = plan.memory
        lines += [
            (
                "memory",
                f"[green]fits[/]: {gib(memory.total)} of {gib(memory.limit)} a device "
                f"({percent:.0f} %): weights {gib(memory.weights)}, other arguments "
                f"{gib(memory.arguments - memory.weights)}, temporaries {gib(memory.temporaries)}",
            )
        ]
    found = plan.roofline
    if found is not None:
        flops = f"{found.flops / 1e12:,.2f} TFLOP a device"
        if plan.floor is not None:
            ratio = found.flops * plan.devices / plan.floor
            flops += f", {ratio:.2f} times the least that it takes"
        lines += [
            ("compute", f"{_ms(found.compute)}: {flops}"),
            ("memory traffic", f"{_ms(found.memory)}: {gib(found.moved)} a device"),
            ("network", f"{_ms(found.network)}: {gib(found.sent)} sent by each device"),
        ]
        for kind, exchange in found.exchanges.items():
            lines.append(
                (
                    f"  {kind}",
                    f"{_ms(exchange.seconds)}: {exchange.count:,} of {gib(exchange.sent)} together",
                )
            )
        rate = plan.tokens_per_second or 0
        lines.append(
            (
                "step time",
                f"at least {_ms(found.seconds)}, bound by {found.bound}: "
                f"at most {rate:,.0f} tokens a second",
            )
        )
    lines.append(("compiled in", f"{plan.compile_seconds:.0f} s"))
    return lines


def gib(count: float) -> str:
    """Bytes in words."""
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{1e3 * seconds:,.1f} ms"
