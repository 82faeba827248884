"""Messages of libp2p's Kademlia, as far as peer routing needs them; hivemind brings none.

https://github.com/libp2p/specs/blob/master/kad-dht/README.md#rpc-messages
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, message_factory  # type: ignore[import-untyped]

_Field = descriptor_pb2.FieldDescriptorProto


def _field(name: str, number: int, *, repeated: bool = False, **options: object) -> Any:
    label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    return _Field(name=name, number=number, label=label, **options)


_PEER = descriptor_pb2.DescriptorProto(
    name="Peer",
    field=[
        _field("id", 1, type=_Field.TYPE_BYTES),
        _field("addrs", 2, type=_Field.TYPE_BYTES, repeated=True),
    ],
)
_MESSAGE = descriptor_pb2.DescriptorProto(
    name="Message",
    nested_type=[_PEER],
    field=[
        _field("type", 1, type=_Field.TYPE_UINT32),
        _field("key", 2, type=_Field.TYPE_BYTES),
        _field(
            "closer_peers", 8, repeated=True, type=_Field.TYPE_MESSAGE,
            type_name=".planetserve.kademlia.Message.Peer",
        ),
    ],
)  # fmt: skip
_FILE = descriptor_pb2.FileDescriptorProto(
    name="planetserve/kademlia.proto",
    package="planetserve.kademlia",
    syntax="proto3",
    message_type=[_MESSAGE],
)

Message = message_factory.GetMessages([_FILE])["planetserve.kademlia.Message"]
"""`type`, `key`, and `closer_peers`, each with `id` and `addrs`."""

FIND_NODE = 4
PING = 5
