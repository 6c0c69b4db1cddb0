"""Attacks on every reader of files: seeded mutations of well-formed models, data and runs.

A target writes a well-formed original once and returns a function that mutates it and reads it as
a command would. The only exception that it may raise is `PrefixJaxError`. `test_attack.py` runs a
few cases of each target; `make fuzz` runs many, in processes watched for hangs and memory.
"""

from attacks import inputs, models, stored  # noqa: F401  (register their targets)
from attacks.registry import TARGETS, case_rng

__all__ = ["TARGETS", "case_rng"]
