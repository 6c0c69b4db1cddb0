"""Runs of several processes: their arguments, how they find each other, and how one leaves."""

from __future__ import annotations

import argparse
import os
import socket
import sys

from prefix_jax.errors import ConfigError, reason

# A process that has not been heard of for so long is lost; the others then end with an error.
# Heartbeats come from a thread that neither compiling nor Python holds up.
_LOST_AFTER_SECONDS = 60
# For all to start: installing or waking takes some hosts longer than others.
_START_WITHIN_SECONDS = 300

ALONE = (
    "error: this process cannot go on. If another one has ended or was lost, its log tells why; "
    "the same command, given to all of them, goes on from the last checkpoint\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whether the run has several processes, and which of them this is."""
    group = parser.add_argument_group(
        "several processes",
        "One process a host, all started by the same command. Cloud TPU, Slurm, Open MPI\n"
        "and Kubernetes tell who they are; elsewhere say so, by options or by the\n"
        "environment.",
    )
    group.add_argument("--distributed", action="store_true", help="this is one process of several")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="a free port of the first process (or JAX_COORDINATOR_ADDRESS); implies --distributed",
    )
    group.add_argument(
        "--processes", metavar="N", type=int, help="how many there are (or JAX_NUM_PROCESSES)"
    )
    group.add_argument(
        "--process", metavar="I", type=int, help="which one this is, from 0 (or JAX_PROCESS_ID)"
    )


def join(args: argparse.Namespace) -> None:
    """Meets the other processes, if there are to be any. Before any other use of JAX.

    Raises:
        ConfigError: they do not tell who they are, or do not come.
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
                "--coordinator HOST:PORT (or JAX_COORDINATOR_ADDRESS): else each of the processes "
                "would train for itself"
            )
        return
    if count is not None and count < 1:
        raise ConfigError(f"--processes {count}: there has to be one at least")
    if count is not None and index is not None and not 0 <= index < count:
        raise ConfigError(f"--process {index} is not one of 0 to {count - 1}, see --processes")
    if coordinator is not None:
        _check(coordinator, listens=index == 0)

    import jax

    # Its handler would take SIGTERM from the loop, which saves and ends.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=_START_WITHIN_SECONDS,
            heartbeat_timeout_seconds=_LOST_AFTER_SECONDS,
            shutdown_timeout_seconds=_LOST_AFTER_SECONDS,
        )
    except ValueError as error:
        raise ConfigError(
            f"--distributed: {error} Give --coordinator HOST:PORT --processes N --process I: "
            "nothing here tells them"
        ) from error
    except RuntimeError as error:
        many = "" if count is None else f"{count} "
        where = "" if coordinator is None else f" at {coordinator}"
        raise ConfigError(
            f"the {many}processes have not met{where}: {reason(error)}. Start all of them within "
            f"{_START_WITHIN_SECONDS} s, and see that each reaches the first one's host and port"
        ) from error


def _check(coordinator: str, *, listens: bool) -> None:
    """Refuses an address at which processes would wait for each other for minutes, or crash."""
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(
            f"--coordinator {coordinator} is no address: give HOST:PORT, as in 10.0.0.1:1234"
        )
    if listens:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            # As the coordinator will, on every address of this host.
            socket.create_server(("", int(port)), family=family, dualstack_ipv6=both).close()
        except OSError as error:
            raise ConfigError(
                f"--coordinator {coordinator}: port {port} of this host cannot be used "
                f"({reason(error)}); choose a free one, the same for all processes"
            ) from None


def _number(given: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if given is not None or text is None:
        return given
    if not text.isdecimal():
        raise ConfigError(f"the environment's {variable} {text!r} is not a number")
    return int(text)


def leave(code: int, words: str = "") -> None:
    """Ends one of several processes at once after an error; returns where there is but one.

    At an ordinary exit JAX waits for the other processes, which may be waiting for this one.
    """
    # Without the module no process can have joined others.
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    print(words, end="", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def first() -> bool:
    """Whether this is the process that prints and writes."""
    import jax

    return jax.process_index() == 0
