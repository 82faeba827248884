"""What requests and command lines may ask for, and who waits for whom."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import pytest
from transformers import GenerationConfig

from planetserve import run_gateway
from planetserve.errors import ConfigError, QueueFull
from planetserve.gateway.errors import RequestError
from planetserve.gateway.protocol import UNSUPPORTED, ChatRequest, CompletionRequest
from planetserve.gateway.requests import (
    Limits,
    ignored_processors,
    sampling_defaults,
    sampling_params,
    text_request,
)
from planetserve.gateway.text_engine import TextSlots

LIMITS = Limits(
    vocab_size=100, max_model_len=64, max_num_seqs=8, max_logprobs=5, eos_ids=frozenset({2}),
    defaults={"temperature": 0.6, "top_k": 20},
)  # fmt: skip


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(prompt="x", **fields)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_obeyed_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(RequestError) as caught:
        ChatRequest(messages=messages, **{name: "something"}).check_supported()
    assert caught.value.param == name
    for nothing in (None, [], *UNSUPPORTED[name]):
        ChatRequest(messages=messages, **{name: nothing}).check_supported()


def test_unknown_parameters_are_ignored() -> None:
    ChatRequest(messages=[{"role": "user", "content": "x"}], user="me").check_supported()


def test_the_model_s_own_parameters_hold_where_a_request_gives_none() -> None:
    found = sampling_params(completion(), LIMITS, None)
    assert (found.temperature, found.top_k, found.top_p) == (0.6, 20, 1.0)
    found = sampling_params(completion(temperature=0, top_k=-1), LIMITS, None)
    assert (found.temperature, found.top_k) == (0, 0)


def test_generation_config_is_read() -> None:
    own = GenerationConfig(temperature=0.7, no_repeat_ngram_size=3)
    assert sampling_defaults(own)["temperature"] == 0.7
    assert ignored_processors(own) == ["no_repeat_ngram_size"]
    assert ignored_processors(GenerationConfig()) == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"100": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"stop_token_ids": [100]}, "stop_token_ids"),
        ({"min_tokens": 17}, "min_tokens"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], param: str) -> None:
    body = completion(**fields)
    with pytest.raises(RequestError) as caught:
        text_request(body, LIMITS, sampling_params(body, LIMITS, None), [1], 16)
    assert caught.value.param == param


def test_prompts_out_of_range_are_refused() -> None:
    for ids in ([], [100], [-1], [1] * 64):
        with pytest.raises(RequestError):
            LIMITS.check_prompt(ids, "prompt")
    body = completion()
    with pytest.raises(RequestError, match="more than the 64"):
        text_request(body, LIMITS, sampling_params(body, LIMITS, None), [1] * 60, 5)
    with pytest.raises(RequestError, match="more than the 8"):
        LIMITS.check_texts(3, 3)


async def test_texts_start_in_order_and_the_queue_is_bounded() -> None:
    slots, order = TextSlots(4, max_waiting=2), []

    async def text(name: str, size: int, end: asyncio.Event) -> None:
        async with slots.take(size):
            order.append(name)
            await end.wait()

    ends = [asyncio.Event() for _ in range(3)]
    tasks = [
        asyncio.create_task(text(name, size, end))
        for name, size, end in zip("abc", (3, 2, 1), ends, strict=True)
    ]
    await asyncio.sleep(0)
    # There is room for c, but b came before.
    assert (order, slots.num_free, slots.num_waiting) == (["a"], 1, 2)
    with pytest.raises(QueueFull):
        slots.check_room(1, 1)
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    await asyncio.sleep(0)
    assert (order, slots.num_free) == (["a", "c"], 0)
    for end in ends:
        end.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (slots.num_free, slots.num_waiting) == (4, 0)


async def test_a_text_that_is_cancelled_as_its_turn_comes_gives_its_room_back() -> None:
    slots = TextSlots(1, max_waiting=9)

    async def text() -> None:
        async with slots.take(1):
            await asyncio.sleep(0)

    first = asyncio.create_task(text())
    await asyncio.sleep(0)
    second = asyncio.create_task(text())
    await asyncio.sleep(0)
    await first
    second.cancel()  # it has been given room, and does not know yet
    await asyncio.gather(second, return_exceptions=True)
    assert slots.num_free == 1


def parse(line: str) -> Any:
    return run_gateway.parse(f"demo --initial_peers /a {line}".split())


def test_flags() -> None:
    config = parse("--port 0 --max-num-seqs 3 --served-model-name a b --api-key k")
    assert (config.host, config.port, config.max_num_seqs) == ("127.0.0.1", 0, 3)
    assert (config.served_model_name, config.api_key) == (("a", "b"), ("k",))
    assert config.initial_peers == ("/a",)
    assert "secret" not in repr(parse("--api_key secret"))


def test_other_machines_need_a_key() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1"):
        parse(f"--host {host}")
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="--api_key"):
            parse(f"--host {host}")
        parse(f"--host {host} --api_key k")


@pytest.mark.parametrize("line", ["--port 70000", "--max_num_seqs 0", "--dtype int8",
                                  "--max_model_len 1", "--local_blocks 0:1"])  # fmt: skip
def test_wrong_settings_are_refused(line: str) -> None:
    with pytest.raises(ConfigError):
        parse(line)


def test_a_gateway_without_peers_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match="--initial_peers"):
        run_gateway.parse(["demo"])


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name)
    )
    with pytest.raises(ConfigError, match=r"needs fastapi: pip install 'planetserve\[gateway\]'"):
        run_gateway.main(["demo", "--initial_peers", "/a"])
