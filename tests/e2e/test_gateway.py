"""The gateway over a real swarm, asked by the official client and by bad ones."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from commands import Command
from gateways import (
    count,
    gateway,
    openai_client,
    pages_used,
    wait_for_no_pages,
    web_client,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import planetserve
from planetserve.errors import ConfigError
from planetserve.gateway.server import Address
from planetserve.testing.swarm import LocalSwarm

DEMO = Path(planetserve.__path__[0]) / "demo_model"
PROMPTS = [f"{name} is" for name in ("A list comprehension", "A class", "The import system", "A")]
HELLO = [{"role": "user", "content": "What is a list?"}]


@pytest.fixture(scope="module")
def demo_swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm("demo", ["0:3", "3:8"]) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def address(demo_swarm: LocalSwarm) -> Iterator[Address]:
    with gateway(demo_swarm, max_num_seqs=16, max_body_mib=0.25, max_warm_sessions=0) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: Address) -> Iterator[openai.OpenAI]:
    with openai_client(address) as made:
        yield made


@pytest.fixture(scope="module")
def web(address: Address) -> Iterator[httpx2.Client]:
    with web_client(address) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def demo() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def generated(demo: Any, tokenizer: Any, ids: list[int], **kwargs: Any) -> str:
    """What transformers generates alone."""
    found = demo.generate(torch.tensor([ids]), do_sample=False, **kwargs)
    text: str = tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)
    return text


def test_completions_equal_generate(client: openai.OpenAI, demo: Any, tokenizer: Any) -> None:
    done = client.completions.create(model="demo", prompt=PROMPTS, max_tokens=12, temperature=0)
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    wanted = [generated(demo, tokenizer, one, max_new_tokens=12) for one in ids]
    assert [choice.text for choice in done.choices] == wanted
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert done.usage is not None
    assert done.usage.prompt_tokens == sum(map(len, ids))
    by_ids = client.completions.create(model="demo", prompt=ids, max_tokens=12, temperature=0)
    assert [choice.text for choice in by_ids.choices] == wanted


def test_a_chat_equals_generate_streaming_and_not(
    client: openai.OpenAI, demo: Any, tokenizer: Any
) -> None:
    ids = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    wanted = generated(demo, tokenizer, ids, max_new_tokens=40)
    asked: dict[str, Any] = {"model": "demo", "messages": HELLO, "temperature": 0}
    whole = client.chat.completions.create(**asked, max_completion_tokens=40)
    assert whole.choices[0].message.content == wanted
    assert whole.choices[0].finish_reason == "stop"
    with client.chat.completions.create(
        **asked, max_tokens=40, n=2, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    texts = ["", ""]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
    assert texts == [wanted, wanted]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * whole.usage.completion_tokens  # type: ignore[union-attr]


def test_stream_lines(web: httpx2.Client) -> None:
    body = {"messages": HELLO, "max_tokens": 2, "stream": True}
    with web.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        assert {"index", "delta", "finish_reason"} <= set(choice)


def test_sixteen_at_once_are_each_as_alone(client: openai.OpenAI) -> None:
    def ask(number: int) -> tuple[str, str]:
        found = client.completions.create(
            model="demo", prompt=PROMPTS[number % 4], max_tokens=8 + number, temperature=0.9,
            seed=number, logprobs=1 if number % 3 else None,
        )  # fmt: skip
        return found.choices[0].text, found.choices[0].finish_reason

    alone = [ask(number) for number in range(16)]
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(ask, range(16))) == alone


def test_echo_with_logprobs_scores_a_prompt(
    client: openai.OpenAI, demo: Any, tokenizer: Any
) -> None:
    ids = tokenizer.encode("A list comprehension is a list")
    with torch.no_grad():
        logprobs_TV = torch.log_softmax(demo(torch.tensor([ids])).logits[0], dim=-1)
    wanted = [float(logprobs_TV[place, token]) for place, token in enumerate(ids[1:])]
    for max_tokens in (0, 1):
        done = client.completions.create(
            model="demo", prompt=ids, max_tokens=max_tokens, echo=True, logprobs=1, temperature=0
        )
        found = done.choices[0].logprobs
        assert found is not None
        assert found.token_logprobs[0] is None
        assert found.token_logprobs[1 : len(ids)] == pytest.approx(wanted, abs=1e-3)
        assert len(found.tokens) == len(found.top_logprobs) == len(ids) + max_tokens
        for value, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
            assert value <= max(top.values())
    assert max(found.top_logprobs[-1].values()) == found.token_logprobs[-1]


def test_chat_logprobs_and_stop(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="demo", messages=HELLO, temperature=0, logprobs=True, top_logprobs=2, stop=[" is a "]
    )
    (choice,) = done.choices
    assert choice.message.content is not None
    assert " is a " not in choice.message.content
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)


def test_models_and_tokenizer(client: openai.OpenAI, web: httpx2.Client, tokenizer: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    found = web.post("/tokenize", json={"prompt": "A list", "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode("A list")
    assert (found["count"], len(found["token_strs"])) == (len(found["tokens"]),) * 2
    chat = web.post("/tokenize", json={"messages": HELLO}).json()["tokens"]
    assert chat == tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, return_dict=False
    )
    tokens = tokenizer.encode("A list", add_special_tokens=False)
    assert web.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "A list"}
    about = web.get("/tokenizer_info").json()
    assert (about["eos_token"], about["bos_token"]) == (tokenizer.eos_token, tokenizer.bos_token)
    assert about["chat_template"] == tokenizer.chat_template
    assert str(DEMO) not in json.dumps(about)
    assert web.get("/health").status_code == 200
    assert web.get("/version").json() == {"version": planetserve.__version__}


def test_metrics_count(web: httpx2.Client, client: openai.OpenAI) -> None:
    before = count(web, "vllm:generation_tokens_total")
    client.completions.create(model="demo", prompt="A", max_tokens=7, extra_body={"ignore_eos": 1})
    assert count(web, "vllm:generation_tokens_total") == before + 7
    assert count(web, "vllm:num_requests_running") == 0
    handled = 'http_requests_total{handler="/v1/completions",method="POST",status="200"}'
    assert count(web, handled) > 0


def test_clients_that_go_away_leave_no_pages(demo_swarm: LocalSwarm, web: httpx2.Client) -> None:
    body = {"prompt": PROMPTS, "max_tokens": 500, "ignore_eos": True, "n": 2}
    with web.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        next(response.iter_lines())
        assert pages_used(demo_swarm)
    wait_for_no_pages(demo_swarm)
    assert count(web, 'vllm:request_success_total{engine="0",finished_reason="abort"') >= 8
    # And without a stream: nobody reads the answer.
    host, port = web.base_url.host, web.base_url.port
    assert port is not None
    text = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        deadline_s = time.monotonic() + 20
        while not pages_used(demo_swarm):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    wait_for_no_pages(demo_swarm)


DEEP = b'{"prompt": "x", "metadata": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (COMPLETE, b"{", 400),
        (COMPLETE, b"\xff\xfe{}", 400),
        (COMPLETE, DEEP, 400),
        (COMPLETE, b'{"prompt": "x", "temperature": NaN}', 400),
        (COMPLETE, b'{"prompt": "x", "temperature": -1}', 400),
        (COMPLETE, b'{"prompt": "x", "repetition_penalty": 5e-324}', 400),
        (COMPLETE, b'{"prompt": "x", "max_tokens": -1}', 400),
        (COMPLETE, b'{"prompt": "x", "max_tokens": 5000}', 400),
        (COMPLETE, b'{"prompt": "x", "n": 17}', 400),
        (COMPLETE, b'{"prompt": "x", "n": 1e300}', 400),
        (COMPLETE, b'{"prompt": "x", "logprobs": 21}', 400),
        (COMPLETE, b'{"prompt": "x", "stop": ""}', 400),
        (COMPLETE, b'{"prompt": "\\ud800"}', 400),
        (COMPLETE, b'{"prompt": []}', 400),
        (COMPLETE, b'{"prompt": [99999999999999999999]}', 400),
        (COMPLETE, b'{"prompt": [[1], "x"]}', 400),
        (COMPLETE, b'{"prompt": {"a": 1}}', 400),
        (COMPLETE, b'{"prompt": "x", "best_of": 3}', 400),
        (COMPLETE, b'{"prompt": "x", "model": "other"}', 404),
        (COMPLETE, b'{"prompt": "' + b"word " * 5000 + b'"}', 400),
        (COMPLETE, b'{"prompt": "' + b"x" * 300_000 + b'"}', 413),
        (CHAT, b'{"messages": []}', 400),
        (CHAT, b'{"messages": [{"role": "robot", "content": "x"}]}', 400),
        (CHAT, b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400),
        (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', 400),
        (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}', 400),
        ("/tokenize", b"{}", 400),
        ("/detokenize", b'{"tokens": [4096]}', 400),
        ("/nowhere", b"{}", 404),
    ],
)  # fmt: skip
def test_bad_input_gets_an_openai_error(
    web: httpx2.Client, path: str, body: bytes, status: int
) -> None:
    response = web.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status
    assert set(error) == {"message", "type", "param", "code"}
    assert len(response.content) < 3000


def test_a_page_elsewhere_cannot_use_a_gateway_without_a_key(web: httpx2.Client) -> None:
    response = web.get("/v1/models", headers={"Host": "evil.example:8000"})
    assert response.status_code == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8000", "[::1]"])
def test_names_of_this_machine_are_answered(web: httpx2.Client, host: str) -> None:
    assert web.get("/v1/models", headers={"Host": host}).status_code == 200


def test_keys_names_and_a_full_queue(demo_swarm: LocalSwarm) -> None:
    with gateway(
        demo_swarm, api_key=("one", "two"), served_model_name=("a", "b"), max_num_seqs=1,
        max_num_queued_reqs=0,
    ) as found:  # fmt: skip
        with openai_client(found, "three") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with openai_client(found, "two") as client:
            assert [model.id for model in client.models.list()] == ["a", "b"]
            with client.completions.create(
                model="b", prompt="A", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            ) as stream:
                assert next(iter(stream)).model == "b"
                with pytest.raises(openai.RateLimitError) as caught:
                    client.completions.create(model="a", prompt="A")
                assert int(caught.value.response.headers["Retry-After"]) >= 1


def test_a_block_without_servers_is_503_and_ends_a_stream_with_an_error() -> None:
    with (
        LocalSwarm("demo", ["0:3", "3:8"]) as swarm,
        gateway(swarm, wait_for_blocks_timeout=0.5, max_retries=1, step_timeout=5) as found,
        openai_client(found) as client,
    ):
        with client.completions.create(
            model="demo", prompt="A", max_tokens=1500, stream=True,
            extra_body={"ignore_eos": True},
        ) as stream:  # fmt: skip
            next(iter(stream))
            swarm.stop_server(swarm.servers[1])
            with pytest.raises(openai.APIError):
                list(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="demo", prompt="A")
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["Retry-After"]) >= 1


def test_the_command_answers_and_ends_a_stream_on_sigint(
    demo_swarm: LocalSwarm, tmp_path: Path, started: list[Command]
) -> None:
    command = Command(
        tmp_path, "run_gateway", "demo", "--port", "0", "--shutdown_timeout", "1",
        "--initial_peers", *demo_swarm.initial_peers,
    )  # fmt: skip
    started.append(command)
    ready = command.wait_ready()
    assert ready["models"] == ["demo"]
    body = {"prompt": "A", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{ready['url']}/v1/completions", json=body) as response:
        next(response.iter_lines())
        assert command.stop(2) == 0
    wait_for_no_pages(demo_swarm)


def test_help_is_instant_and_heavy_things_are_not_loaded() -> None:
    code = "import sys; from planetserve import run_gateway as g\ntry: g.main(['--help'])\n"
    code += "finally: print([n for n in ('torch', 'fastapi', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith("[]")
    assert "--api_key" in done.stdout


def test_several_models(demo_swarm: LocalSwarm) -> None:
    """A request that names none gets the first."""
    with (
        gateway(
            demo_swarm, served_model_name=("a", "b"), served_model=("other=demo", "demo")
        ) as found,
        openai_client(found) as client,
        web_client(found) as web,
    ):  # fmt: skip
        assert found.models == [model.id for model in client.models.list()]
        assert found.models == ["a", "b", "other", "demo"]
        for name in ("b", "other"):
            done = client.completions.create(model=name, prompt="A", max_tokens=3)
            assert done.model == name
            label = {"b": "a"}.get(name, name)
            counted = f'vllm:prompt_tokens_total{{engine="0",model_name="{label}"}}'
            assert done.usage is not None
            assert count(web, counted) == done.usage.prompt_tokens
        assert web.post("/v1/completions", json={"prompt": "A"}).json()["model"] == "a"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="c", prompt="A")


@pytest.mark.parametrize(
    "settings",
    [{"served_model": ("demo",)}, {"served_model": ("x=demo",), "chat_template": "x.jinja"}],
)
def test_models_that_cannot_be_told_apart_are_refused(
    demo_swarm: LocalSwarm, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError), gateway(demo_swarm, **settings):
        pass
