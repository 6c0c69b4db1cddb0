"""Every Python block in README.md and docs/*.md runs, page by page, from top to bottom.

conftest.py replaces the models and limits the training. A block that cannot run has a line before
it:

    <!-- not run: reason -->
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("README.md"), *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(
    r"^(?P<mark><!-- not run: [^\n]+ -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Returns the first line number and the code of every block to run."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start("code")) + 1, match["code"])
        for match in BLOCK.finditer(text)
        if match["mark"] is None
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("fast_docs")
def test_blocks_of_a_page_run_in_order(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, code in blocks(page):
        # Leading blank lines make tracebacks point to the right line of the page.
        exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)


def test_skips_marked_blocks_and_other_languages(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```\nplain\n```\n\n```python\nfirst\n```\n\n<!-- not run: needs a TPU -->\n"
        "```python\nmarked\n```\n\n```bash\nshell\n```\n```python\nsecond\n```\n\n"
        "<!-- not run: neither -->\n```python\nmarked\n```\n"
    )
    assert blocks(page) == [(6, "first\n"), (18, "second\n")]
