"""`prefix-jax generate`: prompts, records, files and interactive input."""

import io
import json
import os
import shutil
import sys
import types
from pathlib import Path

import jax
import pytest
import tiny

from prefix_jax import artifact
from prefix_jax.api import load_prefix
from prefix_jax.cli import generate as command
from prefix_jax.cli.main import main
from prefix_jax.config import DecodeConfig

RECORD = {"facts": "name[Stop 1], it's"}


@pytest.fixture(scope="module")
def tuned(trained):
    folder, _ = trained
    return load_prefix(folder / "run", folder / "model")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prompt_is_used_unchanged(run_in, trained, tuned):
    ran = run_in(trained[0], "generate", "run", "--prompt", "name[X]")
    assert ran.code == 0
    assert ran.out == tuned.generate("name[X]") + "\n"


def test_record_is_rendered_with_the_training_template(run_in, trained, tuned):
    ran = run_in(trained[0], "generate", "run", "--record", json.dumps(RECORD))
    assert ran.out == tuned.generate(RECORD) + "\n"
    assert ran.out == tuned.generate(RECORD["facts"] + "\n") + "\n"


def test_decoding_defaults_to_the_training_settings(run_in, trained, tuned):
    assert tuned.decode.max_new_tokens == 6
    words = ("generate", "run", "--record", json.dumps(RECORD))
    # Settings may come before or after options.
    ran = run_in(trained[0], *words, "decode.max_new_tokens=2")
    assert ran.out == tuned.generate(RECORD, max_new_tokens=2) + "\n"
    assert run_in(trained[0], words[0], "run", "decode.max_new_tokens=2", *words[2:]).out == ran.out


def test_prints_one_line_per_sample(run_in, trained, tuned):
    settings = ["decode.temperature=1", "decode.num_samples=3", "decode.banned_words=['\\n']"]
    ran = run_in(trained[0], "generate", "run", "--prompt", "x", *settings)
    texts = tuned.generate("x", temperature=1.0, num_samples=3, banned_words=["\n"])
    assert ran.out == "".join(text.strip() + "\n" for text in texts)


def test_no_prefix_generates_with_the_bare_model(run_in, trained, tuned):
    bare = tuned.without_prefix()
    assert bare.prefix is None
    ran = run_in(trained[0], "generate", "run", "--no-prefix", "--prompt", "name[X]")
    assert ran.out == bare.generate("name[X]") + "\n"


def test_file_is_answered_in_order(run_in, trained, tuned, tmp_path):
    output = tmp_path / "new" / "predictions.jsonl"
    ran = run_in(trained[0], "generate", "run", "--input", "test.jsonl", "--output", str(output))
    assert ran.code == 0
    assert ran.out == ""
    records = lines(trained[0] / "test.jsonl")
    assert [prediction["origin"] for prediction in lines(output)] == [
        f"test.jsonl:{i}" for i in range(1, 6)
    ]
    assert [prediction["prompt"] for prediction in lines(output)] == [
        r["facts"] + "\n" for r in records
    ]
    texts = tuned.generate(records)
    assert [prediction["prediction"] for prediction in lines(output)] == [
        text.strip() for text in texts
    ]
    assert [path.name for path in output.parent.iterdir()] == ["predictions.jsonl"]


def test_interrupt_keeps_the_predictions_so_far(tuned, tmp_path):
    records = [{"facts": "x" * (40 - i)} for i in range(6)]
    seen = []

    def watch(prediction):
        seen.append(prediction.origin)
        if len(seen) == 3:
            raise KeyboardInterrupt

    output = tmp_path / "p.jsonl"
    with pytest.raises(KeyboardInterrupt):
        tuned.predict(records, output=output, on_prediction=watch, batch_size=2)
    assert seen == ["record 1", "record 2", "record 3"]
    assert not output.exists()
    kept = lines(tmp_path / "p.jsonl.unfinished")
    assert [prediction["origin"] for prediction in kept] == seen[: len(kept)]
    assert len(kept) >= 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"facts": "a"}\n{"facts": \n', "bad.jsonl:2: malformed JSON"),
        ('{"facts": "a"}\n{"fact": "b"}\n', "bad.jsonl:2: no field 'facts' (did you mean 'fact'?)"),
        ('{"facts": "a"}\n{"facts": null}\n', "bad.jsonl:2: field 'facts' is missing"),
        ('{"facts": "a"}\n{"facts": "%s"}\n' % ("b" * 300), "bad.jsonl:2: 301 tokens"),
        ("", "no records"),
    ],
)
def test_reports_a_bad_record_before_generating(
    run_in, folder, trained, monkeypatch, content, message
):
    monkeypatch.setattr("prefix_jax.decode.generate.prefill", None)
    (folder / "bad.jsonl").write_text(content)
    words = ("--input", "bad.jsonl", "--output", "p.jsonl")
    ran = run_in(folder, "generate", str(trained[0] / "run"), *words)
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert message in ran.err
    assert not (folder / "p.jsonl").exists()


def test_typed_lines_fill_the_template(run_in, trained, tuned, monkeypatch):
    typed = [RECORD["facts"], "y" * 300, "name[Stop 2]"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    ran = run_in(trained[0], "generate", "run")
    assert ran.code == 0
    answers = [tuned.generate(RECORD), "", tuned.generate({"facts": "name[Stop 2]"})]
    assert ran.out == "".join(answer + "\n" for answer in answers)
    assert "301 tokens" in ran.err


def test_typed_bytes_that_are_not_text_are_an_error(run_in, trained, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"name[X]\xff\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    ran = run_in(trained[0], "generate", "run")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: standard input: expected utf-8 text, got byte 0xff\n"


def test_input_that_ends_inside_a_record_is_an_error(run_in, trained, monkeypatch):
    def two(_tuned):
        return ("facts", "town")

    monkeypatch.setattr("prefix_jax.tasks.TextTask.form", property(two))
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\nc\n"))
    ran = run_in(trained[0], "generate", "run")
    assert ran.code == 2
    assert ran.out.count("\n") == 1
    assert "standard input ends inside a record, before town" in ran.err


def test_predictions_can_be_written_to_a_pipe(tuned, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        tuned.predict([RECORD], output=pipe)
        assert json.loads(os.read(reader, 1 << 16))["origin"] == "record 1"
    finally:
        os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert pipe.is_fifo()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("samples", [1, 2])
def test_generated_escapes_never_reach_a_terminal(monkeypatch, stream, samples):
    def write(_prompt, decode, on_text=None, details=False):
        if on_text is not None:
            on_text(0, 0, "a\x1b[2Jb")
        sample = types.SimpleNamespace(text="a\x1b[2Jb")
        return types.SimpleNamespace(samples=[sample] * decode.num_samples)

    settings = types.SimpleNamespace(decode=DecodeConfig(num_samples=samples, temperature=1.0))
    tuned = types.SimpleNamespace(generate=write)
    monkeypatch.setattr(command._stored, "load", lambda *_: (tuned, settings))
    monkeypatch.setattr(sys, "stdout", stream())
    words = ["generate", "run", "--prompt", "x"]
    assert main(words) == 0
    shown = sys.stdout.getvalue()
    assert shown.count("a\x1b[2Jb" if stream is io.StringIO else r"a\x1b[2Jb") == samples


def test_escapes_the_names_of_requested_fields(monkeypatch):
    asked = []
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", asked.append)
    command._read_line("a\x1b[2J")
    assert asked == [r"a\x1b[2J> "]


def test_interrupt_stops_one_answer_and_not_the_dialogue(tuned, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    asked = []

    def answer(_tuned, _decode, prompt, _progress):
        asked.append(prompt)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_answer", answer)
    command._dialogue(tuned, tuned.decode, None)
    assert asked == [{"facts": "one"}, {"facts": "two"}]


def test_rejects_other_weights_unless_allowed(run_in, trained, tmp_path):
    other = tiny.write_model(tmp_path / "other", seed=1)
    words = ("generate", "run", "--prompt", "x", "--model", str(other))
    ran = run_in(trained[0], *words)
    assert ran.code == 2
    assert "--allow-other-weights" in ran.err
    assert run_in(trained[0], *words, "--allow-other-weights").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
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
        (["--prompt", "x", "decode.num_beems=5"], "did you mean decode.num_beams?"),
        (["--prompt", "x", "num_beams=5"], "did you mean decode.num_beams?"),
        (["--prompt", "x", "decode.num_beams=some"], "must be an integer in [1, 1024], got 'some'"),
        (["--prompt", "x", "evaluate.max_examples=5"], "unknown key"),
        (["--prompt", "x", "decode.max_new_tokens=999"], "exceed the model's 256 positions"),
        (["--prompt", "x", "--output", "p.jsonl"], "give both"),
        (["--input", "none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_reports_mistakes_in_one_error(run_in, trained, words, message):
    ran = run_in(trained[0], "generate", "run", *words)
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert message in ran.err


def test_never_overwrites_the_records_with_predictions(run_in, trained):
    folder, _ = trained
    before = (folder / "test.jsonl").read_bytes()
    ran = run_in(folder, "generate", "run", "--input", "test.jsonl", "--output", "./test.jsonl")
    assert ran.code == 2
    assert "would overwrite the records" in ran.err
    assert (folder / "test.jsonl").read_bytes() == before


def test_error_leaves_standard_output_empty(run_in, trained):
    for words in (("--record", '{"fact": "x"}'), ("--prompt", "bad\udcff")):
        ran = run_in(trained[0], "generate", "run", *words)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("error: ")


FACTS = ("name[Stop 1]", "name[Stop 2], it's", "x", "name[Stop 4]", "no name")


@pytest.fixture(scope="module")
def mixed(trained, tuned, tmp_path_factory):
    """A folder with two prefixes, and records that choose among them."""
    folder = tmp_path_factory.mktemp("mixed") / "copy"
    shutil.copytree(trained[0], folder)
    shifted = jax.tree.map(lambda x: 3 - 2 * x, tuned.produced)
    artifact.save(folder / "legal", shifted, tuned.card)
    names = ["legal", None, "support", "legal"]
    records = [{"facts": f, "prefix": n} for f, n in zip(FACTS, names, strict=False)]
    records.append({"facts": FACTS[-1]})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "mixed.jsonl").write_text(text)
    (folder / "unknown.jsonl").write_text(text + '{"facts": "a", "prefix": "lega"}\n')
    (folder / "named.jsonl").write_text(json.dumps(records[0]) + "\n")
    return folder


class TestSeveralPrefixes:
    """`--prefix NAME=DIR`."""

    def expected(self, mixed, default):
        """The texts of mixed.jsonl, generated by one prefix at a time."""
        legal = load_prefix(mixed / "legal", default.pretrained)
        run = load_prefix(mixed / "run", default.pretrained)
        models = [legal, default, run, legal, default]
        records = [{"facts": facts} for facts in FACTS]
        options = {"temperature": 5.0, "seed": 4}
        return [
            model.generate(records, **options)[index].strip() for index, model in enumerate(models)
        ]

    WORDS = ("--prefix", "legal=legal", "--prefix", "support=run")

    @pytest.mark.parametrize("bare", [False, True])
    def test_records_choose_their_prefix(self, run_in, mixed, tuned, tmp_path, bare):
        output = tmp_path / "p.jsonl"
        words = [*self.WORDS, *(["--no-prefix"] if bare else [])]
        words += ["decode.temperature=5", "decode.seed=4"]
        ran = run_in(
            mixed, "generate", "run", "--input", "mixed.jsonl", "--output", str(output), *words
        )
        assert ran.code == 0, ran.err
        assert "wrote 5 predictions" in ran.err
        texts = self.expected(mixed, tuned.without_prefix() if bare else tuned)
        assert len(set(texts)) == 5
        assert [prediction["prediction"] for prediction in lines(output)] == texts
        assert [prediction["origin"] for prediction in lines(output)] == [
            f"mixed.jsonl:{i}" for i in range(1, 6)
        ]
        assert lines(output)[0].keys() == {"origin", "prompt", "prediction", "references"}

    def test_first_argument_may_be_a_backbone(self, run_in, mixed, tuned):
        words = ("generate", "model", "--prefix", "legal=legal", "--input", "named.jsonl")
        ran = run_in(mixed, *words, "decode.max_new_tokens=3")
        assert ran.code == 0, ran.err
        legal = load_prefix(mixed / "legal", tuned.pretrained)
        text = legal.generate({"facts": FACTS[0]}, max_new_tokens=3)
        assert ran.out == text.strip() + "\n"

    def test_records_may_have_a_field_prefix_of_their_own(self, run_in, mixed):
        ran = run_in(mixed, "generate", "run", "--input", "unknown.jsonl")
        assert (ran.code, ran.out.count("\n")) == (0, 6)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ["run", "--input", "unknown.jsonl"],
                "unknown.jsonl:6: the field 'prefix' is 'lega', which no --prefix defines (did you "
                "mean legal?); the names are 'legal', 'support'",
            ),
            (
                ["model", "--input", "mixed.jsonl"],
                "mixed.jsonl:2: names no prefix, and model is a backbone without one; set the "
                "field 'prefix' to one of 'legal', 'support'",
            ),
            (["model", "--input", "named.jsonl", "--no-prefix"], "--no-prefix needs a prefix as"),
            (["run", "--prompt", "x"], "--prefix needs --input"),
            (["run"], "--prefix needs --input"),
            (["run", "--input", "mixed.jsonl", "--prefix", "x"], "expected NAME=DIR, got 'x'"),
            (
                ["run", "--input", "mixed.jsonl", "--prefix", "legal=run"],
                "the name 'legal' is given twice, for run and legal",
            ),
            (["run", "--input", "mixed.jsonl", "--prefix", "a=none"], "no directory none"),
            (
                ["run", "--input", "mixed.jsonl", "decode.num_beams=2"],
                "legal: --prefix does not support beam search (num_beams 2); add decode.",
            ),
        ],
    )
    def test_reports_mistakes_before_loading_the_backbone(
        self, run_in, mixed, monkeypatch, words, message
    ):
        monkeypatch.setattr("prefix_jax.interop.backbone.load", None)
        ran = run_in(mixed, "generate", *words, *self.WORDS)
        assert ran.code == 2
        assert ran.err.startswith("error: ")
        assert message in ran.err
