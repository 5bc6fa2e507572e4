"""Tries what the agent needs of the kernel, in a network namespace that goes with this process, and prints
JSON: attempt -> error, empty for success. Run as a process of its own, so that nothing has to be undone."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Final

from meshwire.cli import bpfcall

CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000
LOOPBACK: Final = 1
"""Index of `lo`, the only device of a new network namespace."""
CLSACT_INGRESS: Final = 0xFFFFFFF2
CLSACT_EGRESS: Final = 0xFFFFFFF3
ETH_P_ALL: Final = 3


def unshare(flags: int) -> None:
    """unshare(2) for this thread. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def attempt(results: dict[str, str], name: str, action: Callable[[], object]) -> object:
    """What `action` returns, None where it fails; its error goes into `results`."""
    from pyroute2 import NetlinkError

    try:
        value = action()
    except NetlinkError as error:
        results[name] = os.strerror(error.code)
    except OSError as error:
        results[name] = error.strerror or str(error)
    else:
        results[name] = ""
        return value
    return None


def try_all() -> dict[str, str]:
    """Leaves this process in another network namespace."""
    results: dict[str, str] = {}
    try:
        unshare(CLONE_NEWNET)
    except PermissionError:
        # In a user namespace of one's own a WireGuard device can be made without being root, BPF can't be
        # used.
        try:
            unshare(CLONE_NEWUSER | CLONE_NEWNET)
        except OSError as error:
            return {"namespace": f"a network namespace needs root ({error.strerror})"}
        results["unprivileged"] = "in a user namespace"
    except OSError as error:
        return {"namespace": f"no network namespace: {error.strerror}"}

    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        attempt(results, "wireguard", partial(ipr.link, "add", ifname="mwprobe", kind="wireguard"))
        if "unprivileged" in results:
            return results
        # The shapes of bpf/include/meshwire/types.h.
        trie = {"key_size": 24, "value_size": 8, "flags": bpfcall.BPF_F_NO_PREALLOC}
        array = {"key_size": 4, "value_size": 16}
        for name, kind, shape in (
            ("lpm_trie", bpfcall.BPF_MAP_TYPE_LPM_TRIE, trie),
            ("array", bpfcall.BPF_MAP_TYPE_ARRAY, array),
            ("percpu_array", bpfcall.BPF_MAP_TYPE_PERCPU_ARRAY, array),
        ):
            attempt(results, name, partial(bpfcall.create_map, kind, max_entries=1, **shape))
        fd = attempt(results, "program", bpfcall.load_pass_program)
        attempt(results, "clsact", partial(ipr.tc, "add", "clsact", LOOPBACK))
        if fd is None or results["clsact"]:
            return results
        for name, parent in (("filter_ingress", CLSACT_INGRESS), ("filter_egress", CLSACT_EGRESS)):
            where = {"parent": parent, "prio": 1, "protocol": ETH_P_ALL}
            program = {"fd": fd, "name": "mwprobe", "direct_action": True}
            attempt(results, name, partial(ipr.tc, "add-filter", "bpf", LOOPBACK, 1, **where, **program))
    return results


if __name__ == "__main__":
    json.dump(try_all(), sys.stdout)
