"""Tests `prefix-jax serve`: its mistakes, its start and its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import serving


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prefix", "legal"], "--prefix: expected NAME=DIR, got 'legal'"),
        (["--prefix", "a=x", "--prefix", "a=y"], "the name 'a' is given twice, for x and y"),
        (["--prefix-dir", "nothing"], "--prefix-dir nothing: there is no such directory"),
        (["--max-waiting", "-1"], "--max-waiting must be at least 0, got -1"),
        (["--request-timeout", "0"], "--request-timeout must be at least 1, got 0"),
        (["--api-key", ""], "an API key is empty"),
        (["--port", "70000"], "--port must be between 0 and 65535, got 70000"),
        (["--host", "no such host"], "cannot listen on no such host"),
        (["--rows", "0"], "rows must be a positive integer, got 0"),
        (["--max-shared", "0"], "max_shared must be a positive integer, got 0"),
        (["--prefix", "a=nothing", "--port", "0"], "no directory nothing"),
        (["--port", "0", "--served-model-name", "a", "--prefix", "a=x"], "the model has this name"),
    ],
)
def test_mistakes_are_reported(
    run_in, tmp_path: Path, tiny_model_dir: Path, words, message
) -> None:
    ran = run_in(tmp_path, "serve", str(tiny_model_dir), *words)
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_a_used_port_is_reported_before_the_model_is_loaded(run_in, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        ran = run_in(tmp_path, "serve", "nothing", "--port", port)
    assert (ran.code, f"cannot listen on 127.0.0.1 port {port}" in ran.err) == (2, True)


def test_serves_until_it_is_terminated(tmp_path: Path) -> None:
    model = serving.write_model(tmp_path / "model")
    serving.tune(model, 1).save(tmp_path / "prefixes" / "alpha", "safetensors")
    command = [sys.executable, "-m", "prefix_jax.cli.main", "serve", "model", "--port", "0"]
    with subprocess.Popen(
        [*command, "--prefix-dir", "prefixes", "--prefix", "beta=prefixes/alpha"],
        cwd=tmp_path,
        env={**os.environ, "PREFIX_JAX_API_KEY": "secret"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if line.startswith("serving"))
        except StopIteration:
            process.kill()
            raise
        assert line.startswith("serving model and 2 prefixes at http://127.0.0.1:")
        url = line.split()[-1]
        request = urllib.request.Request(
            f"{url}/models", headers={"Authorization": "Bearer secret"}
        )
        with urllib.request.urlopen(request) as response:
            names = [model["id"] for model in json.load(response)["data"]]
        assert names == ["model", "alpha", "beta"]
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read().splitlines()[-1] == "stopped"
        assert process.wait() == 0
