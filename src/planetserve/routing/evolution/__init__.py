"""The parts of the evolutionary search: objectives, operators, first population, pymoo's loop.

An individual is a host per block, as an index into the problem's servers. Every gene is legal for
its own block whatever the others are, so cutting two parents at a block and joining them gives a
chain. Only `loop.py` knows pymoo, which is optional: import this package where it is used. Others
import `evolve` from here, and nothing from the files inside.
"""

from planetserve.routing.evolution.loop import Settings, evolve

__all__ = ["Settings", "evolve"]
