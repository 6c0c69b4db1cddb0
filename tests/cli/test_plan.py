"""`prefix-jax plan`, for configs and presets, with steps that fit and that do not."""

import json
from pathlib import Path

import pytest

from prefix_jax.cli.main import _parse
from prefix_jax.cli.plan import config_of
from prefix_jax.plan.presets import PRESETS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 128,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(model))
    (tmp_path / "config.yaml").write_text(
        "{model: {path: model}, data: {target: '{text}', max_length: 16, batch_size: 2}, "
        "train: {steps: 1}, output_dir: run, method: {name: prefix, length: 4}}"
    )
    return tmp_path


def test_plans_a_config_without_weights_or_data(run_in, folder: Path) -> None:
    ran = run_in(folder, "plan", "config.yaml", "--topology", "v5e:2x2", "mesh=auto",
               "data.batch_size=4", "--json")  # fmt: skip
    assert ran.code == 0
    answer = json.loads(ran.out)
    assert answer["plan"]["fits"]
    assert answer["plan"]["mesh"] == {"data": 4, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert answer["plan"]["roofline"]["bound"] in ("compute", "memory", "network")
    assert answer["plan"] in answer["meshes"]
    assert not (folder / "run").exists()


def test_prints_a_table(run_in, folder: Path) -> None:
    ran = run_in(folder, "plan", "config.yaml", "--topology", "v5e:1x1")
    assert ran.code == 0
    for words in ("on v5e:1x1 (1 chip)", "2 rows of 16 tokens", "fits", "step, at least"):
        assert words in ran.out


def test_reports_the_excess_of_a_step_that_does_not_fit(run_in, folder: Path) -> None:
    ran = run_in(folder, "plan", "--model", "llama-3-70b", "--topology", "v5e:1x1", "--tokens=32",
                 "data.batch_size=1", "model.remat=full", "--max-batch")  # fmt: skip
    assert ran.code == 1
    assert "does not fit" in ran.out
    assert "GiB over the limit" in ran.out
    assert "No batch fits" in ran.out
    assert "use more chips" in ran.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--topology", "v5e:1x1"), "no model given; give a config, --model"),
        (("--model", "llama-9", "--topology", "v5e:1x1"), f"use one of {next(iter(PRESETS))}"),
        (
            ("--model", "gpt-2", "--topology", "v5e:1x1"),
            "unknown preset 'gpt-2'; did you mean 'gpt2'?",
        ),
        (("--model", "gpt2", "--topology", "v5e:1x1", "model.path=model"), "model.path=model"),
        (("model", "--topology", "v5e:1x1"), "model.path=model"),
        (("config.yaml", "--topology", "v5e"), "write it as one of"),
        (("config.yaml", "--topology", "v5litepod-8"), "write its chips, v5e:2x4"),
        (("config.yaml", "--topology", "v5e:2x2", "mesh.fsdp=3"), "does not fit 4 devices"),
        (("none.yaml", "--topology", "v5e:1x1"), "no such file"),
    ],
)
def test_reports_mistakes_in_one_error(
    run_in, folder: Path, words: tuple[str, ...], message: str
) -> None:
    ran = run_in(folder, "plan", *words)
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_accepts_every_spelling_of_a_preset_or_model() -> None:
    def path_of(*words: str) -> str:
        args = _parse(["plan", "--topology", "v5e:1x1", *words])
        return config_of(args).model.path

    assert path_of("--model", "gpt2") == "preset:gpt2"
    assert path_of("--model", "preset:gpt2") == "preset:gpt2"
    assert path_of("model.path=preset:gpt2") == "preset:gpt2"
    assert path_of("model.path=some/model") == "some/model"
