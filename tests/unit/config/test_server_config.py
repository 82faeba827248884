"""Settings of a server: ranges, choices that exclude each other, values that follow from others."""

from __future__ import annotations

import pytest

from planetserve.config import ServerConfig, from_mapping
from planetserve.errors import ConfigError

SERVER = {"model": "demo", "num_blocks": 3, "new_swarm": True}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": "80"}, "port='80' is not a whole number"),
        ({"port": True}, "port=True is not a whole number"),
        ({"port": 2.0}, "port=2.0 is not a whole number"),
        ({"new_swarm": "yes"}, "new_swarm='yes' is not true or false"),
        ({"model": ""}, "no model given"),
        ({"model": 7}, "model=7 is not a string"),
        ({"update_period": float("nan")}, "update_period=nan is not a number"),
        ({"update_period": float("inf")}, "update_period=inf is not a number"),
        ({"update_period": 0}, "update_period=0.0 must be greater than 0"),
        ({"update_period": 600}, "must stay valid longer than update_period=600"),
        ({"expiration": 601}, "at most 600 seconds; expiration is 601"),
        ({"expiration": 60}, "must stay valid longer than update_period=60"),
        ({"num_blocks": 0}, "num_blocks=0 must be greater than 0"),
        ({"num_blocks": None}, "say which blocks to serve"),
        ({"block_indices": "0:3"}, "say which blocks to serve"),
        ({"num_blocks": None, "block_indices": "3"}, "not START:END"),
        ({"num_blocks": None, "block_indices": 186}, "block_indices=186 is not START:END"),
        ({"new_swarm": False}, "either --initial_peers"),
        ({"initial_peers": ["/ip4/127.0.0.1"]}, "either --initial_peers"),
        ({"initial_peers": [1]}, r"initial_peers=\[1\] is not a list of strings"),
        ({"initial_peers": {"a": 1}}, "is not a list of strings"),
        ({"torch_dtype": "int8"}, "torch_dtype='int8' is unknown; choose one of: auto, float32"),
        ({"log_level": "loud"}, "log_level='loud' is unknown"),
        ({"throughput": "eval"}, "throughput='eval' is not a number or 'auto'"),
        ({"throughput": 0}, "throughput=0.0 must be greater than 0"),
        ({"dht_prefix": "a.b"}, "dht_prefix='a.b' may hold letters"),
        ({"dht_prefix": ""}, "dht_prefix='' may hold letters"),
        ({"state_snapshots": 0}, "state_snapshots"),
        ({"attn_cache_tokens": 10**11}, "more than any machine holds"),
    ],
)
def test_bad_server_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(ServerConfig, {**SERVER, **values})


@pytest.mark.parametrize(
    ("update_period", "expected"), [(1.0, 60.0), (60.0, 120.0), (299.0, 598.0), (400.0, 600.0)]
)
def test_expiration_follows_the_update_period(update_period: float, expected: float) -> None:
    config = from_mapping(ServerConfig, {**SERVER, "update_period": update_period})
    assert config.expiration_s == expected


def test_cache_and_session_sizes_depend_on_shared_kv_heads() -> None:
    config = from_mapping(ServerConfig, SERVER)
    assert config.cache_tokens(shares_kv_heads=True) == 16384
    assert config.cache_tokens(shares_kv_heads=False) == 4096
    assert config.session_tokens(shares_kv_heads=True) == 8192
    assert config.session_tokens(shares_kv_heads=False) == 2048
    small = from_mapping(ServerConfig, {**SERVER, "attn_cache_tokens": 100})
    assert small.session_tokens(shares_kv_heads=True) == 100


def test_the_token_is_not_shown() -> None:
    assert "secret" not in repr(from_mapping(ServerConfig, {**SERVER, "token": "secret"}))
