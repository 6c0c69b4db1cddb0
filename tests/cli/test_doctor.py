import argparse
import importlib.metadata
import types

import jax
import pytest

from prefix_jax.cli import doctor


@pytest.fixture
def report(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(doctor, "_ACCELERATORS", {})

    real = importlib.metadata.distribution

    def run(requires=("jax",)):
        ourselves = types.SimpleNamespace(version="1.0", requires=requires)
        monkeypatch.setattr(
            importlib.metadata,
            "distribution",
            lambda name: ourselves if name == "prefix-jax" else real(name),
        )
        code = doctor.run(argparse.Namespace())
        return code, capsys.readouterr().out

    return run


def test_healthy_machine_has_no_problems(report):
    code, out = report()
    assert out.startswith("no problems found\n")
    assert code == 0
    assert f"{len(jax.devices())} local devices" in out
    assert importlib.metadata.version("jax") in out
    assert jax.config.values["jax_compilation_cache_dir"] in out


def test_the_verdict_comes_first(report):
    assert report()[1].splitlines()[0] == "no problems found"
    assert report(["jax<0.1"])[1].startswith("problem: jax ")


def test_reports_a_package_that_cannot_be_imported(report, monkeypatch):
    def resources(problems):
        raise ImportError("cannot import name 'x' from 'psutil'")

    monkeypatch.setattr(doctor, "_resources", resources)
    code, out = report()
    assert code == 1
    assert "cannot be imported: cannot import name 'x' from 'psutil'" in out


def test_reports_an_unusable_folder(report, monkeypatch):
    def free(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "_disk_free", free)
    code, out = report()
    assert code == 1
    assert "problem: the model cache" in out


def test_reports_an_untested_version_with_its_fix(report):
    code, out = report(["jax<0.1"])
    assert code == 1
    assert "problem: jax" in out
    assert "pip install 'jax<0.1'" in out


def test_reports_a_missing_package(report):
    code, out = report(["no-such-thing>=1"])
    assert code == 1
    assert "no-such-thing is not installed" in out


def test_ignores_packages_of_extras(report):
    assert report(['no-such-thing; extra == "tpu"'])[0] == 0


def test_reports_an_unused_accelerator(report, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_ACCELERATORS", {str(tmp_path): ("gpu", "cuda")})
    code, out = report()
    assert code == 1
    assert "pip install 'prefix-jax[cuda]'" in out


def test_reports_a_backend_that_does_not_start(report, monkeypatch):
    def devices():
        raise RuntimeError("no TPU here")

    monkeypatch.setattr(jax, "devices", devices)
    code, out = report()
    assert code == 1
    assert "JAX found no device: no TPU here" in out


def test_reports_a_source_tree_that_is_not_installed(monkeypatch):
    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    problems = []
    doctor._packages(problems)
    assert problems == ["prefix-jax is not installed; run pip install --editable ."]
