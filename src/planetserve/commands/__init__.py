"""Commands that look at a swarm, at this machine, or write text with a swarm.

One module per command; `swarm_reading.py`, `machine_checks.py` and `writing.py` do their work.
"""
