"""Show devices, versions, caches and memory, and say what is wrong with them.

Exits with 1 if a device cannot compute or an installed package is outside its tested range.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from prefix_jax.errors import reason

if TYPE_CHECKING:
    from rich.table import Table

# Device nodes that drivers make, the JAX backend that uses them, and the extra that installs it.
_ACCELERATORS = {
    "/dev/nvidiactl": ("gpu", "cuda"),
    "/dev/accel0": ("tpu", "tpu"),
    "/dev/vfio/0": ("tpu", "tpu"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Doctor takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Prints problems and three tables; returns 0 if there is no problem."""
    from prefix_jax.terminal.console import make_console, text

    console = make_console()
    problems: list[str] = []
    tables = []
    for make in (_packages, _devices, _places):
        try:
            tables.append(make(problems))
        except ImportError as error:
            problems.append(f"an installed package cannot be imported: {reason(error)}")
    # The tables may be longer than a screen.
    for problem in problems:
        console.print(text("problem:", "bold red"), text(problem), soft_wrap=True)
    if not problems:
        console.print("[bold green]all is well[/]")
    for table in tables:
        console.print(table)
    return 1 if problems else 0


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def _packages(problems: list[str]) -> Table:
    from packaging.requirements import Requirement

    table = _table("Packages", "package", "installed", "tested range")
    table.add_row("python", platform.python_version(), ">=3.11")
    try:
        ourselves = importlib.metadata.distribution("prefix-jax")
    except importlib.metadata.PackageNotFoundError:
        problems.append("prefix-jax runs from its source alone: pip install --editable .")
        return table
    table.add_row("prefix-jax", ourselves.version, "")
    for line in ourselves.requires or ():
        required = Requirement(line)
        if required.marker and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(required.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{required.name} is not installed: pip install '{required}'")
            table.add_row(required.name, "[red]missing[/]", str(required.specifier))
            continue
        tested = ",".join(sorted(map(str, required.specifier), reverse=True))
        fits = required.specifier.contains(version, prereleases=True)
        if not fits:
            problems.append(f"{required.name} {version} is untested: pip install '{required}'")
        table.add_row(required.name, version if fits else f"[red]{version}[/]", tested)
    return table


def _devices(problems: list[str]) -> Table:
    import jax
    import jax.numpy as jnp

    from prefix_jax.terminal.console import text

    table = _table("Devices", "id", "platform", "kind", "memory used", "works")
    try:
        devices = jax.devices()
    except RuntimeError as error:
        problems.append(f"JAX finds no device: {error}")
        devices = []
    for device in devices:
        stats = device.memory_stats() or {}
        memory = "shared with the host"
        if "bytes_limit" in stats:
            memory = f"{_size(stats['bytes_in_use'])} of {_size(stats['bytes_limit'])}"
        works = "[green]yes[/]"
        try:
            x = jax.device_put(jnp.ones((128, 128)), device)
            if float((x @ x).sum()) != 128**3:
                raise ArithmeticError("a product of matrices is wrong")
        except (RuntimeError, ArithmeticError) as error:
            works = "[red]no[/]"
            problems.append(f"device {device.id} cannot compute: {error}")
        table.add_row(str(device.id), device.platform, text(device.device_kind), memory, works)
    for node, (backend, extra) in _ACCELERATORS.items():
        if Path(node).exists() and all(device.platform != backend for device in devices):
            problems.append(
                f"{node} is there, but JAX does not use it: pip install 'prefix-jax[{extra}]'"
            )
    return table


def _places(problems: list[str]) -> Table:
    import huggingface_hub.constants
    import jax
    import psutil

    from prefix_jax.terminal.console import text

    table = _table("Memory and places", "what", "where", "free")
    memory = psutil.virtual_memory()
    table.add_row("host memory", _size(memory.total), _size(memory.available))
    folders = {
        "working folder": str(Path.cwd()),
        "model cache": huggingface_hub.constants.HF_HUB_CACHE,
        "compile cache": jax.config.values["jax_compilation_cache_dir"],
    }
    for what, folder in folders.items():
        if folder is None:
            table.add_row(what, "off: set JAX_COMPILATION_CACHE_DIR", "")
        else:
            try:
                free = _size(_disk_free(Path(folder)))
            except OSError as error:
                problems.append(f"the {what} {folder} cannot be used: {error.strerror}")
                free = "[red]unknown[/]"
            table.add_row(what, text(folder), free)
    return table


def _disk_free(folder: Path) -> int:
    """Free bytes where the folder is, or where it would be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
