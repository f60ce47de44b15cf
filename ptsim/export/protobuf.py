"""How a protobuf message is written: the few wire types that Chakra's schema needs, without a generated class.

Source: the wire format of Protocol Buffers, https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

_VARINT, _LENGTH = 0, 2


def varint(value: int) -> bytes:
    """`value` in base 128, low group first; negative numbers as 64-bit two's complement.

    Raises:
        ValueError: the value does not fit in 64 bits.
    """
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{value} does not fit in a 64-bit varint")
    value &= 2**64 - 1
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def integer(field: int, value: int) -> bytes:
    """A field of type int32, int64, uint32, uint64, bool or enum."""
    return varint(field << 3 | _VARINT) + varint(value)


def block(field: int, content: bytes) -> bytes:
    """A field of type bytes or message, or packed repeated integers."""
    return varint(field << 3 | _LENGTH) + varint(len(content)) + content


def text(field: int, value: str) -> bytes:
    """A field of type string."""
    return block(field, value.encode())


def packed(field: int, values: list[int]) -> bytes:
    """A repeated integer field; nothing where there are no values."""
    return block(field, b"".join(map(varint, values))) if values else b""
