"""Chat templates: rendering as in transformers, and the limits and life of the worker process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from mutations import HOSTILE_VALUES, mutate_text, refusal
from transformers import PreTrainedTokenizerFast

from prefix_jax.errors import DataError
from prefix_jax.untrusted import chat

TURNS = [
    {"role": "system", "content": "Be  brief.\n"},
    {"role": "user", "content": " What is 1 < 2 & 'x'? "},
    {"role": "assistant", "content": "True é 😀"},
    {"role": "user", "content": "Sure?"},
]
# Excerpts of published templates that use every extension of transformers.
TEMPLATES = {
    "smollm2": """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are a helpful AI assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "llama3": r"""{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    "gemma": """{{ bos_token }}{% set messages = messages[1:] %}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}\
{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}""",
    "mistral": """{%- set loop_messages = messages[1:] %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message.role == 'tool' %}{% continue %}{%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content']|trim + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "qwen3": r"""{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not
            (message.content.startswith('<tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
        {% break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
{%- endfor %}{{ ns.last }}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}
    {% generation %}
{{ m.content }}{% endgeneration %}

    {% else %}
{{ m | tojson }}{{ m | tojson(indent=2) }}{% endif %}{% endfor %}
{{ messages[0] | items | list }}{{ dict(a=1).a }}{{ undefined }}{{ tools is none }}""",
}
CUTS = [(2, True), (3, False), (4, True)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    directory = tiny.write_model(tmp_path_factory.mktemp("chat") / "model")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def short(monkeypatch) -> Iterator[None]:
    """Low limits, so that hostile templates reach them quickly."""
    chat._worker.stop()
    monkeypatch.setattr(chat, "CPU_SECONDS", 0.5)
    monkeypatch.setattr(chat, "MEMORY_BYTES", 2**26)
    monkeypatch.setattr(chat, "MAX_CHARACTERS", 10**6)
    yield
    chat._worker.stop()


def render(template: Any, turns: list = TURNS, cuts: list = CUTS, **variables: str) -> list[str]:
    return chat.render_chat_template(template, variables, turns, cuts, "a.jsonl:3", DataError)


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_like_transformers(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = [
        tokenizer.apply_chat_template(
            TURNS[:count],
            chat_template=TEMPLATES[name],
            tokenize=False,
            add_generation_prompt=answer_follows,
        )
        for count, answer_follows in CUTS
    ]
    assert render(TEMPLATES[name], **tokenizer.special_tokens_map) == expected


def test_reasoning_is_available_under_every_name() -> None:
    turns = [{"role": "assistant", "content": "a", "reasoning": "b"}]
    template = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    assert render(template, turns, [(1, False)]) == ["bb"]


def test_values_without_a_json_type_become_placeholders() -> None:
    turns = [{"role": "user", "content": "a", "image": b"x"}]
    assert render("{{ messages[0].image }}", turns, [(1, False)]) == ["<bytes>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "rejects the chat: roles must alternate"),
        ("{{ 1/0 }}", "fails with ZeroDivisionError: division by zero"),
        ("{{ 1 + 'a' }}", "fails with TypeError: unsupported operand"),
        ("{{ range(10**9) }}", "fails with OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails with RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "rejects the chat: access to attribute '__class__'"),
        ("{% if %}", "rejects the chat: Expected an expression"),
        ("{% include '/etc/passwd' %}", "fails with TypeError: no loader"),
        ("{{ namespace(_a=1) }}", "rejects the chat: '_a'"),
        ("x" * 1_000_001, "has 1,000,001 characters, at most 1,000,000 are supported"),
    ],
)
def test_failing_template_is_one_error(template: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        render(template)
    assert str(caught.value).startswith("a.jsonl:3: the tokenizer's chat template ")
    assert message in str(caught.value)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP.replace("BODY", ""), "did not finish within 0.5 seconds of CPU time"),
        ("{{ 9 ** (9 ** 9) }}", "seconds of CPU time|bytes of memory"),
        (LOOP.replace("BODY", "x" * 99), "writes more than 1,000,000 characters"),
        ("{{ 'a' * 9999999999 }}", "needs more than 67,108,864 bytes of memory"),
        ("{{ 'a'|center(10**10) }}", "bytes of memory"),
        ("{{ '%9999999999d' % 1 }}", "bytes of memory"),
        (
            "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
            "{% endfor %}",
            "bytes of memory",
        ),
    ],
)
@pytest.mark.usefixtures("short")
def test_endless_template_is_one_error(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(template)
    assert render("{{ messages | length }}") == ["2", "3", "4"]


def test_mutated_templates_render_or_raise_one_error(short: None) -> None:
    sources = list(TEMPLATES.values())
    for seed in range(400):
        rng = random.Random(seed)
        template = mutate_text(rng.choice(sources), rng)
        refusal(lambda: render(template, bos_token="<s>", eos_token="</s>"), DataError)  # noqa: B023


@pytest.mark.parametrize("value", [v for v in HOSTILE_VALUES if not isinstance(v, str)])
def test_turns_may_contain_any_value(value: Any) -> None:
    turns = [{"role": "user", "content": "a", "x": value, "y": [value]}]
    assert render("{{ messages[0].content }}{{ messages[0].x and 1 }}", turns, [(1, True)])


def test_threads_share_the_worker() -> None:
    failures: list[object] = []

    def work(number: int) -> None:
        turns = [{"role": "user", "content": f"{number}-{'x' * 5000}"}]
        for _ in range(30):
            if render("{{ messages[0].content }}", turns, [(1, True)]) != [turns[0]["content"]]:
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_restarts_a_killed_worker() -> None:
    assert render("a", cuts=[(1, True)]) == ["a"]
    assert chat._worker._process is not None
    os.kill(chat._worker._process.pid, signal.SIGKILL)
    chat._worker._process.wait()
    with pytest.raises(DataError, match="crashed with SIGKILL"):
        render("a", cuts=[(1, True)])
    assert render("a", cuts=[(1, True)]) == ["a"]


# The script of the processes that tests start.
PROLOGUE = """
import os, threading
from prefix_jax.errors import DataError
from prefix_jax.untrusted import chat
chat.CPU_SECONDS = 1
def render(template):
    turns = [{"role": "user", "content": "a"}]
    return chat.render_chat_template(template, {}, turns, [(1, True)], "", DataError)
render("a")
print(chat._worker._process.pid, flush=True)
"""


def start(script: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", PROLOGUE + script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


def test_forked_process_gets_its_own_worker() -> None:
    script = (
        "pid = os.fork()\n"
        "assert render(f'{os.getpid()}') == [f'{os.getpid()}']\n"
        "assert not pid or os.waitpid(pid, 0)[1] == 0\n"
        "assert render('b') == ['b']\n"
    )
    with start(script) as process:
        assert process.wait(timeout=60) == 0


def test_time_is_limited_even_if_the_parent_ignores_the_timer() -> None:
    """A profiler may block and ignore the timer's signal, and child processes inherit both."""
    script = (
        "import signal\n"
        "chat._worker.stop()\n"
        "signal.signal(signal.SIGPROF, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})\n"
        "try:\n"
        f"    render({LOOP.replace('BODY', '')!r})\n"
        "except DataError as error:\n"
        "    assert 'did not finish within 1 seconds' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('the template ended')\n"
    )
    with start(script) as process:
        assert process.wait(timeout=100) == 0


@pytest.mark.parametrize("state", [f"render({LOOP!r})", "threading.Event().wait()"])
def test_no_worker_outlives_a_killed_process(state: str) -> None:
    with start(state) as process:
        assert process.stdout is not None
        worker = psutil.Process(int(process.stdout.readline()))
        process.kill()
    gone, _ = psutil.wait_procs([worker], timeout=60)
    assert gone


def test_interrupt_leaves_no_stale_reply() -> None:
    """A reply left unread by an interrupt would be taken for the reply to the next chat."""

    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Interrupt):
            render(LOOP.replace("BODY", ""))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert render("b", cuts=[(1, True)]) == ["b"]


def test_worker_does_not_inherit_the_environment(monkeypatch) -> None:
    chat._worker.stop()
    monkeypatch.setenv("HF_TOKEN", "secret")
    render("a")
    assert chat._worker._process is not None
    assert "HF_TOKEN" not in psutil.Process(chat._worker._process.pid).environ()


def test_missing_jinja_is_one_error(monkeypatch) -> None:
    chat._worker.stop()
    others = [path for path in sys.path if not (Path(path) / "jinja2").exists()]
    monkeypatch.setattr(sys, "path", others)
    with pytest.raises(DataError, match=r"needs Jinja, .*No module named 'jinja2'.*pip install"):
        render("a")
