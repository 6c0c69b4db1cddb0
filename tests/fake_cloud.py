"""A fake `gcloud` that records its calls and returns prepared answers, for `run_tpu.sh`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = "configs/quickstart.yaml"
WHERE = ("--zone", "us-west4-a", "--accelerator", "v5litepod-16")
WHAT = ("--output-dir", "gs://bucket/run", CONFIG)

# `describe` and the workers return prepared answers in turn, and repeat the last one.
GCLOUD = r"""#!/usr/bin/env bash
here=$(dirname "$0")
printf '%s\x1f' "$@" >> "$here/calls"; printf '\x1e' >> "$here/calls"
next() {
    head -n 1 "$here/$1"
    [ "$(wc -l < "$here/$1")" -le 1 ] || sed -i 1d "$here/$1"
}
[ "$3" = queued-resources ] || [ "$3" = tpu-vm ] || exit 0
failures="$here/$4.fail"
if [ -f "$failures" ]; then
    left=$(cat "$failures")
    if [ "$left" -gt 0 ]; then
        echo $((left - 1)) > "$failures"; echo "ERROR: $4 failed" >&2; exit 255
    fi
fi
case "$4 $*" in
    describe*)
        now=$(next states)
        [ "$now" != absent ] || { echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }
        echo "$now" ;;
    ssh*outcome=*) next outcomes | tr ' ' '\n' ;;
esac
"""
WHOLE = ["create", "scp", "install", "start", "logs", "outcome", "rsync", "delete"]


class Cloud:
    """A fake Google Cloud that records its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "gcloud").write_text(GCLOUD)
        (folder / "gcloud").chmod(0o755)
        self.states("absent", "READY")
        self.outcomes("outcome=0")

    def states(self, *states: str) -> None:
        """Sets the states that `describe` returns, in order."""
        (self.folder / "states").write_text("\n".join(states) + "\n")

    def outcomes(self, *outcomes: str) -> None:
        """Sets the outcomes that the workers report, in order."""
        (self.folder / "outcomes").write_text("\n".join(outcomes) + "\n")

    def fails(self, verb: str, times: int) -> None:
        """Makes a verb fail this many times before it works."""
        (self.folder / f"{verb}.fail").write_text(str(times))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [ROOT / "run_tpu.sh", *words],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path, "RUN_TPU_PAUSE": "0"},
            cwd=self.folder,
            timeout=60,
        )

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of every call."""
        path = self.folder / "calls"
        text = path.read_text() if path.exists() else ""
        return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]

    @property
    def verbs(self) -> list[str]:
        """The verb of every call except `describe`, with the purpose of each `ssh`."""
        return [verb for call in self.calls if (verb := verb_of(call)) != "describe"]


def verb_of(call: Sequence[str]) -> str:
    if call[0] == "storage":
        return call[1]
    if call[3] != "ssh":
        return call[3]
    text = call[-1]
    marks = {"uv pip": "install", "setsid": "start", "tail --lines=15": "outcome", "tail": "logs"}
    return next(name for mark, name in marks.items() if mark in text)
