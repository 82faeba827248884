"""What a distributed model owns besides torch modules: its event loop, swarm node and sessions."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict

from planetserve.client.event_loop_thread import EventLoopThread
from planetserve.client.hf.active_session import ActiveSession
from planetserve.client.hf.local_blocks import LocalEnds
from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.planning.chain_planner import ModelFacts
from planetserve.client.session import InferenceSession
from planetserve.config import ClientConfig
from planetserve.errors import SessionClosed
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.swarm.network import Network
from planetserve.types import Chain

_MAX_KEPT = 32
"""Maximum sessions that hold memory of servers only because the caller keeps their cache."""


class ClientRuntime:
    """Joins the swarm when constructed; `close()` releases thread, process and sockets.

    Args:
        config: the client's settings.
        facts: facts about the model.
        local: the blocks that the client runs itself (`config.local_blocks`).

    Raises:
        PlanetServeError: the swarm cannot be joined.
    """

    def __init__(self, config: ClientConfig, facts: ModelFacts, local: LocalEnds | None = None):
        self.config = config
        self._local = local
        self.active = ActiveSession()
        """The session that `generate()` continues."""
        self._manager = ChainManager(config, facts)
        self._sessions: weakref.WeakSet[InferenceSession] = weakref.WeakSet()
        self._kept: OrderedDict[weakref.ref[InferenceSession], None] = OrderedDict()
        self._latest: weakref.ref[InferenceSession] | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._loop_thread = EventLoopThread()
        try:
            self._loop_thread.call(self._manager.start())
        except BaseException:
            self._loop_thread.close()
            raise

    def check_process(self) -> None:
        """Refuse to work in a forked child, before a tensor is touched there.

        Raises:
            ConfigError: this is one.
        """
        self._loop_thread.check_process()

    def new_session(
        self, *, max_length: int | None = None, lease_tokens: int | None = None
    ) -> InferenceSession:
        """A session that opens its chain at its first step."""
        if self._closed:
            raise SessionClosed("the model has been closed; load it again to use it")
        session = InferenceSession(
            self._manager,
            self._loop_thread,
            max_length=max_length,
            lease_tokens=lease_tokens,
            local=self._local,
        )
        with self._lock:
            self._sessions.add(session)
            self._latest = weakref.ref(session)
        return session

    def owns(self, session: InferenceSession) -> bool:
        """Whether this runtime made the session."""
        with self._lock:
            return session in self._sessions

    def keep(self, session: InferenceSession) -> None:
        """Mark a session whose cache the caller keeps as used now. Servers hold the latest few; the
        other sessions send their rows again when they are used."""
        reference = weakref.ref(session)
        with self._lock:
            self._kept.pop(reference, None)
            self._kept[reference] = None
            while len(self._kept) > _MAX_KEPT:
                oldest = self._kept.popitem(last=False)[0]()
                if oldest is not None and not oldest.closed:
                    oldest.park()

    def longest_session(self, num_rows: int, least: int) -> int | None:
        """Tokens per row for which servers have room now; `least` if they have less but accept
        sessions of that length. None if no server holds the model."""

        async def longest() -> int | None:
            return self._manager.longest_session(num_rows, least)

        return self._loop_thread.call(longest())

    @property
    def node(self) -> Network:
        """The client's swarm node."""
        return self._manager.view.node

    def current_chain(self) -> Chain:
        """The last chain of the latest session, or else the chain that a session would get now."""
        latest = self._latest() if self._latest else None
        chain = latest.chain if latest else None
        return chain or self._manager.last_chain or self._loop_thread.call(self._manager.plan(1, 1))

    def snapshot(self) -> SwarmSnapshot:
        """The snapshot on which a session's chain would be planned now."""

        async def snapshot() -> SwarmSnapshot:
            return self._manager.snapshot()

        return self._loop_thread.call(snapshot())

    def close(self) -> None:
        """Close every session and leave the swarm. Idempotent; nothing in a forked child."""
        if self._loop_thread.in_child:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            sessions = list(self._sessions)
        try:
            self._loop_thread.call(self._close(sessions))
        finally:
            self._loop_thread.close()

    async def _close(self, sessions: list[InferenceSession]) -> None:
        try:
            for session in sessions:
                await session.release()
        finally:
            await self._manager.close()
