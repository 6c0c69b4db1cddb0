"""What every test shares; it must run before JAX is imported, for it sets JAX's environment."""

import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["JAX_PLATFORMS"] = "cpu"
# Several devices, so that meshes are real. A computation on one of them is no slower for it.
_FLAGS = ["--xla_force_host_platform_device_count=8"]
if version("jaxlib").startswith("0.10."):  # later ones refuse to start with a flag they dropped
    # MLIR's emitters of fusions take half of the time that the whole suite compiles, and threads
    # for the halves of a small program gain nothing.
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)
# Devices that wait for each other do so in threads of one pool, by default one a device: too few
# where several exchanges are under way, and all would wait for ever.
os.environ["NPROC"] = "32"
# Compiling a small program takes longer than running it once: quickly, here and in processes that
# tests start. What looks at what the compiler makes of a program asks for `full_compilation`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Tests compile the same small programs again and again, in several processes. They share a cache:
# whoever reads a program that another is about to write compiles it as if it were not there.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

# Compilation makes the first example slow. The same examples on every run: CI never surprises.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

# Helpers of the tests, such as `tiny`, are modules of this folder.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights in Hugging Face layout, with its tokenizer: see `tiny`."""
    import tiny

    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session", params=["bert", "roberta"])
def tiny_encoder_dir(request: pytest.FixtureRequest, tmp_path_factory) -> Path:
    """A tiny encoder in Hugging Face layout, with its pooler and tokenizer: see `tiny`."""
    import tiny

    return tiny.write_encoder(tmp_path_factory.mktemp("tiny") / request.param, request.param)


@pytest.fixture(scope="module")
def full_compilation() -> Iterator[None]:
    """Compiles as users do; programs of one kind round otherwise than those of the other."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture
def compiler_warnings(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What the compiler has written so far. It is silent of programs that come from the cache."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield lambda: capfd.readouterr().err
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
