"""Errors that a user can fix. The CLI prints only their message.

Messages have the form `<where>: <what is wrong>; <what to do>`. Any other exception is a bug in
this package.
"""

from __future__ import annotations


class PrefixJaxError(Exception):
    """Base class of errors that are caused by the user's input."""


class ConfigError(PrefixJaxError, ValueError):
    """A config has unknown keys, invalid values or contradictions."""


class RenamedKeyError(ConfigError):
    """A configuration uses the former name of a key."""


class DataError(PrefixJaxError):
    """A record, file or template cannot become training examples."""


class BackboneError(PrefixJaxError):
    """A pretrained model is unsupported, incomplete or unreadable."""


class PrefixError(PrefixJaxError):
    """A stored prefix is unreadable or does not fit the backbone."""


class ContextError(PrefixJaxError):
    """The prefix and the text together exceed the model's maximum length."""


class MeshError(PrefixJaxError):
    """The mesh does not fit the devices, the model or the batch."""


class CheckpointError(PrefixJaxError):
    """A checkpoint could not be written or read."""


class DamagedCheckpointError(CheckpointError):
    """One checkpoint is missing or damaged; others may be complete."""


class NonFiniteError(PrefixJaxError):
    """A loss, gradient or logit is NaN or infinite."""

    @classmethod
    def of(cls, where: str, what: str) -> NonFiniteError:
        """Makes the error for a model's output, such as "the logits", for the input at `where`."""
        return cls(
            f"{where}: {what} are NaN or infinite; check the weights and the prefix for NaN, or "
            "load the model in float32"
        )


def reason(error: Exception) -> str:
    """Returns the first line of an exception's message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
