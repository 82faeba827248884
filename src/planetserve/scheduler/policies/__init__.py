"""Scheduling policies by name; third cohorts add theirs under `planetserve.scheduling_policies`."""

from __future__ import annotations

from planetserve.registry import Registry
from planetserve.scheduler.policies.base import Candidate, Grant, SchedulingPolicy

POLICIES: Registry[SchedulingPolicy] = Registry(
    "scheduling policy",
    "scheduling_policies",
    {
        "deficit_round_robin": (
            "planetserve.scheduler.policies.deficit_round_robin:DeficitRoundRobin"
        ),
        "fcfs": "planetserve.scheduler.policies.fcfs:Fcfs",
    },
)

__all__ = ["POLICIES", "Candidate", "Grant", "SchedulingPolicy"]
