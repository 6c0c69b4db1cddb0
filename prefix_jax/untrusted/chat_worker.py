"""Renders chat templates under limits. `chat.py` starts this file as a script in a child process.

Requests and replies are JSON, one per line. The first request sets the import path and the limits.
Each later request contains a chat and its cuts, and gets one reply per cut.
"""

from __future__ import annotations

import datetime
import json
import signal
import sys
from collections.abc import Mapping
from typing import Any

# Maximum length of a reported message of a template.
_MESSAGE_CHARS = 500
# The fields in which templates expect a turn's reasoning; transformers copies it to each of them.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def main() -> None:
    """Serves requests until stdin closes, which also happens when the parent is killed."""
    setup = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = setup["path"]
    _accept_timer()
    try:
        compile_template = _import_jinja()
        # Triggers the lazy imports of Jinja and strftime, before the limits forbid opening files.
        warm_up = compile_template("{{ strftime_now('%d %b') }}{{ [] | tojson }}{{ x.y }}")
        _render(warm_up, {}, [], False, 1)
    except ImportError as failure:
        _send({"error": "import", "message": str(failure)})
        return
    _limit(setup["memory"])
    _send({})
    sys.stdout.buffer.flush()
    template: Any = None
    variables: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "template" in request:
            _set_timer(setup["seconds"])
            template, variables = _compile(compile_template, request), request["variables"]
        turns = [_with_reasoning(turn) for turn in request["turns"]]
        for count, answer_follows in request["cuts"]:
            # The default action of SIGPROF ends the process, even inside a long C call.
            _set_timer(setup["seconds"])
            reply = template
            if not isinstance(template, dict):
                reply = _render(
                    template, variables, turns[:count], answer_follows, setup["characters"]
                )
            _set_timer(0)
            _send(reply)
            if reply.get("error") == "memory":
                return  # a new process starts with all of its memory
        sys.stdout.buffer.flush()


def _compile(compile_template: Any, request: Mapping[str, Any]) -> Any:
    """Compiles a template; returns the error reply if that fails."""
    try:
        return compile_template(request["template"])
    except Exception as failure:
        return _failed(failure)


def _render(
    template: Any, variables: Mapping[str, Any], turns: list[Any], answer_follows: bool, limit: int
) -> dict[str, Any]:
    """Renders one cut; returns the reply, with the text or an error."""
    pieces, size = [], 0
    try:
        # The variables that transformers sets. Special tokens may override them.
        values = {
            "messages": turns,
            "tools": None,
            "documents": None,
            "add_generation_prompt": answer_follows,
        }
        for piece in template.generate(values | dict(variables)):
            size += len(piece)
            if size > limit:
                return {"error": "output"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except Exception as failure:
        return _failed(failure)


def _failed(failure: Exception) -> dict[str, Any]:
    import jinja2

    if isinstance(failure, MemoryError):
        return {"error": "memory"}
    kind = "refused" if isinstance(failure, jinja2.TemplateError) else "failed"
    message = str(failure)[:_MESSAGE_CHARS] or type(failure).__name__
    return {"error": kind, "type": type(failure).__name__, "message": message}


def _with_reasoning(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    reasoning = next((turn[key] for key in _REASONING if turn.get(key) is not None), None)
    if reasoning is None:
        return turn
    return {"thinking": reasoning, **turn, "reasoning_content": reasoning}


def _import_jinja() -> Any:
    """Returns a function that compiles templates in the environment of transformers 5.23."""
    import jinja2
    import jinja2.constants
    import jinja2.debug
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` blocks, which mark an assistant's turn and render as their body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    class Dict:
        """`dict` without the attributes of a type."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class Namespace(jinja2.utils.Namespace):
        """`namespace` that rejects names with a leading underscore."""

        def __init__(*args: Any, **values: Any) -> None:
            self, *rest = args
            attributes = dict(*rest, **values)
            for name in attributes:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"{name!r}: names in a namespace must not begin with an underscore"
            )

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: Any) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    def compile_template(text: str) -> Any:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
            "dict": Dict(),
            "namespace": Namespace,
        }
        return environment.from_string(text)

    return compile_template


def _limit(memory: int) -> None:
    """Limits memory to this many bytes above the current use; forbids new files and processes.

    Jinja's sandbox already blocks these. The limits are a second line of defence.
    """
    try:
        import resource
    except ImportError:  # not on Windows
        return
    limits = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_NOFILE": 3}
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
            limits["RLIMIT_AS"] = int(file.read().split()[0]) * resource.getpagesize() + memory
    except OSError:  # macOS, which does not enforce this limit
        pass
    for name, value in limits.items():
        try:
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        except (AttributeError, OSError, ValueError):
            pass


def _accept_timer() -> None:
    """Restores the timer's signal, which a profiler in the parent may block or ignore."""
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})


def _set_timer(seconds: float) -> None:
    """Ends the process after this much CPU time; 0 cancels the timer."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _send(reply: Mapping[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
