"""What the threat model page says can be looked up: the measurement's file, the settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

from planetserve.config import ClientConfig, ServerConfig
from planetserve.wire.messages import ErrorReply, Progress, SessionOpened

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "threat_model.md").read_text(encoding="utf-8")
RESULT = json.loads(
    (ROOT / "benchmarks" / "results" / "prompt_recovery.json").read_text(encoding="utf-8")
)


def test_the_table_is_that_of_the_committed_run() -> None:
    rows = RESULT["recovered_share_by_depth"]
    assert [row["depth"] for row in rows] == list(range(9))
    for row in rows:
        cells = [f"{row[name]:.0%}" for name in ("cosine", "l2", "probe", "search")]
        assert f"| {row['depth']} | {' | '.join(cells)} |" in PAGE
    for count in ("num_tokens", "num_prompts", "num_searched_tokens", "num_probe_tokens"):
        assert f"{RESULT[count]:,}" in PAGE


def test_settings_on_the_page_exist() -> None:
    known = {*ClientConfig.__dataclass_fields__, *ServerConfig.__dataclass_fields__}
    prose = re.sub(
        r"## What each message field gives a liar.*?(?=\n## )", "", PAGE, flags=re.DOTALL
    )
    named = re.findall(r"`(?:--)?([a-z]+(?:_[a-z]+)+)(?:=[^`]*)?`", prose)
    assert len(set(named)) > 10
    assert set(named) <= known


def test_the_table_of_what_servers_send_is_complete_and_its_tests_exist() -> None:
    heading = "## What each message field gives a liar: servers to clients\n"
    table = PAGE.split(heading)[1].split("\n## ")[0]
    for message in (SessionOpened, Progress, ErrorReply):
        assert [name for name in message.model_fields if f"`{name}`" not in table] == []
    files = set(re.findall(r"`([a-z_/]+\.py)`", table))
    assert len(files) > 8
    assert [name for name in files if not (ROOT / "tests" / name).is_file()] == []
