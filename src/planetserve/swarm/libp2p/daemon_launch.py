"""Launching p2pd in hivemind's place: in a session of its own, its sockets in a private folder.

No signal of a terminal reaches a process of another session: neither Ctrl-C, after which this one
drains or goes on, nor Ctrl-Z, nor the end of the window.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Callable, Coroutine
from importlib.resources import files
from pathlib import Path
from typing import Any

from hivemind import hivemind_cli
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon import P2PD_FILENAME
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.p2p.p2p_daemon_bindings.p2pclient import Client
from hivemind.utils.logging import loglevel, python_level_to_golog
from hivemind.utils.multiaddr import Multiaddr
from typing_extensions import override

from planetserve.swarm import multiaddr
from planetserve.swarm.node_config import NodeConfig

_IDLE_TIMEOUT_S = 10
"""Seconds after which a daemon without a connection ends: its parent died while it started."""
_CORES_PER_DAEMON_THREAD = 4


class ContainedP2P(P2P):
    """hivemind's handle on a daemon that `launch` starts.

    Args:
        folder: where its sockets are.
        listen: takes the streams that the daemon hands over, in place of hivemind's method.
    """

    def __init__(self, folder: Path, listen: Callable[[P2P], Coroutine[Any, Any, None]]):
        super().__init__()
        self._daemon_listen_maddr = Multiaddr(f"/unix{folder}/p2pd.sock")
        self._client_listen_maddr = Multiaddr(f"/unix{folder}/client.sock")
        self._listen = listen
        self._owner = os.getpid()

    @override
    def _terminate(self) -> None:
        # hivemind's handle ends the daemon when it is thrown away, in a forked child as well.
        if os.getpid() == self._owner:
            super()._terminate()

    @override
    def _start_listening(self) -> None:
        self._listen_task = asyncio.create_task(self._listen(self))

    async def launch(self, config: NodeConfig, key_file: Path) -> None:
        """Start the daemon and connect to it, as `P2P.create` does.

        Raises:
            P2PDaemonError: it ended; with the last line that it printed.
            OSError: it cannot be run.
        """
        self._child = await asyncio.create_subprocess_exec(
            *self._command(config, key_file),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
        self._alive = True
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader_task = asyncio.create_task(self._read_outputs(ready))
        await ready
        self._client = await Client.create(
            control_maddr=self._daemon_listen_maddr,
            listen_maddr=self._client_listen_maddr,
            persistent_conn_max_msg_size=DEFAULT_MAX_MSG_SIZE,
        )
        await self._ping_daemon()

    def _command(self, config: NodeConfig, key_file: Path) -> list[str]:
        is_local = all(map(_is_loopback, config.listens_on))
        lists = {
            "hostAddrs": config.listens_on,
            "announceAddrs": config.announced,
            "trustedRelays": config.initial_peers if config.use_relay else (),
        }
        command: list[str] = self._make_process_args(
            files(hivemind_cli) / P2PD_FILENAME,
            autoRelay=config.use_relay and bool(config.initial_peers),
            autonat=config.use_relay,
            connManager=True,
            id=key_file,
            idleTimeout=f"{_IDLE_TIMEOUT_S}s",
            listen=self._daemon_listen_maddr,
            natPortMap=not (config.client_mode or config.announced or is_local),
            persistentConnMaxMsgSize=DEFAULT_MAX_MSG_SIZE,
            relay=config.use_relay,
            relayService=config.use_relay,
            tls=True,
            **{"dhtClient" if config.client_mode else "dhtServer": True},
            **({"noListenAddrs": True} if config.client_mode else {}),
            **{name: ",".join(places) for name, places in lists.items() if places},
        )
        return command


def _environment() -> dict[str, str]:
    """The daemon's environment variables, which leave cores to the model.

    Go would spread its work over all of them. On two cores frames take about as long with one
    (`benchmarks/daemon_threads.py`).
    """
    cores = max(1, (os.cpu_count() or 1) // _CORES_PER_DAEMON_THREAD)
    defaults = {
        "GOMAXPROCS": str(cores),
        "GOLOG_LOG_LEVEL": python_level_to_golog(loglevel),
    }
    return {**defaults, **os.environ, "GOLOG_LOG_FMT": "json"}


def _is_loopback(text: str) -> bool:
    return ipaddress.ip_address(multiaddr.parse(text).host).is_loopback
