"""Why there is no chain, in words that a person can act on.

Looks for the reason in the settings first, then in the revision and in the name of the model. An
error that comes from here names what to change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planetserve.client.planning import ChainPlanner, spans_text
from planetserve.client.swarm_view import SwarmView
from planetserve.errors import MissingBlocksError, ModelMismatchError, NoChainAvailable
from planetserve.types import ServerInfo


async def explain(
    failure: NoChainAvailable, view: SwarmView, planner: ChainPlanner
) -> NoChainAvailable:
    """What to raise instead of `failure`, which a plan ended with and waiting has not helped.

    Raises:
        TransportError: the directory does not say what else there is.
    """
    if not isinstance(failure, MissingBlocksError):
        return failure
    missing, name = failure.missing, view.facts.name
    reasons = _ruled_out_by(missing, view, planner)
    if reasons:
        return MissingBlocksError(
            f"{spans_text(missing)} of {name} have no live server that this client may "
            f"use: servers that hold them are ruled out by {' and by '.join(reasons)}; change the "
            "setting, or start a server that it allows",
            missing,
        )
    if view.strangers:
        return other_revision(missing, view)
    if not view.servers:
        others = await view.other_models()
        if others:
            return ModelMismatchError(
                f"no server of {name} ({view.prefix}) in this swarm, which serves "
                f"{', '.join(others)}; load one of these or start servers of yours",
                missing,
            )
    peers = ", ".join(view.config.initial_peers) or "none given"
    return MissingBlocksError(
        f"no live server holds {spans_text(missing)} of {name} after "
        f"waiting {view.config.wait_for_blocks_timeout:g} s; start one with `python -m "
        f"planetserve.run_server {name} --block_indices "
        f"{missing[0][0]}:{missing[0][1]} --initial_peers ...` "
        f"(joined through: {peers})",
        missing,
    )


def other_revision(missing: Sequence[tuple[int, int]], view: SwarmView) -> ModelMismatchError:
    """The error for blocks that only servers with other files of the model hold."""
    theirs = sorted({info.fingerprint[:12] for info in view.strangers.values()})
    return ModelMismatchError(
        f"{spans_text(missing)} of {view.facts.name} are served only in another revision "
        f"({', '.join(theirs)}; yours is {view.facts.fingerprint[:12]}); load the same files "
        "or --revision as the servers",
        missing,
    )


def _ruled_out_by(
    missing: Sequence[tuple[int, int]], view: SwarmView, planner: ChainPlanner
) -> list[str]:
    """The settings that keep the client from servers of the missing blocks."""
    excluded = [info for info in view.excluded if _holds_some(info, missing)]
    barred = planner.barred(missing, view.servers.values())
    reasons = []
    if excluded:
        names = ("allowed_servers", "blocked_servers")
        given = [name for name in names if getattr(view.config, name) is not None]
        reasons.append(f"{' and '.join(given)} ({len(excluded)} of them)")
    if barred:
        reasons.append(f"trusted_servers ({len(barred)} of them)")
    return reasons


def _holds_some(info: ServerInfo, blocks: Iterable[tuple[int, int]]) -> bool:
    return any(start < info.span.end and info.span.start < end for start, end in blocks)
