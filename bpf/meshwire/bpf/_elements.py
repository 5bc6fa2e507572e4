"""What every kind of map needs: reading and writing elements, many at a time where the kernel can."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ctypes import byref, c_uint32
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, Final

from meshwire.bpf import layouts
from meshwire.bpf._libbpf import check, library
from meshwire.bpf.layouts import FAMILY_BITS, Family

Network = IPv4Network | IPv6Network

# The kernel's own, from before there was a number for it in errno.h.
_ENOTSUPP = 524
BATCH: Final = 4096


def open_pinned(path: Path, resources: ExitStack) -> int:
    """A descriptor of a pinned map, closed with `resources`. Raises OSError."""
    fd = check(library().bpf_obj_get(os.fsencode(path)), str(path))
    resources.callback(os.close, fd)
    return fd


def prefix_of(network: Network) -> layouts.Prefix:
    address = network.network_address.packed
    return layouts.Prefix(
        prefixlen=FAMILY_BITS + network.prefixlen,
        family=Family(network.version),
        addr=(ctypes.c_uint8 * 16)(*address),
    )


def single_of(address: bytes) -> layouts.Prefix:
    """The prefix of one packed address."""
    return layouts.Prefix(
        prefixlen=FAMILY_BITS + 8 * len(address),
        family=Family.IPV4 if len(address) == 4 else Family.IPV6,
        addr=(ctypes.c_uint8 * 16)(*address),
    )


def network_of(prefix: layouts.Prefix) -> Network:
    length = prefix.prefixlen - FAMILY_BITS
    address = bytes(prefix.addr)
    if prefix.family == Family.IPV4:
        return IPv4Network((address[:4], length))
    return IPv6Network((address, length))


def lookup(fd: int, key: ctypes._CData, value: ctypes._CData, what: str) -> bool:
    """Reads one element into `value`; whether it is there. Raises OSError."""
    result = library().bpf_map_lookup_elem(fd, byref(key), byref(value))
    if result == -errno.ENOENT:
        return False
    check(result, what)
    return True


def update(fd: int, key: ctypes._CData, value: ctypes._CData, what: str) -> None:
    """Adds or replaces one element. Raises OSError."""
    check(library().bpf_map_update_elem(fd, byref(key), byref(value), 0), what)


def delete(fd: int, key: ctypes._CData, what: str) -> None:
    """One that isn't there is no error. Raises OSError."""
    result = library().bpf_map_delete_elem(fd, byref(key))
    if result != -errno.ENOENT:
        check(result, what)


def update_many(fd: int, elements: Sequence[tuple[Any, Any]], what: str) -> None:
    """Adds or replaces elements with few system calls. Raises OSError; some may be written then."""
    for at in range(0, len(elements), BATCH):
        chunk = elements[at : at + BATCH]
        count = c_uint32(len(chunk))
        keys = (type(chunk[0][0]) * len(chunk))(*(key for key, _ in chunk))
        values = (type(chunk[0][1]) * len(chunk))(*(value for _, value in chunk))
        result = library().bpf_map_update_batch(fd, byref(keys), byref(values), byref(count), None)
        if result == -_ENOTSUPP:
            for key, value in chunk:
                update(fd, key, value, what)
        else:
            check(result, what)


def delete_many(fd: int, keys: Sequence[Any], what: str) -> None:
    """Deletes elements with few system calls; ones that aren't there are no error. Raises OSError; some may
    be gone then."""
    for at in range(0, len(keys), BATCH):
        chunk = keys[at : at + BATCH]
        count = c_uint32(len(chunk))
        packed = (type(chunk[0]) * len(chunk))(*chunk)
        result = library().bpf_map_delete_batch(fd, byref(packed), byref(count), None)
        # A batch ends at the first key that isn't there.
        if result in (-_ENOTSUPP, -errno.ENOENT):
            for key in chunk:
                delete(fd, key, what)
        else:
            check(result, what)


def items(
    fd: int, key_type: type[Any], value_type: type[Any], batch: int = BATCH
) -> Iterator[tuple[Any, Any]]:
    """Everything in a map, with few system calls; ctypes hands simple types over as Python values."""
    for keys, values, count in batches(fd, key_type, value_type, batch):
        yield from zip(keys[:count], values[:count], strict=True)


def batches(
    fd: int, key_type: type[Any], value_type: type[Any], batch: int = BATCH
) -> Iterator[tuple[Any, Any, int]]:
    """The same as arrays, of which so many elements count. They are used again for what follows."""
    keys, values = (key_type * batch)(), (value_type * batch)()
    position: object = None
    while True:
        count, following = c_uint32(batch), key_type()
        result = library().bpf_map_lookup_batch(
            fd, position, byref(following), byref(keys), byref(values), byref(count), None
        )
        # LPM tries learned batches in 5.13, others may never.
        if result == -_ENOTSUPP and position is None:
            yield from _one_by_one(fd, key_type, value_type)
            return
        if result != -errno.ENOENT:
            check(result, "reading a map")
        yield keys, values, count.value
        if result == -errno.ENOENT:
            return
        position = byref(following)


def raw_items(fd: int, key_size: int, value_size: int, batch: int = BATCH) -> Iterator[tuple[bytes, bytes]]:
    """The same of a hash map as bytes: many keys behind each other, and their values."""
    keys, values = (
        ctypes.create_string_buffer(key_size * batch),
        ctypes.create_string_buffer(value_size * batch),
    )
    # Hash maps take the number of a bucket for a position.
    following, position = c_uint32(), None
    while True:
        count = c_uint32(batch)
        result = library().bpf_map_lookup_batch(
            fd, position, byref(following), byref(keys), byref(values), byref(count), None
        )
        if result != -errno.ENOENT:
            check(result, "reading a map")
        yield keys.raw[: key_size * count.value], values.raw[: value_size * count.value]
        if result == -errno.ENOENT:
            return
        position = byref(c_uint32(following.value))


def _one_by_one(fd: int, key_type: type[Any], value_type: type[Any]) -> Iterator[tuple[Any, Any, int]]:
    keys, values = (key_type * 1)(), (value_type * 1)()
    position: object = None
    while (result := library().bpf_map_get_next_key(fd, position, byref(keys))) != -errno.ENOENT:
        check(result, "reading a map")
        position = byref(keys)
        # Only we write, but a key that went away meanwhile is no reason to fail.
        if (found := library().bpf_map_lookup_elem(fd, byref(keys), byref(values))) != -errno.ENOENT:
            check(found, "reading a map")
            yield keys, values, 1
