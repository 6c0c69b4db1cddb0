"""Tokenizers of other people: reading their files, and every text that passes through them.

The tokenizers library is written in Rust. On input that it does not expect it raises a bare
`Exception`, panics, or ends the process, so files are checked before it sees them, and every text
before it is tokenized.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prefix_jax.errors import DataError, PrefixJaxError
from prefix_jax.untrusted.json import describe_json, parse_json
from prefix_jax.untrusted.paths import read_bytes, read_text
from prefix_jax.untrusted.values import Range, matches

if TYPE_CHECKING:  # its import takes seconds
    from tokenizers import Encoding
    from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# The longest text to tokenize, and the most in one call. A character needs 100 bytes of memory in
# English, 650 in Chinese without a vocabulary for it. A million tokens of English fit.
MAX_CHARACTERS = 4 * 2**20
# The largest vocabulary known has 262,208 tokens. The library reserves memory up to the largest id.
MAX_ID = 2**22
# The largest tokenizer.json known has 35 MB.
MAX_BYTES = 128 * 2**20
# How much longer a text may become before it is split into tokens.
MAX_GROWTH = 64

Id = Annotated[int, Range(0, MAX_ID)]

# The files that tokenizers consist of. Everything else in a directory is out of their reach.
_JSON_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json")
_TEXT_FILES = ("vocab.txt", "merges.txt", "chat_template.jinja")
_TEMPLATES = "additional_chat_templates"
# Keys of tokenizer_config.json that name code, or files, which may be anywhere.
_CODE = "auto_map"
_IGNORED = {
    _CODE, "backend", "cache_dir", "gguf_file", "init_inputs", "is_local", "local_files_only",
    "merges", "name_or_path", "post_processor", "tokenizer_object", "trust_remote_code", "vocab",
}  # fmt: skip
_FILE_KEY = re.compile(r"(?!fast_tokenizer_files$).*_(file|files|path|dir)")
# What AutoTokenizer reads of config.json.
_CONFIG_KEYS = ("model_type", "model_name", "tokenizer_class", "transformers_version")
_ROLES = {f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
_FLAGS = {"lstrip", "normalized", "rstrip", "single_word", "special"}
_MAX_EXTRA_IDS = 10_000  # T5 has 100
_MAX_HOLES = 10_000
_MAX_WORD = 10_000  # characters; BERT has 100, and WordPiece takes quadratic time
_MAX_TEMPLATE = 100  # pieces of a post-processor's template

# Rows of the embedding table, for tokenizers that have tokens beyond it.
_ROWS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def read_tokenizer(directory: Path, error: type[PrefixJaxError]) -> PreTrainedTokenizerFast:
    """Reads the tokenizer of a directory in Hugging Face layout, without running code from it.

    transformers sees a temporary directory that holds nothing but checked files.

    Raises:
        PrefixJaxError: of class `error`, if there is no tokenizer, its files are malformed, or it
            is Python code.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    unusable = "reading the tokenizer needs a writable directory for temporary files"
    try:
        folder = tempfile.TemporaryDirectory(prefix="prefix-jax-tokenizer-")
    except OSError as failure:
        raise error(f"{directory}: {unusable} ({failure})") from None
    with folder as view:
        try:
            _link_checked(directory, Path(view), error)
        except OSError as failure:
            raise error(f"{directory}: {unusable} ({failure})") from None
        holds_none = f"{directory} holds no tokenizer that can be read"
        with _stdout_as_stderr(), failures(holds_none, error, view):
            tokenizer = AutoTokenizer.from_pretrained(
                view, local_files_only=True, trust_remote_code=False
            )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise error(
            f"{directory} holds a tokenizer in Python code ({type(tokenizer).__name__}); "
            "convert it to a tokenizer.json"
        )
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(directory)
    return tokenizer


def probe(
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None,
    where: str,
    error: type[PrefixJaxError],
) -> None:
    """Checks that a tokenizer works and belongs to a model.

    A tokenizer may have tokens beyond the embedding table as long as no text uses them: some
    checkpoints have added tokens that were never trained. From here on, `token_ids` and
    `encodings` refuse a text that does.

    Args:
        tokenizer: a new one.
        rows: of the model's embedding table; None for any number.
        where: the model, for messages.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if tokenizing fails, or if a token that every text gets
            is beyond the embedding table.
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
        tokenizer: of Hugging Face transformers.
        texts: to tokenize.
        where: the record of each text, or the origin of all, for messages.
        error: the class to raise.
        add_special_tokens: write the tokenizer's special tokens around each text.

    Raises:
        PrefixJaxError: of class `error`, if a text is too long, is not valid Unicode, cannot be
            tokenized, or has a token beyond the model's embedding table.
    """
    names = [where] * len(texts) if isinstance(where, str) else where
    ids: list[list[int]] = []
    for part in _parts(texts, None, names, error):
        options = {"add_special_tokens": add_special_tokens}
        ids += _tokenize(tokenizer, texts, None, part, names, error, options)["input_ids"]
    for one, name in zip(ids, names, strict=True):
        _check_ids(tokenizer, one, name, error)
    return ids


def encodings(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    where: str | Sequence[str],
    error: type[PrefixJaxError] = DataError,
    **options: Any,
) -> list[Encoding]:
    """Tokenizes texts, or pairs of texts, with their special tokens and offsets.

    Args:
        tokenizer: a fast one of Hugging Face transformers.
        texts: to tokenize.
        pairs: the second text of each; None for single texts.
        where: the record of each text, or the origin of all, for messages.
        error: the class to raise.
        options: such as `truncation` and `max_length`. With `return_overflowing_tokens`, a text
            has several encodings.

    Raises:
        PrefixJaxError: see `token_ids`.
    """
    names = [where] * len(texts) if isinstance(where, str) else where
    encoded: list[Encoding] = []
    for part in _parts(texts, pairs, names, error):
        new = _tokenize(tokenizer, texts, pairs, part, names, error, options).encodings or []
        several = len(new) != part.stop - part.start
        for index, encoding in enumerate(new):
            name = names[part.start + (0 if several else index)]
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
    """Tokenizes a slice of texts in one call. If that fails, finds the text that is to blame."""

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
    """The text of tokens.

    Raises:
        DataError: the tokenizer cannot decode them.
    """
    with failures("the tokenizer cannot decode its tokens", DataError):
        return str(tokenizer.decode(list(ids)))


@contextlib.contextmanager
def failures(where: str, error: type[PrefixJaxError], view: str | None = None) -> Iterator[None]:
    """Turns whatever a tokenizer raises into one error. Panics of Rust are no `Exception`."""
    try:
        yield
    except PrefixJaxError:
        raise
    except BaseException as failure:
        if not isinstance(failure, Exception) and type(failure).__name__ != "PanicException":
            raise  # Ctrl-C and exits
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
    """Slices of at most `MAX_CHARACTERS`, each checked before it is returned."""
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
    """Returns the length of a text that a tokenizer can read.

    Raises:
        PrefixJaxError: of class `error`, if the text is too long, or holds half of a surrogate
            pair, as JSON can.
    """
    if len(text) > MAX_CHARACTERS:
        raise error(
            f"{where}: a text of {len(text):,} characters; the most that is tokenized is "
            f"{MAX_CHARACTERS:,}, so split the record"
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
        f"{where}: token {token!r} has id {max(ids)}, and the model's embedding table has "
        f"{rows} rows; use the tokenizer that the model was trained with"
    )


@contextlib.contextmanager
def _stdout_as_stderr() -> Iterator[None]:
    """Keeps what the Rust side prints out of stdout, which may be data."""
    try:
        stdout = os.dup(1)
    except OSError:  # closed
        yield
        return
    try:
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


# Checking files.


def _link_checked(directory: Path, view: Path, error: type[PrefixJaxError]) -> None:
    """Fills `view` with the files that transformers may see: links, and configs without code.

    Raises:
        PrefixJaxError: of class `error`, if one of them is malformed.
    """

    def text_of(name: str) -> str | None:
        path = directory / name
        return read_text(path, error, limit=MAX_BYTES) if path.exists() else None

    def link(file: Path) -> None:
        target = view / file.relative_to(directory)
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(file.absolute())

    for file in sorted(directory.glob("tokenizer.*json")):
        content = read_text(file, error, limit=MAX_BYTES)
        check_tokenizer_json(parse_json(content, str(file), error), str(file), error)
        link(file)
    for name in _JSON_FILES:
        if (text := text_of(name)) is not None:
            where = str(directory / name)
            tokens = _object(parse_json(text, where, error), where, error)
            if name != "special_tokens_map.json":
                _check_vocabulary(tokens, where, error)
            if name == "vocab.json":
                _check_holes(tokens, where, error)
            if name == "special_tokens_map.json":
                _check_tokens(tokens, where, error)
            link(directory / name)
    for name in _TEXT_FILES:
        if text_of(name) is not None:
            link(directory / name)
    for pattern in ("*.model", f"{_TEMPLATES}/*.jinja"):
        for file in sorted(directory.glob(pattern)):
            read_bytes(file, error, limit=MAX_BYTES)
            link(file)
    known = {}
    if (text := text_of("config.json")) is not None:
        where = str(directory / "config.json")
        config = _object(parse_json(text, where, error), where, error)
        known = {key: config[key] for key in _CONFIG_KEYS if isinstance(config.get(key), str)}
        _check_class(known.get("tokenizer_class"), None, where, error)
        (view / "config.json").write_text(json.dumps(known), encoding="utf-8")
    if (text := text_of("tokenizer_config.json")) is not None:
        where = str(directory / "tokenizer_config.json")
        config = _object(parse_json(text, where, error), where, error)
        checked = _checked_config(config, where, error)
        (view / "tokenizer_config.json").write_text(json.dumps(checked), encoding="utf-8")


def check_tokenizer_json(content: Any, where: str, error: type[PrefixJaxError]) -> None:
    """Checks what the tokenizers library would not survive, or could not finish.

    Args:
        content: of a `tokenizer.json`.
        where: the file.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if the content is malformed.
    """
    content = _object(content, where, error)
    model = content.get("model")
    if not isinstance(model, dict):
        raise error(f"{where}: model: expected an object, got {describe_json(model)}")
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        _check_vocabulary(vocab, f"{where}: model.vocab", error)
        _check_holes(vocab, f"{where}: model.vocab", error)
    elif not isinstance(vocab, list):
        raise error(f"{where}: model.vocab: expected an object, got {describe_json(vocab)}")
    settings = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    _check_numbers(settings, f"{where}: model", error)
    word = model.get("max_input_chars_per_word", 0)
    if not matches(word, Annotated[int, Range(0, _MAX_WORD)]):
        raise error(
            f"{where}: model.max_input_chars_per_word must be an integer up to {_MAX_WORD}, "
            f"got {word!r:.40}"
        )
    added = content.get("added_tokens") or []
    if not matches(added, list[dict[str, Any]]):
        raise error(f"{where}: added_tokens: expected an array of objects")
    for token in added:
        _check_token(token, f"{where}: added_tokens", error)
        if not matches(token.get("id"), Id):
            raise error(
                f"{where}: added_tokens: expected ids from 0 to {MAX_ID}, got {token!r:.120}"
            )
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        _check_numbers(content.get(part), f"{where}: {part}", error)
        if _growth(content.get(part), f"{where}: {part}", error) > MAX_GROWTH:
            raise error(
                f"{where}: {part} can make a text more than {MAX_GROWTH} times longer, as no "
                "published tokenizer does"
            )


def _checked_config(
    config: Mapping[str, Any], where: str, error: type[PrefixJaxError]
) -> dict[str, Any]:
    """The content of `tokenizer_config.json` without code and foreign files."""
    code = config.get(_CODE)
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    _check_class(config.get("tokenizer_class"), code, where, error)
    checked = {
        key: value
        for key, value in config.items()
        if key not in _IGNORED and not _FILE_KEY.fullmatch(key)
    }
    if not matches(checked.get("fast_tokenizer_files"), list[str] | None):
        raise error(f"{where}: fast_tokenizer_files: expected an array of names")
    for name in checked.get("fast_tokenizer_files") or ():
        if "/" in name or "\\" in name:
            raise error(f"{where}: fast_tokenizer_files: {name!r:.80} is not the name of a file")
    _check_tokens(checked, where, error)
    for key, value in checked.items():
        # The longest text is often written as 10**30.
        if "max" not in key:
            _check_numbers(value, f"{where}: {key}", error)
    tokens = checked.get("added_tokens_decoder") or {}
    if not matches(tokens, dict[str, dict[str, Any]]) or not all(
        key.isdecimal() and len(key) < 10 and int(key) <= MAX_ID for key in tokens
    ):
        raise error(
            f"{where}: added_tokens_decoder: expected an object of tokens by their ids, "
            f"which are at most {MAX_ID}"
        )
    for token in tokens.values():
        _check_token(token, f"{where}: added_tokens_decoder", error)
    extra = checked.get("extra_ids")
    if not matches(extra, Annotated[int, Range(0, _MAX_EXTRA_IDS)] | None):
        raise error(
            f"{where}: extra_ids must be an integer up to {_MAX_EXTRA_IDS}, got {extra!r:.40}"
        )
    template = checked.get("chat_template")
    named = list[dict[str, str]]
    if not matches(template, str | named | None) or (
        isinstance(template, list) and not all({"name", "template"} <= {*t} for t in template)
    ):
        raise error(
            f"{where}: chat_template: expected a string, or an array of objects with name and "
            f"template; got {describe_json(template)}"
        )
    return checked


def _check_class(name: Any, code: Any, where: str, error: type[PrefixJaxError]) -> None:
    """Raises if a tokenizer is of a class that is not a tokenizer of transformers.

    Args:
        name: of the class; None if the file names none. transformers reads a tokenizer of unknown
            class by its `tokenizer.json`.
        code: where the file says that the code of the class is; None if it says nothing.
        where: the file.
        error: the class to raise.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(name, str | None):
        raise error(f"{where}: tokenizer_class: expected a string, got {describe_json(name)}")
    known = None
    if name is not None and name.isidentifier():
        with failures(f"{where}: tokenizer_class {name!r:.80} cannot be used", error):
            known = tokenizer_class_from_name(name)
    if known is None and code is not None:
        raise error(
            f"{where}: the tokenizer is Python code of the model ({_CODE}), which is never run; "
            "load and save the tokenizer where you trust that code, or use a model with a "
            "tokenizer of transformers"
        )
    # AutoTokenizer, say, would be asked again and could then run code.
    if known is not None and not (
        isinstance(known, type) and issubclass(known, PreTrainedTokenizerBase)
    ):
        raise error(f"{where}: tokenizer_class {name!r:.80} is not a tokenizer of transformers")


def _check_tokens(content: Mapping[str, Any], where: str, error: type[PrefixJaxError]) -> None:
    """Checks the special tokens among the keys of a file."""
    for key, value in content.items():
        # Some models have further keys with this ending, which may be anything.
        token = key in _ROLES or (key.endswith("_token") and isinstance(value, dict))
        if token and value is not None:
            _check_token(value, f"{where}: {key}", error)
        elif key in ("additional_special_tokens", "extra_special_tokens") and value is not None:
            if not isinstance(value, dict | list):
                raise error(f"{where}: {key}: expected an array, got {describe_json(value)}")
            for token in value.values() if isinstance(value, dict) else value:
                _check_token(token, f"{where}: {key}", error)


def _check_token(token: Any, where: str, error: type[PrefixJaxError]) -> None:
    """Raises unless a value is the text of a token, or an object with its text and its flags."""
    if isinstance(token, str):
        return
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise error(
            f"{where}: expected a token, that is a string or an object with its content, "
            f"got {token!r:.80}"
        )
    for key, value in token.items():
        if key in _FLAGS and not isinstance(value, bool):
            raise error(f"{where}: {key}: expected true or false, got {value!r:.80}")
        if key not in _FLAGS and key not in ("content", "id", "__type"):
            raise error(f"{where}: {key!r:.80} is not a property of a token")


def _check_vocabulary(vocab: Mapping[str, Any], where: str, error: type[PrefixJaxError]) -> None:
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index <= MAX_ID:
            raise error(
                f"{where}: token {token!r:.80}: expected an id from 0 to {MAX_ID}, "
                f"got {index!r:.40}"
            )


def _check_holes(vocab: Mapping[str, int], where: str, error: type[PrefixJaxError]) -> None:
    """Raises if most ids up to the largest have no token: the library lists them one by one."""
    holes = max(vocab.values(), default=-1) + 1 - len(vocab)
    if holes > max(_MAX_HOLES, len(vocab)):
        raise error(f"{where}: {holes} ids are missing between those of its {len(vocab)} tokens")


def _check_numbers(value: Any, where: str, error: type[PrefixJaxError]) -> None:
    """Raises if a JSON value holds an integer that is larger than any id or size."""
    if isinstance(value, int) and abs(value) > MAX_ID:
        raise error(f"{where}: {value!r:.40} is out of range; at most {MAX_ID} is expected")
    for item in value.values() if isinstance(value, dict) else value if _is_list(value) else ():
        _check_numbers(item, where, error)


def _growth(step: Any, where: str, error: type[PrefixJaxError]) -> float:
    """A bound of how many times longer a step of a tokenizer, and those inside it, make a text."""
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
                        raise error(
                            f"{where}: {key}: {token!r:.80} is not one of its special_tokens"
                        )
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
        # Lookarounds may match between two characters too.
        empty = not isinstance(regex, str) or "(?" in regex or re.match(regex, "") is not None
    except (re.error, OverflowError, RecursionError):
        empty = True
    return 1 + length if empty else max(1, length)


def _object(value: Any, where: str, error: type[PrefixJaxError]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, got {describe_json(value)}")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
