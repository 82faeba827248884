"""Configurations: defaults, ranges, YAML, unknown names."""

from __future__ import annotations

from pathlib import Path

import pytest

from planetserve.config import (
    ClientConfig,
    ServerConfig,
    did_you_mean,
    field_docs,
    from_mapping,
    load_yaml,
)
from planetserve.errors import ConfigError
from planetserve.types import BlockSpan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SERVER = {"model": "demo", "num_blocks": 3, "new_swarm": True}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_example_files_are_valid() -> None:
    server = from_mapping(ServerConfig, {**load_yaml(CONFIGS / "server.yaml"), "new_swarm": True})
    assert server.model == "demo"
    assert server.block_indices == BlockSpan(0, 8)
    client = from_mapping(ClientConfig, load_yaml(CONFIGS / "client.yaml"))
    assert client.initial_peers[0].startswith("/ip4/127.0.0.1/tcp/31337/p2p/")
    assert client.allowed_servers is None


def test_an_empty_mapping_gives_the_defaults_of_the_client() -> None:
    assert from_mapping(ClientConfig, {}) == ClientConfig()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("daemon_startup_timeout", 60),
        ("show_route", "inference"),
        ("allowed_servers", None),
        ("blocked_servers", None),
        ("use_server_to_server", True),
        ("connect_timeout", 5),
        ("request_timeout", 180),
        ("update_period", 60),
        ("min_backoff", 1),
        ("max_backoff", 60),
        ("ban_timeout", 15),
        ("max_pinged", 3),
        ("ping_timeout", 2),
    ],
)
def test_client_defaults_that_petals_users_rely_on(name: str, value: object) -> None:
    assert getattr(ClientConfig(), name) == value


def test_retries_are_bounded_by_default_and_cannot_be_unbounded() -> None:
    assert ClientConfig().max_retries == 5
    with pytest.raises(ConfigError, match="max_retries=None is not a whole number"):
        from_mapping(ClientConfig, {"max_retries": None})


@pytest.mark.parametrize("text", ["3:6", "0:8", "12:48", '"3:6"'])
def test_a_span_in_yaml_is_not_read_as_a_base_60_number(tmp_path: Path, text: str) -> None:
    loaded = load_yaml(write(tmp_path, f"block_indices: {text}\n"))
    assert loaded == {"block_indices": text.strip('"')}


def test_yaml_numbers_booleans_and_lists_keep_their_types(tmp_path: Path) -> None:
    path = write(tmp_path, "a: 16\nb: -3\nc: 0\nd: 0x10\ne: 2.5\nf: true\ng: [x, y]\nh:\n")
    assert load_yaml(path) == {
        "a": 16, "b": -3, "c": 0, "d": 16, "e": 2.5, "f": True, "g": ["x", "y"], "h": None,
    }  # fmt: skip


def test_yaml_keys_may_have_dashes(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path, "num-blocks: 3\n")) == {"num_blocks": 3}


def test_an_empty_yaml_file_sets_nothing(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "not a YAML mapping"),
        ("just text", "not a YAML mapping"),
        ("1: x\n", "not a YAML mapping"),
        ("a: [1\nb: 2\n", "is not valid YAML at line 2"),
        ("a: !!python/object/apply:os.system ['true']\n", "is not valid YAML at line 1"),
        ("[" * 2000, "is not valid YAML"),
    ],
)
def test_bad_yaml_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_yaml_file_and_a_binary_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        load_yaml(tmp_path / "absent.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml(tmp_path / "binary")


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"^here: unknown setting 'ban_timout'; did you mean 'ban_timeout'\?$"
    ):
        from_mapping(ClientConfig, {"ban_timout": 3}, source="here")


def test_an_unknown_name_like_no_other_suggests_nothing() -> None:
    with pytest.raises(ConfigError, match=r"^unknown setting 'zzz'$"):
        from_mapping(ClientConfig, {"zzz": 3})
    assert did_you_mean("zzz", ["port"]) == ""


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
    ],
)
def test_bad_server_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(ServerConfig, {**SERVER, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step_timeout": 0}, "step_timeout=0.0 must be greater than 0"),
        ({"max_retries": -1}, "max_retries=-1 must not be negative"),
        ({"max_backoff": 0.5}, "max_backoff=0.5 is below min_backoff=1"),
        ({"use_server_to_server": False}, "servers always push"),
        ({"show_route": "always"}, "show_route='always' is not true or false or 'inference'"),
    ],
)
def test_bad_client_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(ClientConfig, values)


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ConfigError, match="no model given; put a folder"):
        from_mapping(ServerConfig, {"num_blocks": 3, "new_swarm": True})


def test_one_string_stands_for_a_list_of_one_and_paths_for_strings() -> None:
    config = from_mapping(
        ServerConfig,
        {"model": Path("/models/x"), "num_blocks": 1, "initial_peers": "/ip4/127.0.0.1"},
    )
    assert config.initial_peers == ("/ip4/127.0.0.1",)
    assert config.model == "/models/x"


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


@pytest.mark.parametrize("cls", [ClientConfig, ServerConfig])
def test_every_setting_is_documented(cls: type) -> None:
    docs = field_docs(cls)
    assert docs.keys() == set(cls.__dataclass_fields__)  # type: ignore[attr-defined]
