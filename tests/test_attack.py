"""Mutated files are read or raise one `PrefixJaxError`. `make fuzz` runs many more cases."""

from pathlib import Path

import pytest
from attacks import TARGETS, case_rng

from prefix_jax.errors import PrefixJaxError

# Fewer cases for targets that load a model each time, which is up to a hundred times slower.
_CASES = {"finished-run": 12, "tokenizer-config-json": 30} | dict.fromkeys(
    ("config-json", "generation-config-json", "gguf-metadata", "tokenizer-json"), 60
)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_are_read_or_raise_one_error(name: str, tmp_path: Path):
    attempt = TARGETS[name](tmp_path)
    rejected = 0
    for case in range(_CASES.get(name, 150)):
        try:
            attempt(case_rng(name, 0, case))
        except PrefixJaxError as error:
            rejected += 1
            message = str(error)
            assert message.strip(), f"case {case} was rejected without a message"
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}") from error
    assert rejected, "no mutation was rejected, so the attack tests nothing"
