"""When a decode step passes which point of the code, on a clock that all processes here share.

`note` puts a stamp in front of or behind a method of the running program, so the program itself
carries none of this. Run as a module it is `run_server` with stamps: SIGUSR2 writes those since the
last time to the folder that the environment variable names, as `PID.json`.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planetserve import cli, run_server

FOLDER_VARIABLE = "PLANETSERVE_BENCH_FOLDER"

Stamps = list[tuple[str, float]]
"""Where and when, in seconds of the monotonic clock."""


def note(
    stamps: Stamps,
    owner: type,
    method: str,
    *,
    before: str | None = None,
    after: str | None = None,
    only: Callable[..., bool] = lambda *_, **__: True,
) -> None:
    """Stamp every call of `owner.method` whose arguments `only` accepts."""
    own = getattr(owner, method)
    clock = time.monotonic

    if inspect.iscoroutinefunction(own):

        @functools.wraps(own)
        async def stamped(*args: Any, **kwargs: Any) -> Any:
            wanted = only(*args, **kwargs)
            if wanted and before is not None:
                stamps.append((before, clock()))
            result = await own(*args, **kwargs)
            if wanted and after is not None:
                stamps.append((after, clock()))
            return result

    else:

        @functools.wraps(own)
        def stamped(*args: Any, **kwargs: Any) -> Any:
            wanted = only(*args, **kwargs)
            if wanted and before is not None:
                stamps.append((before, clock()))
            result = own(*args, **kwargs)
            if wanted and after is not None:
                stamps.append((after, clock()))
            return result

    setattr(owner, method, stamped)


def is_step(_: Any, header: Any, *__: Any) -> bool:
    """Whether a frame that is being sent carries activations."""
    from planetserve.wire.frame import FrameType

    return header.type is FrameType.STEP


def note_client(stamps: Stamps) -> None:
    """Stamp what a client does."""
    from planetserve.client.hf.batched_lm_head import BatchedLmHead
    from planetserve.client.ring.ring import RingSession
    from planetserve.client.session import InferenceSession
    from planetserve.edge.receiver import StepReceiver
    from planetserve.swarm.libp2p.streams import FrameStream

    note(stamps, InferenceSession, "run", before="asked", after="told")
    note(stamps, RingSession, "step", before="on loop")
    note(stamps, FrameStream, "send", after="sent", only=is_step)
    note(stamps, StepReceiver, "open", before="answered")
    note(stamps, BatchedLmHead, "__call__", before="head", after="logits")


def note_server(stamps: Stamps) -> None:
    """Stamp what a server does."""
    from planetserve.crypto.channel import EdgeSealer
    from planetserve.edge.receiver import StepReceiver
    from planetserve.engine.engine import Engine
    from planetserve.engine.span_runner import SpanRunner
    from planetserve.engine.worker import Worker
    from planetserve.server.downstream import Downstream
    from planetserve.swarm.libp2p.streams import FrameStream

    note(stamps, StepReceiver, "open", before="received")
    note(stamps, Engine, "submit", before="opened")
    note(stamps, Worker, "_wait_for_work", before="waits", after="goes on")
    note(stamps, Worker, "accept", before="awake")
    note(stamps, SpanRunner, "forward", before="batched", after="computed")
    note(stamps, Downstream, "push", before="fetched")
    note(stamps, EdgeSealer, "seal", before="packed", after="sealed")
    note(stamps, FrameStream, "send", after="sent", only=is_step)


def main() -> None:
    folder = Path(os.environ[FOLDER_VARIABLE])
    stamps: Stamps = []

    def write(*_: object) -> None:
        part = folder / f"{os.getpid()}.part"
        part.write_text(json.dumps(stamps))
        stamps.clear()
        part.rename(part.with_suffix(".json"))

    note_server(stamps)
    signal.signal(signal.SIGUSR2, write)
    run_server.main()


if __name__ == "__main__":
    cli.run("stamps", main)
