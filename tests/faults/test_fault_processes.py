"""Real server processes are killed, stopped, asked to leave and starved in the middle of a text.

What `test_fault_matrix.py` does to daemons is done here to whole machines, and to one of the two
processes of a machine. All of it runs with `make faults`; what runs every time is
`tests/e2e/test_process_faults.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import ENVIRONMENT
from fault_table import FaultTable, Row, Witness
from faulted_texts import STAGES, TEXTS, Material
from process_swarm import Blow, Machine, ProcessSwarm

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

SPANS = ("0:2", "0:2", "2:4", "2:4", "4:6", "4:6")
HOPS = {"first": 0, "middle": 1, "last": 2}


@pytest.fixture(scope="module")
def swarm(deep_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessSwarm]:
    with ProcessSwarm(str(deep_folder), SPANS, tmp_path_factory.mktemp("machines")) as running:
        yield running


@pytest.fixture(autouse=True)
def _repaired(swarm: ProcessSwarm) -> None:
    swarm.repair()


def whole_machine_killed(machine: Machine) -> None:
    machine.command.signal_all(signal.SIGKILL)


def whole_machine_stopped(machine: Machine) -> None:
    machine.command.signal_all(signal.SIGSTOP)


def server_killed(machine: Machine) -> None:
    machine.server.kill()


def server_stopped(machine: Machine) -> None:
    machine.server.suspend()


def daemon_killed(machine: Machine) -> None:
    machine.daemon.kill()


def daemon_stopped(machine: Machine) -> None:
    machine.daemon.suspend()


def asked_to_leave(machine: Machine) -> None:
    machine.command.process.send_signal(signal.SIGTERM)


def out_of_memory(machine: Machine) -> None:
    """It may not have one page more than it has."""
    machine.starve(psutil.RLIMIT_AS, machine.server.memory_info().vms)


def disk_full(machine: Machine) -> None:
    """No file of the server's grows any more, its log included."""
    machine.starve(psutil.RLIMIT_FSIZE, 0)


STRIKES: dict[str, Callable[[Machine], object]] = {
    "F1 kill -9": whole_machine_killed,
    "F1 kill -9, server only": server_killed,
    "F2 kill -9, daemon only": daemon_killed,
    "F3 SIGSTOP": whole_machine_stopped,
    "F3 SIGSTOP, server only": server_stopped,
    "F3 SIGSTOP, daemon only": daemon_stopped,
    "F3 SIGTERM": asked_to_leave,
    "F19 disk full": disk_full,
    "F21 out of memory": out_of_memory,
}
UNNOTICED = ("F3 SIGTERM", "F19 disk full", "F21 out of memory")
"""A text need not be moved, or is over before it is."""
OTHER_TEXTS = ("batch", "beams", "lookup", "assisted", "conversation")


def cases() -> Iterator[tuple[str, str, str, str]]:
    for name in STRIKES:
        for stage in STAGES:
            for hop in HOPS:
                yield name, stage, hop, "greedy"
    for name in ("F1 kill -9", "F3 SIGSTOP"):
        for number, text in enumerate(OTHER_TEXTS):
            yield name, list(STAGES)[number % 3], list(HOPS)[number % 3], text


@pytest.mark.parametrize(("name", "stage", "hop", "text"), list(cases()))
def test_a_process_fault_changes_no_token(
    swarm: ProcessSwarm, material: Material, fault_table: FaultTable,
    name: str, stage: str, hop: str, text: str,
) -> None:  # fmt: skip
    way = TEXTS[text]
    expected = way.generate(material.local, material, Witness())
    witness = Witness()
    with swarm.client() as model, witness.watching():
        blow = Blow(model, swarm, HOPS[hop], *way.stages[stage], STRIKES[name])
        model.runtime.node.taps.append(blow)
        got = way.generate(model, material, witness)
        assert blow.struck_s is not None, "the text was over before the fault"
        swarm.repair()
        pages = swarm.leaked_pages(model)
    row = Row(
        f"{name} (processes)", stage, f"{text} {hop} hop", witness.detected(blow.struck_s),
        witness.recovered(blow.struck_s), torch.equal(got, expected), pages,
    )  # fmt: skip
    fault_table.rows.append(row)
    assert row.tokens_equal
    assert row.pages_leaked == 0
    assert row.detected_s is not None or name in UNNOTICED


def test_a_memory_limit_hurts_nobody_else(swarm: ProcessSwarm, material: Material) -> None:
    """F21: a machine that cannot take a long prompt says so or ends; the text goes elsewhere."""
    ids = torch.randint(5, 90, (8, 200), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    expected = material.local.generate(ids, **options)
    with swarm.client() as model:
        model.generate(ids[:, :5], max_new_tokens=1)
        machine = swarm.machine_of(model.chain.hops[1].peer_id)
        out_of_memory(machine)
        assert torch.equal(model.generate(ids, **options), expected)


CLIENT = """
import sys, torch
from planetserve import AutoDistributedModelForCausalLM
from planetserve.wire.frame import FrameType
model_folder, step, chunk, *peers = sys.argv[1:]
model = AutoDistributedModelForCausalLM.from_pretrained(model_folder, initial_peers=peers)
def tap(way, remote, header):
    if way == "sent" and header.type is FrameType.STEP:
        if (header.step, header.chunk) == (int(step), int(chunk)):
            print("now", flush=True)
model.runtime.node.taps.append(tap)
model.generate(torch.arange(5, 71)[None], min_new_tokens=60, max_new_tokens=60,
               do_sample=False)
"""


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_client_leaves_nothing(
    swarm: ProcessSwarm, deep_folder: Path, fault_table: FaultTable, stage: str
) -> None:
    """F22, as a process; `test_lost_clients.py` has it frame by frame."""
    with swarm.client() as model:
        for _ in range(2):
            step, chunk = STAGES[stage]
            client = subprocess.Popen(
                [sys.executable, "-c", CLIENT, str(deep_folder), str(step), str(chunk),
                 *swarm.initial_peers],
                env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            with client:
                assert client.stdout is not None
                assert client.stdout.readline() == b"now\n"
                os.killpg(client.pid, signal.SIGKILL)
        pages = swarm.leaked_pages(model)
    fault_table.rows.append(Row("F22 kill -9, client", stage, "greedy", None, None, True, pages))
    assert pages == 0
