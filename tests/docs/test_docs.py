"""Every Python block in README.md and docs/*.md runs, page by page, from top to bottom.

All models are replaced by a tiny one, `pj.fit` runs at most three steps, and the working directory
contains the project's `examples/` and `configs/`. A block that cannot run has a line before it:

    <!-- not run: reason -->
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefix_jax import api
from prefix_jax.backbones.loading import pretrained

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
def test_blocks_of_a_page_run_in_order(
    page: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = pretrained.find
    monkeypatch.setattr(
        pretrained, "find", lambda source: find(source if Path(source).is_dir() else tiny_model_dir)
    )
    fit = api.fit
    monkeypatch.setattr(
        api, "fit", lambda *args, steps, **rest: fit(*args, steps=min(steps, 3), **rest)
    )
    for folder in ("examples", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for data in (ROOT / "examples" / "stations").glob("*.jsonl"):
        (tmp_path / data.name).symlink_to(data)
    monkeypatch.chdir(tmp_path)
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
