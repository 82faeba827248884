"""A swarm in simulated time: what chain optimizers do to many users at once, without machines.

Servers batch and queue like the engine does, links have a round-trip time and a rate, machines come
and go, and clients plan on what was announced a while ago, with the optimizer objects and the cost
function of the real client. One token through one server is two events, so that what a batch waits
for, and what waits for a batch, is never averaged away.

A run is a pure function of scenario, policy and seed. Needs simpy, the extra `simulation`.

Read in this order: `scenario.py`, `world.py`, `ring.py`, `server.py`, `client.py`, `session.py`,
`turnover.py`, `run.py`, `summary.py`; `command.py` is `planetserve simulate`.
"""

from planetserve.simulation.command import main, parse

__all__ = ["main", "parse"]
