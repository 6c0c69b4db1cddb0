from pathlib import Path

import pytest

from prefix_jax import artifact
from prefix_jax.cli.main import main

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA = FIXTURES / "backbones" / "llama_grouped"
BERT = FIXTURES / "encoders" / "bert"


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_writes_a_prefix_and_prints_a_summary(tmp_path, capsys):
    adapter, output = FIXTURES / "peft" / "cartridge", tmp_path / "mine"
    assert run("import", adapter, output, "--model", LLAMA) == 0
    assert capsys.readouterr().out == (
        f"{output}: 3 slots of kind 'kv', PEFT's CARTRIDGE, for {LLAMA}; "
        "text starts at position 3\n"
    )
    assert artifact.load(output)[1].method == {"name": "cartridge", "length": 3, "frozen": 2}


def test_settings_add_templates_and_label_names(tmp_path, capsys):
    adapter, output = FIXTURES / "peft" / "classify_bert", tmp_path / "mine"
    settings = ("data.input={text}", "task.labels=[no, perhaps, yes]")
    assert run("import", adapter, output, *settings, "--model", BERT) == 0
    _, card = artifact.load(output)
    assert card.task["input"] == "{text}"
    assert card.task["labels"] == ["no", "perhaps", "yes"]
    assert run("import", adapter, tmp_path / "b", "task.labels=[a, b]", "--model", BERT) == 2
    assert "has 3 labels, but task.labels has 2" in capsys.readouterr().err
    assert run("import", adapter, tmp_path / "b", "data.inptu={text}", "--model", BERT) == 2
    assert "did you mean data.input" in capsys.readouterr().err


def test_exporting_an_import_gives_the_same_file(tmp_path, capsys):
    adapter = FIXTURES / "peft" / "prefix"
    assert run("import", adapter, tmp_path / "mine", "--model", LLAMA) == 0
    assert run("export", "--to", "peft", tmp_path / "mine", tmp_path / "back") == 0
    assert "3 slots as PREFIX_TUNING, " in capsys.readouterr().out
    name = "adapter_model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (adapter / name).read_bytes()


@pytest.mark.parametrize(("picked", "count"), [((), 3), (("--task", "2"), 1)])
def test_multitask_prompt_becomes_one_prefix_per_task(picked, count, tmp_path, capsys):
    adapter, output = FIXTURES / "peft" / "multitask", tmp_path / "mine"
    assert run("import", adapter, output, "--model", LLAMA, *picked) == 0
    assert len(capsys.readouterr().out.splitlines()) == count
    last = output if picked else output / "task-2"
    assert artifact.load(last)[1].init == "PEFT's MULTITASK_PROMPT_TUNING, task 2"


def test_never_overwrites_and_reports_mistakes_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run("import", FIXTURES / "peft" / "prefix", tmp_path, "--model", LLAMA) == 2
    assert "already exists" in capsys.readouterr().err
    assert run("import", LLAMA, tmp_path / "mine", "--model", LLAMA) == 2
    assert capsys.readouterr().err.count("\n") == 1
