"""The few calls of bpf(2) that `meshwire preflight` tries, without libbpf: a node may lack it, and what
matters here is what the kernel answers. Constants and layouts are those of linux/bpf.h."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from functools import cache
from typing import Final

NUMBERS: Final = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "s390x": 351,
    "ppc64le": 361,
    "armv7l": 386,
    "i686": 357,
}
"""Machine -> number of the system call."""

BPF_MAP_CREATE: Final = 0
BPF_PROG_LOAD: Final = 5
BPF_PROG_GET_FD_BY_ID: Final = 13
BPF_OBJ_GET_INFO_BY_FD: Final = 15
BPF_PROG_QUERY: Final = 16

BPF_MAP_TYPE_ARRAY: Final = 2
BPF_MAP_TYPE_PERCPU_ARRAY: Final = 6
BPF_MAP_TYPE_LPM_TRIE: Final = 11
BPF_F_NO_PREALLOC: Final = 1
BPF_PROG_TYPE_SCHED_CLS: Final = 3
BPF_TCX_INGRESS: Final = 46
BPF_TCX_EGRESS: Final = 47

MAX_PROGRAMS: Final = 64
"""BPF_MPROG_MAX: no hook holds more."""


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def bpf(command: int, arguments: ctypes.Array[ctypes.c_char]) -> int:
    """The call's result. Raises OSError; ENOSYS where this machine's number is not known here."""
    number = NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(38, f"bpf(2) has no known number on {platform.machine()}")
    result: int = _libc().syscall(number, command, arguments, len(arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def attributes(layout: str, *values: int) -> ctypes.Array[ctypes.c_char]:
    """A `union bpf_attr` that starts with these values; the rest is zero, as the kernel wants it."""
    return ctypes.create_string_buffer(struct.pack(layout, *values), 128)


def create_map(kind: int, *, key_size: int, value_size: int, max_entries: int, flags: int = 0) -> int:
    """A file descriptor; the map goes when it is closed. Raises OSError."""
    return bpf(BPF_MAP_CREATE, attributes("=5I", kind, key_size, value_size, max_entries, flags))


def load_pass_program() -> int:
    """A file descriptor of a TC program that answers TC_ACT_UNSPEC. Raises OSError."""
    # r0 = -1; exit
    code = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0), 16)
    license = ctypes.create_string_buffer(b"GPL")
    return bpf(
        BPF_PROG_LOAD,
        attributes("=2I2Q", BPF_PROG_TYPE_SCHED_CLS, 2, ctypes.addressof(code), ctypes.addressof(license)),
    )


def attached_programs(ifindex: int, attach_type: int) -> list[int]:
    """Ids of the programs on a device's tcx hook, in running order. Raises OSError: EINVAL before Linux
    6.6."""
    ids = (ctypes.c_uint32 * MAX_PROGRAMS)()
    query = attributes("=4IQI", ifindex, attach_type, 0, 0, ctypes.addressof(ids), MAX_PROGRAMS)
    bpf(BPF_PROG_QUERY, query)
    (count,) = struct.unpack_from("=I", query.raw, 24)
    return list(ids[:count])


def program_name(program_id: int) -> str:
    """Up to 15 characters; empty for a program without one. Raises OSError."""
    fd = bpf(BPF_PROG_GET_FD_BY_ID, attributes("=I", program_id))
    try:
        info = ctypes.create_string_buffer(80)
        bpf(BPF_OBJ_GET_INFO_BY_FD, attributes("=2IQ", fd, len(info), ctypes.addressof(info)))
        # struct bpf_prog_info: name follows 64 bytes of numbers.
        return info.raw[64:80].split(b"\0")[0].decode(errors="replace")
    finally:
        os.close(fd)
