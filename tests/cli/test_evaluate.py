"""`prefix-jax evaluate`."""

import json

import pytest


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_reproduces_the_results_of_the_training_run(run_in, trained, tmp_path):
    folder, _ = trained
    ran = run_in(
        folder,
        *("evaluate", "run", "--data", "test.jsonl", "--metrics", "loss,bleu"),
        *(
            "evaluate.compare_baseline=true",
            "evaluate.batch_size=8",
            "--output",
            str(tmp_path / "new"),
        ),
        *("--official", str(tmp_path / "official")),
    )
    assert ran.code == 0
    hypotheses = (tmp_path / "official" / "hypotheses.txt").read_text().splitlines()
    assert len(hypotheses) == len((folder / "test.jsonl").read_text().splitlines())
    stored = read(folder / "run" / "results.json")["test"]
    results = read(tmp_path / "new" / "results.json")["results"]
    for name in ("before", "after"):
        assert results[name]["metrics"] == pytest.approx(stored[name]["metrics"])
        assert f"{stored[name]['metrics']['loss']:.4f}" in ran.out
    for file in ("predictions.jsonl", "predictions-before.jsonl"):
        assert (tmp_path / "new" / file).read_text() == (folder / "run" / file).read_text()


def test_accuracy_compares_the_given_labels(run_in, trained):
    ran = run_in(
        trained[0],
        *("evaluate", "run", "--data", "test.jsonl", "--metrics", "accuracy"),
        *("--labels", "Station 0.,no", "evaluate.max_examples=1"),
    )
    assert ran.code == 0
    assert "accuracy (%)" in ran.out
    assert "token loss" not in ran.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "test.jsonl", "--metrics", "blue"], "evaluate.metrics"),
        (
            ["--data", "test.jsonl", "--metrics", "accuracy"],
            "accuracy chooses among texts; name at least two",
        ),
        (["--data", "test.jsonl", "--official", "there"], "add a generation metric"),
        (["--data", "test.jsonl", "evaluate.max_example=3"], "did you mean evaluate.max_examples?"),
        (["--data", "tset.jsonl"], "did you mean 'test.jsonl'?"),
        (["--data", "config.yaml"], "unknown file type"),
    ],
)
def test_reports_mistakes_in_one_error(run_in, trained, words, message):
    ran = run_in(trained[0], "evaluate", "run", *words)
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert message in ran.err


@pytest.mark.parametrize("option", ["--output", "--official"])
def test_reports_an_unwritable_output_before_evaluating(run_in, trained, monkeypatch, option):
    monkeypatch.setattr("prefix_jax.evaluate.evaluator.Evaluator.compare", None)
    words = ("evaluate", "run", "--data", "test.jsonl", "--metrics", "bleu")
    ran = run_in(trained[0], *words, option, "train.jsonl")
    assert ran.code == 2
    assert ran.err == "error: cannot write to train.jsonl: File exists\n"


def test_never_overwrites_the_results_of_a_run(run_in, trained):
    folder, _ = trained
    before = (folder / "run" / "results.json").read_bytes()
    ran = run_in(folder, "evaluate", "run", "--data", "test.jsonl", "--output", "run")
    assert ran.code == 2
    assert "run contains a run" in ran.err
    assert (folder / "run" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", '{"accuracy": 1}'),
        ("results.json", "not JSON"),
        ("predictions.jsonl", "mine"),
        ("prefix.json", "{}"),
    ],
)
def test_never_overwrites_the_results_of_another_program(run_in, trained, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    words = ("evaluate", "run", "--data", "test.jsonl", "--output", str(tmp_path))
    ran = run_in(trained[0], *words)
    assert ran.code == 2
    assert f"--output: {tmp_path} contains" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_overwrites_the_results_of_an_earlier_evaluation(run_in, trained, tmp_path):
    words = ("evaluate", "run", "--data", "test.jsonl", "--output", str(tmp_path))
    for limit in (1, 2):
        assert run_in(trained[0], *words, f"evaluate.max_examples={limit}").code == 0
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["settings"] == [f"evaluate.max_examples={limit}"]
