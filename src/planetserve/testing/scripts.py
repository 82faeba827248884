"""Steps of several sessions, to try out attention with."""

from __future__ import annotations

import random

from planetserve.engine.attention_selector import Script

_NUM_TICKS = 6
_LONGEST = 600


def random_script(rng: random.Random, num_sessions: int = 4) -> Script:
    """Prompts, single steps, chunks, steps that take some back, and texts begun anew."""
    lengths = [0] * num_sessions
    script = []
    for _ in range(_NUM_TICKS):
        tick = []
        for session in rng.sample(range(num_sessions), rng.randint(1, num_sessions)):
            length = lengths[session]
            start, count = rng.choice([
                (length, 1),
                (length, 1),
                (length, rng.randint(2, 40)),
                (length, rng.randint(200, 300)),
                (max(0, length - rng.randint(1, 5)), rng.randint(1, 3)),
                (0, rng.randint(1, 20)),
            ])  # fmt: skip
            if start + count > _LONGEST:
                start, count = 0, 1
            tick.append((session, start, count))
            lengths[session] = start + count
        script.append(tick)
    return script
