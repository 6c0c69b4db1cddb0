"""Tests model ids: directories of prefixes that change, and prefixes that are loaded by hand."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import serving

import prefix_jax as pj
from prefix_jax.errors import ConfigError, PrefixError
from prefix_jax.serve import server as server_module
from prefix_jax.serve.app import Limits


@pytest.fixture(scope="module")
def texts(model, tuned) -> dict[str, str]:
    """The greedy text of each prefix."""
    config = pj.DecodeConfig(max_new_tokens=6)
    texts = {name: prefix.generate("2+3=", decode=config) for name, prefix in tuned.items()}
    assert len({*texts.values()}) == len(texts)
    return texts


@pytest.fixture(scope="module")
def watching(model, tmp_path_factory):
    """A server over a directory that the tests change."""
    directory = tmp_path_factory.mktemp("watched")
    limits = Limits(admin_key="root")
    with serving.running(serving.make_engine(model), prefix_dir=directory, limits=limits) as server:
        yield server, directory


def text_of(server: serving.Running, name: str) -> str | None:
    answer = server.complete(name)
    if answer.status == 404:
        return None
    return answer.json["choices"][0]["text"]


def ids(server: serving.Running) -> list[str]:
    return [model["id"] for model in server.get("/v1/models").json["data"]]


def replace(source: Path, target: Path) -> None:
    """Replaces a directory as `prefix-jax` does, by renaming."""
    shutil.copytree(source, target.with_name(".new"))
    if target.exists():
        target.rename(target.with_name(".old"))
    target.with_name(".new").rename(target)
    shutil.rmtree(target.with_name(".old"), ignore_errors=True)


def test_a_name_always_answers_from_what_is_on_disk(watching, directory, texts) -> None:
    server, watched = watching
    assert text_of(server, "x") is None
    for name in ("alpha", "beta", "alpha"):
        replace(directory / name, watched / "x")
        assert text_of(server, "x") == texts[name]
        assert ids(server) == ["base", "x"]
    shutil.rmtree(watched / "x")
    assert text_of(server, "x") is None
    assert ids(server) == ["base"]


def test_a_damaged_replacement_is_an_error_and_not_the_old_prefix(
    watching, directory, texts
) -> None:
    server, watched = watching
    replace(directory / "alpha", watched / "y")
    assert text_of(server, "y") == texts["alpha"]
    (arrays,) = (watched / "y").glob("*.safetensors")
    arrays.write_bytes(arrays.read_bytes()[:-8])
    answer = server.complete("y")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert "the model 'y' is not available: " in answer.error["message"]
    assert ids(server) == ["base"]
    assert "y" in server.get("/v1/prefixes", key="root").json["errors"]
    replace(directory / "beta", watched / "y")
    assert text_of(server, "y") == texts["beta"]
    shutil.rmtree(watched / "y")


@pytest.mark.parametrize("name", ["empty", ".hidden", "run/deep"])
def test_what_is_no_prefix_is_no_model(watching, directory, name) -> None:
    server, watched = watching
    (watched / "empty").mkdir(exist_ok=True)
    (watched / "file").write_text("x")
    shutil.copytree(directory / "alpha", watched / ".hidden", dirs_exist_ok=True)
    shutil.copytree(directory / "alpha", watched / "run" / "deep", dirs_exist_ok=True)
    assert text_of(server, name) is None
    assert ids(server) == ["base"]


def test_links_out_of_the_directory_are_refused(watching, directory) -> None:
    server, watched = watching
    (watched / "link").symlink_to(directory / "alpha")
    answer = server.complete("link")
    assert answer.status == 404
    assert "not below the directory of prefixes" in answer.error["message"]
    (watched / "link").unlink()


def test_prefixes_are_loaded_and_unloaded_by_hand(watching, directory, texts) -> None:
    server, watched = watching
    shutil.copytree(directory / "alpha", watched / "store" / "1")
    shutil.copytree(directory / "beta", watched / "store" / "2")
    post = lambda **fields: server.post("/v1/prefixes", key="root", **fields)  # noqa: E731
    loaded = post(name="z", path="store/1").json
    assert (loaded["id"], loaded["parent"], loaded["max_model_len"]) == ("z", "base", 252)
    assert text_of(server, "z") == texts["alpha"]
    taken = post(name="z", path="store/2")
    assert taken.status == 400
    assert "there is already a prefix 'z'" in taken.error["message"]
    assert text_of(server, "z") == texts["alpha"]
    assert post(name="z", path="store/2", replace=True).status == 200
    assert text_of(server, "z") == texts["beta"]
    (about,) = server.get("/v1/prefixes", key="root").json["data"]
    assert (about["name"], about["slots"], about["tier"]) == ("z", 7, "device")
    assert server.get("/v1/models/z").json["root"] == about["digest"]
    assert server.send("DELETE", "/v1/prefixes/z", key="root").status == 204
    assert text_of(server, "z") is None
    assert server.send("DELETE", "/v1/prefixes/z", key="root").status == 404


def test_an_unloaded_prefix_returns_when_it_changes(watching, directory, texts) -> None:
    server, watched = watching
    replace(directory / "alpha", watched / "w")
    assert text_of(server, "w") == texts["alpha"]
    assert server.send("DELETE", "/v1/prefixes/w", key="root").status == 204
    assert text_of(server, "w") is None
    replace(directory / "beta", watched / "w")
    assert text_of(server, "w") == texts["beta"]
    shutil.rmtree(watched / "w")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "../x"}, "not below the directory of prefixes"),
        ({"path": "/etc"}, "not below the directory of prefixes"),
        ({"path": "."}, "not below the directory of prefixes"),
        ({"path": "a\0b"}, "not below the directory of prefixes"),
        ({"path": "nothing"}, "no directory"),
        ({"name": "base", "path": "run/deep"}, "cannot be the name of a prefix"),
        ({"name": ""}, "name: String should have at least 1 character"),
    ],
)
def test_wrong_loads_are_refused(watching, fields, message) -> None:
    server, _ = watching
    answer = server.post("/v1/prefixes", key="root", **{"name": "new", **fields})
    assert answer.status == 400
    assert message in answer.error["message"]
    assert text_of(server, "new") is None


def test_a_failed_replacement_keeps_the_loaded_prefix(watching, directory, texts) -> None:
    server, watched = watching
    shutil.copytree(directory / "alpha", watched / "good" / "1")
    (watched / "good" / "2").mkdir()
    post = lambda **fields: server.post("/v1/prefixes", key="root", **fields)  # noqa: E731
    assert post(name="kept", path="good/1").status == 200
    assert post(name="kept", path="good/2", replace=True).status == 400
    assert text_of(server, "kept") == texts["alpha"]
    assert server.send("DELETE", "/v1/prefixes/kept", key="root").status == 204


def test_wrong_prefixes_stop_the_start(model, directory) -> None:
    engine = serving.make_engine(model)
    with (
        pytest.raises(ConfigError, match="the model has this name"),
        serving.running(engine, prefixes={"base": directory / "alpha"}),
    ):
        pass
    engine = serving.make_engine(model)
    with (
        pytest.raises(PrefixError, match="no directory"),
        serving.running(engine, prefixes={"a": directory / "nothing"}),
    ):
        pass


def test_a_file_that_changes_in_place_is_read_again(watching, directory, texts) -> None:
    server, watched = watching
    replace(directory / "alpha", watched / "v")
    assert text_of(server, "v") == texts["alpha"]
    for path in (directory / "beta").iterdir():
        # As rsync does, with the old times.
        shutil.copy2(path, watched / "v" / path.name)
        os.utime(watched / "v" / path.name, ns=(1, 2))
    assert text_of(server, "v") == texts["beta"]
    shutil.rmtree(watched / "v")


def test_watching_survives_an_unexpected_error(
    model, directory, texts, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(server_module, "_WATCH_SECONDS", 0.01)
    engine = serving.make_engine(model)
    with serving.running(engine, prefix_dir=tmp_path) as server:
        add, failed = engine.add, threading.Event()

        def fail(*args, **options):
            monkeypatch.setattr(engine, "add", add)
            failed.set()
            raise RuntimeError("unexpected")

        monkeypatch.setattr(engine, "add", fail)
        replace(directory / "alpha", tmp_path / "x")
        assert failed.wait(10)
        deadline = time.monotonic() + 10
        while "x" not in engine.prefixes:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert text_of(server, "x") == texts["alpha"]
