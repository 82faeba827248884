"""What every request passes before an endpoint sees it: key, host, size of the body; and counting.

The whole body is read here, up to the limit, so that no endpoint can be made to read more.
"""

from __future__ import annotations

import asyncio
import re
import time

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from planetserve.config import is_loopback
from planetserve.gateway.errors import RequestError, body_for, error_body
from planetserve.gateway.keys import ApiKey, ApiKeys
from planetserve.gateway.metrics import MetricFamilies

_OPEN_PATHS = ("/", "/health", "/version", "/metrics", "/openapi.json")
"""Answered without a key. So are the files of the web page, which asks for one itself."""
_OPEN_FOLDER = "/web/"
KEY = "planetserve.key"
"""Where an endpoint finds the `ApiKey` that asks, in the request's scope."""
_BODY_TIMEOUT_S = 60.0


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        keys: of which requests must bring one; none: everybody on this machine may ask.
        max_body_bytes: of one request.
        metrics: told of every response.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, max_body_bytes: int, metrics: MetricFamilies):
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, status = time.monotonic(), 499  # nginx's number for a client that has gone

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                scope[KEY] = self._check(scope)
                body = await self._read(scope, receive)
            except RequestError as error:
                body_sent = body_for(scope["path"], error_body(error.status, str(error)))
                answer = JSONResponse(body_sent, error.status)
                if error.status == 401:
                    answer.headers["WWW-Authenticate"] = "Bearer"
                answer.headers["Connection"] = "close"  # the rest of a body is not read
                await answer(scope, receive, counted_send)
                return
            if body is None:
                return
            await self._app(scope, _replay(body, receive), counted_send)
        finally:
            # Only known paths become labels: strangers must not fill the memory with others.
            path = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            self._metrics.http_ended(path, method, status, time.monotonic() - began_s)

    def _check(self, scope: Scope) -> ApiKey:
        headers = Headers(scope=scope)
        if not self._keys:
            # A page in a browser may send requests to any name that it makes point to this machine.
            host = re.sub(r":\d*$", "", headers.get("host", "localhost"))
            if not is_loopback(host):
                raise RequestError(
                    f"this gateway has no --api_key and answers as localhost only, not as {host!r}",
                    status=403,
                )
            return self._keys.anybody
        if scope["path"] in _OPEN_PATHS or scope["path"].startswith(_OPEN_FOLDER):
            return self._keys.anybody
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            secret = headers.get("x-api-key", "")  # Anthropic's clients
        key = self._keys.find(secret.strip())
        if key is None:
            raise RequestError("a valid API key is needed: Authorization: Bearer KEY", status=401)
        return key

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client has gone."""
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise RequestError("the body has not come in time", status=408) from None

    def _too_large(self) -> RequestError:
        return RequestError(
            f"the body is larger than {self._max_body_bytes} bytes, which this gateway allows",
            status=413,
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for an application that has not seen the body."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
