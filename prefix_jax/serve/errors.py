"""Errors in OpenAI's format."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from prefix_jax.errors import ContextError, NonFiniteError, PrefixJaxError
from prefix_jax.serve.engine_thread import EngineStoppedError, QueueFullError
from prefix_jax.serve.models import UnknownModelError

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# After this many seconds, a client that was refused may try again.
_RETRY_AFTER = "1"


@dataclasses.dataclass
class ApiError(Exception):
    """An error that is sent to the client.

    Attributes:
        status: the HTTP status.
        message: what is wrong, and what to do.
        param: the field that is wrong, if it is one.
        code: a word for programs.
        headers: further headers.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def content(self) -> dict[str, Any]:
        """The body of the response."""
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, fallback),
                "param": self.param,
                "code": self.code,
            }
        }


def api_error(error: BaseException) -> ApiError:
    """Converts any exception; unexpected ones are logged, and clients do not see them."""
    match error:
        case ApiError():
            return error
        case ValidationError():
            return _of_fields(error)
        case UnknownModelError():
            return ApiError(404, str(error), "model", "model_not_found")
        case ContextError():
            return ApiError(400, str(error), None, "context_length_exceeded")
        case NonFiniteError():
            return ApiError(500, str(error))
        case PrefixJaxError():
            return ApiError(400, str(error))
        case QueueFullError():
            return ApiError(
                429,
                "too many requests are waiting; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": _RETRY_AFTER},
            )
        case EngineStoppedError():
            return ApiError(503, "the server is shutting down")
        case TimeoutError():
            return ApiError(504, "the request took too long and was stopped", code="timeout")
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; the server's log has the cause")


def _of_fields(error: ValidationError) -> ApiError:
    """The first wrong field; a union reports each of its alternatives."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    where = ".".join(map(str, first["loc"]))
    name = str(first["loc"][0]) if first["loc"] else None
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        text = text.removeprefix("Invalid JSON: ")
        return ApiError(400, f"the request is not valid JSON: {text}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{where}: this field is unknown or not supported", name)
    same_field = [p["msg"] for p in problems if p["loc"][:1] == first["loc"][:1]]
    if len(same_field) > 1:
        text = "; or ".join(dict.fromkeys(same_field))
        where = name or where
    return ApiError(400, f"{where}: {text}" if where else text, name)
