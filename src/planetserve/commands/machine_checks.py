"""What `doctor` looks at on this machine: each check says what it found and what to do about it."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import constants, try_to_load_from_cache
from packaging.requirements import Requirement

import planetserve
from planetserve.commands.findings import Finding, Verdict
from planetserve.commands.memory import CGROUP, free_memory, mib, model_memory
from planetserve.errors import ConfigError, ModelError, one_line
from planetserve.model.checkpoint import Checkpoint, parse_dtype
from planetserve.server.factory import device_named
from planetserve.swarm.libp2p.incoming import MAX_STREAMS
from planetserve.tensors import dtype_name

_FILES_PER_STREAM = 4
"""As `SwarmNode.start` counts them."""
_LEAST_FILES = 256
_LEAST_DISK_BYTES = 2**30
_LEAST_MEMORY_BYTES = 2**30
_PROBE_BYTES = 2**16
_PORT_TIMEOUT_S = 5.0


def versions(package: str = "planetserve") -> Iterator[Finding]:
    """Whether the installed packages are those that this one needs."""
    python = ".".join(map(str, sys.version_info[:3]))
    try:
        needed = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "versions", "warning", f"{package} is not installed, so its needs are not known",
            "pip install .",
        )  # fmt: skip
        return
    wrong = []
    for text in needed:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement} (not installed)")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement} (there is {found})")
    if wrong:
        yield Finding(
            "versions", "fault", f"needs {', '.join(wrong)}", "pip install -U planetserve"
        )
        return
    named = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    yield Finding(
        "versions", "ok", f"planetserve {planetserve.__version__}, Python {python}, {named}"
    )


def descriptors() -> Iterator[Finding]:
    """Whether a server may open enough files: every stream takes some."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = sys.maxsize if hard in (-1, resource.RLIM_INFINITY) else hard
    streams = min(MAX_STREAMS, limit // _FILES_PER_STREAM)
    advice = "raise it: `ulimit -Hn 65536` as root, LimitNOFILE=65536 in a systemd unit"
    if limit < _LEAST_FILES:
        yield Finding("descriptors", "fault", f"only {limit} files may be open", advice)
    elif streams < MAX_STREAMS:
        detail = f"{limit} files may be open, so a server takes {streams} streams at most"
        yield Finding("descriptors", "warning", detail, advice)
    else:
        yield Finding("descriptors", "ok", f"room for {streams} streams")


def disk(folder: Path, needed_bytes: int, what: str) -> Iterator[Finding]:
    """Whether a folder can be written and has room for so many bytes."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        yield Finding(
            "disk", "fault", f"{there} for {what} cannot be written: {error.strerror}",
            "free some space" if full else f"let this user write to {there}, or give --cache_dir",
        )  # fmt: skip
        return
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        yield Finding(
            "disk", "fault", f"{mib(free)} free in {there}, {what} need {mib(needed_bytes)}",
            "free some space, or give --cache_dir on another disk",
        )  # fmt: skip
    elif free < _LEAST_DISK_BYTES:
        yield Finding("disk", "warning", f"only {mib(free)} free in {there}", "free some space")
    else:
        yield Finding("disk", "ok", f"{mib(free)} free in {there} for {what}")


def disks(checkpoint: Checkpoint | None, cache_dir: str | None) -> Iterator[Finding]:
    """The folders that a server writes to: for downloads, and for the daemon's socket."""
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    yield from disk(cache, missing_bytes(checkpoint, cache_dir), "downloads")
    yield from disk(Path(tempfile.gettempdir()), 0, "temporary files")


def missing_bytes(checkpoint: Checkpoint | None, cache_dir: str | None) -> int:
    """Bytes of the model's weights that are not on this disk yet."""
    if checkpoint is None:
        return 0
    place, revision = checkpoint.pretrained_location
    if Path(place).is_dir():
        return 0
    try:
        files = checkpoint.tensor_names()
        absent = {
            file
            for file in set(files.values())
            if not isinstance(
                try_to_load_from_cache(place, file, cache_dir=cache_dir, revision=revision), str
            )
        }
        return checkpoint.tensor_bytes(name for name, file in files.items() if file in absent)
    except ModelError:
        return 0


def device(name: str) -> Iterator[Finding]:
    """Whether the device computes."""
    try:
        found = device_named(name)
        one = torch.ones(8, 8, device=found)
        total = float((one @ one).sum())
    except (ConfigError, RuntimeError, AssertionError) as error:
        yield Finding(
            "device", "fault", one_line(error, 200),
            "try --device cpu, or install torch for this machine: https://pytorch.org",
        )  # fmt: skip
        return
    if total != 512:
        yield Finding(
            "device", "fault", f"{found} computes wrongly: 8 x 64 is not {total:g}",
            "do not serve with this device",
        )  # fmt: skip
        return
    kind = torch.cuda.get_device_name(found) if found.type == "cuda" else f"{os.cpu_count()} cores"
    yield Finding("device", "ok", f"{found} ({kind})")


def memory(
    checkpoint: Checkpoint | None, device_name: str, cgroup: Path = CGROUP
) -> Iterator[Finding]:
    """Whether a block of the model fits."""
    try:
        place = device_named(device_name)
        free = free_memory(place, cgroup)
    except (ConfigError, RuntimeError):
        return  # the check of the device has said so
    advice = "close other programs, or give --quant_type or a smaller --attn_cache_tokens to serve"
    if checkpoint is None:
        verdict: Verdict = "ok" if free.num_bytes >= _LEAST_MEMORY_BYTES else "fault"
        text = f"{mib(free.num_bytes)} free ({free.source})"
        yield Finding("memory", verdict, text, advice if verdict == "fault" else "")
        return
    try:
        dtype = dtype_name(parse_dtype("auto", checkpoint, place))
        kind = model_memory(checkpoint).kind(dtype)
    except ConfigError as error:
        yield Finding("memory", "fault", str(error))
        return
    total, fitting = checkpoint.num_blocks, kind.num_fitting(free.num_bytes)
    text = f"{mib(free.num_bytes)} free ({free.source}): {fitting} of {total} blocks fit as {dtype}"
    yield Finding("memory", "ok" if fitting else "fault", text, "" if fitting else advice)


def port(number: int, public_ip: str | None) -> Iterator[Finding]:
    """Whether a server can listen on a port, and whether what is announced leads to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("0.0.0.0", number))
            listener.listen(1)
        except OSError as error:
            advice = "choose another --port, or end the program that listens there"
            if error.errno == errno.EACCES:
                advice = "ports below 1024 need rights; choose another --port"
            detail = f"cannot listen on port {number}: {error.strerror}"
            yield Finding("port", "fault", detail, advice)
            return
        yield Finding("port", "ok", f"port {number} is free")
        if public_ip is None:
            return
        try:
            socket.create_connection((public_ip, number), _PORT_TIMEOUT_S).close()
            listener.settimeout(_PORT_TIMEOUT_S)
            listener.accept()[0].close()
        except OSError as error:
            yield Finding(
                "port", "fault",
                f"{public_ip} port {number} does not lead here: {error.strerror or 'no answer'}",
                f"forward TCP port {number} of the router to this machine and open it in its "
                "firewall; not every router lets a machine behind it try this, so ask a friend "
                "to dial it before you believe it",
            )  # fmt: skip
        else:
            yield Finding("port", "ok", f"{public_ip} port {number} leads here")
