"""Errors that a user can act on. The CLI prints their message and nothing else.

Each message says what was wrong, where, and what to do. Anything that is not a `PrefixJaxError` is
a bug in this package.
"""

from __future__ import annotations


class PrefixJaxError(Exception):
    """Base of every error that is the input's fault and not this package's."""


class ConfigError(PrefixJaxError):
    """A configuration is unknown, ill-typed or contradicts itself."""


class DataError(PrefixJaxError):
    """A record, file or template cannot become training examples."""


class BackboneError(PrefixJaxError):
    """A pretrained model is unsupported, incomplete or unreadable."""


class PrefixError(PrefixJaxError):
    """A stored prefix is unreadable or does not fit the backbone at hand."""


class ContextError(PrefixJaxError):
    """Prefix and text together do not fit the model's positions."""


class MeshError(PrefixJaxError):
    """The devices, the mesh and the batch do not divide."""


class CheckpointError(PrefixJaxError):
    """A checkpoint could not be written or read."""


class DamagedCheckpointError(CheckpointError):
    """One checkpoint is missing or damaged; others may be complete."""


class NonFiniteError(PrefixJaxError):
    """The loss, its gradient or the logits of a text became NaN or infinite."""

    @classmethod
    def of(cls, where: str, what: str) -> NonFiniteError:
        """For results of a trained model: `what` ("the logits") for the input at `where`."""
        return cls(
            f"{where}: {what} are NaN or infinite; check the weights and the prefix for NaN, or "
            "load the model in float32"
        )


def reason(error: Exception) -> str:
    """What another library's error says first, for a message of ours; its type if it says
    nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
