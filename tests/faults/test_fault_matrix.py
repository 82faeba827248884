"""Servers fail in the middle of a text, in every way we know: no token changes, nothing is left.

Faults F1 to F9 and F14 of the matrix in `docs/development.md`: one at each stage of a text, at each
hop, for each way to generate; and several, one after the other and at once. A small part runs with
every test run, all of it with `make faults`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fault_kinds import FAULTS, HARMLESS, LOUD, PREFILL_ONLY, drained, killed, stopped
from fault_swarm import Fault, FaultSwarm, Held, Host, Moment
from fault_table import FaultTable, Row, Witness
from faulted_texts import GREEDY, STAGES, TEXTS, Material

pytestmark = pytest.mark.timeout(120)

SPANS = ("0:2", "0:2", "2:4", "2:4", "2:4", "4:6", "4:6")
HOPS = {"first": 0, "middle": 2, "last": 4}
"""The first block of each hop of a chain."""
MIDDLE = HOPS["middle"]
NUM_HOPS = len(HOPS)

Case = tuple[str, str, str, str]
"""Fault, stage, hop, text."""

QUICK: tuple[Case, ...] = (
    ("F1 killed", "prefill", "first", "greedy"),
    ("F1 killed", "early", "middle", "beams"),
    ("F1 killed", "late", "last", "assisted"),
    ("F3 paused", "early", "middle", "batch"),
    ("F3 drained", "early", "last", "greedy"),
    ("F8 flipped bit", "late", "first", "lookup"),
    ("F9 repeated frame", "prefill", "middle", "batch"),
    ("F14 NaN", "early", "last", "greedy"),
)


def full() -> Iterator[Case]:
    """Every fault at every stage and hop of a greedy text, and some faults of every text."""
    for fault in FAULTS:
        for stage in ["prefill"] if fault in PREFILL_ONLY else STAGES:
            for hop in HOPS:
                yield fault, stage, hop, "greedy"
    for fault in ("F1 killed", "F3 paused", "F3 drained", "F8 flipped bit"):
        for text in TEXTS:
            if text != "greedy":
                for number, stage in enumerate(STAGES):
                    yield fault, stage, list(HOPS)[number], text


@pytest.fixture
def swarm(repaired_swarm: FaultSwarm) -> FaultSwarm:
    return repaired_swarm


@pytest.fixture
def endure(
    swarm: FaultSwarm, material: Material, fault_table: FaultTable
) -> Callable[..., list[Fault]]:
    """Generate a text while faults strike; all that must be true of it, whatever they are."""

    def endure(
        name: str, stage: str, text: str, arm: Callable[[], Sequence[Fault]], *, where: str = "",
        noticed: bool = True,
    ) -> list[Fault]:  # fmt: skip
        way = TEXTS[text]
        expected = way.generate(material.local, material, Witness())
        witness = Witness()
        with swarm.client() as model, witness.watching():
            faults = list(arm())
            got = way.generate(model, material, witness)
            swarm.restore()
            left = swarm.leaked()
        times = [fault.struck_s for fault in faults if fault.struck_s is not None]
        assert len(times) == len(faults), "the text was over before its faults"
        detected = [witness.detected(time_s) for time_s in times]
        recovered = [witness.recovered(time_s) for time_s in times]
        row = Row(
            name, stage, f"{text} {where}".strip(),
            max((s for s in detected if s is not None), default=None),
            max((s for s in recovered if s is not None), default=None),
            torch.equal(got, expected), left.pages_used,
        )  # fmt: skip
        fault_table.rows.append(row)
        assert row.tokens_equal
        assert left == Held.nothing()
        assert row.detected_s is not None or not noticed
        return faults

    return endure


CASES = [
    pytest.param(
        *case,
        id="-".join(case).replace(" ", "_"),
        marks=() if case in QUICK else pytest.mark.faults,
    )
    for case in dict.fromkeys([*QUICK, *full()])
]


@pytest.mark.parametrize(("fault", "stage", "hop", "text"), CASES)
def test_a_fault_changes_no_token(
    swarm: FaultSwarm, endure: Callable[..., None], fault: str, stage: str, hop: str, text: str
) -> None:
    moment = TEXTS[text].moment(stage, HOPS[hop])
    endure(
        fault, stage, text, lambda: [swarm.strike_at(moment, FAULTS[fault])], where=f"{hop} hop",
        noticed=fault not in HARMLESS,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "batch",
        *(pytest.param(text, marks=pytest.mark.faults) for text in TEXTS if text != "batch"),
    ],
)
def test_one_hop_after_the_other_is_killed(
    swarm: FaultSwarm, endure: Callable[..., None], text: str
) -> None:
    steps = (0, 1, 2) if TEXTS[text].stages is not STAGES else (0, 3, 6)
    moments = [
        Moment(block, step, 0 if step else 3)
        for block, step in zip(HOPS.values(), steps, strict=True)
    ]
    endure("F1 three in a row", "all", text, lambda: [swarm.strike_at(m, killed) for m in moments])


def kill_at(blocks: Sequence[int]) -> Callable[[FaultSwarm, Host], None]:
    """Kill whoever runs these blocks, all in the same moment."""

    def strike(swarm: FaultSwarm, host: Host) -> None:
        for block in blocks:
            killed(swarm, swarm.runs[block])

    return strike


@pytest.mark.parametrize("text", ["greedy", "beams"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("blocks", [(0, 2), (2, 4), (0, 2, 4)])
@pytest.mark.faults
def test_neighbours_are_killed_at_once(
    swarm: FaultSwarm, endure: Callable[..., None], blocks: tuple[int, ...], stage: str, text: str
) -> None:
    moment = TEXTS[text].moment(stage, blocks[-1])
    name = f"F1 {len(blocks)} neighbours"
    endure(name, stage, text, lambda: [swarm.strike_at(moment, kill_at(blocks))], where=str(blocks))


@pytest.mark.parametrize(
    ("stage", "hop", "text"),
    [
        pytest.param("early", "first", "greedy"),
        *(
            pytest.param(stage, hop, text, marks=pytest.mark.faults)
            for stage in STAGES
            for hop in HOPS
            for text in TEXTS
            if (stage, hop, text) != ("early", "first", "greedy")
            if (stage, hop) != ("prefill", "last")  # it is not known yet
        ),
    ],
)
def test_a_hop_is_killed_while_another_has_the_step(
    swarm: FaultSwarm, endure: Callable[..., None], stage: str, hop: str, text: str
) -> None:
    """Where it is the hop after it, the answer comes while a replacement is being filled."""
    moment = TEXTS[text].moment(stage, (HOPS[hop] + 2) % 6)

    def arm() -> list[Fault]:
        return [swarm.strike_at(moment, kill_at([HOPS[hop]]))]

    endure("F1 killed elsewhere", stage, text, arm, where=f"{hop} hop", noticed=False)


@pytest.mark.parametrize(
    ("stage", "chunk", "text"),
    [
        pytest.param("late", 0, "greedy"),
        *(
            pytest.param(stage, chunk, text, marks=pytest.mark.faults)
            for stage in STAGES
            for chunk in (0, 2)
            for text in ("greedy", "batch", "beams", "assisted")
            if (stage, chunk, text) != ("late", 0, "greedy")
        ),
    ],
)
@pytest.mark.parametrize("second", [killed, pytest.param(stopped, marks=pytest.mark.faults)])
def test_the_replacement_fails_while_it_is_filled(
    swarm: FaultSwarm, endure: Callable[..., list[Fault]], stage: str, chunk: int, text: str,
    second: Callable[[FaultSwarm, Host], None],
) -> None:  # fmt: skip
    def arm() -> list[Fault]:
        first = swarm.strike_at(TEXTS[text].moment(stage, MIDDLE), killed)
        filling = Moment(MIDDLE, None, chunk)
        return [first, swarm.strike_at(filling, second, after=first)]

    faults = endure(f"F1 replacement {second.__name__}", stage, text, arm, where=f"chunk {chunk}")
    assert faults[0].victim is not faults[1].victim


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.faults
def test_two_servers_replace_one(
    swarm: FaultSwarm, endure: Callable[..., None], stage: str
) -> None:
    replicas = [host for host in swarm.hosts if host.span == "2:4"]
    for host in replicas[1:]:
        swarm.remove(host)
    halves = swarm.add_hosts(["2:3", "3:4"])
    try:
        moment = TEXTS["batch"].moment(stage, MIDDLE)
        endure("F1 two replace one", stage, "batch", lambda: [swarm.strike_at(moment, killed)])
    finally:
        for host in halves:
            swarm.remove(host)
        swarm.add_hosts([host.span for host in replicas[1:]])


@pytest.mark.faults
def test_a_replacement_that_comes_later_is_waited_for(
    swarm: FaultSwarm, endure: Callable[..., None]
) -> None:
    spare = [host for host in swarm.hosts if host.span == "0:2"][1:]
    for host in spare:
        swarm.remove(host)

    def strike(swarm: FaultSwarm, host: Host) -> None:
        killed(swarm, host)
        swarm.spawn(swarm.start_hosts(["0:2"], delay_s=1.0))

    endure("F1 no replica yet", "early", "greedy", lambda: [swarm.strike_at(Moment(0, 2), strike)])


@pytest.mark.parametrize("strike", [killed, pytest.param(drained, marks=pytest.mark.faults)])
def test_survivors_hold_one_session_each(
    swarm: FaultSwarm, material: Material, strike: Callable[[FaultSwarm, Host], None]
) -> None:
    """Between two texts of a session the chain in use holds it and nobody else does."""
    ids = material.prompt
    whole = material.local.generate(ids, **{**GREEDY, "max_new_tokens": 20})
    with swarm.client() as model, model.inference_session(max_length=100):
        fault = swarm.strike_at(Moment(MIDDLE, 4), strike)
        first = model.generate(ids, **{**GREEDY, "max_new_tokens": 10})
        assert fault.victim is not None
        held = swarm.held_when(lambda held: held.num_sessions <= NUM_HOPS)
        num_pages = -(-(ids.shape[1] + 9) // 16)
        assert (held.num_sessions, held.pages_used) == (NUM_HOPS, NUM_HOPS * num_pages)
        second = model.generate(None, **{**GREEDY, "max_new_tokens": 10})
    assert torch.equal(torch.cat([first, second], dim=1), whole)
    assert swarm.leaked() == Held.nothing()


def test_a_server_that_wakes_up_changes_nothing(swarm: FaultSwarm, material: Material) -> None:
    """F3: what a stopped server sends when it goes on belongs to an epoch that is over."""
    whole = material.local.generate(material.prompt, **{**GREEDY, "max_new_tokens": 20})
    with swarm.client() as model, model.inference_session(max_length=100):
        fault = swarm.strike_at(Moment(MIDDLE, 4), stopped)
        first = model.generate(material.prompt, **{**GREEDY, "max_new_tokens": 10})
        victim = fault.victim
        assert victim is not None
        swarm.restore()
        held = swarm.held_when(lambda _: victim.held() == Held.nothing())
        assert held.num_sessions == NUM_HOPS
        second = model.generate(None, **{**GREEDY, "max_new_tokens": 10})
    assert torch.equal(torch.cat([first, second], dim=1), whole)
    assert swarm.leaked() == Held.nothing()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.faults) for name in LOUD])
def test_several_users_lose_the_same_server(
    swarm: FaultSwarm, material: Material, name: str
) -> None:
    """Users in threads, who share a client; each has one of the sessions that the server held."""
    prompts = [material.prompt[:, :length] for length in (66, 40, 23, 51)]
    expected = [material.local.generate(ids, **GREEDY) for ids in prompts]
    with swarm.client() as model, ThreadPoolExecutor(len(prompts)) as pool:
        faults = [swarm.strike_at(Moment(MIDDLE, step), LOUD[name]) for step in (0, 5)]
        got = list(pool.map(lambda ids: model.generate(ids, **GREEDY), prompts))
        assert all(fault.struck_s for fault in faults)
        swarm.restore()
        assert swarm.leaked() == Held.nothing()
    for tokens, wanted in zip(got, expected, strict=True):
        assert torch.equal(tokens, wanted)


@pytest.mark.parametrize("hop", HOPS)
@pytest.mark.faults
def test_a_link_too_slow_for_the_prompt_is_left(
    swarm: FaultSwarm, endure: Callable[..., None], hop: str
) -> None:
    """It answers every ping, and something moves all the time; just never enough of it."""

    def arm() -> list[Fault]:
        return [swarm.strike_at(Moment(HOPS[hop], 0), FAULTS["F7 slow link"])]

    endure("F7 slow link", "prefill", "batch", arm, where=hop, noticed=False)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.faults
def test_faults_at_random(swarm: FaultSwarm, endure: Callable[..., None], seed: int) -> None:
    """Three faults of any kind, anywhere; what is repeatable is which and where, not their race."""
    choose = random.Random(seed)
    names = [name for name in FAULTS if name not in PREFILL_ONLY]
    text = choose.choice(["greedy", "batch", "beams", "sampling"])
    chosen = [(choose.choice(names), choose.choice(list(HOPS)), step) for step in (0, 4, 8)]
    where = ", ".join(f"{name} at {hop}" for name, hop, _ in chosen)

    def arm() -> list[Fault]:
        return [
            swarm.strike_at(Moment(HOPS[hop], step), FAULTS[name]) for name, hop, step in chosen
        ]

    endure("three at random", "all", text, arm, where=f"seed {seed}: {where}", noticed=False)
