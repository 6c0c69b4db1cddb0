"""The prefixes of a directory, as `prefix-jax export --to vllm` writes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

CARD, ARRAYS = "prefix.json", "prefix.safetensors"
FORMAT_VERSION = 4
_CARD_LIMIT = 16 * 2**20  # bytes
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_KEYS, _VALUES = "decoder.k_LPKH", "decoder.v_LPKH"
# Marks the cache salts that belong to prefixes. Clients may not send such salts.
SALT = "prefix:"


class PrefixError(Exception):
    """A prefix is damaged or does not fit the model, or a request uses it wrongly."""


class UnknownPrefixError(PrefixError):
    """There is no prefix of this name."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The part of a model's shape that its KV cache depends on.

    Attributes:
        layers: the number of layers, L.
        kv_heads: key/value heads per layer, K.
        head_dim: the width of a head, H.
        hidden: the width of the hidden states, D.
        vocab: the size of the vocabulary, V.
        window: whether any layer has a sliding window.
    """

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    window: bool

    @classmethod
    def of(cls, vllm_config: Any) -> Shape:
        """The shape of the model that vLLM serves."""
        model = vllm_config.model_config
        text = model.hf_text_config
        return cls(
            layers=text.num_hidden_layers,
            kv_heads=model.get_total_num_kv_heads(),
            head_dim=model.get_head_size(),
            hidden=text.hidden_size,
            vocab=text.vocab_size,
            window=getattr(text, "sliding_window", None) is not None,
        )


@dataclasses.dataclass(frozen=True)
class StoredPrefix:
    """One stored prefix, without its arrays.

    Attributes:
        name: the name of its directory, which is its model id.
        path: its directory.
        digest: SHA-256 of its card, which contains the digests of its arrays.
        length: P, the number of slots.
        shape: of the model that it was trained for. `window` is whether it stays visible outside a
            sliding window (`pinned`), which vLLM cannot express.
        sha256: the digest of each array.
        created: the time of the export, in seconds since 1970.
    """

    name: str
    path: Path
    digest: str
    length: int
    shape: Shape
    sha256: dict[str, str]
    created: int

    @property
    def salt(self) -> str:
        """The cache salt of its requests, which keeps vLLM's prefix cache apart by content."""
        return SALT + self.digest

    def request(
        self, ids: list[int], placeholder: int
    ) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
        """The prompt and `SamplingParams.extra_args` of a request, for vLLM's `LLM.generate`.

        Args:
            ids: the tokens of the prompt.
            placeholder: see `placeholder_id`.
        """
        prompt = {"prompt_token_ids": [placeholder] * self.length + ids, "cache_salt": self.salt}
        return prompt, {"kv_transfer_params": {"prefix": self.name}}

    def check(self, shape: Shape) -> None:
        """Raises PrefixError if the prefix does not fit the model of this shape."""
        if self.shape.window and shape.window:
            raise PrefixError(
                f"prefix {self.name!r} stays visible outside the sliding window (pinned), which "
                "vLLM cannot express; train it with method.pinned=false"
            )
        ours, theirs = dataclasses.asdict(self.shape), dataclasses.asdict(shape)
        different = [
            f"{name} {ours[name]} instead of {theirs[name]}"
            for name in ("layers", "kv_heads", "head_dim", "hidden")
            if ours[name] != theirs[name]
        ]
        if different:
            raise PrefixError(
                f"prefix {self.name!r} was made for another model: it has {', '.join(different)}; "
                "serve the model that it was trained with"
            )

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Reads k_LPKH and v_LPKH, float32, and checks them against their digests.

        Raises:
            PrefixError: they are missing, damaged or were replaced.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        file = self.path / ARRAYS
        L, K, H = self.shape.layers, self.shape.kv_heads, self.shape.head_dim
        expected = (L, self.length, K, H)
        try:
            # The header adds a few hundred bytes.
            if file.stat().st_size > 8 * L * self.length * K * H + 2**20:
                raise PrefixError(f"{file} is damaged: larger than its shape allows")
            arrays = load_file(file)
        except (OSError, SafetensorError) as error:
            raise PrefixError(f"{file} cannot be read: {error}") from None
        for name in (_KEYS, _VALUES):
            x = arrays.get(name)
            if x is None or tuple(x.shape) != expected:
                raise PrefixError(f"{file} is damaged: {name} is missing or misshapen")
            digest = hashlib.sha256(x.astype("<f4").tobytes()).hexdigest()
            if digest != self.sha256[name]:
                raise PrefixError(f"{file} does not match the digests of {CARD}; export it again")
        return arrays[_KEYS], arrays[_VALUES]


class Prefixes:
    """The prefixes of a directory. Cards are read again when their file changes.

    Attributes:
        root: the directory; each prefix is a directory in it.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._cards: dict[str, tuple[tuple[int, int, int], StoredPrefix]] = {}

    @classmethod
    def of(cls, vllm_config: Any) -> Prefixes:
        """The directory of a vLLM server: `root` of its connector, or the one around this package.

        Raises:
            ValueError: it is not a directory.
        """
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        root = Path(extra.get("root") or Path(__file__).parents[1])
        if not root.is_dir():
            raise ValueError(f"the directory of prefixes {root} does not exist")
        return cls(root)

    def __getitem__(self, name: str) -> StoredPrefix:
        """Returns the prefix of this name.

        Raises:
            UnknownPrefixError: it does not exist.
            PrefixError: it is damaged, or of a kind that vLLM cannot express.
        """
        if not NAME.fullmatch(name):
            raise UnknownPrefixError(f"unknown prefix {name!r}")
        file = self.root / name / CARD
        stat = None
        # Exporting over a prefix swaps two directories, which leaves none for an instant.
        for wait in (0.01, 0.1, None):
            try:
                stat = file.stat()
                break
            except OSError:
                if wait is None or name not in self._cards:
                    self._cards.pop(name, None)
                    raise UnknownPrefixError(f"unknown prefix {name!r}") from None
                time.sleep(wait)
        assert stat is not None
        version = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if name not in self._cards or self._cards[name][0] != version:
            self._cards[name] = version, _read_card(name, file, int(stat.st_mtime))
        return self._cards[name][1]

    def usable(self, shape: Shape) -> tuple[list[StoredPrefix], list[PrefixError]]:
        """All prefixes that fit the model of this shape, and the errors of the others."""
        usable, errors = [], []
        names = (path.name for path in self.root.iterdir() if (path / CARD).is_file())
        for name in sorted(filter(NAME.fullmatch, names)):
            try:
                prefix = self[name]
                prefix.check(shape)
            except PrefixError as error:
                errors.append(error)
            else:
                usable.append(prefix)
        return usable, errors


def placeholder_id(hf_config: Any) -> int:
    """The token that occupies a prefix's positions in a prompt. Its embedding is never used.

    A repetition penalty counts it, so that it should be a token that is in prompts anyway and that
    the model never generates: the beginning-of-sequence token, unless texts end with it too.

    Args:
        hf_config: the model's configuration.
    """
    bos, eos = hf_config.bos_token_id, hf_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    return bos if isinstance(bos, int) and bos not in ends else 0


def _read_card(name: str, file: Path, created: int) -> StoredPrefix:
    where = f"prefix {name!r}"
    try:
        if file.stat().st_size > _CARD_LIMIT:
            raise PrefixError(f"{where} is damaged: {CARD} is too large")
        card = json.loads(file.read_text(encoding="utf-8"))
        stated = card.pop("sha256")
        text = json.dumps(card, sort_keys=True, separators=(",", ":"))
        if hashlib.sha256(text.encode()).hexdigest() != stated:
            raise PrefixError(f"{where} is damaged: {CARD} does not match its digest; export again")
        if card["format_version"] != FORMAT_VERSION:
            raise PrefixError(
                f"{where} has format {card['format_version']}, expected {FORMAT_VERSION}; export "
                "it with the version of prefix-jax that wrote this plugin"
            )
        site, arrays, length = card["geometry"]["decoder"], card["arrays"], card["length"]
        if (
            card["kind"] != "kv"
            or card["layers"]
            or card["text_position"] != length
            or arrays["container"] != "safetensors"
            or set(arrays["sha256"]) != {_KEYS, _VALUES}
        ):
            raise PrefixError(
                f"{where} is of a kind that vLLM cannot express; write it with "
                "'prefix-jax export --to vllm', which names the reason"
            )
        shape = Shape(
            layers=site["layers"],
            kv_heads=site["kv_heads"],
            head_dim=site["head_dim"],
            hidden=card["geometry"]["d_model"],
            vocab=card["geometry"]["vocab"],
            window=card["pinned"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PrefixError(f"{where} is damaged: {CARD} cannot be read ({reason})") from None
    return StoredPrefix(name, file.parent, stated, length, shape, arrays["sha256"], created)
