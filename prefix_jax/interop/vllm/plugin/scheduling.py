"""Decides which slots a request loads. vLLM's part of it is in `connector`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .stored import SALT, PrefixError, Prefixes, Shape, StoredPrefix

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(f"vllm.{__name__}")


@dataclasses.dataclass(frozen=True)
class Load:
    """Slots to write for one request.

    Attributes:
        prefix: the prefix; None refuses the request.
        blocks: the request's blocks, from its first position.
        begin, end: the slots to write; those before `begin` are in vLLM's own cache.
    """

    prefix: StoredPrefix | None
    blocks: tuple[int, ...]
    begin: int
    end: int


class Scheduler:
    """Decides which slots are loaded, for every request that enters a batch.

    Nothing here may raise: vLLM's engine would stop.

    Attributes:
        refused: the requests that will be refused, by id, and the number of their tokens in
            vLLM's own cache.
    """

    def __init__(self, prefixes: Prefixes, shape: Shape, placeholder: int) -> None:
        self._prefixes, self._shape, self._placeholder = prefixes, shape, placeholder
        # Every prefix that a request has used, by salt. Requests that began before a prefix was
        # replaced continue with the old one.
        self._known: dict[str, StoredPrefix] = {}
        self.refused: dict[str, int] = {}
        self._loads: list[Load] = []

    def match(self, request: Request, cached: int) -> tuple[int | None, bool]:
        """Returns the number of tokens to load, and False: they are loaded before the next step.

        Args:
            request: a request that waits to enter a batch.
            cached: how many of its first tokens are in vLLM's own cache.
        """
        try:
            prefix = self._find(request)
        except Exception as error:
            return self._refuse(request, cached, error)
        self.refused.pop(request.request_id, None)
        return (0 if prefix is None else max(0, prefix.length - cached)), False

    def _find(self, request: Request) -> StoredPrefix | None:
        """Returns the prefix of a request, or None.

        Raises:
            PrefixError: the request cannot be served.
        """
        params, salt = request.kv_transfer_params or {}, request.cache_salt or ""
        name = params.get("prefix")
        if name is None:
            if salt.startswith(SALT):
                raise PrefixError(f"the cache salt {salt!r} belongs to a prefix that is not named")
            return None
        salt = _prefix_salt(salt)
        prefix = self._known.get(salt)
        if prefix is None or prefix.name != name:
            prefix = self._prefixes[str(name)]
            prefix.check(self._shape)
            if salt != prefix.salt:
                raise PrefixError(f"prefix {name!r} was replaced; expected salt {prefix.salt!r}")
            self._known[salt] = prefix
        if request.skip_reading_prefix_cache:
            # vLLM would drop the slots without a word.
            raise PrefixError("prompt_logprobs and similar options cannot be used with a prefix")
        ids = request.prompt_token_ids
        if ids is None or len(ids) <= prefix.length:
            raise PrefixError(f"the prompt has no tokens after {prefix.length} placeholders")
        if any(token != self._placeholder for token in ids[: prefix.length]):
            raise PrefixError(
                f"the prompt must begin with {prefix.length} placeholders ({self._placeholder})"
            )
        return prefix

    def _refuse(self, request: Request, cached: int, error: Exception) -> tuple[int | None, bool]:
        if request.request_id not in self.refused:
            logger.error("request %s is refused: %s", request.request_id, error)
        self.refused[request.request_id] = cached
        request.skip_reading_prefix_cache = False
        if request.num_tokens - cached < 2:
            # vLLM has no way to end a request whose only token is still to be computed. It waits
            # until its client gives up, and is never answered by the bare model.
            return None, False
        return 1, False

    def allocated(self, request: Request, blocks: Sequence[int], loaded: int) -> None:
        """Notes the blocks of a request for which `match` returned `loaded` tokens."""
        cached = self.refused.pop(request.request_id, None)
        if cached is not None:
            self._loads.append(Load(None, tuple(blocks), cached, cached + loaded))
            return
        prefix = self._known[_prefix_salt(request.cache_salt or "")]
        self._loads.append(Load(prefix, tuple(blocks), prefix.length - loaded, prefix.length))

    def finished(self, request: Request) -> None:
        """Forgets a request that was cancelled before it got blocks."""
        self.refused.pop(request.request_id, None)

    def take(self) -> list[Load]:
        """Returns the notes since the last call."""
        loads, self._loads = self._loads, []
        return loads


def _prefix_salt(salt: str) -> str:
    """The prefix's part of a salt; a client's own may follow it."""
    return ":".join(salt.split(":")[:2])
