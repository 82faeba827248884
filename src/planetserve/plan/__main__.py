"""`python -m planetserve.plan`."""

from planetserve import cli
from planetserve.plan.command import PROG, main

if __name__ == "__main__":
    cli.run(PROG, main)
