"""Loads programs beside those of another version whose maps have another layout or size, and carries over
what its maps hold. Nothing that is attached changes."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Final

from meshwire.bpf import btf, loader
from meshwire.bpf._elements import open_pinned
from meshwire.bpf._libbpf import check, library, map_info
from meshwire.bpf.btf import Layout
from meshwire.bpf.loader import IncompatibleMap, Programs

# enum bpf_map_type in linux/bpf.h
_PERCPU_HASH, _PERCPU_ARRAY, _LRU_PERCPU_HASH, _RINGBUF = 5, 6, 10, 27
_PERCPU: Final = frozenset({_PERCPU_HASH, _PERCPU_ARRAY, _LRU_PERCPU_HASH})

Convert = Callable[[bytes], bytes]


def load(
    pin_directory: Path, *, objects: Path = loader.OBJECTS, capacities: Mapping[str, int] | None = None
) -> Programs:
    """As Programs.load. A pinned map that these programs can't share is replaced by one of theirs with the
    same content: members go by their names, new ones are 0. Programs that are attached keep the old map, as
    it is now, until they are replaced; so what is to stay in force has to be attached next.

    Stopped at any point, it leaves what either version can begin with. Raises what Programs.load raises,
    IncompatibleMap also where the content can't be carried over; then the pins are as before."""
    try:
        return Programs.load(pin_directory, objects=objects, capacities=capacities)
    except IncompatibleMap:
        pass
    # A bpffs takes no names with dots.
    beside = pin_directory.with_name(f"{pin_directory.name}_next")
    _remove(beside)
    with ExitStack() as undo:
        undo.callback(_remove, beside)
        programs, replaced = _load_beside(pin_directory, beside, objects, capacities)
        undo.callback(programs.close)
        for name in sorted(replaced):
            _copy(pin_directory / name, beside / name)
        for name in sorted(replaced):
            (beside / name).rename(pin_directory / name)
        undo.pop_all()
    _remove(beside)
    return programs


def _load_beside(
    pin_directory: Path, beside: Path, objects: Path, capacities: Mapping[str, int] | None
) -> tuple[Programs, set[str]]:
    """Programs on the pinned maps, but for the names of those that are new."""
    replaced: set[str] = set()
    while True:
        _remove(beside)
        beside.mkdir(mode=0o700)
        for pin in pin_directory.iterdir():
            if pin.name not in replaced:
                _share(pin, beside / pin.name)
        try:
            return Programs.load(beside, objects=objects, capacities=capacities), replaced
        except IncompatibleMap as error:
            if error.path.name in replaced:
                # Two programs of this very version don't agree.
                raise
            replaced.add(error.path.name)


def _share(pin: Path, other: Path) -> None:
    with ExitStack() as resources:
        check(library().bpf_obj_pin(open_pinned(pin, resources), os.fsencode(other)), f"pinning {other}")


def _copy(source: Path, target: Path) -> None:
    """Adds all elements of one pinned map to another. Raises IncompatibleMap and OSError."""
    with ExitStack() as resources:
        old_fd, new_fd = open_pinned(source, resources), open_pinned(target, resources)
        old, new = map_info(old_fd), map_info(new_fd)
        if _RINGBUF in (old.type, new.type):
            return
        if not old.btf_id or not new.btf_id:
            raise IncompatibleMap(source, "it has no type information")
        if (old.type in _PERCPU) is not (new.type in _PERCPU):
            raise IncompatibleMap(source, "only one of the two versions has a value for each CPU")
        theirs = resources.enter_context(btf.read_kernel(old.btf_id))
        ours = resources.enter_context(btf.read_kernel(new.btf_id))
        try:
            key = converter(theirs.layout(old.btf_key_type_id), ours.layout(new.btf_key_type_id), whole=True)
            value = converter(theirs.layout(old.btf_value_type_id), ours.layout(new.btf_value_type_id))
            copies = (
                check(library().libbpf_num_possible_cpus(), "counting CPUs") if old.type in _PERCPU else 1
            )
            elements = _elements(old_fd, old.key_size, old.value_size, copies)
            # Programs go on writing: where an element goes that was read last, the kernel begins anew.
            for each, content in islice(elements, 2 * old.max_entries):
                size = len(content) // copies
                parts = [value(content[at : at + old.value_size]) for at in range(0, len(content), size)]
                if copies > 1:
                    parts = [part.ljust(_rounded(new.value_size), b"\0") for part in parts]
                result = library().bpf_map_update_elem(new_fd, key(each), b"".join(parts), 0)
                if result in (-errno.E2BIG, -errno.ENOSPC) and not any(content):
                    # An array has all its elements from the start.
                    continue
                if result in (-errno.E2BIG, -errno.ENOSPC):
                    raise IncompatibleMap(source, f"it holds more than {new.max_entries} elements")
                check(result, f"carrying {source.name} over")
        except ValueError as error:
            raise IncompatibleMap(source, str(error)) from None


def _elements(fd: int, key_size: int, value_size: int, copies: int) -> Iterator[tuple[bytes, bytes]]:
    key = ctypes.create_string_buffer(key_size)
    value = ctypes.create_string_buffer(_rounded(value_size) * copies if copies > 1 else value_size)
    previous = None
    while True:
        result = library().bpf_map_get_next_key(fd, previous, key)
        if result == -errno.ENOENT:
            return
        check(result, "reading a map")
        previous = ctypes.create_string_buffer(key.raw, key_size)
        result = library().bpf_map_lookup_elem(fd, key, value)
        # It may be gone meanwhile.
        if result != -errno.ENOENT:
            check(result, "reading a map")
            yield key.raw, value.raw


def converter(old: Layout, new: Layout, *, whole: bool = False) -> Convert:
    """From bytes of one layout to those of the other; members go by name. With `whole`, both have to have
    the same members: an element would be another one without them. Raises ValueError where the two don't go
    together, and so does the result where a number doesn't fit."""
    if old == new:
        return lambda data: data[: old.size]
    before, after = _leaves(old), _leaves(new)
    if whole and before.keys() != after.keys():
        raise ValueError(f"its key has other members: {', '.join(sorted(before.keys() ^ after.keys()))}")
    common = [(before[name], after[name]) for name in after if name in before]
    if not common:
        raise ValueError("the two versions have nothing in common")

    def convert(data: bytes) -> bytes:
        result = bytearray(new.size)
        for (at, old_size, is_number), (to, new_size, still_number) in common:
            part = data[at : at + old_size]
            if old_size == new_size:
                result[to : to + new_size] = part
            elif is_number and still_number:
                try:
                    number = int.from_bytes(part, sys.byteorder).to_bytes(new_size, sys.byteorder)
                except OverflowError:
                    raise ValueError(f"a number doesn't fit {new_size} bytes") from None
                result[to : to + new_size] = number
            elif any(part[new_size:]):
                raise ValueError(f"an array doesn't fit {new_size} bytes")
            else:
                result[to : to + min(old_size, new_size)] = part[:new_size]
        return bytes(result)

    return convert


def _leaves(layout: Layout, name: str = "", at: int = 0) -> dict[str, tuple[int, int, bool]]:
    """By path: place and size in bytes, and whether it is a number."""
    if not layout.members:
        return {name: (at, layout.size, layout.element is None)}
    found = {}
    for member, bits, inner in layout.members:
        if bits % 8:
            raise ValueError(f"{member} is a bit field")
        found.update(_leaves(inner, f"{name}.{member}", at + bits // 8))
    return found


def _rounded(size: int) -> int:
    """Of a value per CPU, as the kernel hands them over."""
    return (size + 7) & ~7


def _remove(directory: Path) -> None:
    if directory.exists():
        for pin in directory.iterdir():
            pin.unlink()
        directory.rmdir()
