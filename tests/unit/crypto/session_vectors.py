"""The session crypto once more, written down plainly, and what it gives for fixed inputs.

Nothing here imports the package: HKDF is built from `hmac`, AES-GCM from the streaming cipher, so
that the constants below follow from the text of docs/protocol.md and not from the code they test.
Key pairs: RFC 7748, 6.1 (Alice is the client, Bob the hop); RFC 8032, 7.1, test 1 (the hop's
identity).
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

CLIENT_PRIVATE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
HOP_PRIVATE = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
HOP_IDENTITY = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
SESSION = bytes(range(16))
EDGE = 1
OPEN_PAYLOAD = b'{"example":"exactly the bytes of OPEN"}'
INBOUND, OUTBOUND = bytes(range(0x20, 0x40)), bytes(range(0x40, 0x60))
HEADER_HEX = (
    "01" "04" "0001" + SESSION.hex() + "0001" "00" "00" "00000000" "0000000000000000"
    "00000005" "00000007" "00000002" "0004" "0008" "01" "00" "02" "00"
    "00000002" "00000003" "00000000" "00000000" "0000" "0001" "00000038"
)  # fmt: skip
"""STEP, keep-last, edge 1, forward, epoch 0, sequence 0, step 5, position 7, 2 tokens, blocks 4:8,
float32 [2, 3], chunk 0 of 1, 56 bytes of payload."""
PLAINTEXT = bytes.fromhex("00000001000000000007000000020000") + bytes(range(24))

EXPECTED = {
    "peer id": "12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV",
    "offer": "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
    "answer": "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
    "transcript": "52eac248235aa416b481400f1c559c5eb16a72e575e07334993965b38c95a160",
    "signature": (
        "408ad1be58f5374d18be5f0590515ee12ba2a797fcd4125952eb0474ed73c220"
        "0be112162fc01168106756d1cf63222b1c73745601d748807fdf90a56ca17300"
    ),
    "shared": "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
    "secret": "f8d02c961ab87f694b22412b652b3b621fa1356e012897fda5fc9a6d4e2dab7a",
    "client to hop": ("6e054136de7c83480c484fe0863b302f9b4f4a76520cbcc933244454905a8e32266d265a"),
    "hop to client": ("ae1c6a2f17eb4c1e1f8dd92889b0400de2a617ff77a9a490c2659a2825e7c019d1ecb059"),
    "edge keys of epoch 0": (
        "f892fba366b6ddac43d60d7b8159781245801fa444dda55ac53c99e2a24961c2"
        "1ecafcada3add312731a1d5ad702366765fc0bf7aa0463f38dc45fedbfaaf57c"
        "8ba2db9b120175dc5ab29f420e8d96f8de91928d"
    ),
    "edge keys of epoch 1": (
        "3e2c7967363bdefb7dd38d83819ee7a7bd6cd8ca0f56ebc4da9c8ae2d9d75805"
        "46fd235ac59b13f046b10eef75d700c4f30a26574b289c07064d67d615156e77"
        "dd44c3db4a74ee570d5cb9c8fdb39c1135966f6c"
    ),
    "edge, epoch 0, forward": (
        "ff53929a0d73f2702d17d6bdbfe0f6804a74c0c777a28210979f6db09c1461e76907dd4c"
    ),
    "edge, epoch 0, backward": (
        "cef3e3a4e94ee2bea4ec260c7cd59b9926e03c49e1645e159f00a733220fdaf4149d5a19"
    ),
    "edge, epoch 1, forward": (
        "584ad3e23ff70844657b6e478d7e4016787b451b7e8e11f8e24056c11274e8713abd754f"
    ),
    "payload 0": (
        "89fe45e82a775cee11f24e1003cd9b535c8e216f795caff0a0f40e41eb77e0b5"
        "56d1190cf82d7b19810c9e99606177d417828626724f4246"
    ),
    "payload 1": (
        "df064b125681272618b6ea8e517314dba3be3fc5641f117bfd52d3d71dc59c2c"
        "94978a46a279b4adda013e3c2769db9fd8e60e49189b6fec"
    ),
}


def hkdf_extract(salt: bytes, material: bytes) -> bytes:
    """RFC 5869, 2.2."""
    return hmac.digest(salt or bytes(32), material, "sha256")


def hkdf_expand(key: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, 2.3."""
    output = block = b""
    for number in range(1, 256):
        block = hmac.digest(key, block + info + bytes([number]), "sha256")
        output += block
        if len(output) >= length:
            return output[:length]
    raise ValueError(length)


def gcm_seal(material: bytes, counter: int, plaintext: bytes, associated: bytes) -> bytes:
    """AES-256-GCM with `material` = key (32 bytes) and salt (4 bytes); tag last."""
    nonce = material[32:36] + struct.pack(">Q", counter)
    cipher = Cipher(algorithms.AES(material[:32]), modes.GCM(nonce)).encryptor()
    cipher.authenticate_additional_data(associated)
    sealed = cipher.update(plaintext) + cipher.finalize()
    return sealed + cipher.tag


def base58(data: bytes) -> str:
    letters = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = letters[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text


def compute() -> dict[str, str]:
    """Everything in `EXPECTED`, from the inputs above."""
    client = X25519PrivateKey.from_private_bytes(CLIENT_PRIVATE)
    hop = X25519PrivateKey.from_private_bytes(HOP_PRIVATE)
    identity = Ed25519PrivateKey.from_private_bytes(HOP_IDENTITY)
    offer, answer = client.public_key().public_bytes_raw(), hop.public_key().public_bytes_raw()
    public = identity.public_key().public_bytes_raw()
    peer_id = base58(bytes.fromhex("002408011220") + public)
    transcript = hashlib.sha256(
        b"planetserve/1 handshake"
        + SESSION
        + struct.pack(">HH", EDGE, len(peer_id))
        + peer_id.encode()
        + struct.pack(">I", len(OPEN_PAYLOAD))
        + OPEN_PAYLOAD
        + offer
        + answer
    ).digest()
    context = b"session handshake"
    signature = identity.sign(b"planetserve" + bytes([len(context)]) + context + transcript)
    shared = client.exchange(X25519PublicKey.from_public_bytes(answer))
    secret = hkdf_expand(hkdf_extract(transcript, shared), b"planetserve/1 secret", 32)
    to_hop = hkdf_expand(secret, b"planetserve/1 channel\x00", 36)
    to_client = hkdf_expand(secret, b"planetserve/1 channel\x01", 36)
    label = b"planetserve/1 deal"
    sealed_keys = [
        gcm_seal(to_hop, 0, struct.pack(">I", 0) + INBOUND + OUTBOUND, label),
        gcm_seal(to_hop, 1, struct.pack(">I", 1) + OUTBOUND + INBOUND, label),
    ]
    edge = b"planetserve/1 edge" + SESSION + struct.pack(">H", EDGE)
    pseudorandom = hkdf_extract(b"", INBOUND)
    forward = hkdf_expand(pseudorandom, edge + struct.pack(">IB", 0, 0), 36)
    backward = hkdf_expand(pseudorandom, edge + struct.pack(">IB", 0, 1), 36)
    next_epoch = hkdf_expand(pseudorandom, edge + struct.pack(">IB", 1, 0), 36)
    first = bytearray.fromhex(HEADER_HEX)
    second = bytearray(first)
    second[28:36] = struct.pack(">Q", 1)
    values = {
        "offer": offer,
        "answer": answer,
        "transcript": transcript,
        "signature": signature,
        "shared": shared,
        "secret": secret,
        "client to hop": to_hop,
        "hop to client": to_client,
        "edge keys of epoch 0": sealed_keys[0],
        "edge keys of epoch 1": sealed_keys[1],
        "edge, epoch 0, forward": forward,
        "edge, epoch 0, backward": backward,
        "edge, epoch 1, forward": next_epoch,
        "payload 0": gcm_seal(forward, 0, PLAINTEXT, bytes(first)),
        "payload 1": gcm_seal(forward, 1, PLAINTEXT, bytes(second)),
    }
    return {"peer id": peer_id} | {name: value.hex() for name, value in values.items()}
