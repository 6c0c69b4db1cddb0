"""The notebook runs from top to bottom, with a tiny model and a few steps."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def notebook() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)


def test_notebook_runs(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    client = NotebookClient(
        notebook(), timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    # One device, as for users, instead of the tests' eight.
    env = os.environ | {"MODEL": str(tiny_model_dir), "STEPS": "3", "XLA_FLAGS": ""}
    executed = client.execute(env=env)
    (image,) = [
        output["data"]["image/png"]
        for cell in executed.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(image) > 1000
    assert "keys   (2, 8, 2, 8) float32" in _printed(executed)


def test_notebook_is_stored_without_outputs() -> None:
    cells = [cell for cell in notebook().cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def _printed(executed: nbformat.NotebookNode) -> str:
    return "".join(
        output["text"]
        for cell in executed.cells
        for output in cell.get("outputs", ())
        if output["output_type"] == "stream"
    )
