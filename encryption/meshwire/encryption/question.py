"""The packet that a quiet peer is sent: an ICMP echo reply to nobody's request, from node to node. Whoever
gets it throws it away without a word; only its WireGuard, for which it is data, has to answer. Pure."""

from __future__ import annotations

import struct
from typing import Final

from meshwire.api.fields import Address

_IPV4: Final = struct.Struct("!BBHHHBBH4s4s")
_IPV6: Final = struct.Struct("!IHBB16s16s")
_ICMP: Final = struct.Struct("!BBHHH")
_DONT_FRAGMENT: Final = 0x4000
_HOP_LIMIT: Final = 1
"""It is not to be forwarded."""
_ICMPV4: Final = 1
_ICMPV6: Final = 58
_ECHO_REPLY: Final = {4: 0, 6: 129}


def question(source: Address, target: Address) -> bytes:
    """An IP packet. Raises ValueError where the addresses are of two families."""
    if source.version != target.version:
        raise ValueError(f"{source} and {target} are of two families")
    # An identifier of 0 is no ping's.
    bare = _ICMP.pack(_ECHO_REPLY[source.version], 0, 0, 0, 0)
    if source.version == 4:
        message = _ICMP.pack(_ECHO_REPLY[4], 0, checksum(bare), 0, 0)
        fields = (0x45, 0, _IPV4.size + len(message), 0, _DONT_FRAGMENT, _HOP_LIMIT, _ICMPV4)
        head = _IPV4.pack(*fields, 0, source.packed, target.packed)
        return _IPV4.pack(*fields, checksum(head), source.packed, target.packed) + message
    pseudo = source.packed + target.packed + struct.pack("!II", len(bare), _ICMPV6)
    message = _ICMP.pack(_ECHO_REPLY[6], 0, checksum(pseudo + bare), 0, 0)
    return _IPV6.pack(6 << 28, len(message), _ICMPV6, _HOP_LIMIT, source.packed, target.packed) + message


def checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(word for (word,) in struct.iter_unpack("!H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
