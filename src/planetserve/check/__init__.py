"""`planetserve check`: whether a checkpoint can be served, found out by trying it on this machine.

`command.py` has the flags and the order of things, `slices.py` says which layers there are and
takes the first few of a large model, `chain.py` runs a model cut into parts, `comparison.py`
compares it with the model in one piece, `trial.py` puts the answers together, and `report.py` shows
them. No network but the hub's is used.
"""

from planetserve.check.command import main, parse

__all__ = ["main", "parse"]
