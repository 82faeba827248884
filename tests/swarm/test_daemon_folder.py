"""The folder of a node's sockets lies where every local user can put something beside it."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from planetserve.errors import ConfigError
from planetserve.swarm.libp2p.daemon import _make_folder
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode


@pytest.fixture
def left(tmp_path: Path) -> Iterator[Path]:
    """A folder as a process leaves it that was killed, so far without a lock."""
    folder = tmp_path / "planetserve-0-x"
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def make_another(left: Path) -> None:
    folder, lock = _make_folder(left.parent)
    lock.close()
    assert folder.is_dir()


def test_what_a_dead_process_left_is_removed(left: Path) -> None:
    (left / "lock").touch()
    make_another(left)
    assert not left.exists()


def test_a_pipe_in_the_place_of_a_lock_is_left_alone(left: Path) -> None:
    os.mkfifo(left / "lock")
    # With this end open, whoever opens the other one does not wait, and the test cannot hang.
    ours = os.open(left / "lock", os.O_RDWR)
    make_another(left)
    os.close(ours)
    assert left.exists()


def test_a_link_in_the_place_of_a_lock_is_left_alone(left: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (left / "lock").symlink_to(tmp_path / "file")
    make_another(left)
    assert left.exists()


def test_a_folder_too_deep_to_remove_is_no_reason_not_to_start(left: Path) -> None:
    (left / "lock").touch()
    here = os.open(left, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    make_another(left)


def test_what_is_somebody_elses_is_left_alone(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (left / "lock").touch()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    make_another(left)
    assert left.exists()


def test_no_folder_is_followed_by_its_name(left: Path, tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    link = left.with_name(f"{left.name}-link")
    link.symlink_to(tmp_path)
    make_another(left)
    assert (tmp_path / "lock").exists()


async def test_a_machine_without_a_writable_place_for_it_is_told_of_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_only(**_: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    with pytest.raises(ConfigError, match=r"daemon in /tmp: Read-only file system; make that"):
        await SwarmNode.start(NodeConfig(client_mode=True))
