"""Type descriptions (BTF) of compiled objects and loaded maps, read through libbpf."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from ctypes import c_uint32
from dataclasses import dataclass
from pathlib import Path

from meshwire.bpf._libbpf import library

# enum in linux/btf.h
_INT, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF, _VOLATILE, _CONST = 1, 3, 4, 5, 6, 8, 9, 10


class _Type(ctypes.Structure):
    # struct btf_type
    _fields_ = [("name_off", c_uint32), ("info", c_uint32), ("size_or_type", c_uint32)]


@dataclass(frozen=True, slots=True)
class Layout:
    """A C type as far as bytes are concerned: size in bytes, and for structs each member's name, offset in
    bits and layout, for arrays that of an element, for enums names and values. Names of types don't
    count."""

    size: int
    members: tuple[tuple[str, int, Layout], ...] = ()
    element: Layout | None = None
    values: tuple[tuple[str, int], ...] = ()


class Btf:
    """One set of types. Use `read_elf` or `read_kernel`."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def layout(self, type_id: int) -> Layout:
        """The layout of a type by its number in this set. Raises ValueError for kinds that maps don't
        use."""
        address = library().btf__type_by_id(self._handle, type_id)
        if not address:
            raise ValueError(f"no type {type_id}")
        head = _Type.from_address(address)
        kind, count = head.info >> 24 & 0x1F, head.info & 0xFFFF
        rest = address + ctypes.sizeof(_Type)
        if kind in (_TYPEDEF, _VOLATILE, _CONST):
            return self.layout(head.size_or_type)
        if kind == _INT:
            return Layout(head.size_or_type)
        if kind == _ARRAY:
            element, _, length = (c_uint32 * 3).from_address(rest)
            inner = self.layout(element)
            return Layout(inner.size * length, element=inner)
        if kind in (_STRUCT, _UNION):
            words = (c_uint32 * (3 * count)).from_address(rest)
            return Layout(
                head.size_or_type,
                members=tuple(
                    (self._name(words[i]), words[i + 2] & 0xFFFFFF, self.layout(words[i + 1]))
                    for i in range(0, 3 * count, 3)
                ),
            )
        if kind == _ENUM:
            words = (c_uint32 * (2 * count)).from_address(rest)
            return Layout(
                head.size_or_type,
                values=tuple((self._name(words[i]), words[i + 1]) for i in range(0, 2 * count, 2)),
            )
        raise ValueError(f"type {type_id} is of kind {kind}")

    def named(self, prefix: str) -> dict[str, Layout]:
        """The structs and enums whose names start with `prefix`, as `struct NAME` and `enum NAME`."""
        kinds = {_STRUCT: "struct", _ENUM: "enum"}
        found = {}
        for type_id in range(1, library().btf__type_cnt(self._handle)):
            head = _Type.from_address(library().btf__type_by_id(self._handle, type_id))
            name = self._name(head.name_off)
            if (kind := kinds.get(head.info >> 24 & 0x1F)) and name.startswith(prefix):
                found[f"{kind} {name}"] = self.layout(type_id)
        return found

    def _name(self, offset: int) -> str:
        name: bytes | None = library().btf__name_by_offset(self._handle, offset)
        return (name or b"").decode()


def read_elf(path: Path) -> AbstractContextManager[Btf]:
    """The types in a compiled object. Raises OSError."""
    return _opened(library().btf__parse_elf(os.fsencode(path), None), str(path))


def read_kernel(btf_id: int) -> AbstractContextManager[Btf]:
    """The types the kernel holds under an id. Raises OSError."""
    return _opened(library().btf__load_from_kernel_by_id(btf_id), f"BTF {btf_id}")


@contextmanager
def _opened(handle: int | None, what: str) -> Iterator[Btf]:
    if not handle:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    try:
        yield Btf(handle)
    finally:
        library().btf__free(handle)
