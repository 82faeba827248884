"""Settings of a client: defaults and ranges."""

from __future__ import annotations

import pytest

from planetserve.config import ClientConfig, from_mapping
from planetserve.errors import ConfigError


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
