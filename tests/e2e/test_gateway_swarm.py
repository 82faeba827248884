"""What a gateway tells of the swarm and of a text's chain, and the files of its web page."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from gateways import gateway, openai_client, web_client

import planetserve
from planetserve.gateway.server import Address
from planetserve.testing.swarm import LocalSwarm

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path(planetserve.__path__[0]) / "gateway" / "web"


@pytest.fixture(scope="module")
def demo_swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm("demo", ["0:3", "3:8"], {"public_name": "alice"}) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def address(demo_swarm: LocalSwarm) -> Iterator[Address]:
    with gateway(demo_swarm, api_key=("secret",)) as found:
        yield found


@pytest.fixture(scope="module")
def web(address: Address) -> Iterator[httpx2.Client]:
    with web_client(address, "secret") as made:
        yield made


@pytest.fixture(scope="module")
def client(address: Address) -> Iterator[openai.OpenAI]:
    with openai_client(address, "secret") as made:
        yield made


def test_the_servers_of_a_whole_swarm(web: httpx2.Client, demo_swarm: LocalSwarm) -> None:
    found = web.get("/swarm").json()
    assert (found["model"], found["num_blocks"], found["uncovered"]) == ("demo", 8, [])
    assert [(one["start"], one["end"]) for one in found["servers"]] == [(0, 3), (3, 8)]
    ids = {server.node.peer_id for server in demo_swarm.servers}
    assert {one["peer_id"] for one in found["servers"]} == ids
    for one in found["servers"]:
        assert (one["state"], one["name"]) == ("ready", "alice")
        assert one["tokens_per_s"] > 0
        assert one["free_cache_tokens"] > 0
        assert one["rtt_ms"] > 0
    assert web.get("/swarm", params={"model": "other"}).status_code == 404


def test_only_the_page_itself_is_shown_without_the_key(address: Address) -> None:
    with web_client(address) as stranger:
        assert stranger.get("/swarm").status_code == 401
        assert stranger.get("/").status_code == 200


@pytest.mark.parametrize("stream_options", [{"include_chain": True, "include_usage": True}, {}])
def test_a_stream_tells_its_chain_if_asked(
    client: openai.OpenAI, demo_swarm: LocalSwarm, stream_options: dict[str, bool]
) -> None:
    with client.completions.create(
        model="demo", prompt="A list", max_tokens=20, temperature=0, stream=True,
        stream_options=stream_options,  # type: ignore[arg-type]
        extra_body={"ignore_eos": True},
    ) as stream:  # fmt: skip
        chunks = [chunk.model_dump() for chunk in stream]
    reports = [chunk["chain"] for chunk in chunks if chunk.get("chain")]
    if not stream_options:
        assert not reports
        return
    assert all(chunk["choices"] == [] for chunk in chunks if chunk.get("chain"))
    assert len(reports) >= 2  # with the first token and with the last
    assert reports[0]["prompt_ms"] > 0
    last = reports[-1]
    assert last["num_steps"] == 19
    assert [(hop["start"], hop["end"]) for hop in last["hops"]] == [(0, 3), (3, 8)]
    ids = [server.node.peer_id for server in demo_swarm.servers]
    assert {hop["peer_id"] for hop in last["hops"]} == set(ids)
    assert all(hop["compute_ms"] > 0 for hop in last["hops"])
    assert last["step_ms"] > 0
    assert last["head_ms"] > 0
    assert last["return_ms"] > 0


def test_a_lost_server_is_seen_and_so_is_the_failure() -> None:
    with (
        LocalSwarm("demo", ["0:3", "3:8", "3:8"]) as swarm,
        gateway(swarm) as found,
        openai_client(found) as client,
        web_client(found) as web,
    ):
        with client.completions.create(
            model="demo", prompt="A", max_tokens=300, stream=True,
            stream_options={"include_chain": True},  # type: ignore[typeddict-unknown-key]
            extra_body={"ignore_eos": True},
        ) as stream:  # fmt: skip
            reports = []
            for chunk in stream:
                report = chunk.model_dump().get("chain")
                if report and not reports:
                    lost = report["hops"][1]["peer_id"]
                    (server,) = [one for one in swarm.servers if one.node.peer_id == lost]
                    swarm.stop_server(server)
                reports += [report] if report else []
        assert reports[-1]["hops"][1]["peer_id"] != lost
        view = web.get("/swarm").json()
        assert lost in view["changes"][0]["peer_ids"]
        ready = [one["peer_id"] for one in view["servers"] if one["state"] == "ready"]
        assert lost not in ready
        assert view["uncovered"] == []
        swarm.stop_server(swarm.servers[0])
        with pytest.raises(openai.InternalServerError):
            client.with_options(timeout=60).completions.create(model="demo", prompt="A")
        assert web.get("/swarm").json()["uncovered"] == [[0, 3]]


def test_the_page_is_strict_and_is_cached(web: httpx2.Client) -> None:
    files = sorted(path.name for path in PAGE.iterdir())
    for path in ("/", *(f"/web/{name}" for name in files)):
        found = web.get(path)
        assert found.status_code == 200
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        again = web.get(path, headers={"If-None-Match": found.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("/web/", "/web/missing.js", "/web/..%2fapp.py", "/web/%2e%2e/app.py"):
        assert web.get(path).status_code == 404


def test_the_page_makes_no_html_of_text_and_asks_no_other_host() -> None:
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, (path.name, word)
        named = [part for part in text.split("http")[1:] if part.startswith(("s://", "://"))]
        assert all("www.w3.org" in part for part in named), path.name


def test_a_wheel_has_the_page(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    packed = {path.name for path in (tmp_path / "planetserve" / "gateway" / "web").iterdir()}
    assert packed == {path.name for path in PAGE.iterdir()}
