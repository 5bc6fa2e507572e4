"""Loads the compiled programs through libbpf. Maps are pinned and reused; programs are attached by
`meshwire.bpf.tc`."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping
from contextlib import ExitStack
from ctypes import byref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from meshwire.bpf import btf
from meshwire.bpf._libbpf import (
    OpenOptions,
    check,
    collected_warnings,
    library,
    map_info,
)
from meshwire.bpf._libbpf import program_info as read_program_info

OBJECTS: Final = Path(__file__).parent / "objects"
POLICY_OBJECTS: Final = OBJECTS / "policy"
"""The policy programs. Their maps have a pin directory of their own."""
PIN_DIRECTORY: Final = Path("/sys/fs/bpf/meshwire")

TO_NETDEV: Final = "mw_to_netdev"
TO_NETDEV_L3: Final = "mw_to_netdev_l3"
FROM_NETDEV: Final = "mw_from_netdev"
FROM_NETDEV_L3: Final = "mw_from_netdev_l3"
FROM_WIREGUARD: Final = "mw_from_wireguard"

FROM_POD: Final = "mwp_from_pod"
TO_POD: Final = "mwp_to_pod"
POLICY_OUT: Final = "mwp_policy_out"
POLICY_OUT_L3: Final = "mwp_policy_out_l3"
POLICY_IN: Final = "mwp_policy_in"
POLICY_IN_L3: Final = "mwp_policy_in_l3"

# Address space, not memory: pages of the log that the verifier doesn't write are never touched.
_LOG_BYTES: Final = 16 << 20
_LOG_TAIL_LINES: Final = 20


class Refused(Exception):
    """The kernel's verifier refused a program. The message ends with the tail of `log`."""

    def __init__(self, program: str, log: str) -> None:
        tail = "\n".join(log.splitlines()[-_LOG_TAIL_LINES:])
        super().__init__(f"the kernel refused program {program}:\n{tail}")
        self.program = program
        self.log = log


class IncompatibleMap(Exception):
    """A map pinned by another version of Meshwire has a layout that these programs can't share."""

    def __init__(self, path: Path, difference: str) -> None:
        super().__init__(f"{path}: {difference}")
        self.path = path
        self.difference = difference


@dataclass(frozen=True, slots=True)
class Program:
    """A loaded program. Two programs with the same tag and maps do the same to every packet. `fd` is closed
    with the Programs it came from; a filter holds the program by itself."""

    name: str
    fd: int
    id: int
    tag: str
    map_ids: frozenset[int]


class Programs:
    """The loaded programs of all objects; a context manager that closes their file descriptors."""

    def __init__(self, programs: dict[str, Program], resources: ExitStack) -> None:
        self._programs = programs
        self._resources = resources

    @classmethod
    def load(
        cls, pin_directory: Path, *, objects: Path = OBJECTS, capacities: Mapping[str, int] | None = None
    ) -> Programs:
        """Loads every `*.bpf.o` in `objects`; maps are taken from `pin_directory` or pinned there.
        `capacities`: entries of maps, by name, that are to have room for others than they declare.

        Raises Refused, IncompatibleMap, FileNotFoundError where there are no objects, and OSError for
        anything else, e.g. a pin directory outside of a bpffs."""
        paths = sorted(objects.glob("*.bpf.o"))
        if not paths:
            raise FileNotFoundError(f"no compiled programs in {objects}: run `make -C bpf`")
        pin_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as resources:
            programs: dict[str, Program] = {}
            for path in paths:
                programs |= _load_object(path, pin_directory, capacities or {}, resources)
            return cls(programs, resources.pop_all())

    def get(self, name: str) -> Program:
        """Raises KeyError."""
        return self._programs[name]

    def names(self) -> frozenset[str]:
        return frozenset(self._programs)

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Programs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def program_info(program_id: int) -> tuple[str, str, frozenset[int]]:
    """(name as the kernel keeps it: 15 characters, tag, ids of its maps) of any loaded program. Raises
    OSError, with errno ENOENT where there is none."""
    fd = check(library().bpf_prog_get_fd_by_id(program_id), f"opening program {program_id}")
    try:
        info, map_ids = read_program_info(fd)
    finally:
        os.close(fd)
    return info.name.decode(), bytes(info.tag).hex(), map_ids


def does_the_same(program_id: int, program: Program) -> bool:
    """Whether a loaded program, an earlier agent's perhaps, does what `program` would do."""
    if program_id == program.id:
        return True
    try:
        _, tag, map_ids = program_info(program_id)
    except OSError:
        return False
    return (tag, map_ids) == (program.tag, program.map_ids)


def instructions(program: Program) -> tuple[int, int]:
    """(instructions after verification, instructions the verifier went through) of a loaded program. Raises
    OSError."""
    info, _ = read_program_info(program.fd)
    return info.xlated_prog_len // 8, info.verified_insns


def _load_object(
    path: Path, pin_directory: Path, capacities: Mapping[str, int], resources: ExitStack
) -> dict[str, Program]:
    bpf = library()
    options = OpenOptions(sz=ctypes.sizeof(OpenOptions), pin_root_path=os.fsencode(pin_directory))
    with collected_warnings() as warnings:
        handle = bpf.bpf_object__open_file(os.fsencode(path), byref(options))
        if not handle:
            raise OSError(ctypes.get_errno(), _joined(f"can't read {path}", warnings))
        resources.callback(bpf.bpf_object__close, handle)
        for pinned in _children(handle, bpf.bpf_object__next_map):
            name = bpf.bpf_map__name(pinned).decode()
            if name in capacities:
                check(bpf.bpf_map__set_max_entries(pinned, capacities[name]), f"sizing {name}")
            _check_compatible(handle, pinned)

        functions = list(_children(handle, bpf.bpf_object__next_program))
        logs = [mmap.mmap(-1, _LOG_BYTES) for _ in functions]
        for function, log in zip(functions, logs, strict=True):
            buffer = ctypes.addressof(ctypes.c_char.from_buffer(log))
            check(bpf.bpf_program__set_log_buf(function, buffer, _LOG_BYTES), "setting a verifier log")
        result = bpf.bpf_object__load(handle)
        # The kernel opens the log with the verdict's details; it stays empty for anything but a verifier's
        # refusal.
        texts = [log[: log.find(b"\0")].decode(errors="replace") for log in logs]
        for function, text in zip(functions, texts, strict=True):
            if result < 0 and text:
                raise Refused(bpf.bpf_program__name(function).decode(), text)
        if result < 0:
            raise OSError(-result, _joined(f"can't load {path.name}: {os.strerror(-result)}", warnings))

    programs = {}
    for function in functions:
        name, fd = bpf.bpf_program__name(function).decode(), bpf.bpf_program__fd(function)
        info, map_ids = read_program_info(fd)
        programs[name] = Program(name, fd, info.id, bytes(info.tag).hex(), map_ids)
    return programs


def _children(handle: int, following: ctypes._NamedFuncPointer) -> list[int]:
    found: list[int] = []
    while child := following(handle, found[-1] if found else None):
        found.append(child)
    return found


def _check_compatible(handle: int, declared: int) -> None:
    """libbpf compares sizes only; fields that moved within the same size would be read as something else."""
    bpf = library()
    path = bpf.bpf_map__pin_path(declared)
    if not path or not os.path.exists(path):
        return
    fd = check(bpf.bpf_obj_get(path), f"opening {os.fsdecode(path)}")
    try:
        pinned = map_info(fd)
    finally:
        os.close(fd)
    for what, want, have in (
        ("type", bpf.bpf_map__type(declared), pinned.type),
        ("key size", bpf.bpf_map__key_size(declared), pinned.key_size),
        ("value size", bpf.bpf_map__value_size(declared), pinned.value_size),
        ("capacity", bpf.bpf_map__max_entries(declared), pinned.max_entries),
        ("flags", bpf.bpf_map__map_flags(declared), pinned.map_flags),
    ):
        if want != have:
            raise IncompatibleMap(Path(os.fsdecode(path)), f"{what} is {have}, these programs need {want}")
    types = (bpf.bpf_map__btf_key_type_id(declared), bpf.bpf_map__btf_value_type_id(declared))
    if not any(types):
        # A ring buffer: the kernel knows nothing of its records.
        return
    if not pinned.btf_id:
        raise IncompatibleMap(Path(os.fsdecode(path)), "it has no type information")
    ours = btf.Btf(bpf.bpf_object__btf(handle))
    with btf.read_kernel(pinned.btf_id) as theirs:
        for what, want, have in (
            ("key", types[0], pinned.btf_key_type_id),
            ("value", types[1], pinned.btf_value_type_id),
        ):
            if ours.layout(want) != theirs.layout(have):
                raise IncompatibleMap(Path(os.fsdecode(path)), f"the fields of its {what} differ")


def _joined(message: str, warnings: list[str]) -> str:
    return "; ".join([message, *warnings])
