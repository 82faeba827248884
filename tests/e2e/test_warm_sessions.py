"""A chat's next turn goes on from what servers still hold, and nobody else's does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from gateways import gateway, openai_client, pages_used, wait_for_no_pages

from planetserve.gateway.server import Address
from planetserve.testing.swarm import LocalSwarm

LONG = "Tell me about lists, tuples, dictionaries, sets and strings, one after the other. " * 8
KEYS = """
alice: {key: alice-key}
bob: {key: bob-key}
carol: {key: carol-key, concurrent_texts: 2, requests_per_minute: 3}
dave: {key: dave-key, tokens_per_minute: 10}
"""


@pytest.fixture(scope="module")
def demo_swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm("demo", ["0:3", "3:8"]) as swarm:
        yield swarm


@pytest.fixture
def address(demo_swarm: LocalSwarm, tmp_path: Path) -> Iterator[Address]:
    (tmp_path / "keys.yaml").write_text(KEYS)
    with gateway(
        demo_swarm, api_key_file=str(tmp_path / "keys.yaml"), max_warm_sessions=3
    ) as found:  # fmt: skip
        yield found


def ask(address: Address, key: str, messages: list[Any], **fields: Any) -> Any:
    """A chat's answer."""
    with openai_client(address, key) as client:
        return client.chat.completions.create(
            model="demo", messages=messages, temperature=0, **({"max_tokens": 12} | fields)
        )


def cached(done: Any) -> int:
    number: int = done.usage.prompt_tokens_details.cached_tokens
    return number


def conversation(address: Address, key: str) -> tuple[Any, list[Any]]:
    """A first answer, and the messages of the next turn."""
    messages: list[Any] = [{"role": "user", "content": LONG}]
    first = ask(address, key, messages)
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    return first, [*messages, answer, {"role": "user", "content": "And now?"}]


def test_the_next_turn_goes_on(demo_swarm: LocalSwarm, address: Address) -> None:
    first, messages = conversation(address, "alice-key")
    assert cached(first) == 0
    second = ask(address, "alice-key", messages)
    assert first.usage.prompt_tokens - 2 <= cached(second) < second.usage.prompt_tokens
    # As if nothing had been kept; and once more, from the middle of what is held.
    with gateway(demo_swarm, max_warm_sessions=0) as cold:
        alone = ask(cold, "any", messages)
    assert cached(alone) == 0
    again = ask(address, "alice-key", messages)
    assert cached(again) == again.usage.prompt_tokens - 1
    texts = {done.choices[0].message.content for done in (second, alone, again)}
    assert len(texts) == 1
    lines = httpx2.get(f"{address.url}/metrics").text.splitlines()
    totals = {
        line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if "{" in line
    }
    assert totals["vllm:prefix_cache_hits_total"] == cached(second) + cached(again)
    assert totals["planetserve:warm_session_hits_total"] == 2
    assert totals["planetserve:warm_sessions"] == 1


def test_a_stream_and_the_other_apis_tell_of_it(address: Address) -> None:
    first, messages = conversation(address, "alice-key")
    headers = {"Authorization": "Bearer alice-key"}
    body: dict[str, Any] = {"messages": messages, "max_tokens": 4}
    url = f"{address.url}/v1/messages"
    done = httpx2.post(url, json=body, headers=headers, timeout=30).json()
    assert done["usage"]["cache_read_input_tokens"] >= first.usage.prompt_tokens - 2
    body = {"input": messages, "max_output_tokens": 4}
    url = f"{address.url}/v1/responses"
    done = httpx2.post(url, json=body, headers=headers, timeout=30).json()
    assert done["usage"]["input_tokens_details"]["cached_tokens"] > 0


def test_another_key_s_sessions_are_not_used(address: Address) -> None:
    _, messages = conversation(address, "alice-key")
    assert cached(ask(address, "bob-key", messages)) == 0
    assert cached(ask(address, "alice-key", messages)) > 0


def test_sessions_are_few_and_end_with_the_gateway(demo_swarm: LocalSwarm) -> None:
    with gateway(demo_swarm, max_warm_sessions=1) as found:
        _, messages = conversation(found, "any")
        held = pages_used(demo_swarm)
        assert held
        ask(found, "any", [{"role": "user", "content": "A"}])  # takes its place
        deadline_s = time.monotonic() + 20
        while pages_used(demo_swarm) >= held:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        assert cached(ask(found, "any", messages)) == 0
    wait_for_no_pages(demo_swarm)


def test_sessions_are_kept_for_a_while(demo_swarm: LocalSwarm) -> None:
    with gateway(demo_swarm, warm_session_timeout=0.2) as found:
        conversation(found, "any")
        wait_for_no_pages(demo_swarm)


def test_a_lost_server_costs_no_answer() -> None:
    """What the lost one held is computed again."""
    with LocalSwarm("demo", ["0:3", "3:8", "3:8"]) as swarm, gateway(swarm) as found:
        first, messages = conversation(found, "any")
        busy = next(server for server in swarm.servers[1:] if server.engine.stats().pages_used)
        swarm.stop_server(busy)
        second = ask(found, "any", messages)
        assert cached(second) >= first.usage.prompt_tokens - 2
        with gateway(swarm, max_warm_sessions=0) as cold:
            alone = ask(cold, "any", messages)
        assert second.choices[0].message.content == alone.choices[0].message.content


def test_kept_sessions_make_room_for_others() -> None:
    options = {"attn_cache_tokens": 512, "kv_overcommit": 1.0}
    with LocalSwarm("demo", ["0:8"], options) as swarm, gateway(swarm) as found:
        conversation(found, "any")
        assert pages_used(swarm)
        other: list[Any] = [{"role": "user", "content": "A"}]
        done = ask(found, "any", other, max_tokens=480)
        assert done.choices[0].finish_reason
        # Their room counts as free for an answer without a limit.
        whole = ask(found, "any", other, max_tokens=None, extra_body={"ignore_eos": True})
        assert whole.usage.total_tokens == 512


def test_keys_have_limits(address: Address) -> None:
    hello: list[Any] = [{"role": "user", "content": "What is a list?"}]
    with pytest.raises(openai.RateLimitError, match="2 texts at once"):
        ask(address, "carol-key", hello, n=3)
    for _ in range(3):
        ask(address, "carol-key", hello, n=2)
    with pytest.raises(openai.RateLimitError, match="requests per minute") as caught:
        ask(address, "carol-key", hello)
    assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 20
    ask(address, "dave-key", hello)
    with pytest.raises(openai.RateLimitError, match="tokens per minute"):
        ask(address, "dave-key", hello)
    ask(address, "alice-key", hello)
