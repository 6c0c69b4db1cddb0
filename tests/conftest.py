"""What every test shares; it must run before JAX is imported, for it sets JAX's environment."""

import os
from pathlib import Path

from hypothesis import settings

os.environ["JAX_PLATFORMS"] = "cpu"
# Several devices, so that meshes are real. A computation on one of them is no slower for it.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Tests compile the same small programs again and again. Workers of pytest-xdist write at the same
# time, so that each has a cache of its own.
worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".jax_cache" / worker)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

# Compilation makes the first example slow. The same examples on every run: CI never surprises.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")
