"""Starts a gateway: loads embedding and head, joins the swarm, answers HTTP until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import uvicorn
from prometheus_client import disable_created_metrics
from transformers import AutoTokenizer
from typing_extensions import override

from planetserve.client.hf.options import parse_device
from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.planning.chain_planner import ModelFacts
from planetserve.config import GatewayConfig
from planetserve.errors import ConfigError
from planetserve.gateway.app import create_app
from planetserve.gateway.batch_thread import Turns
from planetserve.gateway.client_half import ClientHalf
from planetserve.gateway.constraints import Grammars
from planetserve.gateway.keys import read_keys
from planetserve.gateway.metrics import MetricFamilies, Metrics
from planetserve.gateway.middleware import Guard
from planetserve.gateway.requests import Limits, ignored_processors, sampling_defaults
from planetserve.gateway.response_templates import ResponseTemplates
from planetserve.gateway.served_models import Models, Service
from planetserve.gateway.swarm_view import num_ready, num_uncovered
from planetserve.gateway.text_engine import TextEngine, TextSlots
from planetserve.gateway.tokenizer_thread import Texts, read_template
from planetserve.gateway.warm_sessions import WarmSessions
from planetserve.model.checkpoint import Checkpoint, parse_dtype

logger = logging.getLogger(__name__)

T = TypeVar("T")

_DEFAULT_LENGTH = 8192
"""Tokens of a text where the model's configuration does not say."""
_SPARE_CONNECTIONS = 256
"""Connections for other things than texts."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a gateway answers."""

    url: str
    models: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Loaded:
    half: ClientHalf
    facts: ModelFacts
    texts: Texts
    limits: Limits
    templates: ResponseTemplates | None


async def serve(
    config: GatewayConfig, stop: asyncio.Event, on_ready: Callable[[Address], None]
) -> None:
    """Answer until `stop` is set; running answers get `shutdown_timeout` seconds to end.

    Raises:
        PlanetServeError: the model cannot be loaded, the swarm not joined, or the port is taken.
    """
    keys = read_keys(config.api_key, config.api_key_file)
    listener = _listen(config.host, config.port)
    try:
        async with contextlib.AsyncExitStack() as stack:
            disable_created_metrics()  # type: ignore[no-untyped-call]
            metrics = MetricFamilies()
            models = await _unless(stop, _start_all(config, metrics, stack))
            if models is None:
                return
            max_body_bytes = int(config.max_body_mib * 2**20)
            app = Guard(create_app(models, metrics), keys, max_body_bytes, metrics)
            address = Address(_url(listener), models.names)
            await _answer(config, app, listener, stop, lambda: on_ready(address))
    finally:
        listener.close()


@contextlib.asynccontextmanager
async def running(config: GatewayConfig) -> AsyncIterator[Address]:
    """A gateway that answers in this block, on the loop of the caller.

    Raises:
        PlanetServeError: as `serve`.
    """
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(config, stop, ready.set_result))
    await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        await task
    try:
        yield ready.result()
    finally:
        stop.set()
        await task


async def _start_all(
    config: GatewayConfig, metrics: MetricFamilies, stack: contextlib.AsyncExitStack
) -> Models:
    """Everything but HTTP; `stack` ends it."""
    services = []
    for model, names in config.all_models():
        one = dataclasses.replace(config, model=model, served_model=(), served_model_name=names)
        services.append(await _start(one, metrics, stack))
    return Models(services)


async def _start(
    config: GatewayConfig, families: MetricFamilies, stack: contextlib.AsyncExitStack
) -> Service:
    """One model; `stack` ends it."""
    loaded = await asyncio.to_thread(_load, config)
    stack.callback(loaded.texts.close)
    manager = ChainManager(config, loaded.facts)
    stack.push_async_callback(manager.close)
    await manager.start()
    turns = Turns(loaded.half)
    stack.callback(turns.close)
    names = config.served_model_name
    metrics = Metrics(names[0], families)
    manager.changes.listeners.append(metrics.chain_changed)
    metrics.watch_swarm(lambda: num_ready(manager), lambda: num_uncovered(manager))
    slots = TextSlots(config.max_num_seqs, config.max_num_queued_reqs)
    warm = WarmSessions(config.max_warm_sessions, config.warm_session_timeout, metrics)
    stack.push_async_callback(warm.close)
    engine = TextEngine(manager, turns, loaded.texts.decoder, slots, warm, metrics)
    stack.push_async_callback(engine.close)
    grammars = Grammars(
        loaded.texts.decoder, loaded.limits.vocab_size, sorted(loaded.limits.eos_ids)
    )
    stack.callback(grammars.close)
    return Service(
        names=names,
        limits=loaded.limits,
        texts=loaded.texts,
        engine=engine,
        manager=manager,
        grammars=grammars,
        templates=loaded.templates,
    )


def _load(config: GatewayConfig) -> _Loaded:
    device = parse_device(config.device)
    template = read_template(config.chat_template)
    checkpoint = Checkpoint.open(
        config.model, revision=config.revision, token=config.token, cache_dir=config.cache_dir
    )
    dtype = parse_dtype(config.dtype, checkpoint, device)
    half = ClientHalf.load(checkpoint, dtype, device)
    path, revision = checkpoint.pretrained_location
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, token=config.token, cache_dir=config.cache_dir
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{checkpoint.name} has no tokenizer that can be read: {error}"
        ) from error
    own = half.generation_config
    ignored = ignored_processors(own)
    if ignored:
        logger.warning("the model's generation_config.json sets %s: ignored", ", ".join(ignored))
    max_model_len = config.max_model_len or half.max_positions or _DEFAULT_LENGTH
    texts = Texts(tokenizer, template, max_model_len)
    limits = Limits(
        vocab_size=half.vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_logprobs=config.max_logprobs,
        eos_ids=_eos_ids(own.eos_token_id, texts.eos_id),
        defaults=sampling_defaults(own) if config.generation_config == "auto" else {},
    )
    templates = texts.response_template(config.response_template)
    return _Loaded(half, ModelFacts.of(checkpoint, dtype), texts, limits, templates)


def _eos_ids(of_model: int | list[int] | None, of_tokenizer: int | None) -> frozenset[int]:
    """As `generate()`: the model's own, or else the tokenizer's."""
    if of_model is None:
        return frozenset() if of_tokenizer is None else frozenset((of_tokenizer,))
    return frozenset((of_model,) if isinstance(of_model, int) else of_model)


class _Server(uvicorn.Server):
    """Without uvicorn's own signal handlers: `cli.run_until_signalled` has them."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.is_up = asyncio.Event()

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    @override
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


async def _answer(
    config: GatewayConfig,
    app: Guard,
    listener: socket.socket,
    stop: asyncio.Event,
    on_ready: Callable[[], None],
) -> None:
    num_texts = len(config.all_models()) * (config.max_num_seqs + config.max_num_queued_reqs)
    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            limit_concurrency=num_texts + _SPARE_CONNECTIONS,
            timeout_graceful_shutdown=max(1, round(config.shutdown_timeout)),
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(server.is_up.wait())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
        if server.started:
            on_ready()
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        starting.cancel()
        stopping.cancel()
        server.should_exit = True
        await asyncio.shield(serving)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None, and `work` cancelled, if `stop` comes first."""
    task, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None
    finally:
        stopping.cancel()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address is taken, or is none of this machine's.
    """
    name = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port or "
            "--host"
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
