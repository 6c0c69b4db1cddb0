"""Processes that train: one to kill at any moment, and one of several hosts. See `forked`."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import tiny_runs

from prefix_jax.cli.main import main
from prefix_jax.runs.console import Console
from prefix_jax.runs.process_sync import ProcessSync

# Well above the duration of ten steps of the tiny model.
SLOW_SECONDS = 5.0


def run_slowly(model: Path, output: Path, overrides: tuple[str, ...]) -> None:
    """Trains, prints each step and leaves time to kill it."""
    on_metrics = Console.on_metrics

    def slowly(self: Console, step: int, *rest: Any) -> bool:
        stop = on_metrics(self, step, *rest)
        print(step, flush=True)
        time.sleep(0.3)
        return stop

    Console.on_metrics = slowly
    pretrained = tiny_runs.on_one_device(model)
    tiny_runs.run(pretrained, output, *overrides, dev=tiny_runs.SOME, test=tiny_runs.SOME)


def run_host(number: int, step: int, words: list[str]) -> int:
    """Runs a command on one host, which at a step sends itself a signal or is slow.

    Args:
        number: the signal; 0 makes the host slow.
        step: the step; 0 means never.
        words: the command line.
    """
    post, calls = ProcessSync.post, []

    def posting(self: ProcessSync, busy: float, proceed: object) -> object:
        calls.append(busy)
        if len(calls) == step:
            if number:
                signal.raise_signal(number)
            else:
                time.sleep(SLOW_SECONDS)
                busy += SLOW_SECONDS
        return post(self, busy, proceed)

    ProcessSync.post = posting
    return main(words)
