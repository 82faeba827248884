"""What clients are told of failures: OpenAI's error object, and the HTTP status of each error.

`STATUS` has every `PlanetServeError`. What a retry may mend is 429 or 503 and says when to try
again; what the request itself is at fault for is 400.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from planetserve import errors

STATUS: Mapping[type[errors.PlanetServeError], int] = {
    errors.PlanetServeError: 500,
    errors.ConfigError: 500,  # requests are checked before: it is a setting of this gateway
    errors.ModelError: 500,
    errors.LocalProtocolError: 500,
    errors.RemoteProtocolError: 503,
    errors.ReceiptError: 503,
    errors.TransportError: 503,
    errors.PeerUnreachable: 503,
    errors.HopTimeout: 503,
    errors.EdgeStalled: 503,
    errors.StreamClosed: 503,
    errors.ReceiptMissing: 503,
    errors.EdgeMismatch: 503,
    errors.CryptoError: 500,
    errors.HandshakeFailed: 503,
    errors.DecryptionFailed: 503,
    errors.RekeyNeeded: 503,
    errors.RemoteError: 503,
    errors.UnsupportedError: 503,
    errors.PeerReportedError: 503,
    errors.NoChainAvailable: 503,
    errors.MissingBlocksError: 503,
    errors.ModelMismatchError: 503,
    errors.RefusedByServers: 503,
    errors.CapacityError: 429,
    errors.CacheExhausted: 429,
    errors.QueueFull: 429,
    errors.SessionError: 500,
    errors.SessionLengthError: 400,
    errors.SessionClosed: 503,  # the gateway is shutting down
    errors.SessionExpired: 503,
}

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestEntityTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
_RETRY_AFTER_S = 5.0
"""When to try again, where an error does not know."""
_MAX_MESSAGE_CHARS = 1000


class RequestError(Exception):
    """A request that is refused.

    Args:
        message: what is wrong, and what to give instead.
        param: the parameter at fault.
        status: HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param = param
        self.status = status


def status_of(error: Exception) -> int:
    """The HTTP status that tells of this error."""
    if isinstance(error, RequestError):
        return error.status
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    return 500


def body_of(error: Exception) -> dict[str, Any]:
    """OpenAI's error object. Of an unexpected error it says nothing but that there was one."""
    status = status_of(error)
    known = isinstance(error, RequestError | errors.PlanetServeError)
    message = str(error) if known else "internal error of the gateway; its log has more"
    param = error.param if isinstance(error, RequestError) else None
    return error_body(status, message, param)


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object for an HTTP status."""
    return {
        "error": {
            "message": errors.one_line(message, _MAX_MESSAGE_CHARS),
            "type": _TYPES.get(status, "BadRequestError" if status < 500 else _TYPES[500]),
            "param": param,
            "code": status,
        }
    }


_ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def body_for(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's error object, or what Anthropic's clients expect where they ask."""
    return anthropic_body(body) if path.startswith(_ANTHROPIC_PATH) else body


def anthropic_body(body: dict[str, Any]) -> dict[str, Any]:
    """An OpenAI error object as Anthropic's."""
    error = body["error"]
    other = "invalid_request_error" if error["code"] < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error["code"], other)
    return {"type": "error", "error": {"type": kind, "message": error["message"]}}


def headers_of(error: Exception) -> dict[str, str]:
    """`Retry-After`, in whole seconds, where a retry may succeed."""
    if status_of(error) not in (429, 503) or not getattr(error, "retryable", False):
        return {}
    wait_s = getattr(error, "retry_after_s", 0.0) or _RETRY_AFTER_S
    return {"Retry-After": str(max(1, math.ceil(wait_s)))}
