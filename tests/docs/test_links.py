"""Links in the documentation lead somewhere, and the commands in it are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from prefix_jax import config
from prefix_jax.cli import plan
from prefix_jax.cli.main import _parse
from prefix_jax.mesh import check_rows
from prefix_jax.plan.topology import Topology

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("examples/*/README.md")]

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)")
SHELL = re.compile(r"```(?:bash|console)\n(.*?)```", re.DOTALL)


def commands(name: str = "prefix-jax") -> list[tuple[str, list[str]]]:
    """Returns the page and the words of every command with this name."""
    return [
        (page.name, shlex.split(line, comments=True))
        for page in PAGES
        for block in SHELL.findall(page.read_text("utf-8"))
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith(f"{name} ")
    ]


def headings(page: Path) -> set[str]:
    """Returns the anchors of a page, in GitHub's form."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text("utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {path}"
        assert not anchor or anchor in headings(target), f"{page.name}: {path}#{anchor}"


def test_readme_shows_every_command() -> None:
    names = {path.stem for path in (ROOT / "prefix_jax" / "cli").glob("[!_]*.py")} - {"main"}
    assert {words[1] for page, words in commands() if page == "README.md"} == names


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda value: str(value)[:60])
def test_commands_are_valid(page: str, words: list[str], monkeypatch) -> None:
    args = _parse(words[1:])
    if words[1] == "plan":
        monkeypatch.chdir(ROOT)
        shown = plan.config_of(args)
        topology = Topology.parse(args.topology, args.slices)
        if not shown.mesh.auto:
            check_rows(topology.mesh(shown.mesh.sizes), shown.data.batch_size, page)
    elif words[1] == "train":
        monkeypatch.chdir(ROOT)
        config.load(args.config, args.settings)
    elif hasattr(args, "settings"):
        config.sections(config.MeasureConfig, {}, args.settings)


@pytest.mark.parametrize("words", [words for _, words in commands("./run_tpu.sh")], ids=" ".join)
def test_batches_of_tpu_commands_divide_over_the_chips(words: list[str]) -> None:
    kind, chips = words[words.index("--accelerator") + 1].split("-")
    assert kind == "v5litepod"  # other types are numbered by cores
    (path,) = (word for word in words if word.endswith(".yaml"))
    shown = config.load(ROOT / path, [word for word in words[1:] if "=" in word])
    assert shown.data.batch_size % int(chips) == 0


def test_make_targets_exist() -> None:
    shown = set(re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / "README.md").read_text("utf-8"), re.M))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    assert shown <= targets
