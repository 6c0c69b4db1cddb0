"""Refusing runs that cannot fit in memory before they allocate anything."""

from pathlib import Path

import jax
import pytest
import tiny
import tiny_runs

from prefix_jax.errors import ConfigError
from prefix_jax.runs import memory


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny_runs.on_one_device(tiny.write_model(tmp_path_factory.mktemp("memory") / "model"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method={name: prefix, length: 4, mid_dim: 60000}",
            "method.mid_dim 60000, method.length 4: ",
        ),
        ("method={name: ptuning, length: 4, hidden: 60000}", "; lower method.hidden"),
        ("method={name: multitask, length: 4, ranks: 60000}", "; lower method.ranks"),
        ("data.batch_size=60000", "data.batch_size 60000: a step needs at least "),
    ],
)
def test_names_the_setting_the_need_and_the_limit(
    monkeypatch, pretrained, tmp_path: Path, override: str, message: str
):
    monkeypatch.setattr(memory, "device_memory", lambda mesh: 10_000_000)
    with pytest.raises(ConfigError, match="GB") as caught:
        tiny_runs.run(pretrained, tmp_path / "run", override)
    assert message in str(caught.value)
    assert "has 0.0 GB" in str(caught.value)


def test_measures_the_memory_of_this_host(pretrained):
    limit = memory.device_memory(pretrained.mesh)
    assert limit is None or limit > 2**28


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3 TiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.\nlong"),
    ],
)
def test_explains_an_allocation_failure(error: Exception):
    match = r"out of memory \(.*\); lower data\.batch_size"
    with pytest.raises(ConfigError, match=match), memory.explain_out_of_memory():
        raise error


def test_passes_other_device_errors_through():
    with pytest.raises(jax.errors.JaxRuntimeError), memory.explain_out_of_memory():
        raise jax.errors.JaxRuntimeError("INTERNAL: bug")
