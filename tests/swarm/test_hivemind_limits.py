"""What strangers' bytes may not do to hivemind's decoders. Dangerous input runs in a subprocess."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import time

import msgpack
import pytest
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, PeerID
from hivemind.utils.serializer import MSGPackSerializer
from hypothesis import given
from hypothesis import strategies as st

from planetserve.errors import RemoteProtocolError
from planetserve.swarm.dht import hivemind_limits
from planetserve.wire.frame import MAX_STEP_BYTES


def nested_extensions(code: int, depth: int) -> bytes:
    """A value inside `depth` extensions of one type."""
    data = b"\xc0"
    for _ in range(depth):
        inner = b"\x91" + data if code == 0x40 else data
        data = b"\xc9" + len(inner).to_bytes(4, "big") + bytes([code]) + inner
    return data


def nested_arrays(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


DECODE = """
import sys
from planetserve.swarm.dht import hivemind_limits
from hivemind.utils.serializer import MSGPackSerializer
from planetserve.errors import RemoteProtocolError
for line in sys.stdin:
    try:
        MSGPackSerializer.loads(bytes.fromhex(line))
    except RemoteProtocolError:
        print("refused", flush=True)
"""


def test_deep_values_do_not_end_the_process() -> None:
    values = [
        nested_extensions(0x40, 150),
        nested_extensions(0x40, 2000),
        nested_extensions(0x50, 2000),
        nested_arrays(100_000),
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DECODE],
        input="\n".join(data.hex() for data in values),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split() == ["refused"] * len(values)


@pytest.mark.parametrize(
    "value",
    [None, True, -1, 2**63, 1.5, "text", b"bytes", [1, [2, [3]]], {"a": [1, 2]}, (1, (2, "x"))],
)
def test_ordinary_values_pass_unchanged(value: object) -> None:
    assert MSGPackSerializer.loads(MSGPackSerializer.dumps(value)) == value


def test_a_full_dictionary_of_records_passes() -> None:
    records = DictionaryDHTValue()
    expires_at_s = time.time() + 60
    for number in range(256):
        records.store(f"{number:052}", bytes(4096), expires_at_s)
    loaded = MSGPackSerializer.loads(MSGPackSerializer.dumps(records))
    assert isinstance(loaded, DictionaryDHTValue)
    assert len(loaded) == 256
    assert loaded.get(f"{7:052}").value == bytes(4096)
    assert loaded.get(f"{7:052}").expiration_time == expires_at_s


@pytest.mark.parametrize(
    "items",
    [
        [["a", b"v", math.inf]],
        [["a", b"v", math.nan]],
        [["a", "text", 1.0]],
        [[1, b"v", 1.0]],
        [["a", b"v"]],
        [[["a"], b"v", 1.0]],
        "text",
    ],
)
def test_dictionaries_of_other_things_are_refused(items: object) -> None:
    packed = msgpack.packb(msgpack.ExtType(0x50, msgpack.packb([None, 1.0, items])))
    with pytest.raises(RemoteProtocolError):
        MSGPackSerializer.loads(packed)


def test_the_senders_size_limit_of_a_dictionary_is_ignored() -> None:
    items = [["a", b"1", 9e9], ["b", b"2", 9e9]]
    packed = msgpack.packb(msgpack.ExtType(0x50, msgpack.packb(["many", "later", items])))
    loaded = MSGPackSerializer.loads(packed)
    assert isinstance(loaded, DictionaryDHTValue)
    assert loaded.maxsize == math.inf
    assert {key: item.value for key, item in loaded.items()} == {"a": b"1", "b": b"2"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xc0\xc0",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc7\x05\x40\xc0",
        b"\xc7\x02\x40\xc0\xc0",
        b"\xd4\x51\xc0",
        b"\xc4\x05abc",
        bytes(hivemind_limits.MAX_DECODED_BYTES + 1),
        b"\xdc\xff\xff" + b"\xc0" * 65535,
    ],
)
def test_malformed_values_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        hivemind_limits.check_msgpack(data)


@given(st.binary(max_size=64))
def test_the_check_and_the_decoder_agree(data: bytes) -> None:
    """What passes the check never surprises the decoder with its structure."""
    try:
        hivemind_limits.check_msgpack(data)
    except RemoteProtocolError:
        return
    try:
        MSGPackSerializer.loads(data)
    except (RemoteProtocolError, ValueError, TypeError, UnicodeDecodeError):
        # Text that is not UTF-8, keys of maps that are no text, dictionaries of other things.
        return


async def test_a_stream_message_has_a_largest_size() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data((2**62).to_bytes(8, "big"))
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        await P2P.receive_raw_data(reader)
    reader = asyncio.StreamReader()
    reader.feed_data((3).to_bytes(8, "big") + b"abc")
    assert await P2P.receive_raw_data(reader) == b"abc"
    assert hivemind_limits.MAX_STREAM_MESSAGE_BYTES < MAX_STEP_BYTES + 1024


def test_a_long_peer_id_is_refused_before_it_is_written_out() -> None:
    with pytest.raises(RemoteProtocolError):
        PeerID(bytes(1 << 20))
    assert PeerID(b"\x12\x20" + bytes(32)).to_base58().startswith("Qm")


def test_installing_twice_changes_nothing() -> None:
    before = MSGPackSerializer.loads, DictionaryDHTValue.unpackb, P2P.receive_raw_data
    hivemind_limits.install()
    assert (MSGPackSerializer.loads, DictionaryDHTValue.unpackb, P2P.receive_raw_data) == before
