import dataclasses
import importlib
import json
import math
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from prefix_jax import artifact
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.cli.main import main
from prefix_jax.prefix import Embeds

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"


@pytest.fixture
def model(tmp_path):
    """A small model whose tokenizer has the words [w0], [w1], …"""
    path = Path(shutil.copytree(FIXTURES / "smollm", tmp_path / "model"))
    words = Tokenizer(WordLevel({f"[w{i}]": i for i in range(96)}, unk_token="[w0]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


@pytest.fixture
def stored(tmp_path, model):
    """A stored prefix whose soft tokens equal words 7, 8 and 9."""
    pretrained = load(model, dtype="float32")
    produced = Embeds(pretrained.params["embed"]["tokens_VD"][7:10])
    backbone = artifact.BackboneCard(
        source=str(model), model_type="llama", fingerprint=pretrained.fingerprint, dtype="float32"
    )
    card = artifact.make_card(
        produced,
        pretrained.backbone.geometry,
        backbone,
        method={"name": "prompt", "length": 3, "mid_dim": None},
        init="text",
        steps=1200,
        task={"name": "text", "input": "[bold]{name}[/] ->\n", "target": " {text}"},
        metrics={"loss": 1.25},
    )
    artifact.save(tmp_path / "stored", produced, card)
    return tmp_path / "stored"


@pytest.fixture
def show(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def show(*arguments):
        code = main(["inspect", *map(str, arguments)])
        return code, capsys.readouterr()

    return show


def test_shows_the_overview_of_a_prefix(stored, model, show):
    code, (out, _) = show(stored)
    assert code == 0
    for part in (
        "name prompt, length 3",
        "1,200 steps",
        "3 slots of kind embeds",
        "0 to 2, text from 3",
        "96 parameters, ",
        f"{model} (llama, float32)",
        r"'[bold]{name}[/] ->\n'",  # not read as rich markup
        "loss 1.25",
        "Norms of soft tokens",
        "'[w7]' 1.00",
        "'[w9]' 1.00",
    ):
        assert part in out


def test_accepts_another_path_of_the_backbone(stored, model, show):
    moved = model.rename(model.with_name("moved"))
    _, (out, _) = show(stored)
    assert "give its current path (--model)" in out
    assert "'[w7]'" not in out
    _, (out, _) = show(stored, "--model", moved)
    assert "'[w7]' 1.00" in out


def test_json_has_everything(stored, show):
    code, (out, _) = show(stored, "--json", "--words", 1)
    report = json.loads(out)
    assert code == 0
    assert report["card"]["kind"] == "embeds"
    assert report["parameters"] == 96
    assert [[word["id"] for word in words] for words in report["nearest"]] == [[7], [8], [9]]
    assert report["norms"][0].keys() == {"of", "layer", "min", "mean", "max"}


def test_damaged_prefix_is_one_error(stored, show):
    (stored / "prefix.json").write_text("{")
    code, (out, err) = show(stored)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "prefix.json: malformed JSON" in err


HOSTILE = "\x1b[2J\x07\x9b2J[/]"


def test_card_text_is_escaped(stored, show):
    produced, card = artifact.load(stored)
    backbone = dataclasses.replace(card.backbone, source=HOSTILE)
    card = dataclasses.replace(card, init=HOSTILE, created=HOSTILE, backbone=backbone)
    artifact.save(stored.with_name("foreign"), produced, card)
    for words in ((), ("--words", 0)):
        code, (out, _) = show(stored.with_name("foreign"), *words)
        assert code == 0
        assert not set("\x1b\x07\x9b") & set(out)
        assert r"\x1b[2J\x07\u009b2J[/]" in out


def test_the_verdict_comes_first(stored, model, show):
    _, (out, _) = show(stored)
    verdict = f"{stored}: intact; 3 slots of kind embeds for {model}, trained for 1,200 steps"
    assert out.splitlines()[0] == verdict
    model.rename(model.with_name("moved"))
    _, (out, _) = show(stored)
    assert out.splitlines()[1].startswith("nearest words: not available; ")


def test_non_finite_prefix_is_a_problem(stored, show, monkeypatch):
    inspect = importlib.import_module("prefix_jax.interop.inspect")
    broken = (inspect.Norms("soft tokens", None, 1.0, math.nan, math.nan),)
    monkeypatch.setattr(inspect, "norms", lambda _: broken)
    code, (out, _) = show(stored, "--words", 0)
    assert code == 1
    assert out.splitlines()[0].endswith(
        "the soft tokens are NaN or infinite; train this prefix again"
    )
    assert show(stored, "--words", 0, "--json")[0] == 1
