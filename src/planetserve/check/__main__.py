"""`python -m planetserve.check`."""

from planetserve import cli
from planetserve.check.command import PROG, main

if __name__ == "__main__":
    cli.run(PROG, main)
