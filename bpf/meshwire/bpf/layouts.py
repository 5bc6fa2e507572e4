"""What `bpf/include/meshwire/types.h` says, for Python. tests/bpf compares the two by BTF.

Multi-byte fields are in host byte order; addresses are bytes in network order."""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag
from typing import Final

MAX_PREFIXES: Final = 131072
MAX_NODES: Final = 16384
QUARANTINED: Final = 0xFFFFFFFF
"""As MW_QUARANTINED."""

FAMILY_BITS: Final = 32
"""Bits of a prefix that come before the address: `Prefix.prefixlen` counts them too."""


class Family(IntEnum):
    IPV4 = 4
    IPV6 = 6


class AddressFlag(IntFlag):
    POD = 1 << 0
    HOST = 1 << 1
    CLUSTER = 1 << 2


class SettingsFlag(IntFlag):
    STRICT = 1 << 0
    ENFORCING = 1 << 1
    PASS_OVERSIZED = 1 << 2


class Direction(IntEnum):
    EGRESS = 0
    INGRESS = 1


class Reason(IntEnum):
    """What became of a packet; from 128 on it was dropped."""

    NOT_OURS = 0
    ENCRYPTED = 1
    DECRYPTED = 2
    CLEAR_ALLOWED = 3
    CLEAR_LEAKED = 4
    CLEAR_HOST = 5
    TOO_BIG_ANSWERED = 6
    MSS_CLAMPED = 7
    CLEAR_ARRIVED = 8
    POLICY_ALLOWED = 9
    POLICY_REPLY = 10
    POLICY_NONE = 11
    POLICY_WOULD_DENY = 12
    POLICY_DEFERRED = 13
    DROP_NO_TUNNEL = 128
    DROP_UNKNOWN_NODE = 129
    DROP_CLEAR_ARRIVED = 130
    DROP_BAD_SOURCE = 131
    DROP_TOO_BIG = 132
    DROP_MALFORMED = 133
    DROP_ENCAPSULATED = 134
    DROP_BAD_DESTINATION = 135
    DROP_NO_SUCH_POD = 136
    DROP_POLICY_INGRESS = 137
    DROP_POLICY_EGRESS = 138
    DROP_SPOOFED_SOURCE = 139
    DROP_WRONG_POD = 140
    DROP_FRAGMENT_UNKNOWN = 141
    DROP_UNKNOWN_POD = 142
    DROP_PORTS_IN_USE = 143
    DROP_QUARANTINED = 144

    @property
    def dropped(self) -> bool:
        return self >= 128

    @property
    def of_policy(self) -> bool:
        """Counted by the policy programs alone."""
        return (
            Reason.POLICY_ALLOWED <= self <= Reason.POLICY_DEFERRED
            or Reason.DROP_POLICY_INGRESS <= self <= Reason.DROP_PORTS_IN_USE
        )


class Prefix(ctypes.Structure):
    """`struct mw_prefix`, the key of `ipcache` and `cidrs`."""

    _fields_ = [
        ("prefixlen", ctypes.c_uint32),
        ("family", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("addr", ctypes.c_uint8 * 16),
    ]


class Address(ctypes.Structure):
    """`struct mw_address`, the value of `ipcache`."""

    _fields_ = [
        ("identity", ctypes.c_uint32),
        ("node", ctypes.c_uint16),
        ("flags", ctypes.c_uint16),
    ]


class Node(ctypes.Structure):
    """`struct mw_node`, the value of `nodes`."""

    _fields_ = [("wg_ifindex", ctypes.c_uint32)]


class Settings(ctypes.Structure):
    """`struct mw_settings`, the one value of `settings`."""

    _fields_ = [
        ("flags", ctypes.c_uint32),
        ("local_node", ctypes.c_uint16),
        ("tunnel_mtu", ctypes.c_uint16),
    ]


class Counter(ctypes.Structure):
    """`struct mw_counter`, the value of `metrics` and `policy_metrics`, one per CPU."""

    _fields_ = [("packets", ctypes.c_uint64), ("bytes", ctypes.c_uint64)]
