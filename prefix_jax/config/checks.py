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


def counted(config: object, *names: str) -> Iterator[tuple[bool, str]]:
    """Checks that each named number of steps can be counted in 32 bits; None passes."""
    for name in names:
        value = getattr(config, name)
        yield value is None or value < 2**31, f"{name} must be below {2**31}, not {value}"


def float32(config: object, *names: str) -> Iterator[tuple[bool, str]]:
    """Checks that float32 can hold each named field, multiply and divide by it; None passes.

    What it cannot is infinity there, or 0, and gives NaN far from where it stands.
    """
    for name in names:
        value = getattr(config, name)
        yield (
            not value or 1e-30 <= abs(value) <= 1e30,
            f"{name} {value} is out of reach of float32",
        )


def seeds(config: object, *names: str) -> Iterator[tuple[bool, str]]:
    """Checks that JAX can take each named field as a seed: of more bits it would drop the upper."""
    for name in names:
        value = getattr(config, name)
        yield 0 <= value < 2**32, f"{name} must lie in [0, {2**32}), not {value}"
