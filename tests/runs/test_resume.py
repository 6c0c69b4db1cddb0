"""Resuming runs."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
from forked import ForkedProcess
from run_processes import run_slowly

from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.errors import CheckpointError, ConfigError
from prefix_jax.evaluate.predictor import Predictor
from prefix_jax.mesh import make_mesh
from prefix_jax.runs.console import Console

pytestmark = pytest.mark.usefixtures("without_plot")

# A run that is hard to resume: dropout, micro-batches, a grouped order whose epochs end within a
# step, and evaluations whose best step must be remembered.
HARD = (
    "method.dropout=0.2",
    "data.group_by_source=true",
    "optim.grad_accum_steps=2",
    "train.steps=null",
    "train.epochs=2.3",
    "train.eval_every=2",
    "data.batch_size=6",
)


@pytest.fixture(scope="module")
def whole(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with default options."""
    directory = tmp_path_factory.mktemp("whole")
    tiny_runs.run(pretrained, directory)
    return directory


# --- Bit-identical results -------------------------------------------------------------------


def test_run_killed_at_any_moment_ends_bit_identical(
    tiny_model_dir: Path, pretrained: Pretrained, tmp_path: Path
) -> None:
    seed = time.time_ns()
    print("seed", seed)
    moments = random.Random(seed)
    for _ in range(2):
        process = ForkedProcess(run_slowly, tiny_model_dir, tmp_path / "killed", HARD)
        for _ in range(moments.randint(1, 3)):
            assert process.stdout.readline()
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "killed" / "prefix").exists()
    for output in ("killed", "whole"):
        run_hard(pretrained, tmp_path / output)
    assert tiny_runs.outcome(tmp_path / "killed") == tiny_runs.outcome(tmp_path / "whole")


def run_hard(pretrained: Pretrained, output: Path) -> None:
    tiny_runs.run(pretrained, output, *HARD, dev=tiny_runs.SOME, test=tiny_runs.SOME)


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.mid_dim=8", "data.pack=false", "train.checkpoint_every=5"),
        ("method=prompt", "optim.name=adafactor", "method.dropout=0.3"),
        ("method=full", "optim.schedule=cosine", "optim.weight_decay=0.1"),
    ],
    ids=["reparameterised", "prompt", "full"],
)
def test_every_method_resumes_bit_identical(
    pretrained: Pretrained, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    for step in (1, 7):
        with tiny_runs.killed_at(step):
            tiny_runs.run(pretrained, tmp_path / "killed", *overrides)
    tiny_runs.run(pretrained, tmp_path / "killed", *overrides)
    tiny_runs.run(pretrained, tmp_path / "whole", *overrides)
    assert tiny_runs.outcome(tmp_path / "killed") == tiny_runs.outcome(tmp_path / "whole")


def test_resumes_on_another_mesh(tiny_model_dir: Path, tmp_path: Path) -> None:
    eight, cube = (load(tiny_model_dir, mesh=make_mesh(*sizes)) for sizes in ((8, 1, 1), (2, 2, 2)))
    overrides = ("data.batch_size=8", "train.checkpoint_every=5")
    tiny_runs.run(eight, tmp_path / "whole", *overrides)
    with tiny_runs.killed_at(7):
        tiny_runs.run(eight, tmp_path / "moved", *overrides)
    tiny_runs.run(cube, tmp_path / "moved", *overrides)
    expected = tiny_runs.losses(tmp_path / "whole")
    assert tiny_runs.losses(tmp_path / "moved") == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 12


# --- Signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_the_state_and_the_next_start_resumes(
    pretrained: Pretrained, whole: Path, tmp_path: Path, number: signal.Signals, monkeypatch
) -> None:
    on_metrics = Console.on_metrics

    def raising(self: Console, step: int, *rest: Any) -> bool:
        stop = on_metrics(self, step, *rest)
        if step == 4:
            signal.raise_signal(number)
        return stop

    console = tiny_runs.console()
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Console, "on_metrics", raising)
        run = tiny_runs.run(pretrained, tmp_path / "run", console=console)
    assert run.interrupted is number
    assert run.produced is None
    assert f"interrupted after step {run.step}, which is saved" in tiny_runs.shown(console)
    assert (tmp_path / "run" / "checkpoints" / str(run.step)).is_dir()
    assert 4 <= run.step < 12
    assert signal.getsignal(number) == handler

    assert not tiny_runs.run(pretrained, tmp_path / "run").interrupted
    assert tiny_runs.outcome(tmp_path / "run") == tiny_runs.outcome(whole)


def test_signal_during_an_evaluation_saves_the_state(
    pretrained: Pretrained, tmp_path: Path, monkeypatch
) -> None:
    values = iter([3.0, 4.0])  # an improvement would be saved anyway

    def loss(*_: object) -> float:
        value = next(values)
        if value == 4:
            signal.raise_signal(signal.SIGTERM)
        return value

    monkeypatch.setattr(Predictor, "loss", loss)
    overrides = ("train.eval_every=2", "train.checkpoint_every=100")
    run = tiny_runs.run(pretrained, tmp_path, *overrides, dev=tiny_runs.SOME)
    assert (run.interrupted, run.step) == (signal.SIGTERM, 4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]


# --- Refusing another run --------------------------------------------------------------------


def test_finished_run_returns_the_same_results_without_training(
    pretrained: Pretrained, tmp_path: Path, monkeypatch
) -> None:
    options = ("train.eval_every=4", "evaluate.compare_baseline=true")
    splits = {"dev": tiny_runs.SOME, "test": tiny_runs.SOME}
    first = tiny_runs.run(pretrained, tmp_path, *options, **splits)
    before = tiny_runs.outcome(tmp_path)
    monkeypatch.setattr(Console, "on_metrics", lambda *_: pytest.fail("a step was taken"))
    again = tiny_runs.run(pretrained, tmp_path, *options, **splits)
    assert tiny_runs.outcome(tmp_path) == before
    assert tiny_runs.bits(again.produced) == tiny_runs.bits(first.produced)
    assert again.evaluations == first.evaluations


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.learning_rate=0.5", "optim.learning_rate (0.01, not 0.5)"),
        ("method.length=5", "method.length (4, not 5)"),
        ("train.steps=13", "train.steps (12, not 13)"),
        ("method=full", "method.name (prefix, not full)"),
        ("evaluate.metrics=[bleu]", "first of evaluate.metrics (loss, not bleu)"),
    ],
)
def test_names_the_keys_that_differ_from_the_run_in_the_directory(
    pretrained: Pretrained, whole: Path, override: str, named: str
) -> None:
    before = tiny_runs.outcome(whole)
    with pytest.raises(ConfigError, match="holds a run with another") as raised:
        tiny_runs.run(pretrained, whole, override)
    assert named in str(raised.value)
    assert tiny_runs.outcome(whole) == before


def test_refuses_a_run_of_an_older_schema(pretrained: Pretrained, tmp_path: Path) -> None:
    with tiny_runs.killed_at(4):
        tiny_runs.run(pretrained, tmp_path)
    old = Path(__file__).parents[1] / "fixtures" / "format3" / "text" / "config.yaml"
    shutil.copy(old, tmp_path)
    with pytest.raises(ConfigError, match="holds a run of an older prefix_jax, whose config") as e:
        tiny_runs.run(pretrained, tmp_path)
    assert str(e.value).endswith("finish it with that version, or choose another output_dir")
    (tmp_path / "prefix").mkdir()
    with pytest.raises(
        ConfigError, match=r"to start from its stored prefix, add init\.start=prefix"
    ):
        tiny_runs.run(pretrained, tmp_path)


def test_settings_without_effect_on_results_may_change(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    with tiny_runs.killed_at(4):
        tiny_runs.run(pretrained, tmp_path)
    run = tiny_runs.run(
        pretrained,
        tmp_path,
        *(
            "train.checkpoint_every=2",
            "train.keep_checkpoints=1",
            "train.log_every=1",
            "decode.num_beams=2",
        ),
        *("evaluate.metrics=[loss,exact_match]", "evaluate.batch_size=2", "train.eval_every=6"),
        test=tiny_runs.SOME[:2],
    )
    assert list(run.evaluations["after"].report.metrics) == ["loss", "perplexity", "exact_match"]


def test_refuses_another_backbone(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    with tiny_runs.killed_at(4):
        tiny_runs.run(tiny_runs.on_one_device(model), tmp_path / "run")
    other = tiny_runs.on_one_device(tiny.write_model(tmp_path / "other", seed=1))
    other.source = str(model)
    with pytest.raises(CheckpointError, match=r"started with another backbone \(fingerprint"):
        tiny_runs.run(other, tmp_path / "run")


def test_refuses_an_output_inside_another_run(
    pretrained: Pretrained, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(whole)
    for output in (whole / "prefix", tmp_path / "link/checkpoints/3"):
        before = sorted(whole.rglob("*"))
        with pytest.raises(ConfigError, match="inside the run"):
            tiny_runs.run(pretrained, output)
        assert sorted(whole.rglob("*")) == before


def test_refuses_other_training_examples(pretrained: Pretrained, tmp_path: Path) -> None:
    with tiny_runs.killed_at(4):
        tiny_runs.run(pretrained, tmp_path)
    with pytest.raises(CheckpointError, match="started with other training examples"):
        tiny_runs.run(pretrained, tmp_path, train=tiny_runs.RECORDS[::-1])


def test_skips_a_damaged_checkpoint_with_a_warning(
    pretrained: Pretrained, whole: Path, tmp_path: Path
) -> None:
    with tiny_runs.killed_at(8):
        tiny_runs.run(pretrained, tmp_path)
    latest = tmp_path / "checkpoints" / "6"
    next(path for path in latest.rglob("d/*") if path.is_file()).write_bytes(b"half")
    console = tiny_runs.console()
    tiny_runs.run(pretrained, tmp_path, console=console)
    assert f"skipped the damaged checkpoint {latest}" in tiny_runs.shown(console)
    assert "resuming after step 3" in tiny_runs.shown(console)
    assert tiny_runs.outcome(tmp_path) == tiny_runs.outcome(whole)
