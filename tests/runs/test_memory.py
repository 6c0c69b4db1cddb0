"""A run that cannot fit in memory is refused before it allocates anything."""

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
def test_names_the_setting_the_need_and_what_there_is(
    monkeypatch, pretrained, tmp_path: Path, override: str, message: str
):
    monkeypatch.setattr(memory, "device_memory", lambda mesh: 10_000_000)
    with pytest.raises(ConfigError, match="GB") as caught:
        tiny_runs.run(pretrained, tmp_path / "run", override)
    assert message in str(caught.value)
    assert "has 0.0 GB" in str(caught.value)


def test_knows_the_memory_of_this_host(pretrained):
    found = memory.device_memory(pretrained.mesh)
    assert found is None or found > 2**28


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3 TiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.\nlong"),
    ],
)
def test_an_exhausted_memory_is_one_error(error: Exception):
    match = r"memory is exhausted \(.*\); lower data\.batch_size"
    with pytest.raises(ConfigError, match=match), memory.out_of_memory():
        raise error


def test_another_error_of_the_devices_stays_what_it_is():
    with pytest.raises(jax.errors.JaxRuntimeError), memory.out_of_memory():
        raise jax.errors.JaxRuntimeError("INTERNAL: bug")
