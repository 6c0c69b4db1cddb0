"""`generate` continues a prompt, a record, a file or what is typed."""

import io
import json
import os
import sys
import types
from pathlib import Path

import pytest
import tiny

from prefix_jax.api import load_prefix
from prefix_jax.cli import generate as verb
from prefix_jax.cli.main import main
from prefix_jax.config import DecodeConfig

RECORD = {"facts": "name[Stop 1], it's"}


@pytest.fixture(scope="module")
def tuned(trained):
    folder, _ = trained
    return load_prefix(folder / "run", folder / "model")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_prompt_is_continued_as_it_stands(run_in, trained, tuned):
    ran = run_in(trained[0], "generate", "run", "--prompt", "name[X]")
    assert ran.code == 0
    assert ran.out == tuned.generate("name[X]") + "\n"


def test_a_record_becomes_a_prompt_by_the_template_of_the_training(run_in, trained, tuned):
    ran = run_in(trained[0], "generate", "run", "--record", json.dumps(RECORD))
    assert ran.out == tuned.generate(RECORD) + "\n"
    assert ran.out == tuned.generate(RECORD["facts"] + "\n") + "\n"


def test_decoding_is_that_of_the_training_unless_set(run_in, trained, tuned):
    assert tuned.decode.max_new_tokens == 6
    words = ("generate", "run", "--record", json.dumps(RECORD))
    # Settings may stand anywhere.
    ran = run_in(trained[0], *words, "decode.max_new_tokens=2")
    assert ran.out == tuned.generate(RECORD, max_new_tokens=2) + "\n"
    assert run_in(trained[0], words[0], "run", "decode.max_new_tokens=2", *words[2:]).out == ran.out


def test_several_samples_are_a_line_each(run_in, trained, tuned):
    settings = ["decode.temperature=1", "decode.samples=3", "decode.banned_words=['\\n']"]
    ran = run_in(trained[0], "generate", "run", "--prompt", "x", *settings)
    found = tuned.generate("x", temperature=1.0, samples=3, banned_words=["\n"])
    assert ran.out == "".join(text.strip() + "\n" for text in found)


def test_without_the_prefix_the_bare_model_speaks(run_in, trained, tuned):
    bare = tuned.without_prefix()
    assert bare.prefix is None
    ran = run_in(trained[0], "generate", "run", "--no-prefix", "--prompt", "name[X]")
    assert ran.out == bare.generate("name[X]") + "\n"


def test_a_file_is_answered_in_its_order(run_in, trained, tuned, tmp_path):
    output = tmp_path / "new" / "predictions.jsonl"
    ran = run_in(trained[0], "generate", "run", "--input", "test.jsonl", "--output", str(output))
    assert ran.code == 0
    assert ran.out == ""
    records = lines(trained[0] / "test.jsonl")
    assert [made["source"] for made in lines(output)] == [f"test.jsonl:{i}" for i in range(1, 6)]
    assert [made["prompt"] for made in lines(output)] == [r["facts"] + "\n" for r in records]
    texts = tuned.generate(records)
    assert [made["prediction"] for made in lines(output)] == [text.strip() for text in texts]
    assert [path.name for path in output.parent.iterdir()] == ["predictions.jsonl"]


def test_predictions_come_in_order_and_an_interrupt_keeps_those_that_came(tuned, tmp_path):
    records = [{"facts": "x" * (40 - i)} for i in range(6)]
    seen = []

    def watch(made):
        seen.append(made.source)
        if len(seen) == 3:
            raise KeyboardInterrupt

    output = tmp_path / "p.jsonl"
    with pytest.raises(KeyboardInterrupt):
        tuned.predict(records, output=output, on_prediction=watch, batch_size=2)
    assert seen == ["record 1", "record 2", "record 3"]
    assert not output.exists()
    kept = lines(tmp_path / "p.jsonl.unfinished")
    assert [made["source"] for made in kept] == seen[: len(kept)]
    assert len(kept) >= 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"facts": "a"}\n{"facts": \n', "bad.jsonl:2: malformed JSON"),
        ('{"facts": "a"}\n{"fact": "b"}\n', "bad.jsonl:2: no field 'facts' (did you mean 'fact'?)"),
        ('{"facts": "a"}\n{"facts": null}\n', "bad.jsonl:2: field 'facts' is missing"),
        ('{"facts": "a"}\n{"facts": "%s"}\n' % ("b" * 300), "bad.jsonl:2: 301 tokens"),
        ("", "no records"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_generated(
    run_in, folder, trained, monkeypatch, content, told
):
    monkeypatch.setattr("prefix_jax.decode.generate.read", None)
    (folder / "bad.jsonl").write_text(content)
    words = ("--input", "bad.jsonl", "--output", "p.jsonl")
    ran = run_in(folder, "generate", str(trained[0] / "run"), *words)
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert told in ran.err
    assert not (folder / "p.jsonl").exists()


def test_lines_that_are_typed_fill_the_template(run_in, trained, tuned, monkeypatch):
    typed = [RECORD["facts"], "y" * 300, "name[Stop 2]"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    ran = run_in(trained[0], "generate", "run")
    assert ran.code == 0
    answers = [tuned.generate(RECORD), "", tuned.generate({"facts": "name[Stop 2]"})]
    assert ran.out == "".join(answer + "\n" for answer in answers)
    assert "301 tokens" in ran.err


def test_typed_lines_that_are_no_text_are_an_error(run_in, trained, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"name[X]\xff\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    ran = run_in(trained[0], "generate", "run")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: standard input: expected utf-8 text, got byte 0xff\n"


def test_an_input_that_ends_within_a_record_is_an_error(run_in, trained, monkeypatch):
    def two(_tuned):
        return ("facts", "town")

    monkeypatch.setattr("prefix_jax.api.Tuned.fields", property(two))
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\nc\n"))
    ran = run_in(trained[0], "generate", "run")
    assert ran.code == 2
    assert ran.out.count("\n") == 1
    assert "the input ends within a record: town would be next" in ran.err


def test_predictions_go_into_a_pipe_or_a_device_as_it_is(tuned, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        tuned.predict([RECORD], output=pipe)
        assert json.loads(os.read(reader, 1 << 16))["source"] == "record 1"
    finally:
        os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert pipe.is_fifo()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_terminal_gets_no_escapes_that_a_model_wrote(monkeypatch, stream, samples):
    def write(_prompts, decode, on_text=None):
        if on_text is not None:
            on_text(0, 0, "a\x1b[2Jb")
        sample = types.SimpleNamespace(text="a\x1b[2Jb")
        return [types.SimpleNamespace(samples=[sample] * decode.samples)]

    settings = types.SimpleNamespace(decode=DecodeConfig(samples=samples, temperature=1.0))
    tuned = types.SimpleNamespace(generations=write)
    monkeypatch.setattr(verb._stored, "load", lambda *_: (tuned, settings))
    monkeypatch.setattr(sys, "stdout", stream())
    words = ["generate", "run", "--prompt", "x"]
    assert main(words) == 0
    shown = sys.stdout.getvalue()
    assert shown.count("a\x1b[2Jb" if stream is io.StringIO else r"a\x1b[2Jb") == samples


def test_names_of_fields_that_are_asked_for_are_escaped(monkeypatch):
    asked = []
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", asked.append)
    verb._line("a\x1b[2J")
    assert asked == [r"a\x1b[2J> "]


def test_an_interrupt_stops_an_answer_and_not_the_dialogue(tuned, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    asked = []

    def answer(_tuned, _decode, prompt, _progress):
        asked.append(prompt)
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_answer", answer)
    verb._dialogue(tuned, tuned.decode, None)
    assert asked == [{"facts": "one"}, {"facts": "two"}]


def test_other_weights_are_refused_unless_allowed(run_in, trained, tmp_path):
    other = tiny.write_model(tmp_path / "other", seed=1)
    words = ("generate", "run", "--prompt", "x", "--model", str(other))
    ran = run_in(trained[0], *words)
    assert ran.code == 2
    assert "--allow-other-weights" in ran.err
    assert run_in(trained[0], *words, "--allow-other-weights").code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--record", "{"], "--record: malformed JSON"),
        (["--record", "[" * 9999], "--record: JSON nested more than"),
        (
            ["--record", '{"facts": %s}' % ("9" * 5000)],
            "--record: JSON with an integer of more than 4,300 digits",
        ),
        (["--record", '{"facts": "a", "facts": "b"}'], "the key 'facts' appears twice"),
        (["--record", "[1]"], "--record: expected an object"),
        (["--record", '{"fact": "x"}'], "the record: no field 'facts' (did you mean 'fact'?)"),
        (["--prompt", ""], "is empty"),
        (["--prompt", "x", "decode.beems=5"], "did you mean decode.beams?"),
        (["--prompt", "x", "beams=5"], "did you mean decode.beams?"),
        (["--prompt", "x", "decode.beams=some"], "expected int; got 'some'"),
        (["--prompt", "x", "evaluate.limit=5"], "unknown key"),
        (["--prompt", "x", "decode.max_new_tokens=999"], "exceed the model's 256 positions"),
        (["--prompt", "x", "--output", "p.jsonl"], "give both"),
        (["--input", "none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_error(run_in, trained, words, told):
    ran = run_in(trained[0], "generate", "run", *words)
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert told in ran.err


def test_the_records_are_not_replaced_by_predictions(run_in, trained):
    folder, _ = trained
    before = (folder / "test.jsonl").read_bytes()
    ran = run_in(folder, "generate", "run", "--input", "test.jsonl", "--output", "./test.jsonl")
    assert ran.code == 2
    assert "would replace the records" in ran.err
    assert (folder / "test.jsonl").read_bytes() == before


def test_an_error_leaves_standard_output_empty(run_in, trained):
    for words in (("--record", '{"fact": "x"}'), ("--prompt", "bad\udcff")):
        ran = run_in(trained[0], "generate", "run", *words)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("error: ")
