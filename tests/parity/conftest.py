"""Collects differences from the references and prints them as a table at the end.

A test reports each comparison through the fixture `difference`:

    def test_logits(name, difference):
        difference("logits", ours - theirs, limit=1e-4, model=name)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import ArrayLike

Difference = Callable[..., None]

_KEY = "difference"


@pytest.fixture
def difference(request: pytest.FixtureRequest) -> Difference:
    """Records a difference for the table, and fails if it exceeds its limit or is NaN.

    Its arguments are the compared quantity, the difference (a number or an array), the limit of its
    absolute value, and the model (by default, the parameters of the test). The table shows the
    largest difference per quantity and model.
    """

    def note(quantity: str, value: ArrayLike, limit: float, model: str | None = None) -> None:
        if model is None:
            callspec = getattr(request.node, "callspec", None)
            model = "" if callspec is None else callspec.id
        largest = float(np.max(np.abs(np.asarray(value, np.float64)), initial=0.0))
        largest = math.inf if math.isnan(largest) else largest
        # Reports carry properties from the workers of pytest-xdist, too.
        request.node.user_properties.append((_KEY, (quantity, model, largest, limit)))
        assert largest <= limit, f"{quantity} of {model}: {largest:.3g} exceeds {limit:.3g}"

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table: quantity, model, largest difference, limit."""
    rows: dict[tuple[str, str], tuple[float, float]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for key, entry in report.user_properties if report.when == "call" else ():
                if key == _KEY:
                    quantity, model, value, limit = entry
                    before, _ = rows.get((quantity, model), (0.0, limit))
                    rows[quantity, model] = (max(value, before), limit)
    if not rows:
        return
    table = [("what", "model", "max |Δ|", "limit")]
    table += [
        (*key, f"{value:.1e}", f"{limit:.0e}") for key, (value, limit) in sorted(rows.items())
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    terminalreporter.section("largest differences")
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
