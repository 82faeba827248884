"""The network: libp2p node, signed directory, frame streams. The only package that uses hivemind.

Importing it installs limits around hivemind's decoders (`dht/hivemind_limits.py`) before any byte
from another machine can be read, and takes about two seconds, most of it torch. hivemind's training
half stays unread (`dht/lean_hivemind.py`), and its log messages go where this process's own go.
"""

# ruff: noqa: E402 - what comes first decides what hivemind loads
from planetserve.swarm.dht import lean_hivemind

lean_hivemind.install()

from hivemind.utils.logging import use_hivemind_log_handler

from planetserve.swarm.dht import hivemind_limits

hivemind_limits.install()
use_hivemind_log_handler("nowhere")
