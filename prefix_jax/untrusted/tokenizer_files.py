"""Reads tokenizers in Hugging Face layout without running their code.

transformers sees only a temporary directory with checked files: links to them, and copies of the
configs without keys that name code or other files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prefix_jax.errors import PrefixJaxError
from prefix_jax.untrusted.json import describe_json, parse_json
from prefix_jax.untrusted.paths import read_bytes, read_text
from prefix_jax.untrusted.tokenizer import failures
from prefix_jax.untrusted.tokenizer_json import (
    MAX_ID,
    check_missing_ids,
    check_numbers,
    check_token,
    check_tokenizer_json,
    check_vocabulary,
    json_object,
)
from prefix_jax.validation import Interval, matches

if TYPE_CHECKING:  # the import takes seconds
    from transformers import PreTrainedTokenizerFast

# The largest known tokenizer.json has 35 MB.
MAX_BYTES = 128 * 2**20

# The files of a tokenizer. Other files of the directory are not visible to transformers.
_JSON_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json")
_TEXT_FILES = ("vocab.txt", "merges.txt", "chat_template.jinja")
_TEMPLATES = "additional_chat_templates"
# Keys of tokenizer_config.json that name code, or files anywhere on the disk.
_CODE = "auto_map"
_IGNORED = {
    _CODE, "backend", "cache_dir", "gguf_file", "init_inputs", "is_local", "local_files_only",
    "merges", "name_or_path", "post_processor", "tokenizer_object", "trust_remote_code", "vocab",
}  # fmt: skip
_FILE_KEY = re.compile(r"(?!fast_tokenizer_files$).*_(file|files|path|dir)")
# The keys of config.json that AutoTokenizer uses.
_CONFIG_KEYS = ("model_type", "model_name", "tokenizer_class", "transformers_version")
_ROLES = {f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
_MAX_EXTRA_IDS = 10_000  # T5 has 100


def read_tokenizer(directory: Path, error: type[PrefixJaxError]) -> PreTrainedTokenizerFast:
    """Reads the tokenizer of a directory.

    Raises:
        PrefixJaxError: of class `error`, if there is no tokenizer, its files are malformed, or it
            needs Python code of the model.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    needs_tmp = "cannot read the tokenizer without a writable directory for temporary files"
    try:
        folder = tempfile.TemporaryDirectory(prefix="prefix-jax-tokenizer-")
    except OSError as failure:
        raise error(f"{directory}: {needs_tmp} ({failure})") from None
    with folder as view:
        try:
            _link_checked(directory, Path(view), error)
        except OSError as failure:
            raise error(f"{directory}: {needs_tmp} ({failure})") from None
        with _stdout_as_stderr(), failures(f"{directory}: no readable tokenizer", error, view):
            tokenizer = AutoTokenizer.from_pretrained(
                view, local_files_only=True, trust_remote_code=False
            )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise error(
            f"{directory}: the tokenizer {type(tokenizer).__name__} is slow (Python only); "
            "convert it to a tokenizer.json"
        )
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(directory)
    return tokenizer


def _link_checked(directory: Path, view: Path, error: type[PrefixJaxError]) -> None:
    """Fills `view` with links to checked files and with configs without code.

    Raises:
        PrefixJaxError: of class `error`, if a file is malformed.
    """

    def read(name: str) -> str | None:
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
        if (text := read(name)) is not None:
            where = str(directory / name)
            tokens = json_object(parse_json(text, where, error), where, error)
            if name != "special_tokens_map.json":
                check_vocabulary(tokens, where, error)
            if name == "vocab.json":
                check_missing_ids(tokens, where, error)
            if name == "special_tokens_map.json":
                _check_tokens(tokens, where, error)
            link(directory / name)
    for name in _TEXT_FILES:
        if read(name) is not None:
            link(directory / name)
    for pattern in ("*.model", f"{_TEMPLATES}/*.jinja"):
        for file in sorted(directory.glob(pattern)):
            read_bytes(file, error, limit=MAX_BYTES)
            link(file)
    if (text := read("config.json")) is not None:
        where = str(directory / "config.json")
        config = json_object(parse_json(text, where, error), where, error)
        used = {key: config[key] for key in _CONFIG_KEYS if isinstance(config.get(key), str)}
        _check_class(used.get("tokenizer_class"), None, where, error)
        (view / "config.json").write_text(json.dumps(used), encoding="utf-8")
    if (text := read("tokenizer_config.json")) is not None:
        where = str(directory / "tokenizer_config.json")
        config = json_object(parse_json(text, where, error), where, error)
        checked = _checked_config(config, where, error)
        (view / "tokenizer_config.json").write_text(json.dumps(checked), encoding="utf-8")


def _checked_config(
    config: Mapping[str, Any], where: str, error: type[PrefixJaxError]
) -> dict[str, Any]:
    """Checks `tokenizer_config.json`; returns it without keys that name code or other files."""
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
            raise error(f"{where}: fast_tokenizer_files: {name!r:.80} is not a file name")
    _check_tokens(checked, where, error)
    for key, value in checked.items():
        # The maximum length is often written as 10**30.
        if "max" not in key:
            check_numbers(value, f"{where}: {key}", error)
    tokens = checked.get("added_tokens_decoder") or {}
    if not matches(tokens, dict[str, dict[str, Any]]) or not all(
        key.isdecimal() and len(key) < 10 and int(key) <= MAX_ID for key in tokens
    ):
        raise error(
            f"{where}: added_tokens_decoder: expected an object of tokens by id, with ids of at "
            f"most {MAX_ID}"
        )
    for token in tokens.values():
        check_token(token, f"{where}: added_tokens_decoder", error)
    extra = checked.get("extra_ids")
    if not matches(extra, Annotated[int, Interval(ge=0, le=_MAX_EXTRA_IDS)] | None):
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
    """Raises if a tokenizer's class is not one of transformers.

    Args:
        name: the class that the file names, if any. For an unknown class transformers reads the
            `tokenizer.json`.
        code: the code that the file names for the class, if any.
        where: the file, for messages.
        error: the class to raise.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(name, str | None):
        raise error(f"{where}: tokenizer_class: expected a string, got {describe_json(name)}")
    cls = None
    if name is not None and name.isidentifier():
        with failures(f"{where}: tokenizer_class {name!r:.80} cannot be used", error):
            cls = tokenizer_class_from_name(name)
    if cls is None and code is not None:
        raise error(
            f"{where}: the tokenizer needs Python code of the model ({_CODE}), which is never run; "
            "convert it to a tokenizer.json where you trust that code, or use a model with a "
            "tokenizer of transformers"
        )
    # A class such as AutoTokenizer would look up the code and run it.
    if cls is not None and not (isinstance(cls, type) and issubclass(cls, PreTrainedTokenizerBase)):
        raise error(f"{where}: tokenizer_class {name!r:.80} is not a tokenizer of transformers")


def _check_tokens(content: Mapping[str, Any], where: str, error: type[PrefixJaxError]) -> None:
    """Checks the special tokens in a file."""
    for key, value in content.items():
        # Some models have other keys with this suffix, with values of any type.
        token = key in _ROLES or (key.endswith("_token") and isinstance(value, dict))
        if token and value is not None:
            check_token(value, f"{where}: {key}", error)
        elif key in ("additional_special_tokens", "extra_special_tokens") and value is not None:
            if not isinstance(value, dict | list):
                raise error(f"{where}: {key}: expected an array, got {describe_json(value)}")
            for token in value.values() if isinstance(value, dict) else value:
                check_token(token, f"{where}: {key}", error)


@contextlib.contextmanager
def _stdout_as_stderr() -> Iterator[None]:
    """Redirects what the Rust library prints from stdout, which may carry data, to stderr."""
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
