"""Standard streams that are closed or have a limited encoding."""

import io
import subprocess
import sys

from prefix_jax.terminal import streams

SCRIPT = """
import os, sys
from prefix_jax.terminal import streams
streams.prepare()
opened = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
print('to standard output', flush=True)
print('to standard error', file=sys.stderr, flush=True)
sys.exit(opened if sys.stdin.read() == '' else 1)
"""


def test_files_never_get_the_descriptors_of_closed_streams(tmp_path):
    file = tmp_path / "file"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", SCRIPT, str(file)]
    assert subprocess.run(command, timeout=60).returncode > 2
    assert file.read_bytes() == b""


def test_replaces_characters_outside_the_encoding(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    streams.prepare()
    print("NAME,… 3 × 語 \ud800")
    out.flush()
    assert out.buffer.getvalue() == b"NAME,... 3 x \\u8a9e \\ud800\n"


def test_keeps_the_error_handler_of_the_user(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="ignore")
    monkeypatch.setattr(sys, "stdout", out)
    streams.prepare()
    assert out.errors == "ignore"
