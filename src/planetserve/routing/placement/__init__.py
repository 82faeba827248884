"""Block placement strategies by name; see `base.py` for what one must do."""

from __future__ import annotations

from planetserve.registry import Registry
from planetserve.routing.placement.base import Placement

PLACEMENTS: Registry[Placement] = Registry(
    "placement",
    "placements",
    {
        "balance": "planetserve.routing.placement.balance:Balance",
        "fixed": "planetserve.routing.placement.fixed:Fixed",
    },
)

__all__ = ["PLACEMENTS", "Placement"]
