"""`planetserve plan`: which chain of servers a request would get, before any model is loaded.

Plans on a snapshot file or on a live swarm, with any optimiser, and shows the chains as text, as
JSON or as a picture. `command.py` has the flags and the order of things, `live.py` joins a swarm,
`solving.py` runs the optimiser, `report.py` and `plot.py` show what came out.
"""

from planetserve.plan.command import main, parse

__all__ = ["main", "parse"]
