"""Rows that share a long prefix against rows that copy it.

    make bench NAME=shared_prefix

SmolLM2-135M, float32, prompts of the cleaned E2E data, new tokens without end of text. Every line
has a number of rows, and a number of different prefixes of one length that they use in turn. Both
engines run in one process and in turns, after one round that compiles; a speed is the median of the
rounds, from which that of a single new token is subtracted, so that reading prompts is not counted.

Memory is that of the KV cache and of the prefixes on the device together; temporaries are those of
the compiled decoding step. `--bytes` measures only these.
"""

from __future__ import annotations

import argparse
from typing import Any

import common
from mixed_prefixes import Bench, seconds

NEW, ROUNDS, MIB = 32, 3, 2**20
# (rows, different prefixes, slots)
CASES = [(rows, 1, P) for P in (64, 128, 256, 512, 1024, 2048) for rows in (1, 4, 16, 64)]
CASES += [(16, prefixes, P) for P in (256, 1024) for prefixes in (2, 4, 8, 16)]


class Temporaries:
    """Records the temporaries of the decoding program that an engine runs."""

    def __init__(self) -> None:
        from prefix_jax.engine import programs

        self.bytes = 0
        self._programs, self._decode = programs, programs.decode

    def __enter__(self) -> Temporaries:
        self._programs.decode = self._record
        return self

    def __exit__(self, *_: object) -> None:
        self._programs.decode = self._decode

    def _record(self, *args: Any, **options: Any) -> Any:
        if not self.bytes:
            compiled = self._decode.lower(*args, **options).compile()
            self.bytes = compiled.memory_analysis().temp_size_in_bytes
        return self._decode(*args, **options)


def measure(bench: Bench, case: tuple[int, int, int], rounds: int) -> list[str]:
    """The cells of one line; without rounds, those of the speed are empty."""
    import jax

    rows, prefixes, P = case
    ids = (bench.prompts * rows)[:rows]
    names = [str(row % prefixes) for row in range(rows)]
    cores = {
        kind: bench.engine([P] * prefixes, rows=rows, max_shared=prefixes, share_slots=threshold)
        for kind, threshold in (("copied", None), ("shared", 1))
    }
    memory, temporaries = {}, {}
    for kind, core in cores.items():
        with Temporaries() as recorded:
            bench.serve(core, ids, names, NEW if rounds else 2)
        cache = sum(x.nbytes for x in jax.tree.leaves(core._cache))
        memory[kind] = (cache + core.bank.bytes("device")) / MIB
        temporaries[kind] = recorded.bytes / MIB
    speed = dict.fromkeys(cores, "")
    ratio = ""
    if rounds:
        work = {
            kind: lambda new, core=core: bench.serve(core, ids, names, new)
            for kind, core in cores.items()
        }
        whole, first = seconds(work, NEW, rounds), seconds(work, 1, rounds)
        step = {kind: (whole[kind] - first[kind]) / (NEW - 1) for kind in cores}
        speed = {kind: f"{rows / step[kind]:.1f}" for kind in cores}
        ratio = f"{step['copied'] / step['shared']:.2f}x"
    return [
        str(P),
        str(rows),
        str(prefixes),
        speed["copied"],
        speed["shared"],
        ratio,
        f"{memory['copied']:.0f}",
        f"{memory['shared']:.0f}",
        f"{temporaries['copied']:.0f}",
        f"{temporaries['shared']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measured rounds")
    parser.add_argument("--bytes", action="store_true", help="measure no speed")
    parser.add_argument(
        "--slots", type=int, nargs="*", help="only these lengths (default: all)", default=()
    )
    parser.add_argument("--rows", type=int, nargs="*", help="only these numbers of rows")
    common.output_argument(parser, "shared_prefix")
    arguments = parser.parse_args()
    common.without_torch()
    bench = Bench()
    table = []
    for case in CASES:
        rows, _, P = case
        if (arguments.slots and P not in arguments.slots) or (
            arguments.rows and rows not in arguments.rows
        ):
            continue
        table.append(measure(bench, case, 0 if arguments.bytes else arguments.rounds))
        print(*table[-1], sep="  ", flush=True)
    common.write_table(
        arguments.output,
        f"Copied and shared prefixes, SmolLM2-135M float32, {NEW} new tokens",
        [
            "slots",
            "rows",
            "prefixes",
            "copied (tokens/s)",
            "shared (tokens/s)",
            "shared against copied",
            "copied (MiB)",
            "shared (MiB)",
            "copied, temporaries (MiB)",
            "shared, temporaries (MiB)",
        ],
        table,
    )


if __name__ == "__main__":
    main()
