import pytest

from prefix_jax.errors import ConfigError, DataError
from prefix_jax.untrusted.names import check_storable_labels, check_storable_names


def test_accepts_the_names_of_published_tasks():
    check_storable_names(["sst2", "super_glue.rte", "e2e-clean", "größe", "3"], "here", ConfigError)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "a\\b", ".hidden", "a..b", "a.", "a b", "-a", "a\n", "a\0", "\x1b[31m",
     "\ud800", "C:"],
)  # fmt: skip
def test_rejects_invalid_directory_names(name: str):
    with pytest.raises(ConfigError, match=r"here: .* cannot name a directory; use letters"):
        check_storable_names([name], "here", ConfigError)


@pytest.mark.parametrize("name", ["a" * 300, "ü" * 100])
def test_rejects_names_that_are_too_long_for_a_directory(name: str):
    with pytest.raises(ConfigError, match="too many for a directory name"):
        check_storable_names([name], "here", ConfigError)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rte", "copa", "RTE"], "'rte' and 'RTE' would share a directory"),
        (["\u00c5", "\u212b"], "would share a directory"),
        (["stra\u00dfe", "STRASSE"], "would share a directory"),
        (["a", "b", "".join("a")], "'a' appears twice"),
    ],
)
def test_rejects_names_that_would_share_a_directory(names: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        check_storable_names(names, "here", ConfigError)


def test_labels_may_be_any_short_text():
    check_storable_labels(["", "not a name/at all\n", "größer"], "here", DataError)
    with pytest.raises(DataError, match=r"here: the label '\\ud800' is not valid Unicode text"):
        check_storable_labels(["\ud800"], "here", DataError)
    with pytest.raises(DataError, match="has 2,000 characters, at most 1,000"):
        check_storable_labels(["x" * 2000], "here", DataError)
