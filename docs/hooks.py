"""MkDocs hooks: adds the pages that live outside docs/, and the notebook.

README.md becomes the front page. The pages link to each other as on GitHub; links to other files of
the repository are rewritten, and those files are copied into the site.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages outside docs/ by their path in the repository, with their path in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "configs/README.md": "recipes.md",
    "examples/stations/README.md": "stations.md",
}
NOTEBOOK = "docs/quickstart.ipynb"
_LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of `PAGES` and the notebook, as Markdown."""
    for path, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text("utf-8")))
    files.append(File.generated(config, _site_path(NOTEBOOK), content=_notebook()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites the links of a page, and copies the files that they lead to."""
    sources = {name: path for path, name in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = _site_path(path)
        if files.get_file_from_path(target) is None and (ROOT / path).is_file():
            files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
        return match[1] + posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(rewrite, markdown)


def _site_path(path: str) -> str:
    """Returns the path in the site of a file of the repository."""
    if path == NOTEBOOK:
        return "quickstart.md"
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"


def _notebook() -> str:
    cells = json.loads((ROOT / NOTEBOOK).read_text("utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(
        text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in texts
    )
