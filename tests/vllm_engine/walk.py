"""Runs the commands of docs/serving.md from nothing to a chat, in a new clone.

python tests/vllm_engine/walk.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
URL = "http://localhost:8000"
_BLOCK = re.compile(r"<!-- walk.*?-->\n```bash\n(.*?)```", re.DOTALL)


def main() -> int:
    """Returns 0 if the last command is answered by the prefix."""
    block = _BLOCK.search((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))
    assert block is not None
    # A command continues after a backslash and inside quotes.
    commands = re.findall(r"(?:[^'\n\\]|'[^']*'|\\\n)+", block[1])
    *setup, serve, ask = commands
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["git", "clone", "--quiet", ROOT, directory], check=True)
        for command in setup:
            print(f"$ {command}", flush=True)
            subprocess.run(command, shell=True, cwd=directory, check=True)
        print(f"$ {serve}", flush=True)
        with subprocess.Popen(f"exec env {serve}", shell=True, cwd=directory) as server:
            try:
                _wait(server)
                print(f"$ {ask}", flush=True)
                done = subprocess.run(ask, shell=True, capture_output=True, text=True, check=True)
            finally:
                server.terminate()
    print(done.stdout)
    answer = json.loads(done.stdout)
    return 0 if answer["model"] == "stations" and answer["choices"][0]["message"]["content"] else 1


def _wait(server: subprocess.Popen) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit("the server ended")
        try:
            urllib.request.urlopen(f"{URL}/health")
        except OSError:
            time.sleep(1)
        else:
            return
    raise SystemExit("the server did not start within ten minutes")


if __name__ == "__main__":
    sys.exit(main())
