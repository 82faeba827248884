"""Programs at a pseudo-terminal, for tests that press keys."""

from __future__ import annotations

import os
import pty
import select
import sys
import threading
import time

import psutil
from commands import ENVIRONMENT

CTRL_C = b"\x03"
CTRL_D = b"\x04"


class Terminal:
    """A pseudo-terminal with one program in its foreground, as a shell would start it."""

    def __init__(self, *arguments: str):
        self.output = ""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, "-W", "ignore", *arguments], ENVIRONMENT)
        os.set_inheritable(self.master, False)  # another terminal would keep this one's window
        self.process = psutil.Process(self.pid)
        self.family: set[psutil.Process] = set()
        self._code: int | None = None
        self._closed = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._closed.is_set():
            # A read that waits would keep the window open after it is closed.
            if not select.select([self.master], [], [], 0.05)[0]:
                continue
            try:
                piece = os.read(self.master, 4096)
            except OSError:  # how a terminal says that nobody has it open any more
                return
            self.output += piece.decode(errors="replace")

    def press(self, keys: bytes) -> None:
        """Type, after noting who is there, so that `end` can say who is left."""
        self.note_family()
        os.write(self.master, keys)

    def note_family(self) -> None:
        self.family |= {self.process, *self.process.children(recursive=True)}

    def close_window(self) -> None:
        self.note_family()
        self._closed.set()
        self._reader.join()
        os.close(self.master)

    def wait_for(self, words: str) -> None:
        while words not in self.output:
            assert self.process.status() != psutil.STATUS_ZOMBIE, self.output
            time.sleep(0.02)

    def wait_for_daemon(self) -> None:
        while not any(child.name() == "p2pd" for child in self.process.children()):
            assert self.process.status() != psutil.STATUS_ZOMBIE, self.output
            time.sleep(0.02)

    def end(self) -> int:
        """The exit code, once nothing of it is left."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        _, left = psutil.wait_procs(self.family, timeout=15)
        assert not left
        return self._code

    def destroy(self) -> None:
        """Whatever state it is in."""
        if self._code is None:
            self.note_family()
            for process in self.family:
                if process.is_running():
                    process.kill()
            os.waitpid(self.pid, 0)
