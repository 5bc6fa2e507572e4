"""What `bpf/include/meshwire/policy_types.h` says, for Python: as `meshwire.bpf.layouts`, for types.h."""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag
from typing import Final

MAX_IDENTITIES: Final = 262144
MAX_CIDRS: Final = 65536
MAX_ENDPOINTS: Final = 8192
MAX_SERVICES: Final = 65536
MAX_POLICY: Final = 524288
MAX_FLOWS: Final = 262144
MAX_FRAGMENTS: Final = 8192
MAX_VERDICTS: Final = 65536
MAX_POD_LINKS: Final = 8192
EVENTS_PER_SECOND: Final = 2000

POLICY_BITS_ALL: Final = 72
"""`PolicyKey.prefixlen` of an entry for every protocol."""
POLICY_BITS_PROTOCOL: Final = 80
"""The same for a protocol; 0 to 16 bits of the port come on top."""


class CidrFlag(IntFlag):
    CLUSTER = 1 << 0
    LOCAL = 1 << 1


class EndpointFlag(IntFlag):
    INGRESS_ENFORCED = 1 << 0
    EGRESS_ENFORCED = 1 << 1
    INGRESS_AUDITED = 1 << 2
    EGRESS_AUDITED = 1 << 3
    INGRESS_CIDRS = 1 << 4
    EGRESS_CIDRS = 1 << 5


class FlowFlag(IntFlag):
    REPLIED = 1 << 0
    FIN = 1 << 1
    FIN_REPLY = 1 << 2
    CLOSING = 1 << 3
    DIRECT = 1 << 4
    STACK = 1 << 5


class StateFlag(IntFlag):
    SKIP_STACK = 1 << 0


class VerdictFlow(IntFlag):
    SENDERS_FLOW = 1 << 0
    SENDERS_REPLY = 1 << 1
    RECEIVERS_FLOW = 1 << 2
    RECEIVERS_REPLY = 1 << 3


class Ip(ctypes.Structure):
    """`struct mw_ip`, the key of `identities`, `endpoints` and `services`."""

    _fields_ = [
        ("addr", ctypes.c_uint8 * 16),
        ("family", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
    ]


class Identity(ctypes.Structure):
    """`struct mw_identity`, the value of `identities`."""

    _fields_ = [("number", ctypes.c_uint32)]


class Cidr(ctypes.Structure):
    """`struct mw_cidr`, the value of `cidrs`."""

    _fields_ = [("number", ctypes.c_uint32), ("flags", ctypes.c_uint32)]


class Endpoint(ctypes.Structure):
    """`struct mw_endpoint`, the value of `endpoints`."""

    _fields_ = [
        ("ifindex", ctypes.c_uint32),
        ("identity", ctypes.c_uint32),
        ("set", ctypes.c_uint32),
        ("audit_set", ctypes.c_uint32),
        ("revision", ctypes.c_uint32),
        ("born", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    ]


class Service(ctypes.Structure):
    """`struct mw_service`, the value of `services`."""

    _fields_ = [("flags", ctypes.c_uint32)]


class PolicyKey(ctypes.Structure):
    """`struct mw_policy_key`, the key of `policy`. `port` is in network order."""

    _fields_ = [
        ("prefixlen", ctypes.c_uint32),
        ("set", ctypes.c_uint32),
        ("identity", ctypes.c_uint32),
        ("direction", ctypes.c_uint8),
        ("protocol", ctypes.c_uint8),
        ("port", ctypes.c_uint16),
    ]


class PolicyValue(ctypes.Structure):
    """`struct mw_policy_value`, the value of `policy`."""

    _fields_ = [
        ("rule", ctypes.c_uint32),
        ("deny", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
    ]


class FlowKey(ctypes.Structure):
    """`struct mw_flow_key`, the key of `flows`. Ports are in network order."""

    _fields_ = [
        ("src", ctypes.c_uint8 * 16),
        ("dst", ctypes.c_uint8 * 16),
        ("sport", ctypes.c_uint16),
        ("dport", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("protocol", ctypes.c_uint8),
        ("direction", ctypes.c_uint8),
        ("pad", ctypes.c_uint8),
    ]


class Flow(ctypes.Structure):
    """`struct mw_flow`, the value of `flows`."""

    _fields_ = [
        ("expires", ctypes.c_uint64),
        ("revision", ctypes.c_uint32),
        ("peer", ctypes.c_uint32),
        ("flags", ctypes.c_uint8),
        ("reason", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 6),
    ]


class Hook(IntEnum):
    FROM_POD = 0
    TO_POD = 1
    POLICY_OUT = 2


class State(ctypes.Structure):
    """`struct mw_policy_state`, the one value of `policy_state`."""

    _fields_ = [
        ("generation", ctypes.c_uint32),
        ("upsets", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    ]


class VerdictKey(ctypes.Structure):
    """`struct mw_verdict_key`, the key of `verdicts`. Ports are in network order."""

    _fields_ = [
        ("src", ctypes.c_uint8 * 16),
        ("dst", ctypes.c_uint8 * 16),
        ("sport", ctypes.c_uint16),
        ("dport", ctypes.c_uint16),
        ("ifindex", ctypes.c_uint32),
        ("family", ctypes.c_uint8),
        ("protocol", ctypes.c_uint8),
        ("hook", ctypes.c_uint8),
        ("pad", ctypes.c_uint8),
    ]


class Verdict(ctypes.Structure):
    """`struct mw_verdict`, the value of `verdicts`."""

    _fields_ = [
        ("until", ctypes.c_uint64),
        ("generation", ctypes.c_uint32),
        ("upsets", ctypes.c_uint32),
        ("target", ctypes.c_uint32),
        ("macs", ctypes.c_uint8 * 12),
        ("reason", ctypes.c_uint8),
        ("target_reason", ctypes.c_uint8),
        ("target_mtu", ctypes.c_uint16),
        ("sport", ctypes.c_uint16),
        ("dport", ctypes.c_uint16),
        ("flows", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 7),
    ]


class PodLink(ctypes.Structure):
    """`struct mw_pod_link`, the value of `pod_links`, whose key is an ifindex."""

    _fields_ = [("pod", ctypes.c_uint8 * 6), ("gateway", ctypes.c_uint8 * 6)]


class FragmentKey(ctypes.Structure):
    """`struct mw_fragment_key`, the key of `fragments`."""

    _fields_ = [
        ("src", ctypes.c_uint8 * 16),
        ("dst", ctypes.c_uint8 * 16),
        ("identification", ctypes.c_uint32),
        ("family", ctypes.c_uint8),
        ("protocol", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 2),
    ]


class Fragment(ctypes.Structure):
    """`struct mw_fragment`, the value of `fragments`. In network order."""

    _fields_ = [("sport", ctypes.c_uint16), ("dport", ctypes.c_uint16)]


class Event(ctypes.Structure):
    """`struct mw_event`, a record of `events`. Ports are in network order."""

    _fields_ = [
        ("time", ctypes.c_uint64),
        ("src", ctypes.c_uint8 * 16),
        ("dst", ctypes.c_uint8 * 16),
        ("src_identity", ctypes.c_uint32),
        ("dst_identity", ctypes.c_uint32),
        ("rule", ctypes.c_uint32),
        ("ifindex", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
        ("sport", ctypes.c_uint16),
        ("dport", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("protocol", ctypes.c_uint8),
        ("direction", ctypes.c_uint8),
        ("reason", ctypes.c_uint8),
    ]


class EventBudget(ctypes.Structure):
    """`struct mw_event_budget`, the value of `event_budget`, one per CPU."""

    _fields_ = [
        ("since", ctypes.c_uint64),
        ("sent", ctypes.c_uint64),
        ("lost", ctypes.c_uint64),
    ]
