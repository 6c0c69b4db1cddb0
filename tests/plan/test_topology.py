"""Parsing of topologies, and the figures of chips."""

import os
import subprocess
import sys
import types
from typing import Any

import pytest

from prefix_jax.errors import MeshError
from prefix_jax.plan.topology import CHIPS, GIB, OutOfMemory, Topology


@pytest.mark.parametrize(
    ("text", "chips", "devices"),
    [
        ("v5e:1x1", 1, 1),
        ("v5e:4x4", 16, 16),
        ("v5e:1x4", 4, 4),
        ("V6E:2x2", 4, 4),
        ("v4:2x2x1", 4, 4),
        ("v5p:2x2x1", 4, 4),
        ("v5p:1x1x1", 1, 1),
        ("tpu7x:2x2x1", 4, 8),
        ("2*v5e:4x4", 32, 32),
    ],
)
def test_parses_topologies(text: str, chips: int, devices: int) -> None:
    topology = Topology.parse(text)
    assert topology.chips == chips
    assert len(topology.devices) == devices
    assert {device.platform for device in topology.devices} == {"tpu"}
    assert str(topology) == text.lower()
    again = Topology.of(topology.devices)
    assert (again.name, again.shape, again.slices) == (
        topology.name,
        topology.shape,
        topology.slices,
    )


def test_slices_may_be_a_separate_argument() -> None:
    assert Topology.parse("v5e:2x2", 2) == Topology.parse("2*v5e:2x2")


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5e", None, "topology 'v5e': write it as one of v5e:4x4"),
        ("v9:2x2", None, "the chip 'v9' is not one of v4, v5e, v5p, v6e, tpu7x"),
        ("v5p:2x2", None, "v5p has 3 axes of chips, as in v5p:4x4x4"),
        ("v5e:16x32", None, "a slice of v5e has at most 256 chips"),
        ("v5e:0x2", None, "v5e has 2 axes of chips"),
        ("2*v5e:2x2", 3, "has 2 slices, but 3 are requested"),
        ("v5e:2x2", -1, "needs at least one slice, got -1"),
        ("v5e:2x2", 0, "needs at least one slice, got 0"),
        ("v5litepod-16", None, "topology 'v5litepod-16': write its chips, v5e:4x4"),
        ("2*v6e-4", None, "write its chips, 2*v6e:2x2"),
        ("v6e-128", None, "write its chips, v6e:8x16"),
        ("v5litepod-3", None, "write it as one of v5e:4x4"),
        ("v5litepod-512", None, "write it as one of v5e:4x4"),
        ("v5p-8", None, "topology 'v5p-8': write its chips, v5p:2x2x1"),
        ("v4-32", None, "write its chips, v4:2x2x4"),
        ("2*v5p-128", None, "write its chips, 2*v5p:4x4x4"),
        ("v5p-7", None, "write it as one of v5e:4x4"),
        ("v5p-0", None, "write it as one of v5e:4x4"),
    ],
)
def test_reports_invalid_topologies(text: str, slices: int | None, message: str) -> None:
    with pytest.raises(MeshError, match=message.replace("*", r"\*")):
        Topology.parse(text, slices)


def test_missing_libtpu_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MeshError, match=r'pip install "prefix_jax\[tpu\]"'):
        _ = Topology.parse("v5e:2x2").devices


def test_rejects_devices_that_are_not_tpus() -> None:
    import jax

    with pytest.raises(MeshError, match=r"supports only TPUs .* got \d+ x cpu"):
        Topology.of(jax.devices())


@pytest.mark.parametrize("name", ["v5e:2x2", "v4:2x2x1", "tpu7x:2x2x1"])
def test_hbm_limit_is_nearly_all_of_the_memory(name: str) -> None:
    topology = Topology.parse(name)
    published = topology.chip.hbm / topology.chip.devices
    assert published - 2 * GIB < topology.hbm_limit < published


def test_each_host_queries_its_own_device_for_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import jax

    asked: list[object] = []

    def refuse(device: object) -> None:
        asked.append(device)
        raise LookupError

    devices: Any = tuple(types.SimpleNamespace(process_index=number // 4) for number in range(8))
    topology = Topology("v5e", (2, 4), attached=devices)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr("prefix_jax.plan.topology.SingleDeviceSharding", refuse)
    with pytest.raises(LookupError):
        _ = topology.hbm_limit
    assert asked == [devices[4]]


def test_figures_of_chips_are_within_range_of_each_other() -> None:
    for chip in CHIPS.values():
        assert 1e14 < chip.bf16 <= chip.int8 <= 2.1 * chip.bf16
        # Operations per byte: a large product is compute-bound on every chip.
        assert 150 < chip.bf16 / chip.bandwidth < 700


@pytest.mark.parametrize(
    ("message", "used", "limit"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (65.90G) exceeds available HBM (15.75G).",
            65.9,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 18.96G of 15.75G hbm. Exceeded hbm capacity by 3.21G.",
            18.96,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: … Used 1.50T of 512.00M hbm.", 1536, 0.5),
    ],
)
def test_parses_out_of_memory_errors(message: str, used: float, limit: float) -> None:
    parsed = OutOfMemory.parse(message)
    assert parsed is not None
    assert (parsed.used, parsed.limit) == (round(used * GIB), round(limit * GIB))


def test_ignores_other_compiler_errors() -> None:
    assert OutOfMemory.parse("INVALID_ARGUMENT: 3.0G of what?") is None


_QUIET = """
from prefix_jax.plan.topology import Topology
print(len(Topology.parse("v5e:2x2").devices))
"""


def test_two_processes_load_libtpu_at_once_without_output() -> None:
    # Otherwise each process would report that the other holds a lock, or a missing TPU.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "ALLOW"))
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _QUIET],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.communicate(timeout=120) == ("4\n", "")
