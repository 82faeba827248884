"""What a forked child lets go of: the node's sockets and daemon belong to its parent alone.

A child gets copies of all open files. While it holds them, a stream that its parent has closed
stays open, and the daemon outlives a parent that was killed; and what the child's copy of a
selector does, when it is thrown away say, happens to the list of files that the parent waits for.
So the first thing in a child is to put /dev/null in the place of all of them.
"""

from __future__ import annotations

import contextlib
import os
import selectors
from typing import Protocol
from weakref import WeakSet


class _OpenFile(Protocol):
    def fileno(self) -> int: ...


_files: WeakSet[_OpenFile] = WeakSet()
_selectors: WeakSet[selectors.BaseSelector] = WeakSet()


def keep_from_children(file: _OpenFile) -> None:
    """Let no process that is forked from this one hold `file` open."""
    _files.add(file)


def own_selector() -> selectors.BaseSelector:
    """A selector that no forked process holds open, nor the files that it watches."""
    selector = selectors.DefaultSelector()
    _selectors.add(selector)
    if hasattr(selector, "fileno"):  # not where it is only a call, as poll() is
        _files.add(selector)
    return selector


def _let_go() -> None:
    numbers = []
    for file in _files:
        with contextlib.suppress(OSError, ValueError):  # closed
            numbers.append(file.fileno())
    for selector in _selectors:
        with contextlib.suppress(RuntimeError, AttributeError):  # closed
            numbers += [key.fd for key in selector.get_map().values()]
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in numbers:
        if number >= 0:
            os.dup2(nowhere, number)
    os.close(nowhere)


os.register_at_fork(after_in_child=_let_go)
