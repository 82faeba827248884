"""Runs the texts of one request and answers it: as one JSON document, or as server-sent events.

A client that goes away ends its texts. A request that fails before its first token gets the status
of its error; a stream that has begun ends with an event that holds the error.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from typing_extensions import override

from planetserve.errors import PlanetServeError
from planetserve.gateway.answers import Answer, Event, Style, Usage
from planetserve.gateway.chain_timer import ChainReport
from planetserve.gateway.errors import RequestError
from planetserve.gateway.keys import ApiKey
from planetserve.gateway.middleware import KEY
from planetserve.gateway.text import Delta, Failed, Output, Outputs, PromptLogprobs, TextRequest
from planetserve.gateway.text_engine import TextEngine

logger = logging.getLogger(__name__)

PING_S = 15.0
"""Seconds without a token after which a stream gets a comment, so that proxies keep it open."""
_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

_Running = contextlib.AbstractAsyncContextManager[Outputs]
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

    async def respond(self, request: Request, is_stream: bool) -> Response:
        """The response, as a stream or not.

        Raises:
            PlanetServeError: a text failed; in a stream, before it had a token.
            asyncio.CancelledError: the client has gone.
        """
        key: ApiKey = request.scope[KEY]
        self._texts = [dataclasses.replace(text, owner=key.name) for text in self._texts]
        running = self._running(key)
        return await (
            self._stream(request, running) if is_stream else self._whole(request, running)
        )

    @contextlib.asynccontextmanager
    async def _running(self, key: ApiKey) -> AsyncIterator[Outputs]:
        """Run the texts on the account of a key."""
        with key.running(len(self._answers)):
            async with self._engine.run(self._texts) as outputs:
                try:
                    yield outputs
                finally:
                    usage = self._usage()
                    key.charge(usage.num_prompt - usage.num_cached + usage.num_answer)

    async def _whole(self, request: Request, running: _Running) -> Response:
        async with running as outputs, ends_with_client(request):
            while not self._is_done:
                for output in await outputs.take():
                    self._take(output)
        return JSONResponse(self._style.whole(self._answers, self._usage()))

    async def _stream(self, request: Request, running: _Running) -> Response:
        stack = contextlib.AsyncExitStack()
        try:
            outputs = await stack.enter_async_context(running)
            # A failure so far still has a status of its own.
            async with ends_with_client(request):
                ready = await outputs.take(PING_S)
            for output in ready:
                if isinstance(output, Failed):
                    raise output.error
        except BaseException:
            await stack.aclose()
            raise
        return _Stream(self._events(stack, outputs, ready), stack)

    async def _events(
        self,
        running: contextlib.AsyncExitStack,
        outputs: Outputs,
        ready: list[Output],
    ) -> AsyncIterator[bytes]:
        async with running:
            try:
                while True:
                    chunks = [chunk for output in ready for chunk in self._chunks(output)]
                    if chunks:
                        yield self._written(chunks)
                    elif not ready:
                        yield b": ping\n\n"
                    if self._is_done:
                        break
                    ready = await outputs.take(PING_S)
            except Exception as error:  # noqa: BLE001 - the client is told
                if not isinstance(error, PlanetServeError):
                    logger.exception("a stream failed")
                yield self._written(self._style.failure(error)) + self._style.end
                return
            last = self._style.closing(self._answers, self._usage())
            yield self._written(last) + self._style.end

    def _chunks(self, output: Output) -> list[Event]:
        is_first = isinstance(output, Delta) and not self._answers[output.index].num_tokens
        self._take(output)
        if isinstance(output, ChainReport):
            return self._style.chain(output)
        if not isinstance(output, Delta):
            return []
        if self._drops_answers:
            output = Delta(output.index, finish_reason=output.finish_reason)
        usage = self._usage()
        chunks = self._style.opening(output.index, usage) if is_first else []
        return chunks + self._style.chunk(output, usage)

    def _written(self, events: Sequence[Event]) -> bytes:
        """As server-sent events."""
        lines = []
        for event in events:
            if self._style.names_events:
                lines.append(f"event: {event['type']}\n")
            lines.append(
                f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
            )
        return "".join(lines).encode("utf-8", "replace")

    def _take(self, output: Output) -> None:
        if isinstance(output, Failed):
            raise output.error
        if isinstance(output, PromptLogprobs):
            if self._see_prompt is not None:
                self._see_prompt(output)
            return
        if isinstance(output, ChainReport):
            return
        answer = self._answers[output.index]
        answer.add(output)
        if self._drops_answers:
            answer.text, answer.content, answer.logprobs = "", "", []

    @property
    def _is_done(self) -> bool:
        return all(answer.finish_reason is not None for answer in self._answers)

    def _usage(self) -> Usage:
        num_answer = sum(answer.num_tokens for answer in self._answers)
        return Usage(
            sum(len(text.prompt_ids) for text in self._texts),
            0 if self._drops_answers else num_answer,
            sum(answer.num_reasoning for answer in self._answers),
            sum(answer.num_cached for answer in self._answers),
        )


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
