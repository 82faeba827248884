"""`planetserve plan` on snapshot files: what it prints, what it refuses, and that it is right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planetserve import cli
from planetserve.errors import ConfigError
from planetserve.plan import main, parse
from planetserve.plan.command import parse_pick
from planetserve.routing.cost import check_chain
from planetserve.routing.optimizers import OPTIMIZERS
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.testing.brute_force import all_chains, random_snapshot
from planetserve.types import Chain, Hop

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plan.md"


def document() -> dict[str, Any]:
    """Two ways through six blocks: `whole` alone, slow and steady, or `a` and `b`."""
    servers = [("whole", 0, 6, 5.0, 6000.0), ("a", 0, 4, 2.0, 1200.0), ("b", 2, 6, 2.0, 1200.0)]
    return {
        "version": 1,
        "num_blocks": 6,
        "activation_bytes_per_token": 1000,
        "hop_overhead_ms": 1.0,
        "default_rtt_ms": 4.0,
        "servers": [
            {
                "id": name,
                "start": start,
                "end": end,
                "decode_ms_per_block": decode,
                "tokens_per_s_per_block": rate,
                "network_bytes_per_s": 1e7,
                "free_cache_tokens": 800,
            }
            for name, start, end, decode, rate in servers
        ],
        "rtt_ms": {"client": {"whole": 10.0}},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "swarm.json"
    file.write_text(json.dumps(document()))
    return file


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON that the command prints."""
    main([*arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def as_chain(entry: dict[str, Any]) -> Chain:
    return Chain(tuple(Hop(hop["server"], hop["start"], hop["end"]) for hop in entry["hops"]))


def test_json_of_one_chain(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--snapshot", str(path))
    assert found.pop("solve_ms") > 0
    # a and b: three half round trips of 2, two hops of 1 + 0.1, six blocks of 2
    chain = found.pop("chains")[0]
    assert {hop["server"] for hop in chain["hops"]} == {"a", "b"}
    assert chain["latency_ms"] == pytest.approx(3 * 2 + 2 * 1.1 + 12)
    assert chain["tokens_per_s"] == pytest.approx(1000 / 20.2)
    assert found == {
        "version": 1,
        "optimizer": "shortest_path",
        "pick": None,
        "prompt_tokens": 0,
        "output_tokens": 0,
        "cache_tokens": 0,
        "num_blocks": 6,
        "num_servers": 3,
        "exact": None,
        "picked": 0,
    }


def test_a_front_lists_every_chain_and_marks_the_picked_one(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pick, expected in (("latency", 0), ("throughput", -1)):
        found = planned(
            capsys, "--snapshot", str(path), "--optimizer", "pareto_exact", "--pick", pick
        )
        assert found["exact"] is True
        assert len(found["chains"]) > 1
        assert found["picked"] == expected % len(found["chains"])
        main(["--snapshot", str(path), "--optimizer", "pareto_exact", "--pick", pick])
        text = capsys.readouterr().out
        marked = [line for line in text.splitlines() if line.startswith("->")]
        assert [int(line.split()[1]) for line in marked] == [found["picked"]]
        for number, chain in enumerate(found["chains"]):
            row = next(line for line in text.splitlines() if re.match(rf"(->)?\s+{number} ", line))
            assert f"{chain['latency_ms']:.2f}" in row
            assert f"{chain['throughput_tokens_per_s']:.2f}" in row
            for hop in chain["hops"]:
                assert f"{hop['server']} {hop['start']}:{hop['end']}" in row
        picked = found["chains"][found["picked"]]
        assert f"latency_ms: {picked['latency_ms']:.2f}" in text
        assert "solve time" in text


def test_the_pick_by_request_takes_the_least_time_of_all(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picks = set()
    for prompt, output in ((400, 0), (400, 400), (0, 400), (700, 3)):
        found = planned(
            capsys, "--snapshot", str(path), "--optimizer", "pareto_exact",
            "--pick", f"request:{prompt}:{output}",
        )  # fmt: skip
        times = [
            1000 * prompt / c["throughput_tokens_per_s"] + output * c["latency_ms"]
            for c in found["chains"]
        ]
        assert [c["request_ms"] for c in found["chains"]] == pytest.approx(times)
        assert found["picked"] == int(np.argmin(times))
        assert found["cache_tokens"] == prompt + output
        picks.add(found["picked"])
    assert len(picks) > 1


def test_a_request_needs_room_for_its_tokens(path: Path) -> None:
    line = ["--snapshot", str(path), "--pick", "request:600:300"]
    with pytest.raises(ConfigError, match="free cache for 900 tokens"):
        main(line)
    main([*line, "--cache_tokens", "100"])


@pytest.mark.parametrize(
    ("flags", "servers"),
    [
        (["--blocked_servers", "b"], {"whole", "a"}),
        (["--allowed-servers", "whole"], {"whole"}),
        (["--trusted_servers", "whole", "--trusted-blocks", "0:1"], {"whole", "a", "b"}),
        (["--trusted_servers", "whole"], {"whole", "a", "b"}),
        (["--cache_tokens", "800"], {"a", "b"}),
    ],
)
def test_filters_hold(
    path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], servers: set[str]
) -> None:
    found = planned(capsys, "--snapshot", str(path), *flags)
    hops = found["chains"][0]["hops"]
    assert {hop["server"] for hop in hops} <= servers
    if "--trusted_servers" in flags:
        assert hops[0]["server"] == "whole"


def test_reputation_is_a_filter(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = document()
    changed["servers"][1]["reputation"] = 0.5
    path.write_text(json.dumps(changed))
    found = planned(capsys, "--snapshot", str(path), "--min_reputation", "0.6")
    assert "a" not in {hop["server"] for hop in found["chains"][0]["hops"]}


@pytest.mark.parametrize("name", ["shortest_path", "pareto_exact"])
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
def test_the_command_finds_what_brute_force_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, scale: float
) -> None:
    rng = np.random.default_rng(int(1000 * scale))
    for number in range(30):
        made = random_snapshot(rng, int(rng.integers(1, 7)), int(rng.integers(1, 9)), scale)
        file = tmp_path / f"{number}.json"
        made.save(file)
        snapshot = SwarmSnapshot.load(file)
        _, latency, throughput = all_chains(snapshot)
        expected: list[tuple[float, float]] = []
        for i in np.lexsort((-throughput, latency)):
            if not expected or throughput[i] > expected[-1][1] * (1 + 1e-12):
                expected.append((float(latency[i]), float(throughput[i])))
        found = planned(capsys, "--snapshot", str(file), "--optimizer", name)
        got = [(c["latency_ms"], c["throughput_tokens_per_s"]) for c in found["chains"]]
        for entry in found["chains"]:
            check_chain(snapshot, as_chain(entry))
        if name == "shortest_path":
            expected, got = [expected[0][:1]], [got[0][:1]]  # type: ignore[list-item]
        else:
            assert found["exact"] is True
        assert len(got) == len(expected)
        np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_plans_and_repeats_itself_with_a_seed(
    path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    line = ["--snapshot", str(path), "--optimizer", name, "--seed", "5"]
    first, second = planned(capsys, *line), planned(capsys, *line)
    assert first["chains"] == second["chains"]
    assert first["picked"] == second["picked"]
    for entry in first["chains"]:
        check_chain(SwarmSnapshot.load(path), as_chain(entry))


@pytest.mark.parametrize("objectives", [3, 4])
def test_reputation_and_price_count_only_where_a_snapshot_has_them(
    path: Path, capsys: pytest.CaptureFixture[str], objectives: int
) -> None:
    name = f"nsga2:objectives={objectives},population=20,generations=5"
    line = ["--snapshot", str(path), "--optimizer", name]
    with pytest.raises(ConfigError, match="no live swarm announces yet; use objectives=2"):
        main(line)
    document = json.loads(path.read_text())
    document["servers"][0]["reputation"] = 0.5
    path.write_text(json.dumps(document))
    chain = planned(capsys, *line)["chains"][0]
    assert {"latency_ms", "price", "reputation"} <= set(chain)


def test_options_of_an_optimizer(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--snapshot", str(path), "--optimizer"]
    for text, says in (
        ("nsga2:objectives=5", "2, 3 or 4"),
        ("nsga2:speed=5", "no option 'speed'; its options are objectives"),
        ("greedy:seed=1", "it has no options"),
        ("nsga2:population", "option=value"),
        ("nsga2:population=many", "population='many' must be int"),
        ("random:seed=-1", "seed"),
    ):
        with pytest.raises(ConfigError, match=says):
            main([*line, text])


def test_an_optimizer_with_one_chain_says_that_there_is_nothing_to_pick(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--snapshot", str(path), "--optimizer", "greedy", "--pick", "throughput"])
    assert capsys.readouterr().err.startswith("note: greedy plans one chain")


def test_a_saved_snapshot_gives_the_same_plan(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.json"
    first = planned(capsys, "--snapshot", str(path), "--save-snapshot", str(copy))
    second = planned(capsys, "--snapshot", str(copy))
    assert SwarmSnapshot.load(copy) == SwarmSnapshot.load(path)
    assert first["chains"] == second["chains"]


@pytest.mark.parametrize("name", ["shortest_path", "pareto_exact"])
def test_a_picture_is_drawn(path: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan"
    main(["--snapshot", str(path), "--optimizer", name, "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_without_matplotlib_nothing_is_planned(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from planetserve.plan import plot

    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'planetserve\[plot\]'"):
        main(["--snapshot", str(path), "--plot", "plan.png"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, (None, 0, 0)),
        ("knee", ("knee", 0, 0)),
        ("request:12:0", ("request", 12, 0)),
        ("request:0:7", ("request", 0, 7)),
    ],
)
def test_picks(text: str | None, expected: tuple[str | None, int, int]) -> None:
    assert parse_pick(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "best", "request", "request:1", "request:1:2:3", "request:-1:2", "request:a:b",
     "request:0:0", "request:1.5:2", "request:٣:1", "knee:1:2", "request:1:" + "9" * 5000],
)  # fmt: skip
def test_what_is_no_pick(text: str) -> None:
    with pytest.raises(ConfigError, match="is none of: knee, latency, throughput, request:P:G"):
        parse_pick(text)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "nothing to plan on"),
        ("demo", "nothing to plan on"),
        ("--initial_peers /x", "say which MODEL"),
        ("demo --initial_peers /x --snapshot y", "not both"),
        ("demo --snapshot y", "not both"),
        ("--snapshot y --min_reputation -1", "min_reputation"),
        ("--snapshot y --cache_tokens -1", "cache_tokens"),
        ("--snapshot y --seed 1.5", "seed"),
        ("--snapshot y --log_level loud", "log_level"),
        ("--snapshot y --optimiser x", "--optimizer"),
    ],
)
def test_command_lines_that_make_no_sense(line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(line.split())


def _changed(path: tuple[Any, ...], value: object) -> str:
    changed = document()
    target: Any = changed
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return json.dumps(changed)


BAD_FILES = {
    "blocks that nobody holds": (
        _changed(("num_blocks",), 9), "no server holds blocks 6:9"),
    "no servers": (json.dumps(document() | {"servers": [], "rtt_ms": {}}),
                   "no server holds blocks 0:6"),
    "a negative number": (_changed(("servers", 0, "price"), -0.5), "price"),
    "a number that is none": (_changed(("default_rtt_ms",), float("nan")), "NaN"),
    "an infinite number": (_changed(("hop_overhead_ms",), float("inf")), "Infinity"),
    "an unknown id": (_changed(("rtt_ms", "client"), {"z": 1.0}), "'z', which is no server"),
    "a span outside the model": (_changed(("servers", 0, "end"), 7), "leaves the model"),
    "an id twice": (_changed(("servers", 0, "id"), "a"), "two servers have the id 'a'"),
    "a key twice": (json.dumps(document())[:-1] + ', "version": 1}', "repeats the key 'version'"),
    "unequal directions": (
        _changed(("rtt_ms", "whole"), {"client": 11.0}), "twice with unequal values"),
    "an unknown key": (_changed(("servers", 0, "gpu"), "H100"), "unknown key 'gpu'"),
    "deep nesting": ("[" * 200_000, "not valid JSON"),
    "no JSON": ("hello", "not valid JSON"),
    "nothing": ("", "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_one_line_and_no_plan(
    path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    text, says = BAD_FILES[case]
    path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        cli.run("planetserve", lambda: main(["--snapshot", str(path)]))
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert says in output.err


def test_a_file_of_100_mb_is_not_read(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with path.open("r+b") as file:
        file.truncate(100 * 10**6)
    with pytest.raises(ConfigError, match="longer than 64 MiB"):
        main(["--snapshot", str(path)])


@pytest.mark.parametrize("flag", ["--allowed_servers", "--blocked_servers", "--trusted_servers"])
def test_a_server_that_is_not_there_is_named(path: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag}: 'c' is no server of"):
        main(["--snapshot", str(path), flag, "a", "c"])


def test_the_process_exits_with_2_and_lists_the_optimizers(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planetserve.cli", "plan", "--snapshot", str(path),
         "--optimizer", "fastest"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "planetserve: error: unknown chain optimizer 'fastest'; choose one of: "
        f"{', '.join(OPTIMIZERS.names())}\n"
    )


def test_a_reader_that_leaves_early_is_no_error(path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "planetserve.cli", "plan", "--snapshot", str(path)],
        stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 141


def test_an_optimizer_of_another_package(path: Path, tmp_path: Path) -> None:
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[planetserve.chain_optimizers]\nlast_first = theirs:LastFirst\n"
    )
    (tmp_path / "theirs.py").write_text(
        "from planetserve.routing.problem import RoutingProblem\n"
        "class LastFirst:\n"
        "    def __init__(self, rank: int = -1):\n"
        "        self.rank = rank\n"
        "    def plan(self, snapshot, request):\n"
        "        problem = RoutingProblem.build(snapshot, request)\n"
        "        return problem.chain([row.nonzero()[0][self.rank] for row in problem.legal])\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "planetserve.plan", "--snapshot", str(path), "--json",
         "--optimizer", "last_first:rank=-1"],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    hops = json.loads(done.stdout)["chains"][0]["hops"]
    assert [(hop["server"], hop["start"], hop["end"]) for hop in hops] == [("a", 0, 2), ("b", 2, 6)]


def test_the_page_lists_the_keys_of_the_output(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## The JSON output")[2]
    outer, inner = section.split("| key of a chain |")
    found = planned(capsys, "--snapshot", str(path))

    def keys(table: str) -> set[str]:
        cells = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
        return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}

    assert keys(outer) == set(found)
    assert keys(inner) == set(found["chains"][0])
