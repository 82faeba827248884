"""The endpoints. What they have in common is in `request_runner.py`, limits in `requests.py`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import planetserve
from planetserve.errors import PlanetServeError
from planetserve.gateway.answers import ChatStyle, CompletionStyle, Prompt
from planetserve.gateway.anthropic_api import CountRequest, MessagesRequest, MessagesStyle
from planetserve.gateway.chat import format_of, prepare_chat
from planetserve.gateway.errors import RequestError, body_for, body_of, error_body, headers_of
from planetserve.gateway.metrics import MetricFamilies
from planetserve.gateway.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    TokenizeRequest,
    TokenizeResponse,
    invalid_request,
)
from planetserve.gateway.request_runner import Responder
from planetserve.gateway.requests import sampling_params, text_request
from planetserve.gateway.responses_api import ResponsesRequest, ResponsesStyle
from planetserve.gateway.served_models import Models
from planetserve.gateway.swarm_view import SwarmView, view_swarm
from planetserve.gateway.text import PromptLogprobs
from planetserve.gateway.web_page import add_page

logger = logging.getLogger(__name__)

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 403, 404, 413, 429, 500, 503)
}


def create_app(models: Models, metrics: MetricFamilies) -> FastAPI:
    """The application, without the guard in front of it."""
    # Its pages of documentation would load scripts from other hosts.
    app = FastAPI(
        title="PlanetServe gateway", version=planetserve.__version__, docs_url=None, redoc_url=None,
        responses=_ERRORS,
    )  # fmt: skip
    _handle_errors(app)
    _add_information(app, models, metrics)
    _add_tokenizer(app, models)
    add_page(app)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer the messages of a chat."""
        return await _chat(models, body, request)

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Go on with one text or several."""
        return await _complete(models, body, request)

    @app.post("/v1/responses", response_model=None)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        """Answer as Open Responses has it."""
        service, model = models.find(body.model)
        text = await prepare_chat(service, body.as_chat())
        style = ResponsesStyle(model, body)
        return await Responder(service.engine, [text], style).respond(request, body.stream)

    @app.post("/v1/messages", response_model=None)
    async def message(body: MessagesRequest, request: Request) -> Response:
        """Answer as Anthropic's API does."""
        service, model = models.find(body.model)
        text = await prepare_chat(service, body.as_chat())
        style = MessagesStyle(model)
        return await Responder(service.engine, [text], style).respond(request, body.stream)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest) -> dict[str, int]:
        """The tokens of such a request."""
        service, _ = models.find(body.model)
        return {"input_tokens": len((await prepare_chat(service, body.as_chat())).prompt_ids)}

    return app


async def _chat(models: Models, body: ChatRequest, request: Request) -> Response:
    service, model = models.find(body.model)
    text = await prepare_chat(service, body)
    style = ChatStyle(model, body, service.spell(body))
    return await Responder(service.engine, [text], style).respond(request, body.stream)


async def _complete(models: Models, body: CompletionRequest, request: Request) -> Response:
    service, model = models.find(body.model)
    limits = service.limits
    body.check_supported()
    limits.check_logprobs(body.logprobs, "logprobs")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens must be at least 1 without echo", "max_tokens")
    given = _prompts(body)
    limits.check_texts(len(given), body.n)
    sampling = sampling_params(body, limits, body.logprobs)
    form = format_of(body)
    matcher = None if form is None else await service.grammars.compile(form)
    style = CompletionStyle(model, body, service.spell(body))
    shown, texts = [], []
    for prompt in given:
        if isinstance(prompt, str):
            ids = await service.texts.encode(
                prompt, add_special_tokens=body.add_special_tokens, param="prompt"
            )
        else:
            ids = prompt
        limits.check_prompt(ids, "prompt")
        max_tokens = body.max_tokens
        if max_tokens is None:
            max_tokens = service.room(body.n, ids)
        asked = body.logprobs if body.echo else None
        texts.append(text_request(body, limits, sampling, ids, max_tokens or 1, asked, matcher))
        shown.append(prompt if isinstance(prompt, str) else service.texts.decode(ids))

    def show(number: int, prompt: Prompt) -> None:
        first = number * body.n
        style.prompts |= dict.fromkeys(range(first, first + body.n), prompt)

    def see_prompt(found: PromptLogprobs) -> None:
        tokens = texts[found.prompt].prompt_ids
        show(found.prompt, Prompt(shown[found.prompt], tokens, found.logprobs))

    if body.echo:
        for number, prompt_text in enumerate(shown):
            show(number, Prompt(prompt_text))
    responder = Responder(service.engine, texts, style, see_prompt)
    if body.max_tokens == 0:
        responder.drop_answers()
    return await responder.respond(request, body.stream)


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [one for one in prompt if isinstance(one, int)]
    return [ids] if ids else [one for one in prompt if not isinstance(one, int)]


def _add_information(app: FastAPI, models: Models, metrics: MetricFamilies) -> None:
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models, each by all of its names."""
        return {"object": "list", "data": models.describe()}

    @app.get("/v1/models/{model:path}")
    async def show_model(model: str) -> dict[str, Any]:
        """One of them."""
        service, name = models.find(model)
        return service.describe(name)

    @app.get("/swarm")
    async def show_swarm(model: str | None = None) -> SwarmView:
        """The servers of a model, the blocks that nobody runs, and what has failed."""
        service, name = models.find(model)
        return await view_swarm(name, service.manager)

    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> str:
        """Whether the gateway answers."""
        return ""

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of PlanetServe."""
        return {"version": planetserve.__version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_tokenizer(app: FastAPI, models: Models) -> None:
    @app.post("/tokenize", response_model_exclude_none=True)
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """The tokens of a prompt or of a chat."""
        service, _ = models.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", "prompt")
        if body.prompt is not None:
            add = True if body.add_special_tokens is None else body.add_special_tokens
            tokens = await service.texts.encode(body.prompt, add_special_tokens=add, param="prompt")
        else:
            _, tokens = await service.texts.encode_chat(
                body.messages or [],
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                add_special_tokens=bool(body.add_special_tokens),
                template_kwargs=body.chat_template_kwargs,
                tools=[tool.model_dump(exclude_none=True) for tool in body.tools or []],
            )
        strings = service.texts.token_strings(tokens) if body.return_token_strs else None
        return TokenizeResponse(
            count=len(tokens),
            max_model_len=service.limits.max_model_len,
            tokens=tokens,
            token_strs=strings,
        )

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """The settings of the first model's tokenizer."""
        service, _ = models.find(None)
        return service.texts.about()

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """The text of some tokens."""
        service, _ = models.find(body.model)
        if body.tokens:
            service.limits.check_prompt(body.tokens, "tokens")
        return DetokenizeResponse(prompt=service.texts.decode(body.tokens))


def _handle_errors(app: FastAPI) -> None:
    def respond(request: Request, body: dict[str, Any], headers: Mapping[str, str]) -> Response:
        return JSONResponse(body_for(request.url.path, body), body["error"]["code"], dict(headers))

    async def known(request: Request, error: Exception) -> Response:
        return respond(request, body_of(error), headers_of(error))

    async def invalid(request: Request, error: Exception) -> Response:
        errors = error.errors() if isinstance(error, RequestValidationError) else ()
        return respond(request, body_of(invalid_request(errors)), {})

    async def other(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return respond(request, body_of(error), {})
        body = error_body(error.status_code, str(error.detail))
        return respond(request, body, error.headers or {})

    app.add_exception_handler(RequestError, known)
    app.add_exception_handler(PlanetServeError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, other)
    app.add_exception_handler(Exception, other)
