"""Tokenizes and decodes untrusted text with untrusted tokenizers.

The tokenizers library is written in Rust. On unexpected input it raises a bare `Exception`, panics,
or ends the process, so every text is checked before it is tokenized. `tokenizer_files` reads
tokenizers.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefix_jax.errors import DataError, PrefixJaxError

if TYPE_CHECKING:  # the import takes seconds
    from tokenizers import Encoding
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# The maximum length of a text, and of all texts in one call. The library needs about 100 bytes of
# memory per character of English, and 650 for Chinese without a Chinese vocabulary. A million
# tokens of English fit.
MAX_CHARACTERS = 4 * 2**20

# Rows of the model's embedding table, for tokenizers with larger ids.
_ROWS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def probe(
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None,
    where: str,
    error: type[PrefixJaxError],
) -> None:
    """Checks that a tokenizer works and fits a model.

    Ids beyond the embedding table are accepted as long as no text uses them: some checkpoints have
    added tokens that were never trained. After this call, `token_ids` and `encodings` reject
    texts that contain such tokens.

    Args:
        tokenizer: the tokenizer, not yet used.
        rows: the number of rows of the model's embedding table; None disables the check.
        where: the model, for messages.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if tokenization fails, or if a token that is added to
            every text is beyond the embedding table.
    """
    with failures(f"{where}: the tokenizer is malformed", error):
        largest = max(tokenizer.get_vocab().values(), default=-1)
        end = tokenizer.eos_token_id
    if largest < 0:
        raise error(f"{where}: the tokenizer has no tokens")
    if rows is not None and largest >= rows:
        _ROWS[tokenizer] = rows
    token_ids(tokenizer, ["a 1"], where, error, add_special_tokens=True)
    if end is not None:
        _check_ids(tokenizer, [end], where, error)


def token_ids(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    where: str | Sequence[str],
    error: type[PrefixJaxError] = DataError,
    *,
    add_special_tokens: bool = False,
) -> list[list[int]]:
    """Tokenizes texts.

    Args:
        tokenizer: a tokenizer of Hugging Face transformers.
        texts: the texts.
        where: the record of each text, or one origin for all, for messages.
        error: the class to raise.
        add_special_tokens: add the tokenizer's special tokens to each text.

    Raises:
        PrefixJaxError: of class `error`, if a text is too long, is not valid Unicode, cannot be
            tokenized, or has a token beyond the model's embedding table.
    """
    names = [where] * len(texts) if isinstance(where, str) else where
    ids: list[list[int]] = []
    for part in _parts(texts, None, names, error):
        options = {"add_special_tokens": add_special_tokens}
        ids += _tokenize(tokenizer, texts, None, part, names, error, options)["input_ids"]
    for text_ids, name in zip(ids, names, strict=True):
        _check_ids(tokenizer, text_ids, name, error)
    return ids


def encodings(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    where: str | Sequence[str],
    error: type[PrefixJaxError] = DataError,
    **options: Any,
) -> list[Encoding]:
    """Tokenizes texts or pairs of texts, with special tokens and offsets.

    Args:
        tokenizer: a fast tokenizer of Hugging Face transformers.
        texts: the texts.
        pairs: the second text of each pair; None for single texts.
        where: the record of each text, or one origin for all, for messages.
        error: the class to raise.
        options: options of the tokenizer, such as `truncation` and `max_length`. With
            `return_overflowing_tokens`, a text may have several encodings.

    Raises:
        PrefixJaxError: see `token_ids`.
    """
    names = [where] * len(texts) if isinstance(where, str) else where
    encoded: list[Encoding] = []
    for part in _parts(texts, pairs, names, error):
        new = _tokenize(tokenizer, texts, pairs, part, names, error, options).encodings or []
        overflowing = len(new) != part.stop - part.start
        for index, encoding in enumerate(new):
            name = names[part.start + (0 if overflowing else index)]
            _check_ids(tokenizer, encoding.ids, name, error)
        encoded += new
    return encoded


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    part: slice,
    names: Sequence[str],
    error: type[PrefixJaxError],
    options: Mapping[str, Any],
) -> BatchEncoding:
    """Tokenizes a slice of texts in one call. If it fails, the error names the text that failed."""

    def call(part: slice) -> BatchEncoding:
        seconds = None if pairs is None else list(pairs[part])
        with failures(f"{names[part.start]}: cannot be tokenized", error):
            return tokenizer(list(texts[part]), seconds, verbose=False, **options)

    try:
        return call(part)
    except error:
        for index in range(part.start, part.stop):
            call(slice(index, index + 1))
        raise


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decodes tokens to text.

    Raises:
        DataError: the tokenizer cannot decode the tokens.
    """
    with failures("the tokenizer cannot decode its tokens", DataError):
        return str(tokenizer.decode(list(ids)))


@contextlib.contextmanager
def failures(where: str, error: type[PrefixJaxError], view: str | None = None) -> Iterator[None]:
    """Turns everything that a tokenizer raises, including panics of Rust, into one error.

    Args:
        where: the start of the message.
        error: the class to raise.
        view: a temporary directory, whose path must not appear in the message.
    """
    try:
        yield
    except PrefixJaxError:
        raise
    except BaseException as failure:
        if not isinstance(failure, Exception) and type(failure).__name__ != "PanicException":
            raise  # KeyboardInterrupt, SystemExit
        lines = str(failure).strip().splitlines()
        text = lines[0][:300] if lines else ""
        if view is not None:
            text = text.replace(view, "the directory")
        if not isinstance(failure, OSError | ValueError) and type(failure) is not Exception:
            text = f"{type(failure).__name__}: {text}"
        raise error(f"{where}: {text or type(failure).__name__}") from None


def _parts(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    names: Sequence[str],
    error: type[PrefixJaxError],
) -> Iterator[slice]:
    """Yields slices of at most `MAX_CHARACTERS` each, after checking their texts."""
    start = size = 0
    for index, (text, name) in enumerate(zip(texts, names, strict=True)):
        length = check_text(text, name, error)
        if pairs is not None:
            length += check_text(pairs[index], name, error)
        if size and size + length > MAX_CHARACTERS:
            yield slice(start, index)
            start, size = index, 0
        size += length
    if len(texts) > start:
        yield slice(start, len(texts))


def check_text(text: str, where: str, error: type[PrefixJaxError]) -> int:
    """Checks a text before it is tokenized; returns its length.

    Raises:
        PrefixJaxError: of class `error`, if the text is too long or contains an unpaired
            surrogate, as JSON escapes can.
    """
    if len(text) > MAX_CHARACTERS:
        raise error(
            f"{where}: the text has {len(text):,} characters, at most {MAX_CHARACTERS:,} can be "
            "tokenized; split the record"
        )
    try:
        text.encode()
    except UnicodeEncodeError as failure:
        raise error(f"{where}: not valid Unicode text: {failure.reason}") from None
    return len(text)


def _check_ids(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    where: str,
    error: type[PrefixJaxError],
) -> None:
    rows = _ROWS.get(tokenizer)
    if rows is None or not ids or max(ids) < rows:
        return
    token = str(tokenizer.convert_ids_to_tokens(max(ids)))
    raise error(
        f"{where}: token {token!r} has id {max(ids)}, but the model's embedding table has only "
        f"{rows} rows; use the tokenizer that the model was trained with"
    )
