"""`python -m planetserve.simulation`."""

from planetserve import cli
from planetserve.simulation.command import PROG, main

if __name__ == "__main__":
    cli.run(PROG, main)
