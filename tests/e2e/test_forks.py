"""A process that has loaded a model forks, as DataLoader's workers and many servers do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT

SCRIPT = """
import gc, multiprocessing, os, subprocess, sys, time
import psutil, torch
from planetserve import AutoDistributedModelForCausalLM
from planetserve.testing.swarm import LocalSwarm

multiprocessing.set_start_method("fork", force=True)
ids = torch.arange(5, 12)[None]

def generate(model):
    return model.generate(ids, max_new_tokens=4, do_sample=False).tolist()

def fork(work):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

def refused(use):
    try:
        use()
    except Exception as error:
        print(type(error).__name__, error, flush=True)

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return index

swarm = LocalSwarm(sys.argv[1], ["0:6"]).__enter__()
(server,) = swarm.servers
model = AutoDistributedModelForCausalLM.from_pretrained(
    sys.argv[1], initial_peers=swarm.initial_peers, torch_dtype="float32"
)
expected = generate(model)
sys.stdout.flush()
if (child := os.fork()) == 0:
    sys.exit(0)  # runs what is registered for the end of the interpreter
assert os.waitpid(child, 0)[1] == 0

with model.inference_session(max_length=30) as session:
    generate(model)
    for use in (
        lambda: generate(model),
        lambda: model(ids),
        lambda: session.step(torch.zeros(1, 1, 32)),
        model.close,
    ):
        fork(lambda: refused(use))
    lingering = multiprocessing.Process(target=time.sleep, args=[1000])
    lingering.start()
while server.handler.num_sessions:  # unless somebody else holds the session's stream open
    time.sleep(0.01)

def forget():
    global model
    del model
    gc.collect()

fork(forget)
worker = multiprocessing.Process(target=forget)
worker.start()
worker.join()
assert worker.exitcode == 0
assert list(torch.utils.data.DataLoader(Numbers(), num_workers=2, batch_size=4))
subprocess.run(["true"], check=True, preexec_fn=gc.collect)
assert generate(model) == expected
daemons = [child for child in psutil.Process().children() if child.name() == "p2pd"]
assert len(daemons) == 3
print("still works", flush=True)
if os.fork() == 0:
    # Killed, with children that live on: the daemons end all the same.
    os.kill(os.getppid(), 9)
    psutil.wait_procs(daemons, timeout=30)
    print("left:", [daemon.pid for daemon in daemons if daemon.is_running()], flush=True)
    os.kill(lingering.pid, 9)
    os._exit(0)
time.sleep(1000)
"""


@pytest.mark.timeout(180)
def test_forked_children_use_nothing_keep_nothing_and_break_nothing(llama_folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(llama_folder)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        output, _ = process.communicate(timeout=150)
    lines = output.splitlines()
    assert lines[-2:] == ["still works", "left: []"]
    assert len(lines) == 5
    for line in lines[:3]:
        assert line.startswith("ConfigError this model was loaded before the process was forked")
