"""Check the installation: package versions, devices, memory and folders.

Exits with 1 if a device cannot compute, a folder cannot be used, or an installed
package is outside its tested range.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
from pathlib import Path

from prefix_jax.errors import reason

# Device nodes of drivers, with the JAX backend that uses them and the extra that installs it.
_ACCELERATORS = {
    "/dev/nvidiactl": ("gpu", "cuda"),
    "/dev/accel0": ("tpu", "tpu"),
    "/dev/vfio/0": ("tpu", "tpu"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the command has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Prints the problems, then JAX's environment and ours. Returns 0 without problems, else 1."""
    from prefix_jax.terminal.console import make_console, text

    console = make_console(soft_wrap=True)
    problems: list[str] = []
    environment: list[str] = []
    for check in (_devices, _packages, _resources):
        try:
            environment += check(problems)
        except ImportError as error:
            problems.append(f"an installed package cannot be imported: {reason(error)}")
    for problem in problems:
        console.print(text("problem:", "bold red"), text(problem))
    if not problems:
        console.print("[bold green]no problems found[/]")
    console.print()
    for line in environment:
        console.print(text(line))
    return 1 if problems else 0


def _packages(problems: list[str]) -> list[str]:
    """Compares the installed packages with the tested ranges; returns their versions."""
    from packaging.requirements import Requirement

    try:
        package = importlib.metadata.distribution("prefix-jax")
    except importlib.metadata.PackageNotFoundError:
        problems.append("prefix-jax is not installed; run pip install --editable .")
        return []
    versions = [f"prefix-jax {package.version}"]
    for line in package.requires or ():
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed; run pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(
                f"{requirement.name} {version} is outside the tested range; run pip install "
                f"'{requirement}'"
            )
        versions.append(f"{requirement.name} {version}")
    return [f"packages: {', '.join(versions)}"]


def _devices(problems: list[str]) -> list[str]:
    """Multiplies matrices on every device; returns JAX's environment and the devices' memory."""
    import jax
    import jax.numpy as jnp

    try:
        devices = jax.devices()
    except RuntimeError as error:
        problems.append(f"JAX found no device: {error}")
        return []
    environment = jax.print_environment_info(return_string=True) or ""
    lines = [line for line in environment.splitlines() if line.strip()]
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            used, limit = _gib(stats["bytes_in_use"]), _gib(stats["bytes_limit"])
            lines.append(f"memory of device {device.id}: {used} used of {limit}")
        try:
            x = jax.device_put(jnp.ones((128, 128)), device)
            if (total := float((x @ x).sum())) != 128**3:
                raise ArithmeticError(f"a matrix product sums to {total}, expected {128**3}")
        except (RuntimeError, ArithmeticError) as error:
            problems.append(f"device {device.id} cannot compute: {error}")
    for node, (backend, extra) in _ACCELERATORS.items():
        if Path(node).exists() and all(device.platform != backend for device in devices):
            problems.append(
                f"JAX does not use the accelerator at {node}; run pip install 'prefix-jax[{extra}]'"
            )
    return lines


def _resources(problems: list[str]) -> list[str]:
    """Checks the folders that runs use; returns free memory and disk space."""
    import huggingface_hub.constants
    import jax
    import psutil

    memory = psutil.virtual_memory()
    lines = [f"host memory: {_gib(memory.available)} free of {_gib(memory.total)}"]
    folders = {
        "working directory": str(Path.cwd()),
        "model cache": huggingface_hub.constants.HF_HUB_CACHE,
        "compilation cache": jax.config.values["jax_compilation_cache_dir"],
    }
    for name, folder in folders.items():
        if folder is None:
            lines.append(f"{name}: off (set JAX_COMPILATION_CACHE_DIR)")
            continue
        try:
            lines.append(f"{name}: {folder}, {_gib(_disk_free(Path(folder)))} free")
        except OSError as error:
            problems.append(f"the {name} {folder} cannot be used: {error.strerror}")
    return lines


def _disk_free(folder: Path) -> int:
    """Returns the free bytes on the disk of a folder, which may not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
