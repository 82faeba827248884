"""API keys: who they are, and what each may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from planetserve.config import GatewayConfig
from planetserve.errors import ConfigError, QueueFull
from planetserve.gateway.keys import ApiKey, read_keys


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_buckets_fill_up_with_time() -> None:
    clock = Clock()
    key = ApiKey("a", requests_per_minute=2, tokens_per_minute=60, clock=clock)
    for _ in range(2):
        with key.running(1):
            pass
    with pytest.raises(QueueFull) as caught, key.running(1):
        pass
    assert caught.value.retry_after_s == pytest.approx(30)
    clock.now_s += 30
    with key.running(1):
        key.charge(90)
    clock.now_s += 30
    with pytest.raises(QueueFull, match="tokens") as caught, key.running(1):
        pass
    assert caught.value.retry_after_s == pytest.approx(1)
    clock.now_s += 3600  # a minute's worth at most
    for _ in range(2):
        with key.running(1):
            pass
    with pytest.raises(QueueFull), key.running(1):
        pass


def test_texts_at_once_are_given_back() -> None:
    key = ApiKey("a", concurrent_texts=3)
    with key.running(2):
        with pytest.raises(QueueFull), key.running(2):
            pass
        with key.running(1):
            pass
    with pytest.raises(RuntimeError), key.running(3):
        raise RuntimeError
    with key.running(3):
        pass


def test_keys_are_found(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("alice: secret\nbob: {key: other, concurrent_texts: 1}\n")
    keys = read_keys(("flag",), str(path))
    names = [key.name for secret in ("flag", "secret", "other") if (key := keys.find(secret))]
    assert names == ["key 1", "alice", "bob"]
    assert keys.find("") is None
    assert not read_keys((), None)


@pytest.mark.parametrize(
    "text",
    [
        "{", "", "[]", "alice:", "alice: 3", "alice: {}", "alice: {key: ' x'}", "alice: {key: é}",
        "alice: {key: x, tokens: 3}", "alice: {key: x, tokens_per_minute: 0}",
        "alice: {key: x, concurrent_texts: many}", "alice: {key: x, requests_per_minute: true}",
        "alice: {key: x, requests_per_minute: .nan}", "alice: x\nbob: x", "alice: flag",
        "'key 1': x",
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_keys(("flag",), str(path))
    assert "' x'" not in str(caught.value)
    with pytest.raises(ConfigError):
        read_keys((), str(tmp_path / "none"))


def test_a_file_of_keys_lets_other_machines_in() -> None:
    with pytest.raises(ConfigError, match="api_key_file"):
        GatewayConfig(model="demo", host="0.0.0.0")
    GatewayConfig(model="demo", host="0.0.0.0", api_key_file="keys.yaml")
