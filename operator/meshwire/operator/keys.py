"""WireGuard key pairs and epoch secrets, and sealing them to a node. A private key never leaves this module
unsealed."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import nacl.utils
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox

from meshwire.api import preshared


class UnusableSealingKey(Exception):
    """What a node published as its sealing key can't be sealed to."""


@dataclass(frozen=True, slots=True)
class SealedKey:
    """`public_key` is base64, `sealed` what only the node can open (docs/architecture.md, Keys)."""

    public_key: str
    sealed: bytes


def issue(*, node: str, epoch: int, sealing_key: str) -> SealedKey:
    """A new key pair for this node and epoch, its private half sealed to `sealing_key` (base64). Raises
    UnusableSealingKey."""
    pair = PrivateKey.generate()
    sealed = _seal(node, str(epoch), bytes(pair), sealing_key)
    return SealedKey(base64.b64encode(bytes(pair.public_key)).decode(), sealed)


def new_epoch_secret() -> bytes:
    return nacl.utils.random(preshared.SECRET_BYTES)


def seal_epoch_secret(secret: bytes, *, node: str, epoch: int, sealing_key: str) -> bytes:
    """The epoch secret for this node alone, sealed to `sealing_key` (base64). Raises UnusableSealingKey."""
    return _seal(node, preshared.sealed_as(epoch), secret, sealing_key)


def _seal(node: str, what: str, raw: bytes, sealing_key: str) -> bytes:
    # Name and epoch are sealed in: a Secret put in another node's place, or an old one put back, is
    # refused there.
    content = b"\0".join((node.encode(), what.encode(), raw))
    try:
        box = SealedBox(PublicKey(base64.b64decode(sealing_key, validate=True)))
        return box.encrypt(base64.b64encode(content))
    except (CryptoError, ValueError, TypeError):
        raise UnusableSealingKey(f"the sealing key of node {node} is not a usable X25519 key") from None
