"""Multi-process runs: command-line arguments, initialization and exit."""

from __future__ import annotations

import argparse
import os
import socket
import sys

from prefix_jax.errors import ConfigError, reason

# After this long without a heartbeat a process counts as lost, and the others exit with an error.
# Heartbeats are sent from a thread that neither compilation nor the interpreter lock blocks.
_HEARTBEAT_TIMEOUT_SECONDS = 60
# Generous, because hosts of one job may start minutes apart.
_START_TIMEOUT_SECONDS = 300

CANNOT_CONTINUE = (
    "error: this process cannot continue. If another process failed, its log has the cause; start "
    "all processes again with the same command to resume from the last checkpoint\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that describe a multi-process run and this process's place in it."""
    group = parser.add_argument_group(
        "multi-process runs",
        "Start the same command once per host. On Cloud TPU, Slurm, Open MPI and\n"
        "Kubernetes, --distributed is enough; elsewhere also give the other options or\n"
        "their environment variables.",
    )
    group.add_argument("--distributed", action="store_true", help="run as one of several processes")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="host and free port of process 0 (or JAX_COORDINATOR_ADDRESS); implies --distributed",
    )
    group.add_argument(
        "--processes", metavar="N", type=int, help="number of processes (or JAX_NUM_PROCESSES)"
    )
    group.add_argument(
        "--process", metavar="I", type=int, help="index of this process, from 0 (or JAX_PROCESS_ID)"
    )


def initialize(args: argparse.Namespace) -> None:
    """Connects to the other processes of a multi-process run. Call it before JAX is used.

    Raises:
        ConfigError: the options are missing or contradict each other, or the other processes did
            not start in time.
    """
    if "distributed" not in args:
        return
    coordinator = args.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _number(args.processes, "JAX_NUM_PROCESSES")
    index = _number(args.process, "JAX_PROCESS_ID")
    if not (args.distributed or coordinator):
        if count is not None or index is not None:
            raise ConfigError(
                "--processes and --process (or JAX_NUM_PROCESSES and JAX_PROCESS_ID) need "
                "--coordinator HOST:PORT (or JAX_COORDINATOR_ADDRESS); without it every process "
                "would train independently"
            )
        return
    if count is not None and count < 1:
        raise ConfigError(f"--processes must be at least 1, got {count}")
    if count is not None and index is not None and not 0 <= index < count:
        raise ConfigError(
            f"--process must be between 0 and {count - 1} (--processes {count}), got {index}"
        )
    if coordinator is not None:
        _check(coordinator, listens=index == 0)

    import jax

    # JAX's handler would replace the training loop's, which saves on SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=_START_TIMEOUT_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
        )
    except ValueError as error:
        raise ConfigError(
            f"--distributed: the environment does not describe the processes ({error}); give "
            "--coordinator HOST:PORT --processes N --process I"
        ) from error
    except RuntimeError as error:
        size = "" if count is None else f"{count} "
        where = "" if coordinator is None else f" at {coordinator}"
        raise ConfigError(
            f"the {size}processes could not connect{where}: {reason(error)}; start all of them "
            f"within {_START_TIMEOUT_SECONDS} s and check that each can reach the host and port "
            "of process 0"
        ) from error


def _check(coordinator: str, *, listens: bool) -> None:
    """Rejects an address at which JAX would time out after minutes, or crash."""
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(
            f"--coordinator must be HOST:PORT, such as 10.0.0.1:1234, got {coordinator}"
        )
    if listens:
        dualstack = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dualstack else socket.AF_INET
        try:
            # Like the coordinator, which listens on every address of this host.
            socket.create_server(("", int(port)), family=family, dualstack_ipv6=dualstack).close()
        except OSError as error:
            raise ConfigError(
                f"--coordinator {coordinator}: cannot listen on port {port} of this host "
                f"({reason(error)}); choose a free port, the same for all processes"
            ) from None


def _number(given: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if given is not None or text is None:
        return given
    if not text.isdecimal():
        raise ConfigError(f"environment variable {variable} must be a number, got {text!r}")
    return int(text)


def exit_now(code: int, message: str = "") -> None:
    """Exits at once if this is one of several processes; otherwise does nothing.

    On a normal exit JAX waits for the other processes, which may be waiting for this one.
    """
    # If JAX was not imported, the processes are not connected.
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    print(message, end="", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first() -> bool:
    """Returns true in the process that prints and writes."""
    import jax

    return jax.process_index() == 0
