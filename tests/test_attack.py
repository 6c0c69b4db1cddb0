"""Whatever a file holds, reading it ends well or in one error. `make fuzz` runs many more cases."""

from pathlib import Path

import pytest
from attack import TARGETS, case_rng

from prefix_jax.errors import PrefixJaxError

# Cases per second differ by a factor of a hundred; the slow ones load a model each time.
_CASES = {"finished-run": 12, "tokenizer-config-json": 30} | dict.fromkeys(
    ("config-json", "generation-config-json", "gguf-metadata", "tokenizer-json"), 60
)


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_read_or_refused(name: str, tmp_path: Path):
    attempt = TARGETS[name](tmp_path)
    refused = 0
    for case in range(_CASES.get(name, 150)):
        try:
            attempt(case_rng(name, 0, case))
        except PrefixJaxError as error:
            refused += 1
            message = str(error)
            assert message.strip(), f"case {case} was refused without a reason"
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}") from error
    assert refused, "no mutation was refused: the attack reaches nothing"
