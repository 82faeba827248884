"""What `doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "fault"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        verdict: whether it is a fault, which keeps something from working, or a warning.
        detail: what was found.
        advice: what to do; empty if nothing.
    """

    check: str
    verdict: Verdict
    detail: str
    advice: str = ""
