"""The error tree: blame, retries, and codes that survive the network."""

from __future__ import annotations

import pytest

from planetserve import errors
from planetserve.errors import (
    Blame,
    CapacityError,
    ConfigError,
    MissingBlocksError,
    PlanetServeError,
    RemoteError,
    error_from_code,
)

ALL = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, PlanetServeError)
]


@pytest.mark.parametrize("cls", ALL)
def test_every_class_is_named_in_the_modules_table_with_its_blame(
    cls: type[PlanetServeError],
) -> None:
    rows = [line.split() for line in (errors.__doc__ or "").splitlines()]
    rows = [row for row in rows if cls.__name__ in row]
    if cls is PlanetServeError:
        assert rows
        return
    (row,) = rows
    blame, retry = row[row.index(cls.__name__) + 1 :][:2]
    assert blame == cls.blame.name
    assert (retry == "yes") is cls.retryable


def test_codes_are_unique_and_fit_the_wire() -> None:
    codes = [cls.code for cls in ALL]
    assert len(set(codes)) == len(codes)
    assert max(map(len, codes)) <= 32


@pytest.mark.parametrize("cls", ALL)
def test_a_code_rebuilds_its_class(cls: type[PlanetServeError]) -> None:
    rebuilt = error_from_code(cls.code, "why", 7.0)
    assert type(rebuilt) is cls
    assert str(rebuilt) == "why"
    if isinstance(rebuilt, CapacityError):
        assert rebuilt.retry_after_s == 7.0


@pytest.mark.parametrize("code", ["", "no_such_code", "__class__"])
def test_an_unknown_code_is_the_peers_failure(code: str) -> None:
    rebuilt = error_from_code(code, "why")
    assert type(rebuilt) is RemoteError
    assert rebuilt.blame is Blame.REMOTE


def test_what_the_user_can_correct_is_also_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)
    assert not ConfigError.retryable


def test_a_clients_own_fault_never_blames_a_server() -> None:
    local = {cls for cls in ALL if cls.blame is Blame.LOCAL}
    assert {errors.ConfigError, errors.LocalProtocolError, errors.SessionError} <= local
    assert errors.SessionLengthError in local


def test_missing_blocks_are_listed() -> None:
    assert MissingBlocksError("gone", [(0, 3), (5, 8)]).missing == ((0, 3), (5, 8))


@pytest.mark.parametrize("cls", [PlanetServeError, errors.ModelError, errors.CacheExhausted])
def test_a_message_is_one_line_that_a_terminal_cannot_obey(cls: type[PlanetServeError]) -> None:
    text = "a\x1b]0;owned\x07b\r\nc\u202ed\x9be\udc80"
    assert str(cls(text)) == r"a\x1b]0;owned\x07b c\u202ed\x9be\udc80"
    assert str(cls("Größe: 3 µs, 模型")) == "Größe: 3 µs, 模型"
    assert len(str(cls("x" * 10**6))) < 3000
