"""Shared fixtures, and JAX's environment, which must be set before JAX is imported."""

import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices, for real meshes. Computations on a single device are not slower.
_FLAGS = ["--xla_force_host_platform_device_count=8"]
if version("jaxlib").startswith("0.10."):  # later versions reject removed flags
    # The MLIR fusion emitters need half of the suite's compilation time, and splitting small
    # programs over threads saves none.
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)
# Devices wait for each other in threads of one pool. The default, one thread per device, deadlocks
# if several collectives run at once.
os.environ["NPROC"] = "32"
# Small programs take longer to compile than to run. Tests of compiled programs use the fixture
# `full_compilation`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Many tests, in several processes, compile the same programs, so they share a cache.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

# No deadline, because the first example includes compilation. Deterministic, for CI.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

# Test helpers, such as `tiny`, are modules of this folder.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights in Hugging Face layout, with a tokenizer (see `tiny`)."""
    import tiny

    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session", params=["bert", "roberta"])
def tiny_encoder_dir(request: pytest.FixtureRequest, tmp_path_factory) -> Path:
    """A tiny encoder in Hugging Face layout, with a pooler and a tokenizer (see `tiny`)."""
    import tiny

    return tiny.write_encoder(tmp_path_factory.mktemp("tiny") / request.param, request.param)


@pytest.fixture(scope="module")
def full_compilation() -> Iterator[None]:
    """Compiles with all optimizations, like for users; these programs round differently."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture
def compiler_warnings(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Returns the compiler's messages so far. Disables the cache, which would suppress them."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield lambda: capfd.readouterr().err
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], Any]:
    """Makes a tokenizer with a template for special tokens, such as "<s> $A <|im_end|>"."""
    import bpe

    return bpe.make_tokenizer


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[[str], Any]) -> Any:
    """A byte-level tokenizer without special tokens around texts: see `bpe`."""
    return make_tokenizer("$A")


@pytest.fixture(scope="session")
def bos_tokenizer(make_tokenizer: Callable[[str], Any]) -> Any:
    """The same with "<s>" before every text."""
    return make_tokenizer("<s> $A")
