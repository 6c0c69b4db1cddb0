"""Every mistake in the input becomes one error message that names its place."""

import json
import resource
import shutil

import pytest

CHAT = '{"chat": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def error_of(ran):
    """The error message of a failed command."""
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert "Traceback" not in ran.err
    return ran.err.removeprefix("error: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.inptu={facts}"], "did you mean data.input?"),
        (
            ["train.steps=many"],
            "train.steps: must be a positive integer below 2**31 or null, got 'many'",
        ),
        (["trainsteps"], "expected key.path=value"),
        (["method.lenght=4"], "length"),
        (["method=prefxi"], "prefix"),
        (["model.path=nowhere/model"], "nowhere/model: no such directory"),
        (
            ["model.path=package:no_such_package"],
            "no Python package 'no_such_package' is installed",
        ),
        (["model.path=config.yaml"], "neither a directory in Hugging Face layout nor"),
        (["data.train=tarin.jsonl"], "did you mean 'train.jsonl'?"),
        (["data.train=config.yaml"], "unknown file type '.yaml'"),
        (["data.input={fact}"], "train.jsonl:1: no field 'fact' (did you mean 'facts'?)"),
        (["data.input={facts"], "template '{facts'"),
        (["data.batch_size=3"], "batch_size 3 is not divisible by 8 batch shards"),
        (["mesh.data=3"], "does not fit 8 devices"),
        (["method.length=255"], "positions"),
        (["train.steps=null", "train.epochs=1e29"], "train.epochs: 1e+29 epochs are"),
        (["data.max_length=256"], "exceed the model's 256 positions"),
        (["data.max_length=12"], "train.jsonl:1: "),
        (["init.start=prefix", "init.path=nowhere"], "no directory nowhere"),
        (["decode.max_new_tokens=255"], "exceed the model's 256 positions"),
    ],
)
def test_reports_invalid_settings_before_training(run_in, folder, settings, message):
    ran = run_in(folder, "train", "config.yaml", *settings)
    assert message in error_of(ran)
    assert "step 1" not in ran.out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "no records"),
        (
            "cut.jsonl",
            '{"facts": "a", "text": "b"}\n{"facts": "a", ',
            "cut.jsonl:2: malformed JSON",
        ),
        ("list.jsonl", "[1, 2]\n", "list.jsonl:1: expected a JSON object"),
        ("bytes.jsonl", b"\xff\xfe\n", "not UTF-8 text"),
        ("nan.csv", "facts,text\na,b\nc,NaN\n", "nan.csv:3: field 'text' is missing"),
        ("cells.csv", "facts,text\na,b,c\n", "cells.csv:2: 3 cells, but the header has 2 columns"),
        ("blank.jsonl", '{"facts": "a", "text": " "}\n', "blank.jsonl:1: the target"),
        ("long.jsonl", '{"facts": "a", "text": "%s"}\n' % ("b" * 300), "long.jsonl:1: "),
        ("torn.parquet", b"PAR1", "torn.parquet: not a readable Parquet file"),
    ],
)
def test_reports_invalid_data_with_its_line(run_in, folder, name, content, message):
    content = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(content)
    assert message in error_of(run_in(folder, "train", "config.yaml", f"data.train={name}"))


def test_reports_a_config_that_is_not_yaml(run_in, folder):
    (folder / "torn.yaml").write_text("model: {path: ")
    assert "not valid YAML" in error_of(run_in(folder, "train", "torn.yaml"))
    assert "none.yaml: no such file" in error_of(run_in(folder, "train", "none.yaml"))


def test_reports_a_missing_chat_template(run_in, folder):
    (folder / "chat.jsonl").write_text(CHAT)
    settings = ["data.input=null", "data.target=null", "data.messages=chat"]
    ran = run_in(folder, "train", "config.yaml", "data.train=chat.jsonl", *settings)
    assert "chat.jsonl:1: the tokenizer has no chat template" in error_of(ran)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors"),
        (lambda model: (model / "model.safetensors").unlink(), "safetensors"),
        (lambda model: (model / "config.json").write_text("{"), "malformed JSON"),
        (lambda model: (model / "config.json").unlink(), "no config.json"),
        (
            lambda model: (model / "tokenizer.json").write_text("{"),
            "tokenizer.json: malformed JSON",
        ),
        (lambda model: change(model, model_type="mamba"), "unsupported architecture 'mamba'"),
        (lambda model: change(model, num_hidden_layers=3), "layers.2"),
        (lambda model: change(model, hidden_size=64), "shape"),
    ],
)
def test_reports_a_damaged_model(run_in, folder, damage, message):
    damage(folder / "model")
    assert message in error_of(run_in(folder, "train", "config.yaml"))


@pytest.fixture
def prefix(trained, folder):
    """A copy of the trained prefix, in the test's folder."""
    shutil.copytree(trained[0] / "run" / "prefix", folder / "prefix")
    return folder / "prefix"


def test_rejects_a_model_with_other_shapes(run_in, folder, prefix):
    shutil.rmtree(folder / "model")
    import tiny

    tiny.write_model(folder / "model", num_hidden_layers=3)
    message = error_of(run_in(folder, "generate", "prefix", "--prompt", "x"))
    assert "layers: 2 in the prefix, 3 in the backbone (differs)" in message


def test_asks_for_a_model_that_has_moved(run_in, folder, prefix):
    (folder / "model").rename(folder / "moved")
    message = error_of(run_in(folder, "generate", "prefix", "--prompt", "x"))
    assert "model" in message
    assert "--model" in message


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "x"], ["evaluate", "--data", "x.jsonl"]]
)
def test_reports_a_corrupt_prefix(run_in, folder, prefix, command):
    name, *words = command
    for file in (prefix / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    assert "prefix/arrays is missing or damaged" in error_of(run_in(folder, name, "prefix", *words))
    (prefix / "prefix.json").write_text("{")
    assert "prefix.json: malformed JSON" in error_of(run_in(folder, name, "prefix", *words))
    assert "no directory none" in error_of(run_in(folder, name, "none", *words))


def test_full_disk_is_reported_and_resumable(run_in, folder, trained):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        message = error_of(run_in(folder, "train", "config.yaml"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in message
    assert run_in(folder, "train", "config.yaml").code == 0
    stored = (trained[0] / "run" / "results.json").read_text()
    assert (folder / "run" / "results.json").read_text() == stored
