"""The network: libp2p node, signed directory, frame streams. The only package that uses hivemind.

Importing it installs the guards around hivemind's decoders (`guards.py`) before any byte from
another machine can be read, and takes about two seconds, most of it torch. hivemind's log messages
go where this process's own go.
"""

from hivemind.utils.logging import use_hivemind_log_handler

from planetserve.swarm import guards

guards.install()
use_hivemind_log_handler("nowhere")
