"""docs/snapshot.schema.json says what `SwarmSnapshot.from_json` does, as far as a schema can."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planetserve.errors import ConfigError
from planetserve.routing.snapshot import SwarmSnapshot

DOCS = Path(__file__).resolve().parents[3] / "docs"
SCHEMA = json.loads((DOCS / "snapshot.schema.json").read_text(encoding="utf-8"))
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float)}


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """JSON Schema, the keywords that the file uses; the first that fails decides."""
    for key, wanted in schema.items():
        if key == "additionalProperties":
            rest = [
                item for name, item in value.items() if name not in schema.get("properties", {})
            ]
            fits = not rest if wanted is False else all(valid(item, wanted) for item in rest)
        else:
            fits = KEYWORDS[key](value, wanted)
        if not fits:
            return False
    return True


KEYWORDS: dict[str, Callable[[Any, Any], bool]] = {
    "type": lambda value, name: isinstance(value, TYPES[name]) and not isinstance(value, bool),
    "const": lambda value, wanted: type(value) is type(wanted) and value == wanted,
    "not": lambda value, schema: not valid(value, schema),
    "minimum": lambda value, least: value >= least,
    "maximum": lambda value, most: value <= most,
    "minLength": lambda value, least: len(value) >= least,
    "maxLength": lambda value, most: len(value) <= most,
    "required": lambda value, names: set(names) <= set(value),
    "items": lambda value, schema: all(valid(item, schema) for item in value),
    "properties": lambda value, schemas: all(
        valid(item, schemas[name]) for name, item in value.items() if name in schemas
    ),
    **dict.fromkeys(("$schema", "title", "description", "default"), lambda value, _: True),
}


def example() -> dict[str, Any]:
    """The one on the page."""
    text = (DOCS / "plan.md").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text.partition("```json\n")[2].partition("```")[0])
    return found


def test_the_example_is_valid_for_both() -> None:
    assert valid(example(), SCHEMA)
    assert len(SwarmSnapshot.from_json(json.dumps(example())).servers) == 2


CHANGES: list[tuple[tuple[Any, ...], list[Any]]] = [
    (("version",), [2, True, "1", 1.5, None]),
    (("num_blocks",), [0, 4097, -1, 8.5, "8", True]),
    (("surprise",), [1]),
    (("servers",), [{}, 1]),
    (("servers", 0), ["s1", None]),
    (("servers", 0, "id"), ["", "client", 7, "x" * 129]),
    (("servers", 0, "start"), [-1, 0.5, "0", True]),
    (("servers", 0, "end"), [4097, None]),
    (("servers", 0, "free_cache_tokens"), [-1, 1.5, 10**16]),
    (("servers", 0, "gpu"), ["H100"]),
    (("rtt_ms",), [[], 1]),
    (("rtt_ms", "s1"), [5, []]),
    (("rtt_ms", "s1", "s2"), [-1, "12", 1e16]),
    *[((name,), [-1, 1e16, "1", True, None]) for name in
      ("activation_bytes_per_token", "hop_overhead_ms", "default_rtt_ms")],
    *[(("servers", 0, name), [-1, 1e16, "1", False]) for name in
      ("decode_ms_per_block", "tokens_per_s_per_block", "network_bytes_per_s", "reputation",
       "price", "wait_ms")],
    *[(("servers", 0, name), [0, 1e-10]) for name in
      ("tokens_per_s_per_block", "network_bytes_per_s")],
]  # fmt: skip


@pytest.mark.parametrize(("path", "values"), CHANGES, ids=lambda part: str(part)[:40])
def test_both_refuse_the_same(path: tuple[Any, ...], values: list[Any]) -> None:
    for value in values:
        changed = example()
        target: Any = changed
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        assert not valid(changed, SCHEMA), value
        with pytest.raises(ConfigError):
            SwarmSnapshot.from_json(json.dumps(changed))


def test_both_need_the_same_keys() -> None:
    for inside in ("", "servers"):
        document = example()
        part = document["servers"][0] if inside else document
        for key in list(part):
            changed = copy.deepcopy(document)
            del (changed["servers"][0] if inside else changed)[key]
            if valid(changed, SCHEMA):
                SwarmSnapshot.from_json(json.dumps(changed))
            else:
                with pytest.raises(ConfigError):
                    SwarmSnapshot.from_json(json.dumps(changed))
