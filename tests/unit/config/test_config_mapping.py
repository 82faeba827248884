"""From plain values to configurations: types, YAML, unknown names, help texts."""

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

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


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


@pytest.mark.parametrize("cls", [ClientConfig, ServerConfig])
def test_every_setting_is_documented(cls: type) -> None:
    docs = field_docs(cls)
    assert docs.keys() == set(cls.__dataclass_fields__)  # type: ignore[attr-defined]
