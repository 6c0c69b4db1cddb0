"""Tests `prefix-jax serve`: its mistakes, its start and its end."""

from __future__ import annotations

import contextlib
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
        (["--num-speculative-tokens", "-1"], "num_speculative_tokens must be at least 0, got -1"),
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, and a directory with a prefix."""
    model = serving.write_model(tmp_path / "model")
    serving.tune(model, 1).save(tmp_path / "prefixes" / "alpha", "safetensors")
    return tmp_path


COMMAND = [sys.executable, "-m", "prefix_jax.cli.main", "serve", "model", "--prefix-dir"]


def test_serves_until_it_is_terminated(folder: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "prefixes", "--prefix", "beta=prefixes/alpha", "--port", "0"],
        cwd=folder,
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_its_log_does_not_end_it(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    (folder / "prefixes" / "damaged").mkdir()
    (folder / "prefixes" / "damaged" / "prefix.json").write_text("x")
    with (
        Path("/dev/full").open("w") as full,
        subprocess.Popen(
            [*COMMAND, "prefixes", "--port", str(port)], cwd=folder, stderr=full
        ) as process,
    ):
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as response:
                        names = [model["id"] for model in json.load(response)["data"]]
                    break
            assert names == ["model", "alpha"]
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0
        finally:
            process.kill()
