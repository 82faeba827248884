"""Explains why there is no chain, in an error that says what to change.

Looks for the reason in the settings first, then in the revision and in the name of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planetserve.client.planning.chain_planner import ChainPlanner, spans_text
from planetserve.client.planning.compatibility import obstacle
from planetserve.client.planning.server_discovery import ServerDiscovery
from planetserve.errors import MissingBlocksError, ModelMismatchError, NoChainAvailable
from planetserve.types import ServerInfo

_MAX_ASKED = 8
_MAX_NAMED = 3
_MAX_ADDRESS = 100
"""Maximum characters of an address in a message."""

_MAX_SHOWN = 5


async def explain(
    failure: NoChainAvailable, view: ServerDiscovery, planner: ChainPlanner
) -> NoChainAvailable:
    """The error to raise instead of `failure`, with which a plan ended in spite of waiting.

    Raises:
        TransportError: the directory does not answer.
    """
    if not isinstance(failure, MissingBlocksError):
        return failure
    missing, name = failure.missing, view.facts.name
    reasons = _excluding_settings(missing, view, planner)
    if reasons:
        return MissingBlocksError(
            f"{spans_text(missing)} of {name} have no live server that this client may "
            f"use: servers that hold them are ruled out by {' and by '.join(reasons)}; change the "
            "setting, or start a server that it allows",
            missing,
        )
    holders = [info for info in view.servers.values() if _overlaps(info, missing)]
    if holders:
        return MissingBlocksError(await _why_unusable(holders, missing, view), missing)
    incompatible = [info for info in view.incompatible if _overlaps(info, missing)]
    if incompatible:
        return MissingBlocksError(
            f"{spans_text(missing)} of {name} are held only by servers that this client cannot "
            f"talk with ({len(incompatible)} of them): …{incompatible[0].peer_id[-6:]} "
            f"{obstacle(incompatible[0])}; install the same version of planetserve here and there",
            missing,
        )
    if view.strangers:
        return other_revision(missing, view)
    if not view.servers:
        others = await view.other_models()
        if others:
            return ModelMismatchError(
                f"no server of {name} ({view.prefix}) in this swarm, which serves "
                f"{_shortened(others)}; load one of these or start servers of yours",
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


async def _why_unusable(
    holders: Sequence[ServerInfo], missing: Sequence[tuple[int, int]], view: ServerDiscovery
) -> str:
    """A message about servers that hold the blocks and are banned after failures."""
    asked = holders[:_MAX_ASKED]
    silent = set(await view.silent([info.peer_id for info in asked]))
    unreachable = [info for info in asked if info.peer_id in silent]
    blocks = f"{spans_text(missing)} of {view.facts.name}"
    if not unreachable:
        return (
            f"{blocks} have servers ({len(holders)} of them) that answer but have just failed or "
            "refused; try again, or start another"
        )
    named = "; ".join(_named_with_addresses(info) for info in unreachable[:_MAX_NAMED])
    more = f" and {len(holders) - _MAX_NAMED} more" if len(holders) > _MAX_NAMED else ""
    return (
        f"{blocks} are held by servers that cannot be reached: {named}{more}; if they run, check "
        "their --public_ip or --announce_maddrs and that their port is forwarded"
    )


def _named_with_addresses(info: ServerInfo) -> str:
    """Peer id and announced addresses of a server."""
    told = [text.partition("/p2p/")[0][:_MAX_ADDRESS] for text in info.addresses[:2]]
    shown = [text for text in told if text.isascii() and text.isprintable()]
    return f"{info.peer_id} at {' or '.join(shown) or 'no address'}"


def other_revision(missing: Sequence[tuple[int, int]], view: ServerDiscovery) -> ModelMismatchError:
    """The error for blocks that only servers of another revision hold."""
    named, mine = {info.fingerprint for info in view.strangers.values()}, view.facts.fingerprint
    if named == {mine}:
        # The name is a sample of the files; their manifest is not.
        named, mine = {info.manifest for info in view.strangers.values()}, view.weights.manifest
    theirs = sorted(name[:12] for name in named)
    return ModelMismatchError(
        f"{spans_text(missing)} of {view.facts.name} are served only in another revision "
        f"({_shortened(theirs)}; yours is {mine[:12]}); load the same files "
        "or --revision as the servers",
        missing,
    )


def _excluding_settings(
    missing: Sequence[tuple[int, int]], view: ServerDiscovery, planner: ChainPlanner
) -> list[str]:
    """The settings that exclude servers of the missing blocks."""
    excluded = [info for info in view.excluded if _overlaps(info, missing)]
    barred = planner.barred(missing, view.servers.values())
    reasons = []
    if excluded:
        names = ("allowed_servers", "blocked_servers")
        given = [name for name in names if getattr(view.config, name) is not None]
        reasons.append(f"{' and '.join(given)} ({len(excluded)} of them)")
    if barred:
        reasons.append(f"trusted_servers ({len(barred)} of them)")
    return reasons


def _shortened(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are."""
    shown = list(names[:_MAX_SHOWN])
    if len(names) > len(shown):
        shown.append(f"{len(names) - len(shown)} more")
    return ", ".join(shown)


def _overlaps(info: ServerInfo, blocks: Iterable[tuple[int, int]]) -> bool:
    return any(start < info.span.end and info.span.start < end for start, end in blocks)
