"""The configuration of ruff."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_folders_of_a_checkout_do_not_change_the_import_order(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "__init__.py").touch()
    (tmp_path / "test.py").write_text(
        "import pytest\nimport runs\n\nimport prefix_jax\n\nprint(prefix_jax, pytest, runs)\n"
    )
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select=I", "test.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
