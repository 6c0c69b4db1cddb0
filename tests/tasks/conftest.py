from typing import Any

import pytest
import tiny

from prefix_jax.backbones.loading.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny.write_encoder(tmp_path_factory.mktemp("bert") / "model"))


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("roberta") / "model"
    return load_tokenizer(tiny.write_encoder(path, "roberta"))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny.write_model(tmp_path_factory.mktemp("llama") / "model"))
