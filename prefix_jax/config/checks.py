"""Checks of several fields of a configuration together."""

from __future__ import annotations

from prefix_jax.errors import ConfigError


def require(*checks: tuple[bool, str]) -> None:
    """Raises one `ConfigError` that lists every check that does not hold."""
    broken = [message for holds, message in checks if not holds]
    if broken:
        raise ConfigError("; ".join(broken))
