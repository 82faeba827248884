"""The faults, by name: what is done to the host that is hit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping

import tampering
from fault_swarm import FaultSwarm, Host, Strike
from faulty_link import BOTH, FAIR, IN, OUT

from planetserve.testing.proxy import Link

FLAP_S = 1.0
CUT = Link(holds=BOTH)
SLOW = Link(bytes_per_s=4_000)
FAR = Link(delay_s=0.05)


def killed(swarm: FaultSwarm, host: Host) -> None:
    host.signal(signal.SIGKILL)


def stopped(swarm: FaultSwarm, host: Host) -> None:
    host.signal(signal.SIGSTOP)


def paused(swarm: FaultSwarm, host: Host) -> None:
    """Stopped and continued, too late to be waited for and early enough to interfere."""
    host.signal(signal.SIGSTOP)
    swarm.later(2.0, lambda: host.signal(signal.SIGCONT))


def drained(swarm: FaultSwarm, host: Host) -> None:
    """What SIGTERM does."""
    swarm.spawn(host.server.close(drain_timeout_s=20.0))


def cut_off(swarm: FaultSwarm, host: Host) -> None:
    """Nobody reaches it and it reaches nobody."""
    swarm.set_link(host, CUT)


def cut_from_client(swarm: FaultSwarm, host: Host) -> None:
    """In the middle of the chain nothing is on that link while all goes well."""
    if host.link is not None:
        host.link.set(CUT, dialler=swarm.client_pid)


def cut_from_next(swarm: FaultSwarm, host: Host) -> None:
    """The hop after it; the last hop is cut from the one before."""

    def cut() -> None:
        following = swarm.runs.get(host.server.span.end)
        others = [other for other in swarm.runs.values() if other is not host]
        if others:
            swarm.cut_between(host, following or others[-1])
        else:  # nothing has got that far
            swarm.later(0.01, cut)

    cut()


def hears_nobody(swarm: FaultSwarm, host: Host) -> None:
    swarm.set_link(host, Link(holds=IN))


def is_not_heard(swarm: FaultSwarm, host: Host) -> None:
    swarm.set_link(host, Link(holds=OUT))


def flapping(swarm: FaultSwarm, host: Host) -> None:
    def flap(link: Link) -> None:
        swarm.set_link(host, link)
        swarm.later(FLAP_S, lambda: flap(FAIR if link is CUT else CUT))

    flap(CUT)


def slow_link(swarm: FaultSwarm, host: Host) -> None:
    swarm.set_link(host, SLOW)


def far_away(swarm: FaultSwarm, host: Host) -> None:
    swarm.set_link(host, FAR)


def corrupted_link(swarm: FaultSwarm, host: Host) -> None:
    swarm.set_link(host, Link(corrupts=OUT))


def reset_link(swarm: FaultSwarm, host: Host) -> None:
    swarm.spawn(swarm.reset_connections(host))


def hung_engine(swarm: FaultSwarm, host: Host) -> None:
    """The machine answers pings and computes nothing any more."""
    go_on = threading.Event()
    swarm.on_restore(go_on.set)
    host.server.engine._worker.post(lambda: go_on.wait(60.0) and None)


def sends(change: tampering.Change) -> Strike:
    """The next STEP frame that the host sends is another."""
    return lambda swarm, host: swarm.tampering.arm(host.server.node, change)


def computes(spoil: tampering.Spoil) -> Strike:
    """The next step that the host computes comes out wrong."""
    return lambda swarm, host: tampering.compute_wrongly(host.server.engine, spoil)


LOUD: Mapping[str, Strike] = {
    # Somebody notices at once and says so.
    "F1 killed": killed,
    "F8 corrupted link": corrupted_link,
    "F8 flipped bit": sends(tampering.flipped),
    "F8 reset link": reset_link,
    "F9 repeated frame": sends(tampering.repeated),
    "F9 stale frame": sends(tampering.stale),
    "F9 truncated frame": sends(tampering.truncated),
    "F14 NaN": computes(tampering.with_nan),
    "F14 infinity": computes(tampering.with_infinity),
    "F14 wrong shape": computes(tampering.too_wide),
    "F14 failing pass": computes(tampering.failing),
}
QUIET: Mapping[str, Strike] = {
    # Nothing tells of them but that nothing comes any more.
    "F3 stopped": stopped,
    "F3 paused": paused,
    "F4 cut off": cut_off,
    "F5 cut from next hop": cut_from_next,
    "F6 hears nobody": hears_nobody,
    "F6 is not heard": is_not_heard,
    "F7 hung engine": hung_engine,
    "F9 lost frame": sends(tampering.lost),
    "F9 frame of a later epoch": sends(tampering.of_a_later_epoch),
}
HARMLESS: Mapping[str, Strike] = {
    "F3 drained": drained,
    "F4 cut from client": cut_from_client,
    "F6 flapping": flapping,
    "F7 slow link": slow_link,
    "F7 far away": far_away,
}
"""A client may stay with the host, or be done before it notices."""
PREFILL_ONLY: Mapping[str, Strike] = {"F9 swapped frames": sends(tampering.swapped)}
"""A decode step is one frame, which nothing can overtake."""

FAULTS: Mapping[str, Strike] = {**LOUD, **QUIET, **HARMLESS, **PREFILL_ONLY}
