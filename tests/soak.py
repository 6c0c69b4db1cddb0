"""Keeps a server under random load, and checks every answer against the row decoded by itself.

    make soak MINUTES=10

A server in a process of its own gets requests of many clients: completions, streams, samples, wrong
requests, clients that leave. Meanwhile prefixes are replaced, damaged, removed, loaded and
unloaded, and the memory for them is too small for all. At the end, its memory must not have grown
since the second quarter, and all rows must be usable. Runs of less than five minutes do not judge
the memory, because programs are still being compiled.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import psutil
import serving

import prefix_jax as pj

ROWS, CLIENTS, VERSIONS, STABLE = 8, 12, 4, 6
PROMPTS = ["2+3=", "1+1=", "name[Stop 7]", "x" * 40, "the end of the line, ", "0"]
CONFIGS: list[dict[str, Any]] = [
    {"max_tokens": 12, "temperature": 0},
    {"max_tokens": 3, "temperature": 0},
    {"max_tokens": 25, "temperature": 1.0, "seed": 5},
    {"max_tokens": 10, "temperature": 0.7, "seed": 6, "top_p": 0.9, "top_k": 40},
]
WRONG: list[Any] = [
    {"model": "nobody", "prompt": "x"},
    {"model": "stable0", "prompt": ""},
    {"model": "stable0", "prompt": "x", "max_tokens": 10**6},
    {"model": "stable0", "prompt": "x", "temperature": -3},
    {"model": "stable0"},
    [],
]


@dataclasses.dataclass
class Name:
    """A model id whose prefix changes.

    Attributes:
        history: versions, with the times at which each may have been used first and at which the
            one before it was surely replaced; None is no prefix, or a damaged one.
    """

    history: list[tuple[int | None, float, float]]

    def possible(self, start: float, end: float) -> set[int | None]:
        """The versions that a request between two times may have used."""
        versions = set()
        following = [*self.history[1:], (None, float("inf"), float("inf"))]
        for (version, begun, _), (_, _, replaced) in zip(self.history, following, strict=True):
            if begun <= end and replaced >= start:
                versions.add(version)
        return versions


class Soak:
    """A server, its clients, and the expected answers.

    Args:
        directory: an empty directory.
        seconds: how long to run.
        seed: of all random choices.
    """

    def __init__(self, directory: Path, seconds: float, seed: int):
        self.directory, self.seconds, self.rng = directory, seconds, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.memory: list[tuple[float, int]] = []
        self.over = threading.Event()
        model = serving.write_model(directory / "model")
        count = STABLE + VERSIONS
        tuned = [
            serving.tune(model, number, length=1 + 4 * (number % 4)) for number in range(count)
        ]
        for number, prefix in enumerate(tuned):
            prefix.save(directory / "versions" / str(number), "safetensors")
        # The text of every prefix, prompt and setting, decoded one at a time.
        engine = pj.Engine(
            model, {str(number): prefix for number, prefix in enumerate(tuned)}, rows=1
        )
        self.expected = {
            (number, prompt, index): _alone(engine, number, prompt, config)
            for number, prompt, (index, config) in itertools.product(
                [None, *range(count)], PROMPTS, enumerate(CONFIGS)
            )
        }
        self.prefixes = directory / "prefixes"
        self.prefixes.mkdir()
        for number in range(STABLE):
            shutil.copytree(directory / "versions" / str(number), self.prefixes / f"stable{number}")
        self.changing = {name: Name([(None, 0.0, 0.0)]) for name in ("swap", "swop")}
        self.bytes = sum(prefix.stat().st_size for prefix in self.prefixes.rglob("*.safetensors"))

    def run(self) -> None:
        """Runs the server and its clients, and checks the end."""
        command = [sys.executable, "-m", "prefix_jax.cli.main", "serve", "model", "--port", "0"]
        command += ["--served-model-name", "base", "--prefix-dir", "prefixes", "--rows", str(ROWS)]
        command += ["--admin-key", "root", "--max-waiting", "2"]
        # Half of the prefixes fit the device, and a few of the others the host.
        command += ["--device-bytes", str(self.bytes), "--host-bytes", str(self.bytes // 4)]
        with (
            (self.directory / "log").open("w", encoding="utf-8") as log,
            subprocess.Popen(command, cwd=self.directory, stderr=log) as process,
        ):
            self.process = psutil.Process(process.pid)
            try:
                self.port = self._wait_for_start(process)
                self._load()
                self._check_end()
                process.send_signal(signal.SIGTERM)
                if process.wait(timeout=60) != 0:
                    self.problems.append(f"exit code {process.returncode}")
            finally:
                process.kill()
        if self.problems:
            self.problems.append((self.directory / "log").read_text(encoding="utf-8")[-20000:])

    def _wait_for_start(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            for line in (self.directory / "log").read_text(encoding="utf-8").splitlines():
                if line.startswith("serving "):
                    return int(line.split(":")[-1].split("/")[0])
            assert process.poll() is None, (self.directory / "log").read_text(encoding="utf-8")
            time.sleep(0.1)

    def _load(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS + 2) as pool:
            seeds = [self.rng.random() for _ in range(CLIENTS + 1)]
            tasks = [pool.submit(self._client, random.Random(seed)) for seed in seeds[1:]]
            tasks += [pool.submit(self._change, random.Random(seeds[0])), pool.submit(self._watch)]
            concurrent.futures.wait(tasks, self.seconds, concurrent.futures.FIRST_EXCEPTION)
            self.over.set()
        for task in tasks:
            if error := task.exception():
                self.problems.append(repr(error))

    def _client(self, rng: random.Random) -> None:
        while not self.over.is_set():
            kind = rng.choices(["answer", "leave", "wrong"], [8, 1, 1])[0]
            self.counts[kind] += 1
            getattr(self, f"_{kind}")(rng)

    def _answer(self, rng: random.Random) -> None:
        """Asks for a text and compares it."""
        names = ["base", *(f"stable{number}" for number in range(STABLE)), *self.changing]
        name, prompt, index = rng.choice(names), rng.choice(PROMPTS), rng.randrange(len(CONFIGS))
        stream = rng.random() < 0.4
        start = time.monotonic()
        body = {"model": name, "prompt": prompt, "stream": stream, **CONFIGS[index]}
        status, content = self._post("/v1/completions", body)
        end = time.monotonic()
        if status == 429:
            self.counts["429"] += 1
            return
        if name in self.changing:
            versions = self.changing[name].possible(start, end)
        else:
            versions = {None if name == "base" else int(name[-1])}
        if name in self.changing and None in versions:
            # It may have been removed or damaged, also after the request was accepted.
            if status in (400, 404):
                return
            versions.discard(None)
        if status != 200:
            self.problems.append(f"{name}: {status} {content[:300]!r}")
            return
        parts = [json.loads(content)] if not stream else _events(content)
        if "error" in parts[-1]:
            self.problems.append(f"{name}: {parts[-1]}")
            return
        text = "".join(part["choices"][0]["text"] for part in parts)
        if text not in {self.expected[version, prompt, index] for version in versions}:
            self.problems.append(f"{name}, {prompt!r}, {CONFIGS[index]}: {text!r} of {versions}")

    def _leave(self, rng: random.Random) -> None:
        """Closes the connection in the middle of an answer."""
        body = {"model": "stable1", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
        body |= {"stream": rng.random() < 0.5, "n": rng.choice([1, 3])}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body))
        time.sleep(rng.random() * 0.1)
        connection.close()

    def _wrong(self, rng: random.Random) -> None:
        """Sends a request that must be refused."""
        status, content = self._post("/v1/completions", rng.choice(WRONG))
        if status not in (400, 404, 429) or "error" not in json.loads(content):
            self.problems.append(f"a wrong request got {status} {content[:300]!r}")

    def _post(self, path: str, body: Any, key: str = "root") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            headers = {"Authorization": f"Bearer {key}"}
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()

    def _change(self, rng: random.Random) -> None:
        """Replaces, damages, removes, loads and unloads prefixes."""
        while not self.over.wait(rng.random() * 0.5):
            name = rng.choice([*self.changing])
            version = rng.choice([None, *range(STABLE, STABLE + VERSIONS)])
            new, target = self.prefixes / f".{name}", self.prefixes / name
            if version is not None or rng.random() < 0.5:
                source = self.directory / "versions" / str(STABLE if version is None else version)
                shutil.copytree(source, new)
                if version is None:
                    (arrays,) = new.glob("*.safetensors")
                    arrays.write_bytes(arrays.read_bytes()[:-8])
            begun = time.monotonic()
            # Between the two renames there is no prefix.
            history = self.changing[name].history
            history.append((None, begun, float("inf")))
            if target.exists():
                target.rename(self.prefixes / f".{name}.old")
            if new.exists():
                new.rename(target)
            done = time.monotonic()
            history[-1] = (None, begun, begun)
            history.append((version, begun, done))
            shutil.rmtree(self.prefixes / f".{name}.old", ignore_errors=True)
            self.counts["change"] += 1
            path = f"stable{rng.randrange(STABLE)}"
            status, content = self._post("/v1/prefixes", {"name": "loaded", "path": path})
            if status not in (200, 400):
                self.problems.append(f"load: {status} {content!r}")
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            with contextlib.closing(connection):
                headers = {"Authorization": "Bearer root"}
                connection.request("DELETE", "/v1/prefixes/loaded", headers=headers)
                connection.getresponse().read()

    def _watch(self) -> None:
        """Measures the memory of the server."""
        start = time.monotonic()
        while not self.over.wait(min(1.0, self.seconds / 40)):
            self.memory.append((time.monotonic() - start, self.process.memory_info().rss))

    def _check_end(self) -> None:
        """Checks that nothing runs, that all rows can be used, and that memory has not grown."""
        for _ in range(200):
            metrics = self._get("/metrics")
            if "num_requests_running 0.0" in metrics and "num_requests_waiting 0.0" in metrics:
                break
            time.sleep(0.05)
        else:
            self.problems.append("requests run after all clients have left")
        body = {"model": "stable0", "prompt": "x", "n": ROWS, "max_tokens": 50, "ignore_eos": True}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answer = pool.submit(self._post, "/v1/completions", body)
            most = 0.0
            while not answer.done():
                lines = self._get("/metrics").splitlines()
                running = next(x for x in lines if x.startswith("vllm:num_requests_running"))
                most = max(most, float(running.split()[-1]))
            if answer.result()[0] != 200 or most != ROWS:
                self.problems.append(f"at the end, {most:g} rows ran: {answer.result()}")
        quarter = self.seconds / 4
        first = [rss for at, rss in self.memory if quarter <= at < 2 * quarter]
        last = [rss for at, rss in self.memory if at >= 3 * quarter]
        self.growth = statistics.median(last) / statistics.median(first) - 1

    def _get(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read().decode()


def _alone(engine: pj.Engine, number: int | None, prompt: str, config: dict[str, Any]) -> str:
    fields = {key: value for key, value in config.items() if key != "max_tokens"}
    decode = pj.DecodeConfig(max_new_tokens=config["max_tokens"], **fields)
    name = None if number is None else str(number)
    (generation,) = engine.generate([prompt], name, decode)
    return generation.text


def _events(content: bytes) -> list[Any]:
    *events, done, _ = content.decode().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        soak = Soak(Path(directory), args.minutes * 60, args.seed)
        soak.run()
    print(", ".join(f"{count} × {kind}" for kind, count in sorted(soak.counts.items())))
    size = soak.memory[-1][1] / 2**20
    print(f"memory: {size:.0f} MiB, {soak.growth:+.1%} since the second quarter")
    for problem in soak.problems[:20]:
        print(problem)
    print(f"{len(soak.problems)} problems")
    return bool(soak.problems) or (soak.growth > 0.05 and args.minutes >= 5)


if __name__ == "__main__":
    sys.exit(main())
