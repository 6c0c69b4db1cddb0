"""`prefix-jax bake` stores a text as a prefix that `generate` uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefix_jax import artifact
from prefix_jax.cli.main import main


def test_text_and_file_give_the_same_prefix(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "system.txt").write_text("be brief: ", encoding="utf-8")
    bake = ["bake", str(tiny_model_dir), "--output"]
    assert main([*bake, str(tmp_path / "a"), "--text", "be brief: "]) == 0
    assert "10 slots" in capsys.readouterr().out
    assert main([*bake, str(tmp_path / "b"), "--file", str(tmp_path / "system.txt")]) == 0
    first, second = (artifact.load(tmp_path / name)[1] for name in "ab")
    assert first.spec == second.spec
    assert main(["generate", str(tmp_path / "a"), "--prompt", "hello"]) == 0


def test_existing_prefix_is_kept(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bake", str(tiny_model_dir), "--text", "x", "--output", str(tmp_path / "a")]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "already contains a prefix" in capsys.readouterr().err


@pytest.mark.parametrize("text", [["--text", ""], ["--file", "absent.txt"]])
def test_unusable_text_is_one_error(
    text: list[str], tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bake", str(tiny_model_dir), *text, "--output", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "a").exists()
