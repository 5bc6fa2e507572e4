"""Runs a loaded program on a packet without a device (BPF_PROG_TEST_RUN), for tests and measurements."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from meshwire.bpf._libbpf import TestRunOptions, check, library

# linux/pkt_cls.h, as the program returns them
TC_ACT_UNSPEC = 0xFFFFFFFF
TC_ACT_OK = 0
TC_ACT_SHOT = 2
TC_ACT_REDIRECT = 7


class Context(ctypes.Structure):
    """`struct __sk_buff`. The kernel takes mark, priority, ingress_ifindex, ifindex, cb, tstamp, wire_len,
    gso_segs, gso_size and hwtstamp from it and refuses anything else that isn't zero."""

    _fields_ = [
        ("len", ctypes.c_uint32),
        ("pkt_type", ctypes.c_uint32),
        ("mark", ctypes.c_uint32),
        ("queue_mapping", ctypes.c_uint32),
        ("protocol", ctypes.c_uint32),
        ("vlan_present", ctypes.c_uint32),
        ("vlan_tci", ctypes.c_uint32),
        ("vlan_proto", ctypes.c_uint32),
        ("priority", ctypes.c_uint32),
        ("ingress_ifindex", ctypes.c_uint32),
        ("ifindex", ctypes.c_uint32),
        ("tc_index", ctypes.c_uint32),
        ("cb", ctypes.c_uint32 * 5),
        ("hash", ctypes.c_uint32),
        ("tc_classid", ctypes.c_uint32),
        ("data", ctypes.c_uint32),
        ("data_end", ctypes.c_uint32),
        ("napi_id", ctypes.c_uint32),
        ("family", ctypes.c_uint32),
        ("remote_ip4", ctypes.c_uint32),
        ("local_ip4", ctypes.c_uint32),
        ("remote_ip6", ctypes.c_uint32 * 4),
        ("local_ip6", ctypes.c_uint32 * 4),
        ("remote_port", ctypes.c_uint32),
        ("local_port", ctypes.c_uint32),
        ("data_meta", ctypes.c_uint32),
        ("flow_keys", ctypes.c_uint64),
        ("tstamp", ctypes.c_uint64),
        ("wire_len", ctypes.c_uint32),
        ("gso_segs", ctypes.c_uint32),
        ("sk", ctypes.c_uint64),
        ("gso_size", ctypes.c_uint32),
        ("tstamp_type", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 3),
        ("hwtstamp", ctypes.c_uint64),
    ]


@dataclass(frozen=True, slots=True)
class Result:
    """`verdict` is the program's return value, `data` the packet afterwards, `duration_ns` the mean of one
    run."""

    verdict: int
    data: bytes
    duration_ns: int


def run(fd: int, data: bytes, *, context: Context | None = None, repeat: int = 1) -> Result:
    """Runs the program on `data`, which starts with 14 bytes of Ethernet. With `repeat`, each run works on
    the packet as the one before left it. Raises OSError, EINVAL for fewer than 14 bytes."""
    out = ctypes.create_string_buffer(len(data) + 512)
    into = ctypes.create_string_buffer(data, len(data))
    options = TestRunOptions(
        sz=ctypes.sizeof(TestRunOptions),
        data_in=ctypes.addressof(into),
        data_out=ctypes.addressof(out),
        data_size_in=len(data),
        data_size_out=len(out),
        repeat=repeat,
    )
    if context is not None:
        options.ctx_in = ctypes.addressof(context)
        options.ctx_size_in = ctypes.sizeof(context)
    check(library().bpf_prog_test_run_opts(fd, ctypes.byref(options)), "running a program")
    return Result(options.retval, out.raw[: options.data_size_out], options.duration)
