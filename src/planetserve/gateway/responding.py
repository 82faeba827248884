"""Runs the texts of one request and answers it: as one JSON document, or as server-sent events.

A client that goes away ends its texts. A request that fails before its first token gets the status
of its error; a stream that has begun ends with an event that holds the error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from typing_extensions import override

from planetserve.errors import PlanetServeError
from planetserve.gateway.answers import Answer, Style, usage_of
from planetserve.gateway.errors import RequestError, body_of
from planetserve.gateway.text import Delta, Failed, Output, Outputs, PromptLogprobs, TextRequest
from planetserve.gateway.text_engine import TextEngine

logger = logging.getLogger(__name__)

PING_S = 15.0
"""Seconds without a token after which a stream gets a comment, so that proxies keep it open."""
_DONE = b"data: [DONE]\n\n"
_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

SeePrompt = Callable[[PromptLogprobs], None]


class Responder:
    """One request on its way.

    Args:
        engine: runs the texts.
        texts: what to run.
        style: how the endpoint writes answers.
        see_prompt: told of the log-probabilities of prompts, which come before their answers.
    """

    def __init__(
        self,
        engine: TextEngine,
        texts: Sequence[TextRequest],
        style: Style,
        see_prompt: SeePrompt | None = None,
    ):
        self._engine = engine
        self._texts = texts
        self._style = style
        self._see_prompt = see_prompt
        self._answers = [Answer() for text in texts for _ in range(text.n)]
        self._drops_answers = False

    def drop_answers(self) -> None:
        """Only the prompts are wanted, whose answers have one token each for that."""
        self._drops_answers = True

    async def whole(self, request: Request) -> Response:
        """The response without a stream.

        Raises:
            PlanetServeError: a text failed.
            asyncio.CancelledError: the client has gone.
        """
        async with self._engine.run(self._texts) as outputs, ends_with_client(request):
            while not self._is_done:
                for output in await outputs.take():
                    self._take(output)
        return JSONResponse(self._style.whole(self._answers, self._usage()))

    async def stream(
        self, request: Request, *, include_usage: bool, always_usage: bool
    ) -> Response:
        """Server-sent events.

        Raises:
            PlanetServeError: a text failed before it had a token.
        """
        running = contextlib.AsyncExitStack()
        try:
            outputs = await running.enter_async_context(self._engine.run(self._texts))
            # A failure so far still has a status of its own.
            async with ends_with_client(request):
                ready = await outputs.take(PING_S)
            for output in ready:
                if isinstance(output, Failed):
                    raise output.error
        except BaseException:
            await running.aclose()
            raise
        events = self._events(running, outputs, ready, include_usage, always_usage)
        return _Stream(events, running)

    async def _events(
        self,
        running: contextlib.AsyncExitStack,
        outputs: Outputs,
        ready: list[Output],
        include_usage: bool,
        always_usage: bool,
    ) -> AsyncIterator[bytes]:
        async with running:
            try:
                while True:
                    chunks = [chunk for output in ready for chunk in self._chunks(output)]
                    if always_usage:
                        for chunk in chunks:
                            chunk["usage"] = self._usage()
                    elif include_usage:
                        for chunk in chunks:
                            chunk["usage"] = None
                    if chunks:
                        yield b"".join(map(_event, chunks))
                    elif not ready:
                        yield b": ping\n\n"
                    if self._is_done:
                        break
                    ready = await outputs.take(PING_S)
            except Exception as error:  # noqa: BLE001 - the client is told
                if not isinstance(error, PlanetServeError):
                    logger.exception("a stream failed")
                yield _event(body_of(error)) + _DONE
                return
            if include_usage:
                yield _event(self._style.closing(self._usage()))
            yield _DONE

    def _chunks(self, output: Output) -> list[dict[str, Any]]:
        chunks = []
        if isinstance(output, Delta) and not self._answers[output.index].num_tokens:
            chunks.append(self._style.opening(output.index))
        self._take(output)
        if isinstance(output, Delta):
            shown = output
            if self._drops_answers:
                shown = Delta(output.index, finish_reason=output.finish_reason)
            chunks.append(self._style.chunk(shown))
        return [chunk for chunk in chunks if chunk is not None]

    def _take(self, output: Output) -> None:
        if isinstance(output, Failed):
            raise output.error
        if isinstance(output, PromptLogprobs):
            if self._see_prompt is not None:
                self._see_prompt(output)
            return
        answer = self._answers[output.index]
        answer.add(output)
        if self._drops_answers:
            answer.text, answer.logprobs = "", []

    @property
    def _is_done(self) -> bool:
        return all(answer.finish_reason is not None for answer in self._answers)

    def _usage(self) -> dict[str, Any]:
        num_prompt = sum(len(text.prompt_ids) for text in self._texts)
        num_answer = sum(answer.num_tokens for answer in self._answers)
        return usage_of(num_prompt, 0 if self._drops_answers else num_answer)


class _Stream(StreamingResponse):
    """Ends the texts also if the client has gone before the first event is asked for."""

    def __init__(self, events: AsyncIterator[bytes], running: contextlib.AsyncExitStack):
        super().__init__(events, media_type="text/event-stream", headers=_SSE_HEADERS)
        self._running = running

    @override
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.shield(self._running.aclose())


@contextlib.asynccontextmanager
async def ends_with_client(request: Request) -> AsyncIterator[None]:
    """Cancel what runs in this block when the client goes away.

    Raises:
        RequestError: it has; nobody will read this.
    """
    task = asyncio.current_task()
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        if task is not None:
            task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone or task is None:
            raise
        task.uncancel()
        raise RequestError("the client has gone", status=499) from None
    finally:
        watcher.cancel()


def _event(data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"
