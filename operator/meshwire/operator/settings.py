"""Where the operator runs, from the environment."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from meshwire.api import names


class InvalidEnvironment(Exception):
    """A variable is malformed; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`identity` tells the replicas apart. `metrics_address` is (host, port); port 0 serves none."""

    namespace: str
    identity: str
    metrics_address: tuple[str, int]


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Raises InvalidEnvironment."""
    address = environ.get("MESHWIRE_METRICS_ADDRESS", "0.0.0.0:9872")
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise InvalidEnvironment(f"MESHWIRE_METRICS_ADDRESS is {address!r}, not HOST:PORT")
    return Settings(
        namespace=environ.get("POD_NAMESPACE") or names.NAMESPACE,
        # Two processes must never think they are the same replica. A pod's name is unique, a host's is not.
        identity=environ.get("POD_NAME") or f"{socket.gethostname()}_{secrets.token_hex(4)}",
        metrics_address=(host.strip("[]"), int(port)),
    )
