"""Command lines: spelling, YAML, messages and exit codes; ready files and signals."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planetserve import __version__, cli, run_dht, run_server
from planetserve.errors import CapacityError, ConfigError, PlanetServeError
from planetserve.types import BlockSpan


def parse(line: str) -> object:
    return run_server.parse(line.split())


def exit_code(main: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run("prog", main)  # type: ignore[arg-type]
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_flags_fill_the_configuration() -> None:
    config = run_server.parse(
        "demo --block_indices 2:5 --initial_peers /a /b --port 31337 --throughput 12.5 "
        "--torch_dtype bfloat16 --update_period 30".split()
    )
    assert config.model == "demo"
    assert config.block_indices == BlockSpan(2, 5)
    assert config.initial_peers == ("/a", "/b")
    assert (config.port, config.throughput, config.update_period) == (31337, 12.5, 30.0)
    assert config.torch_dtype == "bfloat16"
    assert config.step_timeout == 300


def test_dashes_and_underscores_are_the_same() -> None:
    dashed = parse("demo --num-blocks=2 --new-swarm --attn-cache-tokens 64")
    assert dashed == parse("demo --num_blocks 2 --new_swarm --attn_cache_tokens=64")


def test_dashes_in_values_stay() -> None:
    assert run_server.parse("a-b_c --num_blocks 2 --new_swarm --public-name=x-y".split()).model == (
        "a-b_c"
    )


def test_petals_name_of_the_model() -> None:
    line = "--converted_model_name_or_path demo --num_blocks 2 --new_swarm"
    assert run_server.parse(line.split()).model == "demo"
    with pytest.raises(ConfigError, match="exclude each other"):
        parse(f"other {line}")


@pytest.mark.parametrize("name", sorted(run_server.IGNORED_FLAGS))
def test_petals_flags_without_effect_are_accepted_with_a_warning(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = "demo --num_blocks 2 --new_swarm"
    value = "1" if run_server.IGNORED_FLAGS[name][0] else ""
    with caplog.at_level(logging.WARNING):
        assert parse(f"--{name} {value} {plain}") == parse(plain)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"--{name} has no effect"
    ]


PLAIN = "demo --num_blocks 2 --new_swarm"

HARMLESS = [
    "--balance_quality 0.75", "--mean_balance_check_period 60", "--stats_report_interval 60",
    "--max_chunk_size_bytes 1000000", "--max_disk_space 50GB", "--max_disk_space=300GiB",
    "--use_auth_token", "--throughput eval", "--torch_dtype AUTO",
    "--load_in_8bit False", "--use_relay", "--no_relay", "--use_auto_relay", "--no-auto-relay",
    "--attn_cache_size 16GiB", "--adapters", "--min_batch_size 1", "--compression NONE",
]  # fmt: skip

TRANSLATED = [
    ("--quant_type NF4", "--quant_type nf4"),
    ("--quant_type NONE", "--quant_type none"),
    ("--quant_type INT8", "--quant_type int8"),
    ("--load_in_8bit True", "--quant_type int8"),
    ("--torch_dtype torch.bfloat16", "--torch_dtype bfloat16"),
    ("--torch_dtype fp16", "--torch_dtype float16"),
    ("--tensor_parallel_devices cpu", "--device cpu"),
    ("--tensor_parallel_devices cuda:1 --device cuda:1", "--device cuda:1"),
]

LIES = [
    ("--adapters org/lora org/other", "merge"),
    ("--custom_module_path x.py", "not loaded from files"),
    ("--tensor_parallel_devices cuda:0 cuda:1", "one server for each"),
    ("--throughput dry_run", "--throughput auto"),
    ("--dht_client_mode", "must be reachable"),
    ("--quant_type int4", "choose one of: auto, none, stored, int8, nf4"),
    ("--load_in_8bit --quant_type nf4", "expected one argument"),
    ("--load_in_8bit True --quant_type nf4", "exclude each other"),
    ("--load_in_8bit maybe", "not true or false"),
    ("--port 70000", "no TCP port"),
    ("--port -1", "no TCP port"),
]


@pytest.mark.parametrize("flags", HARMLESS)
def test_what_is_harmless_in_petals_command_lines_is_accepted(flags: str) -> None:
    assert parse(f"{PLAIN} {flags}") == parse(PLAIN)
    assert parse(f"demo {flags} --num_blocks 2 --new_swarm") == parse(PLAIN)


@pytest.mark.parametrize(("flags", "ours"), TRANSLATED)
def test_what_petals_calls_otherwise_is_translated(flags: str, ours: str) -> None:
    assert parse(f"{PLAIN} {flags}") == parse(f"{PLAIN} {ours}")


@pytest.mark.parametrize(("flags", "message"), LIES)
def test_what_would_be_a_lie_is_refused_with_the_way_out(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(f"{PLAIN} {flags}")


def test_a_yaml_file_of_petals_is_read_like_its_flags(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(
        "converted_model_name_or_path: demo\nnum_blocks: 2\nnew-swarm: true\nnum_handlers: 8\n"
        "quant_type: none\nthroughput: eval\nadapters: []\nbalance_quality: 0.5\n"
        "tensor_parallel_devices: [cpu]\nmax_disk_space: 50GB\nload_in_8bit: false\n"
    )
    assert parse(f"-c {path}") == parse(f"{PLAIN} --device cpu --quant_type none")
    assert "--num_handlers has no effect" in caplog.text
    path.write_text("adapters: [org/lora]\n")
    with pytest.raises(ConfigError, match="merge"):
        parse(f"{PLAIN} -c {path}")


def test_petals_run_dht_flags_are_accepted() -> None:
    flags = "--new_swarm --refresh_period 30 --no_relay --use_auto_relay --no_auto_relay"
    assert run_dht.parse(flags.split()) == run_dht.parse([])


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text("model: demo\nnum_blocks: 2\nnew-swarm: true\nport: 1\npage_size: 8\n")
    config = run_server.parse(["-c", str(path), "--port", "2"])
    assert (config.model, config.num_blocks, config.port, config.page_size) == ("demo", 2, 2, 8)
    assert config.new_swarm


def test_a_flag_replaces_the_files_half_of_an_exclusive_pair(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text("model: demo\nnum_blocks: 2\nnew_swarm: true\n")
    config = run_server.parse(["--config", str(path), "--block_indices", "0:3"])
    assert (config.num_blocks, config.block_indices) == (None, BlockSpan(0, 3))
    config = run_server.parse(["--config", str(path), "--initial_peers", "/a"])
    assert (config.new_swarm, config.initial_peers) == (False, ("/a",))


def test_no_configuration_file_is_read_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yml").write_text("port: 99\n")
    monkeypatch.chdir(tmp_path)
    assert run_server.parse("demo --num_blocks 1 --new_swarm".split()).port == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no model given"),
        ("demo", "say which blocks to serve"),
        ("--initial_peers /a demo --num_blocks 1", "before the flags"),
        ("demo --num_blocks", "argument --num_blocks: expected one argument"),
        ("demo --num_blocks two --new_swarm", "num_blocks='two' is not a whole number"),
        ("demo --num_blocks 1.5 --new_swarm", "num_blocks=1.5 is not a whole number"),
        ("demo --num_blocks 1 --new_swarm=x", "--new_swarm: ignored explicit argument"),
        ("demo --block_indexes 0:1", "unknown argument '--block_indexes'; did you mean "),
        ("demo --num 1 --new_swarm", "unknown argument '--num'"),
        ("demo extra --num_blocks 1 --new_swarm", "unknown argument 'extra'"),
        ("demo --initial_peers --num_blocks 1", "--initial_peers: expected at least one argument"),
        ("demo --block_indices 5:2 --new_swarm", "empty or reversed"),
        ("demo --block_indices 8 --new_swarm", "is not START:END"),
        ("demo --block_indices 0-8 --new_swarm", "is not START:END"),
        ("demo --block_indices 0:8:2 --new_swarm", "is not START:END"),
        ("demo --block_indices=-1:3 --new_swarm", "is not START:END"),
        ("demo --block_indices : --new_swarm", "is not START:END"),
        (f"demo --block_indices 0:{'9' * 5000} --new_swarm", "is not START:END"),
        (f"demo --num_blocks {'9' * 5000} --new_swarm", "is not a whole number"),
        ("demo --num_blocks 1e999 --new_swarm", "is not a whole number"),
        ("demo --num_blocks -2 --new_swarm", "must be greater than 0"),
        ("demo --block_indices 0:1 --num_blocks 1 --new_swarm", "say which blocks to serve"),
        ("demo --num_blocks 1 --new_swarm -c nowhere.yaml", "cannot read nowhere.yaml"),
    ],
)
def test_bad_lines_are_refused_in_one_line(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(lambda: parse(line)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("prog: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text("model: demo\nnum_blokcs: 2\n")
    with pytest.raises(ConfigError, match=r"server\.yaml: unknown setting 'num_blokcs'; did you"):
        run_server.parse(["-c", str(path)])


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> object:
        def main() -> None:
            raise error

        return main

    assert exit_code(lambda: None) == 0
    assert exit_code(fail(ConfigError("a\nb"))) == 2
    assert exit_code(fail(CapacityError("full"))) == 1
    assert exit_code(fail(PlanetServeError("odd"))) == 1
    assert exit_code(fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == (
        "prog: error: a b\nprog: error: full\nprog: error: odd\nprog: interrupted\n"
    )
    with pytest.raises(ZeroDivisionError):
        cli.run("prog", fail(ZeroDivisionError()))  # type: ignore[arg-type]


def test_strangers_text_reaches_a_log_spelled_out(capfd: pytest.CaptureFixture[str]) -> None:
    """Whichever library logs it: each may have a handler of its own."""
    factory = logging.getLogRecordFactory()
    logger = logging.getLogger("somebody")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        cli.setup_logging("info")
        logger.warning("model type %s\nsecond", "x\x1b]0;owned\x07")
    finally:
        logging.setLogRecordFactory(factory)
        logger.removeHandler(handler)
    assert capfd.readouterr().err == "model type x\\x1b]0;owned\\x07\nsecond\n"


def test_help_names_every_flag_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for names in run_server.GROUPS.values():
        for name in names:
            assert ("MODEL" if name == "model" else f"--{name} ") in text
    assert "(default: 512)" in text
    assert "--num_handlers" not in text
    assert text.count("python -m planetserve.run_server demo --block_indices") == 2


def test_every_setting_of_the_server_has_a_flag() -> None:
    flags = [name for names in run_server.GROUPS.values() for name in names]
    assert sorted(flags) == sorted(run_server.ServerConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"no command given; choose one of: {', '.join(cli.COMMANDS)}"),
        (["serv"], "unknown command 'serv'; did you mean 'serve'?"),
        (["--frob"], "unknown argument '--frob'"),
        (["serve", "--frob"], "unknown argument '--frob'"),
    ],
)
def test_the_umbrella_refuses_what_it_does_not_know(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("planetserve: error: ")
    assert message in error


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_the_umbrella_hands_over_to_every_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert cli.COMMANDS[command][0] in shown or f"usage: planetserve {command} " in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["serve", "--version"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert capsys.readouterr().out.strip() == __version__


def test_a_ready_file_is_whole_json(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    path.write_text("old")
    cli.write_ready_file(path, peer_id="12D3Koo", addresses=["/ip4/127.0.0.1"], span="0:3")
    assert json.loads(path.read_text()) == {
        "pid": os.getpid(),
        "peer_id": "12D3Koo",
        "addresses": ["/ip4/127.0.0.1"],
        "span": "0:3",
    }
    assert os.listdir(tmp_path) == ["ready.json"]


def test_a_ready_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write --ready_file .*: No such file"):
        cli.write_ready_file(tmp_path / "absent" / "ready.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot write --ready_file"):
        cli.write_ready_file(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


SIGNALLED = """
import asyncio, os, signal, threading, time
from planetserve import cli

async def main(stop):
    send(NUMBER)
    await stop.wait()
    print("drains", flush=True)
    BODY
    print("left", flush=True)

def send(number):
    os.kill(os.getpid(), number)

def ends():
    cli.run_until_signalled(main)

cli.run("prog", ends)
"""


def signalled(number: int, body: str = "pass", **options: Any) -> tuple[int, str, str]:
    """A process whose `main` gets a signal, prints "drains", runs `body` and prints "left"."""
    code = SIGNALLED.replace("NUMBER", str(int(number))).replace("BODY", body)
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, timeout=50, check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_main_to_stop(number: signal.Signals) -> None:
    assert signalled(number) == (0, "drains\nleft\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_wait_for_the_drain(number: signal.Signals) -> None:
    body = f"send({int(number)}); await asyncio.Event().wait()"
    assert signalled(signal.SIGTERM, body) == (128 + number, "drains\n", "")


def test_a_second_signal_ends_a_release_that_hangs_and_a_loop_that_is_busy() -> None:
    body = f"send({int(signal.SIGINT)}); [time.sleep(0.1) for _ in range(1000)]"
    assert signalled(signal.SIGINT, body) == (130, "drains\n", "")


def test_no_thread_is_waited_for_after_a_signal() -> None:
    body = "threading.Thread(target=time.sleep, args=[1000]).start()"
    body += "; asyncio.get_running_loop().run_in_executor(None, time.sleep, 1000)"
    assert signalled(signal.SIGINT, body) == (0, "drains\nleft\n", "")


def test_nohup_keeps_a_closed_window_from_stopping_it() -> None:
    code = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\ndef ends"
    body = "print(stop.is_set())"
    script = SIGNALLED.replace("def ends", code).replace("await stop.wait()", body)
    script = script.replace("NUMBER", str(int(signal.SIGHUP))).replace("BODY", "pass")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout) == (0, "False\ndrains\nleft\n")


def test_errors_of_main_come_through() -> None:
    async def main(_: asyncio.Event) -> None:
        raise CapacityError("full")

    with pytest.raises(CapacityError, match="full"):
        cli.run_until_signalled(main)


@pytest.mark.parametrize("place", ["/dev/full", "closed pipe"])
def test_what_cannot_be_printed_goes_to_the_log(place: str) -> None:
    """A server whose disk is full, or whose output nobody reads any more, goes on serving."""
    reader, writer = os.pipe()
    os.close(reader)
    body = "cli.say('join with this address'); await asyncio.sleep(0)"
    with open(place if place.startswith("/") else writer, "w") as stdout:
        code = SIGNALLED.replace('print("drains", flush=True)', "pass").replace("BODY", body)
        code = code.replace("NUMBER", "2").replace('print("left", flush=True)', "cli.say('left')")
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True,
            timeout=50, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cannot write to stdout" in done.stderr
    assert "join with this address" in done.stderr


def test_a_result_that_cannot_be_printed_is_an_error_of_one_line() -> None:
    with open("/dev/full", "w") as stdout:
        done = subprocess.run(
            [sys.executable, "-c", "from planetserve import cli; cli.run('x', lambda: print(1))"],
            stdout=stdout, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith("error: cannot write the output: No space left on device\n")
    assert done.stderr.count("\n") == 1


def test_closed_standard_files_are_not_taken_for_others() -> None:
    code = "import os; from planetserve import cli; os.close(0); os.close(1); os.close(2); "
    code += "cli.run('prog', lambda: os._exit(40 + os.open('/dev/null', 0)))"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode >= 43


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planetserve.run_server", "demo"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("python -m planetserve.run_server: error: say which blocks")
    assert done.stderr.count("\n") == 1
