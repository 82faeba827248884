"""What Prometheus reads of servers and gateways, and whether what deploy/ asks for exists."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from commands import Command
from gateways import count, gateway, web_client
from prometheus_client.parser import text_string_to_metric_families

from planetserve.errors import ConfigError
from planetserve.server.metrics import MetricsEndpoint
from planetserve.testing.swarm import LocalSwarm

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ASKED = {"prompt": "A list comprehension is", "max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def scraped() -> Iterator[dict[str, str]]:
    """The text of a gateway's metrics and of a server's, after one answer and a lost server."""
    with (
        LocalSwarm("demo", ["0:3", "3:8", "3:8"]) as swarm,
        gateway(swarm, max_warm_sessions=0) as found,
        web_client(found) as web,
    ):
        body = {**ASKED, "max_tokens": 200, "stream": True}
        body["stream_options"] = {"include_chain": True}
        with web.stream("POST", "/v1/completions", json=body) as stream:
            for line in stream.iter_lines():
                if '"chain"' in line and len(swarm.servers) == 3:
                    hops = json.loads(line.removeprefix("data: "))["chain"]["hops"]
                    lost = hops[1]["peer_id"]
                    (server,) = [one for one in swarm.servers if one.node.peer_id == lost]
                    swarm.stop_server(server)
        endpoint = MetricsEndpoint()

        async def read() -> str:
            async with endpoint.answering(0):
                endpoint.show(swarm.servers[0].collector())
                async with httpx2.AsyncClient() as client:
                    response = await client.get(f"http://127.0.0.1:{endpoint.port}/metrics")
                    missing = await client.get(f"http://127.0.0.1:{endpoint.port}/other")
            assert (response.status_code, missing.status_code) == (200, 404)
            return response.text

        yield {"gateway": web.get("/metrics").text, "server": swarm.call(read())}


def values(text: str) -> dict[str, float]:
    """Each sample's name without labels, and the sum of its values."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        found.setdefault(family.name, 0.0)
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_a_server_counts_what_it_runs(scraped: dict[str, str]) -> None:
    found = values(scraped["server"])
    # The first token comes with the prompt; the step under way may be sent again.
    assert found["vllm:generation_tokens_total"] >= 199
    assert found["vllm:prompt_tokens_total"] >= 5
    assert found["planetserve:batches_total"] == found["vllm:iteration_tokens_total_count"] >= 199
    assert found["planetserve:batch_seconds_total"] > 0
    assert found["planetserve:kv_pages_total"] > 0
    assert found["planetserve:hop_block_seconds"] > 0
    assert found["planetserve:online"] == 1
    assert found["planetserve:num_blocks"] == 3
    assert 'model_name="demo"' in scraped["server"]


def test_a_gateway_counts_failovers_and_steps(scraped: dict[str, str]) -> None:
    found = values(scraped["gateway"])
    assert found["planetserve:failovers_total"] >= 1
    assert found["planetserve:step_seconds_count"] > 100
    assert found["planetserve:chain_hops"] == 2
    assert found["planetserve:ready_servers"] == 2
    assert found["planetserve:uncovered_blocks"] == 0


def asked_for(where: str) -> set[str]:
    """The metrics that a file names."""
    return {*re.findall(r"\b(?:vllm|planetserve):[a-z_]+", where)}


def expressions(node: Any) -> Iterator[str]:
    """Everything in a dashboard or rules that Prometheus is asked."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            yield from expressions(value)
    elif isinstance(node, list):
        for one in node:
            yield from expressions(one)


@pytest.mark.parametrize("name", ["alerts.yml", "grafana_dashboard.json"])
def test_every_metric_that_a_file_names_exists(name: str, scraped: dict[str, str]) -> None:
    tree = yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))
    named = {metric for text in expressions(tree) for metric in asked_for(text)}
    assert len(named) > 5
    known = {*values(scraped["gateway"]), *values(scraped["server"])}
    known |= {f"{one}_total" for one in known}  # a counter that has no sample yet
    assert named <= known


async def test_callers_that_talk_too_long_or_not_at_all_are_hung_up_on() -> None:
    endpoint = MetricsEndpoint()
    async with endpoint.answering(0):
        for sent in (
            b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 20_000,
            b"\r\n\r\n",
            b"\x00" * 20_000,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
            writer.write(sent)
            assert b"200 OK" not in await reader.read()
            writer.close()


async def test_a_taken_port_is_refused_with_the_next_step() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ConfigError, match="choose another --metrics_port"):
            async with MetricsEndpoint().answering(taken.getsockname()[1]):
                pass


def test_the_command_answers_prometheus(tmp_path: Path, started: list[Command]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = Command(
        tmp_path, "run_server", "demo", "--block_indices", "0:2", "--new_swarm",
        "--metrics_port", str(port), "--host_maddrs", "/ip4/127.0.0.1/tcp/0",
    )  # fmt: skip
    started.append(command)
    command.wait_ready()
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as web:
        assert count(web, "planetserve:num_blocks") == 2
    assert command.stop(2) == 0
