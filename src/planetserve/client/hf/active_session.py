"""Finds the session that a call continues: the session of the `with` block around it.

Tasks of asyncio inherit the block by themselves. A new thread does not, so from the first block on
`Thread.start` records the blocks around it: a thread started inside a block, as for a streamer,
continues the session as well. Worker threads of a pool do not; they serve any caller.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import weakref
from collections.abc import Iterable, Iterator

from planetserve.client.session import InferenceSession
from planetserve.errors import SessionClosed

Entry = tuple["ActiveSession", InferenceSession | None]
Token = contextvars.Token[tuple[Entry, ...]]
_Reference = tuple["weakref.ref[ActiveSession]", "weakref.ref[InferenceSession] | None"]

_entered: contextvars.ContextVar[tuple[Entry, ...]] = contextvars.ContextVar(
    "planetserve_sessions", default=()
)
"""The blocks around this call, innermost last."""
_inherited: weakref.WeakKeyDictionary[threading.Thread, tuple[_Reference, ...]] = (
    weakref.WeakKeyDictionary()
)
"""Thread -> the blocks in which it was started."""
_POOLS = ("concurrent.futures.", "multiprocessing.")


class ActiveSession:
    """The active session of one model; an assistant model inside `generate()` never uses its
    caller's session."""

    def __init__(self) -> None:
        self._num_blocks = 0
        self._is_told = False
        self._lock = threading.Lock()

    def may_be_missed(self) -> bool:
        """Whether to warn that this thread is outside all blocks while another is inside one. True
        once."""
        if self._is_told or not self._num_blocks or self._find(_entered.get()) is not None:
            return False
        self._is_told = True
        return True

    def get(self) -> InferenceSession | None:
        """The session of the innermost block around this call, if there is one.

        Raises:
            SessionClosed: this thread was started inside a block that has ended.
        """
        own = self._find(_entered.get())
        if own is not None:
            return own[1]
        for owner, session in reversed(_inherited.get(threading.current_thread(), ())):
            if owner() is not self:
                continue
            if session is None:
                return None
            found = session()
            if found is None or found.closed:
                raise SessionClosed(
                    "the inference session in which this thread was started is closed; to "
                    "generate without one, use `with model.use_session(None)`"
                )
            return found
        return None

    def set(self, session: InferenceSession | None) -> Token:
        """Open a block; `reset` takes what this returns."""
        _note_threads()
        with self._lock:
            self._num_blocks += session is not None
        return _entered.set((*_entered.get(), (self, session)))

    def reset(self, token: Token) -> None:
        """End a block."""
        entry = self._find(_entered.get())
        _entered.reset(token)
        with self._lock:
            self._num_blocks -= entry is not None and entry[1] is not None

    def _find(self, entries: Iterable[Entry]) -> Entry | None:
        return next((entry for entry in reversed(tuple(entries)) if entry[0] is self), None)


def _references(entries: Iterable[Entry]) -> Iterator[_Reference]:
    for owner, session in entries:
        yield weakref.ref(owner), None if session is None else weakref.ref(session)


def _note(thread: threading.Thread) -> None:
    """Record the blocks around the start of `thread`."""
    around = _inherited.get(threading.current_thread(), ())
    own = tuple(_references(_entered.get()))
    target = getattr(thread, "_target", None)
    is_pooled = str(getattr(target, "__module__", "")).startswith(_POOLS)
    if (around or own) and not is_pooled:
        _inherited[thread] = around + own


class _ThreadStarts:
    """Wraps `Thread.start`, once per process, to call `_note`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._noted = False

    def __call__(self) -> None:
        with self._lock:
            if self._noted:
                return
            self._noted = True
            plain_start = threading.Thread.start

            @functools.wraps(plain_start)
            def start(thread: threading.Thread) -> None:
                _note(thread)
                plain_start(thread)

            threading.Thread.start = start  # type: ignore[method-assign, assignment]


_note_threads = _ThreadStarts()
