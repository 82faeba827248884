"""What a checkpoint's weights are: one hash over all of them, made of one for each block.

Only a tensor's name, stored dtype, shape and stored bytes count, and the configuration without what
tools rewrite. So a hub model, a copied folder, a later commit that changed a text file and another
split into files have the same manifest, and any changed byte of weights another.

Tensors are hashed while they are read for loading. A node that has all files hashes the others
afterwards, piece by piece; one that has not cannot know the manifest by itself. Digests are kept on
disk for each weights file, as long as the file does not change.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from planetserve.errors import ModelError
from planetserve.model.json_files import read_json_object
from planetserve.model.shards import TensorEntry, read_pieces
from planetserve.types import ServerInfo

logger = logging.getLogger(__name__)

DIGEST_BYTES = 32
_LABEL = b"planetserve manifest 1"
_PROGRESS_PERIOD_S = 2.0

ReadManifest = Callable[[threading.Event], "Manifest | None"]


@dataclass(frozen=True)
class Manifest:
    """Digests of a checkpoint's configuration and of the groups of its tensors.

    A group is what `group_of` says: a block, or all that belongs to none.
    """

    config: bytes
    groups: Mapping[str, bytes]

    @property
    def hash(self) -> str:
        """The hash that stands for the whole manifest, in hexadecimal."""
        digest = blake3(_LABEL + self.config)
        for name in sorted(self.groups):
            digest.update(self.groups[name])
        return digest.hexdigest()

    @classmethod
    def of(cls, config: bytes, tensors: Mapping[str, bytes]) -> Manifest:
        """The manifest of a canonical configuration and the digests of all tensors by name."""
        members: dict[str, list[str]] = {}
        for name in sorted(tensors):
            members.setdefault(group_of(name), []).append(name)
        groups = {
            group: blake3(b"".join(tensors[name] for name in names)).digest()
            for group, names in members.items()
        }
        return cls(blake3(config).digest(), groups)


def group_of(tensor: str) -> str:
    """The block that a tensor belongs to, by its name: up to the first number in it.

    `model.layers.7.mlp.experts.3.w1` belongs to `model.layers.7`, `lm_head.weight` to "".
    """
    parts = tensor.split(".")
    for index, part in enumerate(parts):
        if part.isascii() and part.isdigit():
            return ".".join(parts[: index + 1])
    return ""


class TensorHasher:
    """Hashes one tensor as its bytes come."""

    def __init__(self, entry: TensorEntry):
        described = json.dumps([entry.name, entry.dtype_name, list(entry.shape)])
        self._digest = blake3(described.encode() + b"\0")

    def update(self, piece: memoryview) -> None:
        """The next bytes."""
        self._digest.update(piece)

    def finish(self) -> bytes:
        """The tensor's digest."""
        return self._digest.digest()


class TensorDigests:
    """Digests of tensors, by file, kept on disk. Thread-safe.

    Args:
        folder: where they are kept; None keeps them in memory only.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()

    def hasher(self, path: Path, entry: TensorEntry) -> TensorHasher | None:
        """What hashes the tensor while it is read; None if its digest is known."""
        return None if self.known(path, entry.name) else TensorHasher(entry)

    def known(self, path: Path, tensor: str) -> bytes:
        """The digest of a tensor of a file; empty if it is not known."""
        return self._file(path).tensors.get(tensor, b"")

    def put(self, path: Path, tensor: str, digest: bytes) -> None:
        """Take note of a tensor's digest."""
        file = self._file(path)
        with self._lock:
            file.tensors[tensor] = digest
            file.is_saved = False

    def read(
        self, model: str, tensors: Sequence[tuple[Path, TensorEntry]], stop: threading.Event
    ) -> bool:
        """Hash those of the tensors that have not been, piece by piece, and keep what is new.

        Returns:
            Whether all are known; not, once `stop` is set.

        Raises:
            ModelError: a file cannot be read, or ends early.
        """
        missing = [(path, entry) for path, entry in tensors if not self.known(path, entry.name)]
        missing.sort(key=lambda item: (item[0], item[1].start))
        progress = _Progress(model, sum(entry.num_bytes for _, entry in missing))
        try:
            for path, entry in missing:
                hasher = TensorHasher(entry)
                for piece in read_pieces(path, entry):
                    if stop.is_set():
                        return False
                    hasher.update(piece)
                    progress.add(len(piece))
                self.put(path, entry.name, hasher.finish())
        finally:
            self.save()
        return True

    def save(self) -> None:
        """Keep on disk what is new. That it cannot be kept is no error: it is hashed again then."""
        if self._folder is None:
            return
        with self._lock:
            unsaved = [file for file in self._files.values() if not file.is_saved]
            for file in unsaved:
                file.is_saved = True
            written = [(self._kept_in(file), file.to_json()) for file in unsaved]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path, text in written:
                _replace(path, text)
        except OSError as error:
            logger.debug("cannot keep hashes of weights in %s: %s", self._folder, error)

    def _file(self, path: Path) -> _File:
        found = self._files.get(path)
        if found is None:
            found = _File.of(path)
            if self._folder is not None:
                found.load(self._kept_in(found))
            with self._lock:
                found = self._files.setdefault(path, found)
        return found

    def _kept_in(self, file: _File) -> Path:
        name = blake3(file.path.encode()).hexdigest()[:32]
        return (self._folder or Path()) / f"{name}.json"


@dataclass(slots=True)
class _File:
    """A weights file as it was when it was first used, and the digests of its tensors."""

    path: str
    stamp: list[int]
    """Size, time of modification in nanoseconds and inode: a changed file has another."""
    tensors: dict[str, bytes]
    is_saved: bool = True

    @classmethod
    def of(cls, path: Path) -> _File:
        resolved = path.resolve()
        try:
            stat = resolved.stat()
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
        return cls(str(resolved), [stat.st_size, stat.st_mtime_ns, stat.st_ino], {})

    def load(self, kept_in: Path) -> None:
        """Take over what is kept, if it is of the file as it is now."""
        if not kept_in.is_file():
            return
        try:
            kept = read_json_object(kept_in)
            if kept.get("stamp") == self.stamp and isinstance(kept.get("tensors"), dict):
                self.tensors = {name: _from_hex(text) for name, text in kept["tensors"].items()}
        except (ModelError, ValueError):
            logger.debug("%s is damaged; its hashes are made again", kept_in)

    def to_json(self) -> str:
        tensors = {name: digest.hex() for name, digest in self.tensors.items()}
        return json.dumps({"path": self.path, "stamp": self.stamp, "tensors": tensors})


class OwnWeights:
    """Which weights this node has: by name from the start, by manifest once that is known.

    Args:
        fingerprint: names the weights.
        read: as `Checkpoint.manifest`; None if there are no files.
    """

    def __init__(self, fingerprint: str, read: ReadManifest | None):
        self.fingerprint = fingerprint
        self.manifest = ""
        """The manifest's hash; empty until it is known."""
        self._is_settled = asyncio.Event()
        self._read = read

    async def recall(self) -> None:
        """Find out the manifest if no weights have to be read for it. Never raises."""
        await self._run(is_quick=True)

    async def learn(self) -> None:
        """Find out the manifest, in a thread that ends with the process. Never raises."""
        try:
            await self._run(is_quick=False)
        finally:
            self._is_settled.set()

    async def _run(self, *, is_quick: bool) -> None:
        if self._read is None or self.manifest:
            return
        read, loop, stop = self._read, asyncio.get_running_loop(), threading.Event()
        if is_quick:
            stop.set()
        found: asyncio.Future[str] = loop.create_future()

        def answer(text: str) -> None:
            if not found.done():
                found.set_result(text)

        def work() -> None:
            text = _hash(read, stop)
            with contextlib.suppress(RuntimeError):  # the loop is closed, nobody asks any more
                loop.call_soon_threadsafe(answer, text)

        # Not one of asyncio's threads: the interpreter waits for these when it exits.
        threading.Thread(target=work, name="planetserve-weights", daemon=True).start()
        try:
            self.manifest = await found
        finally:
            stop.set()

    async def wait_settled(self, timeout_s: float) -> None:
        """Wait, at most so long, until the manifest is known, or clearly cannot be."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._is_settled.wait()

    def are_those_of(self, info: ServerInfo, manifest: str = "") -> bool:
        """Whether a server has the same weights, by what it announces.

        `manifest` stands for this node's own while that is not known.
        """
        manifest = self.manifest or manifest
        if manifest and info.manifest:
            return info.manifest == manifest
        return info.fingerprint == self.fingerprint


def _hash(read: ReadManifest, stop: threading.Event) -> str:
    try:
        manifest = read(stop)
    except ModelError as error:
        logger.warning("the weights cannot be hashed, so they are known by name alone: %s", error)
        return ""
    return "" if manifest is None else manifest.hash


class _Progress:
    """Says how far the hashing is, if it takes long."""

    def __init__(self, model: str, total_bytes: int):
        self._model = model
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._said_s = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if time.monotonic() - self._said_s > _PROGRESS_PERIOD_S:
            self._said_s = time.monotonic()
            logger.info(
                "%s: hashes its weights, %d of %d MiB",
                self._model, self._done_bytes >> 20, self._total_bytes >> 20,
            )  # fmt: skip


def _from_hex(text: Any) -> bytes:
    digest = bytes.fromhex(text) if isinstance(text, str) else b""
    if len(digest) != DIGEST_BYTES:
        raise ValueError("not a digest")
    return digest


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
