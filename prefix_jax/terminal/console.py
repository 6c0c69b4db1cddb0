"""Rich consoles that escape what they print."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.text import Text

from prefix_jax.terminal import escape


class _EscapingConsole(Console):
    """A console that passes `BrokenPipeError` on to `main`."""

    @property
    def encoding(self) -> str:
        # Rich looks only at a file that was passed to it, not at standard output.
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise


class _Escaped:
    """A renderable with escaped text."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(encodable(escape(segment.text), console.encoding), segment.style)


class _EscapeHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


def make_console(**options: Any) -> Console:
    """Makes a console that escapes control characters; accepts the options of `rich.Console`."""
    return guard(_EscapingConsole(**options))


def guard(console: Console) -> Console:
    """Makes an existing console escape control characters, and returns it."""
    hooks: Iterable[RenderHook] = console._render_hooks
    if not any(isinstance(hook, _EscapeHook) for hook in hooks):
        # The hook must run first. Bars and spinners add theirs, with control codes, after it.
        console.push_render_hook(_EscapeHook())
    return console


def text(content: object, style: str = "") -> Text:
    """Makes text for a table cell or a bar: escaped, and never parsed as rich markup."""
    return Text(escape(str(content)), style)


def encodable(content: str, encoding: str) -> str:
    """Replaces characters that an encoding does not have with similar ones (see `streams`)."""
    from prefix_jax.terminal import streams

    return content.encode(encoding, streams.FALLBACK).decode(encoding)
