"""EleutherAI's evaluation harness scores a local task through the server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo"}
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("task")
    data = directory / "test.jsonl"
    choices = [*CAPITALS.values()]
    records = [
        {"question": f"The capital of {country} is", "choices": choices, "answer": number}
        for number, country in enumerate(CAPITALS)
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "capitals.yaml").write_text(TASK.format(data=data))
    return directory


@pytest.mark.parametrize("name", ["base", "facts"])
def test_log_likelihoods_rank_the_right_answers_first(
    served, task: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    result = lm_eval.simple_evaluate(
        "local-completions",
        model_args={
            "model": served.base if name == "base" else name,
            "base_url": f"{served.url}/v1/completions",
            "tokenizer_backend": "remote",
            "num_concurrent": 4,
            "max_retries": 1,
        },
        tasks=["capitals"],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        log_samples=True,
    )
    assert result["results"]["capitals"]["acc,none"] == 1.0
    for sample in result["samples"]["capitals"]:
        scores = [float(score) for ((score, _),) in sample["resps"]]
        assert all(score < 0 for score in scores)


def test_generation_matches_the_stop_texts(served) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions", model="facts", tokenizer_backend="remote"
    )
    arguments = ("The capital of Italy is", {"until": ["."], "max_gen_toks": 8})
    (text,) = model.generate_until([Instance("generate_until", {}, arguments, 0)])
    assert text.strip().startswith("Rome")
    assert "." not in text
