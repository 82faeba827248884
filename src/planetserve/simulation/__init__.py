"""A swarm in simulated time: the effect of chain optimizers on many users at once, without
machines.

Servers batch and queue as the engine does, links have a round-trip time and a rate, machines join
and leave, and clients plan on announcements of some age, with the optimizer objects and the cost
function of the real client. One token through one server is two events, so that all waits of
batches and for batches are simulated and not averaged.

A run is a pure function of scenario, policy and seed. Needs simpy, the extra `simulation`.

Read in this order: `scenario.py`, `world.py`, `ring.py`, `server.py`, `client.py`, `session.py`,
`turnover.py`, `run.py`, `summary.py`; `command.py` is `planetserve simulate`.
"""

from planetserve.simulation.command import main, parse

__all__ = ["main", "parse"]
