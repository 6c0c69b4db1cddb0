"""Tests the bank: budgets, the order of eviction, and reading a prefix again."""

from __future__ import annotations

from pathlib import Path

import engines
import numpy as np
import pytest
from engines import alone, card, model, prefixes

from prefix_jax import artifact
from prefix_jax.config import DecodeConfig
from prefix_jax.engine import EngineCore, Request
from prefix_jax.errors import PrefixError

CONFIG = DecodeConfig(max_new_tokens=6)


def save(path: Path, kind: str) -> Path:
    produced = prefixes("llama")[kind]
    artifact.save(path, produced, card(model("llama"), produced), "safetensors")
    return path


def add(core: EngineCore, name: str, kind: str = "kv", directory: Path | None = None) -> None:
    produced = prefixes("llama")[kind]
    core.bank.add(name, produced, card(model("llama"), produced), (), directory)


def tiers(core: EngineCore) -> dict[str, str]:
    return {name: banked.tier for name, banked in core.bank.prefixes.items()}


@pytest.fixture(scope="module")
def size() -> int:
    """The bytes of one prefix."""
    core = engines.core("llama", ["kv"])
    return core.bank.find("kv").bytes


def generate(core: EngineCore, name: str) -> tuple[int, ...]:
    handle = core.submit(Request([1, 2, 3], name, CONFIG))
    while not handle.done:
        core.step()
    if handle.error is not None:
        raise handle.error
    assert handle.generation is not None
    return handle.generation.samples[0].ids


def expected(kind: str) -> tuple[int, ...]:
    return alone("llama", kind, [[1, 2, 3]], CONFIG)[0].samples[0].ids


def test_least_recently_used_prefixes_leave_the_device_then_the_host(tmp_path, size: int) -> None:
    core = engines.core("llama", [], rows=2, device_bytes=2 * size, host_bytes=size)
    for name in "abcd":
        add(core, name, directory=save(tmp_path / name, "kv"))
    # They are read from their directories when they are needed.
    assert tiers(core) == {"a": "disk", "b": "disk", "c": "disk", "d": "host"}
    answers = [generate(core, name) for name in "abac"]
    assert tiers(core) == {"d": "disk", "b": "host", "a": "device", "c": "device"}
    answers += [generate(core, name) for name in "dba"]
    assert tiers(core) == {"c": "disk", "d": "host", "b": "device", "a": "device"}
    assert set(answers) == {expected("kv")}
    assert core.bank.bytes("device") == 2 * size


def test_prefix_without_a_directory_stays_in_memory(size: int) -> None:
    core = engines.core("llama", [], rows=2, device_bytes=size, host_bytes=0)
    for name in "ab":
        add(core, name)
    assert [generate(core, name) for name in "abab"] == [expected("kv")] * 4
    assert tiers(core) == {"a": "host", "b": "device"}


@pytest.mark.parametrize("kind", ["kv", "bias", "layers", "pinned", "hidden", "embeds", "adapter"])
def test_prefix_is_the_same_after_it_is_read_again(tmp_path, kind: str) -> None:
    core = engines.core("llama", [], rows=2, host_bytes=0)
    add(core, "one", kind, save(tmp_path / "one", kind))
    add(core, "other")
    assert tiers(core)["one"] == "disk"
    assert generate(core, "one") == expected(kind)


def test_directory_with_another_prefix_is_refused(tmp_path) -> None:
    core = engines.core("llama", [], rows=2, host_bytes=0)
    add(core, "one", "kv", save(tmp_path / "one", "kv"))
    add(core, "other")
    save(tmp_path / "one", "long")
    with pytest.raises(PrefixError, match="was added as 'one'; add it again"):
        generate(core, "one")
    add(core, "one", "long", tmp_path / "one")
    assert generate(core, "one") == expected("long")


def test_missing_directory_fails_the_request_only(tmp_path) -> None:
    core = engines.core("llama", [], rows=2, host_bytes=0)
    directory = save(tmp_path / "one", "kv")
    add(core, "one", "kv", directory)
    add(core, "other")
    directory.rename(tmp_path / "moved")
    with pytest.raises(PrefixError):
        generate(core, "one")
    assert generate(core, "other") == expected("kv")


def test_prefix_beyond_the_budget_is_refused(size: int) -> None:
    core = engines.core("llama", [], rows=2, device_bytes=size)
    add(core, "name")
    with pytest.raises(PrefixError, match=r"needs [\d,]+ bytes on the device, more than"):
        add(core, "name", "long")
    assert generate(core, "name") == expected("kv")


def test_digests_tell_prefixes_apart() -> None:
    produced = prefixes("llama")
    digests = {kind: artifact.digest(prefix) for kind, prefix in produced.items()}
    assert len(set(digests.values())) == len(digests)
    for kind, prefix in produced.items():
        assert digests[kind] == artifact.digest(prefix)


def test_slots_are_padded_to_powers_of_two() -> None:
    core = engines.core("llama", ["kv", "long", "adapter"])
    warm = core.bank.use("long")
    assert warm.decoder.k_LKPH.shape == (3, 2, 16, 8)
    np.testing.assert_array_equal(warm.decoder.k_LKPH[:, :, 11:], 0)
    warm = core.bank.use("adapter")
    assert warm.decoder.k_LKPH is None
    assert warm.decoder.gated_k_LPKH.shape == (3, 4, 2, 8)
    assert warm.decoder.gated_slots_L.tolist() == [3, 3, 3]
