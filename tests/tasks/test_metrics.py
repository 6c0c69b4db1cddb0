"""Tests that metrics equal their libraries and hand computations, for any number of references."""

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from prefix_jax.errors import ConfigError, DataError
from prefix_jax.tasks.metrics import TEXT_METRICS, measure, score

PREDICTIONS = [
    "Wren Hill serves the town of Millbeck.",
    "It has three platforms, all step-free, and a café.",
    "",
]
REFERENCES = [
    ["Wren Hill is the station for Millbeck.", "Wren Hill serves Millbeck."],
    ["All 3 platforms are step-free, and there is a café."],
    ["There is no parking.", "It has no parking.", "No parking."],
]
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def test_bleu_and_chrf_are_sacrebleus_over_none_padded_streams():
    streams = [
        [REFERENCES[0][0], REFERENCES[1][0], REFERENCES[2][0]],
        [REFERENCES[0][1], None, REFERENCES[2][1]],
        [None, None, REFERENCES[2][2]],
    ]
    assert score(["bleu", "chrf"], PREDICTIONS, REFERENCES) == {
        "bleu": sacrebleu.corpus_bleu(PREDICTIONS, streams).score,
        "chrf": sacrebleu.corpus_chrf(PREDICTIONS, streams).score,
    }


def test_rouge_is_rouge_scores_best_reference_averaged_over_inputs():
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    for kind, value in score(ROUGE, PREDICTIONS, REFERENCES).items():
        best = [
            max(scorer.score(text, prediction)[kind].fmeasure for text in texts)
            for prediction, texts in zip(PREDICTIONS, REFERENCES, strict=True)
        ]
        assert value == pytest.approx(100 * sum(best) / 3)


def test_bleu_by_hand():
    # n-gram precisions 5/6, 3/5, 2/4 and 1/3; equal lengths, so no brevity penalty.
    scores = score(["bleu"], ["the cat sat on the mat"], [["the cat sat on a mat"]])
    assert scores["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_chrf_by_hand():
    # Precision and recall are equal: 2/3 for letters, 1/2 for pairs, 0 for the only triple.
    scores = score(["chrf"], ["abc"], [["abd"]])
    assert scores["chrf"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_rouge_by_hand_with_stems():
    # cat(s) and sat are shared: precision 2/3, recall 2/4; for pairs 1/2 and 1/3.
    scores = score(ROUGE, ["the cats sat"], [["a cat sat down"]])
    assert scores["rouge1"] == pytest.approx(100 * 4 / 7)
    assert scores["rouge2"] == pytest.approx(100 * 2 / 5)
    assert scores["rougeL"] == pytest.approx(100 * 4 / 7)


def test_rouge_l_sum_treats_lines_as_sentences():
    scores = score(["rougeL", "rougeLsum"], ["red fox\nblue sea"], [["blue sea\nred fox"]])
    assert scores == {"rougeL": pytest.approx(50), "rougeLsum": pytest.approx(100)}


def test_final_number_ignores_text_before_it_and_formatting():
    predictions = ["So 3 + 4 = 7. The answer is: 1,000", "It is $7.50 ($7.5).", "none", "-3 or 4"]
    references = [["#### 1000"], ["7.5"], ["0"], ["5 4", "9"]]
    assert score(["final_number"], predictions, references) == {"final_number": 75.0}
    assert score(["final_number"], ["none"], [["many"]]) == {"final_number": 0.0}


def test_numbers_beyond_floats_are_compared_exactly():
    predictions, references = ["9" * 400, str(2**53 + 1)], [["8" * 400], [str(2**53)]]
    assert score(["final_number"], predictions, references) == {"final_number": 0.0}
    assert score(["final_number"], predictions, [[text] for text in predictions]) == {
        "final_number": 100.0
    }


def test_exact_match_ignores_whitespace_and_accepts_any_reference():
    predictions = [" a  b\n", "A b", "ab", "c"]
    references = [["x", "a b"], ["a b"], ["a b"], ["c"]]
    assert score(["exact_match"], predictions, references) == {"exact_match": 50.0}


def test_accuracy_compares_labels_exactly():
    labels = [["positive"], ["negative"], ["negative"], ["negative"]]
    predicted = ["positive", "positive", "negative", " negative"]
    assert score(["accuracy"], predicted, labels) == {"accuracy": 50.0}


def test_a_perfect_prediction_scores_100_and_an_empty_one_0():
    texts = ["All 3 platforms are step-free, and there is a café."]
    assert score(TEXT_METRICS, texts, [texts]) == {
        name: pytest.approx(100) for name in TEXT_METRICS
    }
    assert score(TEXT_METRICS, [""], [texts]) == dict.fromkeys(TEXT_METRICS, 0.0)


TEXT = st.text(st.sampled_from("ab é.\n"), max_size=12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=3))
def test_a_repeated_reference_changes_nothing_and_scores_are_percentages(inputs):
    predictions = [prediction for prediction, _ in inputs]
    references = [texts for _, texts in inputs]
    once = score(TEXT_METRICS, predictions, references)
    assert all(0 <= value <= 100 + 1e-9 for value in once.values())
    repeated = [[*references[0], references[0][0]], *references[1:]]
    assert score(TEXT_METRICS, predictions, repeated) == once


def test_signatures_state_options_and_versions():
    scores = measure(TEXT_METRICS, PREDICTIONS, REFERENCES)
    assert scores["bleu"].signature == (
        f"nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    )
    assert scores["rouge2"].signature.startswith("rouge2|refs:best-f1|stem:porter|")
    assert all(result.signature for result in scores.values())


def test_unknown_metric_error_has_closest_match():
    with pytest.raises(ConfigError, match="unknown metric 'blue': did you mean 'bleu'"):
        score(["blue"], ["a"], [["a"]])
    with pytest.raises(ConfigError, match="'zzz': choose from bleu, chrf, rouge1"):
        score(["zzz"], ["a"], [["a"]])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no predictions"),
        (["a", "b"], [["a"]], "got 2 predictions and 1 lists of references"),
        (["a", "b"], [["a"], []], r"references\[1\]: .*, got \[\]"),
        (["a"], ["a"], r"references\[0\]: .*, got 'a'"),
    ],
)
def test_rejects_unpaired_predictions_and_references(predictions, references, message):
    with pytest.raises(DataError, match=message):
        score(["exact_match"], predictions, references)
