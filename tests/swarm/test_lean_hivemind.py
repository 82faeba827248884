"""hivemind's training half stays unread until it is asked for; each case in its own process."""

from __future__ import annotations

import subprocess
import sys

import pytest

TRAINING = ("averaging", "moe", "optim")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_node_does_not_load_the_training_half() -> None:
    code = "import sys, planetserve.swarm.libp2p.node, planetserve.swarm.directory"
    print_loaded = f"print(*[n for n in {TRAINING} if f'hivemind.{{n}}' in sys.modules])"
    assert run(f"{code}; {print_loaded}") == ""


@pytest.mark.parametrize("order", ["hivemind, planetserve.swarm", "planetserve.swarm, hivemind"])
def test_hivemind_itself_works_as_ever(order: str) -> None:
    ours = "from planetserve.swarm.libp2p.node import DHTNode"
    code = f"import {order}; {ours}; from hivemind import DHT"
    shown = "print(hivemind.dht.DHTNode is DHTNode, DHT is hivemind.DHT, hivemind.__version__)"
    words = run(f"{code}; {shown}").split()
    assert words[:2] == ["True", "True"]
    assert words[2].startswith("1.")


def test_a_name_that_hivemind_lacks_is_refused() -> None:
    code = "import planetserve.swarm, hivemind; print(hasattr(hivemind, 'nonesuch'))"
    assert run(code) == "False"


def test_a_server_process_does_not_load_scipy_and_still_can() -> None:
    code = """
import sys
from planetserve import run_server
try:
    run_server.main(["/nonexistent", "--block_indices", "0:1", "--new_swarm"])
except Exception as error:
    print(type(error).__name__)
print("planetserve.server.server" in sys.modules, "scipy" in sys.modules)
import scipy
"""
    assert run(code).splitlines()[-1] == "True False"
