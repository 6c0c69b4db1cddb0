"""The bank: prefixes by name, on the device, in host memory or on disk.

A prefix is used when a row starts with it. The row keeps its own copy, or if rows share the prefix,
a reference to its arrays. The bank therefore needs no locks: replacing, removing or evicting a
prefix cannot affect rows that are running. The least recently used prefix leaves the device first,
and later host memory, if its directory can be read again.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import jax

from prefix_jax import artifact
from prefix_jax.artifact import Card
from prefix_jax.data.ngrams import NgramTable
from prefix_jax.engine.warm import Slots, Warm
from prefix_jax.errors import PrefixError
from prefix_jax.prefix import Produced

Tier = Literal["device", "host", "disk"]


@dataclasses.dataclass
class Banked:
    """A prefix in the bank.

    Attributes:
        card: its metadata.
        digest: SHA-256 of its arrays.
        slots: where its slots are in a row.
        eos: the tokens that end a text.
        directory: where it can be read again; None if it exists only in memory.
        bytes: the size of its arrays as they are used, padding included.
        tier: where these arrays are.
    """

    card: Card
    digest: str
    slots: Slots
    eos: tuple[int, ...]
    directory: Path | None
    bytes: int = 0
    tier: Tier = "disk"
    _warm: Warm | None = dataclasses.field(default=None, repr=False)
    # The arrays on the device after their eviction, which rows may still use.
    _evicted: Callable[[], Warm | None] = dataclasses.field(default=lambda: None, repr=False)


class Bank:
    """Holds prefixes within byte budgets.

    Args:
        make: converts a prefix to a warm start, on the host.
        put: moves a warm start to the device.
        device_bytes: the budget on the device.
        host_bytes: the budget in host memory, for prefixes that are not on the device. Prefixes
            without a directory stay even if they exceed it.
    """

    def __init__(
        self,
        make: Callable[[Produced], tuple[Warm, Slots]],
        put: Callable[[Warm], Warm],
        device_bytes: int,
        host_bytes: int,
    ):
        self._make, self._put = make, put
        self._budget: dict[Tier, int] = {"device": device_bytes, "host": host_bytes}
        # Least recently used first.
        self._prefixes: OrderedDict[str, Banked] = OrderedDict()

    @property
    def prefixes(self) -> Mapping[str, Banked]:
        """The prefixes by name, least recently used first."""
        return MappingProxyType(self._prefixes)

    def bytes(self, tier: Tier) -> int:
        """The bytes in use on the device or in host memory."""
        return sum(banked.bytes for banked in self._prefixes.values() if banked.tier == tier)

    def add(
        self,
        name: str,
        produced: Produced,
        card: Card,
        eos: tuple[int, ...],
        directory: Path | None,
        ngrams: NgramTable | None = None,
    ) -> None:
        """Adds a prefix, or replaces the one with this name.

        Args:
            name: its name.
            produced: the prefix in its method's form.
            card: its metadata.
            eos: the tokens that end a text.
            directory: where it can be read again; None if it exists only in memory.
            ngrams: an n-gram table of its training targets.

        Raises:
            PrefixError: it does not fit the model or the budget. The bank is unchanged.
        """
        warm, slots = self._make(produced)
        warm = _with_ngrams(warm, ngrams)
        banked = Banked(card, artifact.digest(produced), slots, eos, directory, warm.bytes, "host")
        if banked.bytes > self._budget["device"]:
            raise PrefixError(
                f"prefix {name!r} needs {banked.bytes:,} bytes on the device, more than the budget "
                f"of {self._budget['device']:,}; raise device_bytes"
            )
        banked._warm = warm
        self._prefixes.pop(name, None)
        self._prefixes[name] = banked
        self._evict(name)

    def remove(self, name: str) -> None:
        """Removes a prefix.

        Raises:
            PrefixError: there is no prefix with this name.
        """
        self.find(name)
        del self._prefixes[name]

    def find(self, name: str) -> Banked:
        """Returns a prefix without using it.

        Raises:
            PrefixError: there is no prefix with this name.
        """
        banked = self._prefixes.get(name)
        if banked is None:
            names = ", ".join(map(repr, sorted(self._prefixes)[:10])) or "none"
            more = len(self._prefixes) - 10
            raise PrefixError(
                f"there is no prefix {name!r}; add it first, or give one of {names}"
                + (f" and {more} others" if more > 0 else "")
            )
        return banked

    def use(self, name: str) -> Warm:
        """Returns the arrays of a prefix on the device.

        Raises:
            PrefixError: there is no such prefix, or its directory is damaged, missing or contains
                another prefix than it did.
        """
        banked = self.find(name)
        self._prefixes.move_to_end(name)
        if banked.tier != "device":
            put = banked._evicted()
            if put is None:
                put = self._put(self._read(name, banked) if banked._warm is None else banked._warm)
            banked._warm, banked.tier = put, "device"
            self._evict(name)
        assert banked._warm is not None
        return banked._warm

    def _read(self, name: str, banked: Banked) -> Warm:
        assert banked.directory is not None
        produced, _ = artifact.load(banked.directory)
        digest = artifact.digest(produced)
        if digest != banked.digest:
            raise PrefixError(
                f"{banked.directory}: its prefix has sha256 {digest}, but {banked.digest} was "
                f"added as {name!r}; add it again (replace)"
            )
        return _with_ngrams(self._make(produced)[0], artifact.load_ngrams(banked.directory))

    def _evict(self, latest: str) -> None:
        """Moves the least recently used prefixes out of full memories, except the latest one."""
        for name in self._over("device", latest):
            banked = self._prefixes[name]
            assert banked._warm is not None
            banked._evicted = weakref.ref(banked._warm)
            banked._warm, banked.tier = jax.device_get(banked._warm), "host"
        for name in self._over("host", latest):
            banked = self._prefixes[name]
            if banked.directory is not None:
                banked._warm, banked.tier = None, "disk"

    def _over(self, tier: Tier, latest: str) -> list[str]:
        """The prefixes to evict from a memory, least recently used first."""
        excess = self.bytes(tier) - self._budget[tier]
        names = []
        for name, banked in self._prefixes.items():
            if excess <= 0:
                break
            evictable = tier == "device" or banked.directory is not None
            if banked.tier == tier and name != latest and evictable:
                names.append(name)
                excess -= banked.bytes
        return names


def _with_ngrams(warm: Warm, ngrams: NgramTable | None) -> Warm:
    return warm if ngrams is None else dataclasses.replace(warm, ngrams_G2W=ngrams.entry_G2W)
