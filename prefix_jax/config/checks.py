"""Checks that a section of a configuration makes of its fields."""

from __future__ import annotations

from collections.abc import Iterator

from prefix_jax.errors import ConfigError


def require(*checks: tuple[bool, str]) -> None:
    """Raises one `ConfigError` that lists every check that does not hold."""
    broken = [message for holds, message in checks if not holds]
    if broken:
        raise ConfigError("; ".join(broken))


def at_least(config: object, low: float, *names: str) -> Iterator[tuple[bool, str]]:
    """Checks that each named field is `low` or more; None (absent) passes, NaN does not."""
    for name in names:
        value = getattr(config, name)
        yield value is None or value >= low, f"{name} must be at least {low}, not {value}"


def fraction(config: object, *names: str) -> Iterator[tuple[bool, str]]:
    """Checks that each named field lies in [0, 1); None (absent) passes."""
    for name in names:
        value = getattr(config, name)
        yield value is None or 0 <= value < 1, f"{name} must lie in [0, 1), not {value}"
