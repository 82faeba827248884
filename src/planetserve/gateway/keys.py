"""API keys, each with a name and limits.

Requests and tokens are limited by buckets that fill up continuously, a minute's worth at most.
Tokens are known only afterwards: a key that has used too many waits until its bucket is positive.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from planetserve.errors import ConfigError, QueueFull

_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent_texts")
_MINUTE_S = 60.0
_FULL_RETRY_S = 2.0


class _Bucket:
    """A rate limit: a number of units per minute."""

    def __init__(self, per_minute: float, now_s: float):
        self._per_minute = self._level = per_minute
        self._filled_at_s = now_s

    def wait_s(self, least: float, now_s: float) -> float:
        """Seconds until there is at least so much; 0 if there is."""
        grown = (now_s - self._filled_at_s) / _MINUTE_S * self._per_minute
        self._level = min(self._per_minute, self._level + grown)
        self._filled_at_s = now_s
        return max(0.0, (least - self._level) / self._per_minute * _MINUTE_S)

    def take(self, amount: float) -> None:
        self._level -= amount


class ApiKey:
    """One who asks, and what it has used.

    Args:
        name: in errors; the key itself is shown nowhere.
        requests_per_minute: None for no limit, as the others.
        tokens_per_minute: of prompts and answers.
        concurrent_texts: answers at once.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        concurrent_texts: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name = name
        self._clock = clock
        self._requests, self._tokens = (
            None if limit is None else _Bucket(limit, clock())
            for limit in (requests_per_minute, tokens_per_minute)
        )
        self._max_texts = concurrent_texts
        self._num_texts = 0

    @contextlib.contextmanager
    def running(self, num_texts: int) -> Iterator[None]:
        """Count a request with so many answers while the block runs.

        Raises:
            QueueFull: it is beyond a limit.
        """
        now_s = self._clock()
        if self._max_texts is not None and self._num_texts + num_texts > self._max_texts:
            raise self._full(f"more than {self._max_texts:g} texts at once", _FULL_RETRY_S)
        if self._tokens is not None and (wait_s := self._tokens.wait_s(1, now_s)):
            raise self._full("more tokens per minute", wait_s)
        if self._requests is not None:
            if wait_s := self._requests.wait_s(1, now_s):
                raise self._full("more requests per minute", wait_s)
            self._requests.take(1)
        self._num_texts += num_texts
        try:
            yield
        finally:
            self._num_texts -= num_texts

    def charge(self, num_tokens: int) -> None:
        """Count tokens of a prompt and its answers."""
        if self._tokens is not None:
            self._tokens.take(num_tokens)

    def _full(self, what: str, wait_s: float) -> QueueFull:
        return QueueFull(f"the key {self.name!r} allows no {what}; try again later", wait_s)


class ApiKeys:
    """All keys of a gateway; without any, everybody who reaches it may ask."""

    def __init__(self, keys: Sequence[tuple[str, ApiKey]] = ()):
        self._keys = [(_digest(secret), key) for secret, key in keys]
        self.anybody = ApiKey("")

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, secret: str) -> ApiKey | None:
        """Whose this is. All are compared, each in the same time whatever it is."""
        digest = _digest(secret)
        found = [key for own, key in self._keys if hmac.compare_digest(digest, own)]
        return found[0] if found else None


def read_keys(secrets: Sequence[str], path: str | None) -> ApiKeys:
    """Keys without limits, and those of a YAML file: name -> key and limits.

    Raises:
        ConfigError: the file cannot be read or used.
    """
    keys = [(secret, ApiKey(f"key {number}")) for number, secret in enumerate(secrets, 1)]
    if path is not None:
        try:
            entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            # YAML's own message would quote the file.
            kind = type(error).__name__
            raise ConfigError(f"cannot read --api_key_file {path}: {kind}") from None
        if not isinstance(entries, dict) or not entries:
            raise ConfigError(f"--api_key_file {path} must be a mapping of names to keys")
        keys += [_entry(path, name, entry) for name, entry in entries.items()]
    if len({secret for secret, _ in keys}) < len(keys):
        raise ConfigError("two API keys are the same")
    if len({key.name for _, key in keys}) < len(keys):
        raise ConfigError(f"--api_key_file {path}: names like 'key 1' are those of --api_key")
    return ApiKeys(keys)


def _entry(path: str, name: object, entry: object) -> tuple[str, ApiKey]:
    place = f"--api_key_file {path}: {name}"
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {"key": entry}
    unknown = sorted(set(map(str, fields)) - {"key", *_LIMITS})
    if unknown:
        raise ConfigError(f"{place}: no such setting: {', '.join(unknown)}; there are key, "
                          f"{', '.join(_LIMITS)}")  # fmt: skip
    secret = fields.get("key")
    if (
        not isinstance(secret, str)
        or not secret.isascii()
        or secret.strip() != secret
        or not secret
    ):
        raise ConfigError(f"{place}: key must be printable ASCII without spaces around it")
    limits = {limit: fields[limit] for limit in _LIMITS if fields.get(limit) is not None}
    for limit, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
            raise ConfigError(f"{place}: {limit} must be a number of at least 1")
    return secret, ApiKey(str(name), **limits)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
