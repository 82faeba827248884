"""Every error has a status, and its body is OpenAI's."""

from __future__ import annotations

import pytest

from planetserve import errors
from planetserve.gateway.errors import STATUS, RequestError, body_of, headers_of, status_of


def every_error() -> list[type[errors.PlanetServeError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.PlanetServeError)
    ]


def test_every_error_is_in_the_table() -> None:
    assert set(STATUS) == set(every_error())


@pytest.mark.parametrize("cls", every_error())
def test_what_a_retry_may_mend_says_so(cls: type[errors.PlanetServeError]) -> None:
    error = cls("no")
    body = body_of(error)["error"]
    assert body["code"] == status_of(error)
    assert set(body) == {"message", "type", "param", "code"}
    if cls.retryable:
        assert status_of(error) in (429, 503)
        assert int(headers_of(error)["Retry-After"]) >= 1
    else:
        assert headers_of(error) == {}


def test_a_full_swarm_says_when_to_come_back() -> None:
    error = errors.CacheExhausted("full", 12.3)
    assert (status_of(error), headers_of(error)) == (429, {"Retry-After": "13"})


def test_an_unexpected_error_tells_nothing() -> None:
    body = body_of(KeyError("secret prompt"))
    assert body["error"]["code"] == 500
    assert "secret" not in str(body)


def test_a_refused_request_names_its_parameter() -> None:
    assert body_of(RequestError("too many", "n")) == {
        "error": {"message": "too many", "type": "BadRequestError", "param": "n", "code": 400}
    }
