"""Runs many cases of every attack in watched processes and reports their outcomes.

    python tests/fuzz.py                              # every target, 300 cases each
    python tests/fuzz.py gguf jsonl --cases 5000      # two targets
    python tests/fuzz.py gguf --seed 3 --only 17      # one case again, with its traceback

A case must succeed or raise a `PrefixJaxError`. Failures are another exception, more than
`--seconds` of time or `--gigabytes` of memory, or the death of the process. The exit code is 1 if
there was a failure.
"""

from __future__ import annotations

import argparse
import collections
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"
}  # fmt: skip
_OUTCOMES = ("accepted", "rejected", "traceback", "hang", "memory", "death")


def main() -> int:
    """Attacks the given targets and prints a table of outcomes."""
    args = _arguments()
    os.environ.update(_ENVIRONMENT)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if args.only is not None:
        return _repeat(args.targets[0], args.seed, args.only)
    if args.worker:
        return _work(args.targets[0], args.seed, args.first, args.cases, int(args.gigabytes * 2e9))
    from attacks import TARGETS

    table, failures = Table("target", *_OUTCOMES, "slowest", box=None), 0
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        console = progress.console
        names = args.targets or list(TARGETS)
        bars = {name: progress.add_task(name, total=args.cases, start=False) for name in names}

        def attack(name: str) -> _Report:
            progress.start_task(bars[name])
            report = _attack(name, args, lambda done: progress.update(bars[name], completed=done))
            for line in report.failures:
                console.print(line, markup=False, highlight=False)
            if not console.is_terminal:
                console.print(f"{name}: {dict(report.counts)}", highlight=False)
            return report

        with ThreadPoolExecutor(args.jobs) as pool:
            for name, report in zip(names, pool.map(attack, names), strict=True):
                counts = (str(report.counts[outcome] or "") for outcome in _OUTCOMES)
                table.add_row(name, *counts, f"{report.slowest:.1f} s")
                failures += len(report.failures)
    console.print(table)
    return 1 if failures else 0


@dataclass
class _Report:
    """What happened to one target: counts by outcome, one line per failure, the longest time."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets at a time")
    parser.add_argument("--only", type=int)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _repeat(name: str, seed: int, case: int) -> int:
    """Runs one case in this process, without catching its exception."""
    from attacks import TARGETS, case_rng

    with tempfile.TemporaryDirectory() as folder:
        TARGETS[name](Path(folder))(case_rng(name, seed, case))
    return 0


def _work(name: str, seed: int, first: int, end: int, limit: int) -> int:
    """Runs cases `first` to `end`; prints a line at the start and the end of each."""
    from attacks import TARGETS, case_rng

    from prefix_jax.errors import PrefixJaxError

    # Use a separate descriptor, so that output of libraries does not mix with the protocol.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    # Higher than the limit that the parent watches; stops single huge allocations.
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        attempt = TARGETS[name](Path(folder))
        for case in range(first, end):
            print("start", case, file=out)
            try:
                attempt(case_rng(name, seed, case))
            except PrefixJaxError:
                print("rejected", case, file=out)
            except MemoryError:
                print("memory", case, file=out)
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)
                ours = next((f for f in reversed(where) if "/prefix_jax/" in f.filename), where[-1])
                place = f"{Path(ours.filename).name}:{ours.lineno}"
                text = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                print(f"traceback {case} {place} {text!r}", file=out)
            else:
                print("accepted", case, file=out)
    return 0


def _attack(name: str, args: argparse.Namespace, advance: Callable[[int], None]) -> _Report:
    """Runs all cases of a target; calls `advance` with the number of cases done."""
    report, first = _Report(), 0
    while first < args.cases:
        command = [sys.executable, __file__, name, "--worker"]
        command += ["--seed", str(args.seed), "--first", str(first), "--cases", str(args.cases)]
        command += ["--gigabytes", str(args.gigabytes)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            first = _watch(process, name, args, first, report, advance)
    return report


def _watch(
    process: subprocess.Popen[str],
    name: str,
    args: argparse.Namespace,
    first: int,
    report: _Report,
    advance: Callable[[int], None],
) -> int:
    """Watches a process until it ends or is killed; returns the next case."""
    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    case, started = first - 1, time.monotonic()
    running = False

    def fail(kind: str, text: str = "") -> None:
        report.counts[kind] += 1
        report.failures.append(f"{kind}: {name} --seed {args.seed} --only {case} {text}".rstrip())

    while True:
        if selector.select(0.2):
            line = process.stdout.readline()
            if not line:
                break
            kind, number, *rest = line.split(maxsplit=2)
            if kind == "start":
                case, started, running = int(number), time.monotonic(), True
                continue
            report.slowest = max(report.slowest, time.monotonic() - started)
            running = False
            advance(case + 1)
            if kind in ("traceback", "memory"):
                fail(kind, "".join(rest).strip())
            else:
                report.counts[kind] += 1
        elif running and time.monotonic() - started > args.seconds:
            process.kill()
            report.slowest = args.seconds
            fail("hang")
            return case + 1
        elif running and _memory(process.pid) > args.gigabytes * 1e9:
            process.kill()
            fail("memory")
            return case + 1
    process.wait()
    if running:
        fail("death", f"(exit code {process.returncode})")
    elif case < first:
        raise SystemExit(f"{name}: the target failed before its first case; run it with --only 0")
    return case + 1


def _memory(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


if __name__ == "__main__":
    sys.exit(main())
