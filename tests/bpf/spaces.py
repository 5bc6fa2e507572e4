"""Network namespaces as tests use them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from pyroute2 import netns


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Sockets and devices opened meanwhile belong to the namespace, and stay there."""
    netns.pushns(namespace)
    try:
        yield
    finally:
        netns.popns()


def ip(namespace: str, *lines: str) -> None:
    """Commands of `ip`, one a line. Raises CalledProcessError."""
    subprocess.run(["ip", "-n", namespace, "-batch", "-"], input="\n".join(lines), text=True, check=True)
