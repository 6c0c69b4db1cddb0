"""Checks of `tokenizer.json` and of the tokens in other tokenizer files.

The tokenizers library panics, ends the process or exhausts memory on some malformed content, so the
content is checked before the library reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from prefix_jax.errors import PrefixJaxError
from prefix_jax.untrusted.json import describe_json
from prefix_jax.validation import Interval, matches

# The library allocates memory up to the largest id. The largest known vocabulary has 262,208.
MAX_ID = 2**22
# How many times longer a text may become before it is split into tokens.
MAX_GROWTH = 64

Id = Annotated[int, Interval(ge=0, le=MAX_ID)]

_TOKEN_FLAGS = {"lstrip", "normalized", "rstrip", "single_word", "special"}
_MAX_MISSING_IDS = 10_000
_MAX_WORD = 10_000  # characters; BERT has 100, and WordPiece is quadratic in this length
_MAX_TEMPLATE = 100  # pieces of a post-processor's template


def check_tokenizer_json(content: Any, where: str, error: type[PrefixJaxError]) -> None:
    """Checks for content that would crash the tokenizers library or make it hang.

    Args:
        content: the parsed content of a `tokenizer.json`.
        where: the file, for messages.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if the content is malformed.
    """
    content = json_object(content, where, error)
    model = content.get("model")
    if not isinstance(model, dict):
        raise error(f"{where}: model: expected an object, got {describe_json(model)}")
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        check_vocabulary(vocab, f"{where}: model.vocab", error)
        check_missing_ids(vocab, f"{where}: model.vocab", error)
    elif not isinstance(vocab, list):
        raise error(f"{where}: model.vocab: expected an object, got {describe_json(vocab)}")
    settings = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    check_numbers(settings, f"{where}: model", error)
    word = model.get("max_input_chars_per_word", 0)
    if not matches(word, Annotated[int, Interval(ge=0, le=_MAX_WORD)]):
        raise error(
            f"{where}: model.max_input_chars_per_word must be an integer up to {_MAX_WORD}, "
            f"got {word!r:.40}"
        )
    added = content.get("added_tokens") or []
    if not matches(added, list[dict[str, Any]]):
        raise error(f"{where}: added_tokens: expected an array of objects")
    for token in added:
        check_token(token, f"{where}: added_tokens", error)
        if not matches(token.get("id"), Id):
            raise error(
                f"{where}: added_tokens: expected ids from 0 to {MAX_ID}, got {token!r:.120}"
            )
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        check_numbers(content.get(part), f"{where}: {part}", error)
        if _growth(content.get(part), f"{where}: {part}", error) > MAX_GROWTH:
            raise error(
                f"{where}: {part} can make a text more than {MAX_GROWTH} times longer; published "
                "tokenizers do not"
            )


def check_token(token: Any, where: str, error: type[PrefixJaxError]) -> None:
    """Raises unless a value is a token: a string, or an object with its content and flags."""
    if isinstance(token, str):
        return
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise error(
            f"{where}: expected a token (a string, or an object with its content), "
            f"got {token!r:.80}"
        )
    for key, value in token.items():
        if key in _TOKEN_FLAGS and not isinstance(value, bool):
            raise error(f"{where}: {key}: expected true or false, got {value!r:.80}")
        if key not in _TOKEN_FLAGS and key not in ("content", "id", "__type"):
            raise error(f"{where}: {key!r:.80} is not a property of a token")


def check_vocabulary(vocab: Mapping[str, Any], where: str, error: type[PrefixJaxError]) -> None:
    """Raises if an id of a vocabulary is not an integer or out of range."""
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index <= MAX_ID:
            raise error(
                f"{where}: token {token!r:.80}: expected an id from 0 to {MAX_ID}, "
                f"got {index!r:.40}"
            )


def check_missing_ids(vocab: Mapping[str, int], where: str, error: type[PrefixJaxError]) -> None:
    """Raises if most ids below the largest are missing: the library prints each missing id."""
    missing = max(vocab.values(), default=-1) + 1 - len(vocab)
    if missing > max(_MAX_MISSING_IDS, len(vocab)):
        raise error(f"{where}: {missing} ids are missing between those of its {len(vocab)} tokens")


def check_numbers(value: Any, where: str, error: type[PrefixJaxError]) -> None:
    """Raises if a JSON value contains an integer larger than any id or size."""
    if isinstance(value, int) and abs(value) > MAX_ID:
        raise error(f"{where}: {value!r:.40} is out of range; at most {MAX_ID} is expected")
    for item in value.values() if isinstance(value, dict) else value if _is_list(value) else ():
        check_numbers(item, where, error)


def _growth(step: Any, where: str, error: type[PrefixJaxError]) -> float:
    """Returns a bound on how many times longer a step and its inner steps can make a text."""
    if isinstance(step, list):
        growth = 1.0
        for inner in step:
            growth *= _growth(inner, where, error)
        return growth
    if not isinstance(step, dict):
        return 1.0
    growth = 1.0
    match step.get("type"):
        case "Replace":
            growth = _growth_of_replacement(step.get("pattern"), step.get("content"))
        case "Prepend":
            growth = max(1, len(str(step.get("prepend"))))
        case "TemplateProcessing":
            for key in ("single", "pair"):
                pieces: Any = step.get(key)
                if not matches(pieces, list[dict[str, Any]]) or len(pieces) > _MAX_TEMPLATE:
                    raise error(
                        f"{where}: {key}: expected an array of at most {_MAX_TEMPLATE} objects"
                    )
                used = [piece["SpecialToken"] for piece in pieces if "SpecialToken" in piece]
                tokens: Any = step.get("special_tokens")
                if used and not isinstance(tokens, dict):
                    raise error(f"{where}: special_tokens: expected an object")
                for token in used:
                    if not isinstance(token, dict) or token.get("id") not in list(tokens):
                        raise error(f"{where}: {key}: {token!r:.80} is not in special_tokens")
    for inner in step.values():
        if _is_list(inner):
            growth *= _growth(inner, where, error)
    return growth


def _growth_of_replacement(pattern: Any, content: Any) -> float:
    length = len(content) if isinstance(content, str) else 1
    if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        return max(1.0, length / max(1, len(pattern["String"])))
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    try:
        # Lookarounds may match the empty string between two characters.
        empty = not isinstance(regex, str) or "(?" in regex or re.match(regex, "") is not None
    except (re.error, OverflowError, RecursionError):
        empty = True
    return 1 + length if empty else max(1, length)


def json_object(value: Any, where: str, error: type[PrefixJaxError]) -> dict[str, Any]:
    """Returns a JSON object; raises if the value has another type."""
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, got {describe_json(value)}")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
