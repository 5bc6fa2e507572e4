"""Epoch secrets, and the preshared keys that nodes derive from them: what operator and agents have to do
alike. Pure.

All derivation is keyed BLAKE2b (RFC 7693), a pseudorandom function of its key."""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from typing import Final

SECRET_BYTES: Final = 32

_DIGEST: Final = b"meshwire digest"
_PAIR: Final = b"meshwire pair"


def digest(secret: bytes, epoch: int) -> str:
    """What everybody may know of an epoch secret, to tell it from any other: base64 of 32 bytes."""
    return b64encode(_blake2b(secret, _DIGEST, _epoch(epoch))).decode()


def sealed_as(epoch: int) -> str:
    """What an epoch secret is called within what is sealed to a node."""
    return f"{epoch}-secret"


def pair_key(secret: bytes, epoch: int, one: str, other: str) -> bytes:
    """The preshared key (32 bytes) between two nodes with these WireGuard public keys (base64), whichever
    comes first. Raises ValueError for what is no key, or twice the same."""
    keys = sorted(b64decode(key, validate=True) for key in (one, other))
    if keys[0] == keys[1] or {len(key) for key in keys} != {32}:
        raise ValueError("a pair has two public keys of 32 bytes each")
    return _blake2b(secret, _PAIR, _epoch(epoch) + keys[0] + keys[1])


def _epoch(epoch: int) -> bytes:
    return epoch.to_bytes(8)


def _blake2b(secret: bytes, purpose: bytes, message: bytes) -> bytes:
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"an epoch secret has {SECRET_BYTES} bytes")
    return hashlib.blake2b(message, key=secret, person=purpose, digest_size=32).digest()
