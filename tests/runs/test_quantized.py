"""Training, storing and using a prefix on a quantized backbone."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
import tiny_runs

import prefix_jax as pj
from prefix_jax import config as configs
from prefix_jax.backbones.fingerprint import fingerprint
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.errors import ConfigError, PrefixError
from prefix_jax.mesh import make_mesh
from prefix_jax.runs.build import build_run

pytestmark = pytest.mark.usefixtures("without_plot")


@pytest.fixture(scope="module")
def pretrained(tiny_model_dir: Path) -> Pretrained:
    """Layers in int4, token embeddings in int8."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return load(tiny_model_dir, mesh=mesh, quantize="int4")


@pytest.fixture(scope="module")
def whole(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    _run(pretrained, directory)
    return directory


def _run(pretrained: Pretrained, output: Path) -> None:
    tiny_runs.run(pretrained, output, "model.quantize=int4", test=tiny_runs.SOME)


def test_reduces_the_loss_and_keeps_the_weights(pretrained: Pretrained, whole: Path) -> None:
    losses = tiny_runs.losses(whole)
    assert losses[12] < losses[1]
    assert fingerprint(pretrained.stacked()) == pretrained.fingerprint


def test_killed_run_ends_bit_identical(pretrained: Pretrained, whole: Path, tmp_path: Path) -> None:
    with tiny_runs.killed_at(7):
        _run(pretrained, tmp_path)
    _run(pretrained, tmp_path)
    assert tiny_runs.outcome(tmp_path) == tiny_runs.outcome(whole)


def test_resumes_only_with_the_same_quantization(
    tiny_model_dir: Path, whole: Path, pretrained: Pretrained
) -> None:
    with pytest.raises(ConfigError, match=r"model.quantize \(int4, not none\)"):
        tiny_runs.run(tiny_runs.on_one_device(tiny_model_dir), whole)


def test_stored_prefix_loads_its_quantized_backbone(pretrained: Pretrained, whole: Path) -> None:
    tuned = pj.load_prefix(whole)
    assert tuned.card.backbone.quantize == pretrained.quantize
    assert tuned.pretrained.fingerprint == pretrained.fingerprint
    assert isinstance(tuned.generate("1+2=", max_new_tokens=4), str)


def test_refuses_another_quantization_unless_allowed(
    pretrained: Pretrained, whole: Path, tiny_model_dir: Path
) -> None:
    bare = tiny_runs.on_one_device(tiny_model_dir)
    with pytest.raises(PrefixError) as error:
        pj.load_prefix(whole, bare)
    assert "(quantize: int4)" in str(error.value)
    assert "(quantize: none)" in str(error.value)
    assert pj.load_prefix(whole, bare, allow_other_weights=True).pretrained is bare


def test_refuses_to_train_quantized_weights(
    tiny_model_dir: Path, pretrained: Pretrained, tmp_path: Path
) -> None:
    values = {
        "model": {"path": str(tiny_model_dir), "quantize": pretrained.quantize},
        "method": {"name": "full"},
        "data": {"input": "{sum}=", "target": "{total}", "batch_size": 4},
        "train": {"steps": 1},
        "output_dir": str(tmp_path),
    }
    with pytest.raises(ConfigError, match="method: full trains the weights themselves"):
        build_run(configs.parse(values), records={"train": tiny_runs.RECORDS})
    values["method"] = {"name": "prefix"}
    values["model"]["quantize"] = "none"
    with pytest.raises(
        ConfigError, match=r"model.quantize is none, but the given backbone was loaded"
    ):
        build_run(
            configs.parse(values), pretrained=pretrained, records={"train": tiny_runs.RECORDS}
        )
