"""What settings of several roles may be: choices and ranges."""

from __future__ import annotations

import re

from planetserve.errors import ConfigError
from planetserve.types import DTYPE_NAMES

TORCH_DTYPES = ("auto", *DTYPE_NAMES)
LOG_LEVELS = ("debug", "info", "warning", "error")


def require_positive(config: object, *names: str) -> None:
    """Refuse a configuration in which one of the named settings is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name}={getattr(config, name)} must be greater than 0")


def require_not_negative(config: object, *names: str) -> None:
    """Refuse a configuration in which one of the named settings is below 0."""
    for name in names:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name}={getattr(config, name)} must not be negative")


def check_prefix(prefix: str | None) -> None:
    """Refuse a directory prefix that peers would not accept."""
    if prefix is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", prefix):
        raise ConfigError(
            f"dht_prefix={prefix!r} may hold letters, digits, '-' and '_' only, at most 128"
        )
