"""Keeps little of the memory that the agent, which runs on every node, needs in its first seconds alone."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from types import ModuleType
from typing import Final

# malloc.h of glibc
_M_TRIM_THRESHOLD: Final = -1
_M_ARENA_MAX: Final = -8


def import_parts_only() -> None:
    """To be called before anything imports kopf or pyroute2.

    kopf imports the official client to recognise its classes, wherever that is installed: 20 MB which an
    agent on every node does without. pyroute2 imports all of itself, with a database: 5 MB; with an empty
    module in its place, each of its modules is imported where it is used."""
    sys.modules["kubernetes"] = None  # type: ignore[assignment]
    if spec := importlib.util.find_spec("pyroute2"):
        sys.modules["pyroute2"] = package = ModuleType("pyroute2")
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or ())


def configure() -> None:
    """One heap for all threads, and no hoard at its end. To be called before there are threads; other C
    libraries than glibc are left as they are."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 * 1024)
