"""This node's secrets: the sealing key and the WireGuard private keys it opens. Reads and writes 0600
files."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nacl.exceptions
from nacl.bindings import crypto_scalarmult_base
from nacl.public import PrivateKey, SealedBox

from meshwire.api import preshared
from meshwire.encryption.model import HeldKey, SecretKey


class KeyRefused(Exception):
    """A sealed key or a key file can't be trusted; the message says why and holds no secret."""


def public_key(private_key: SecretKey) -> str:
    """The base64 public half, as WireGuard computes it."""
    return base64.b64encode(crypto_scalarmult_base(private_key.reveal())).decode()


def find_or_create_sealing_key(path: Path) -> SecretKey:
    """The key that this node's sealed keys are sealed to, made on first use. Raises KeyRefused for a file
    that others can read, or that is no key, and OSError."""
    if raw := _read_secret(path):
        try:
            return SecretKey(base64.b64decode(raw, validate=True))
        except ValueError:
            raise KeyRefused(f"{path} holds no key: remove it to get a new one") from None
    key = SecretKey(bytes(PrivateKey.generate()))
    _write_secret(path, base64.b64encode(key.reveal()))
    return key


def open_sealed(sealed: bytes, sealing_key: SecretKey, *, node: str, epoch: int, expected: str) -> HeldKey:
    """The private key in a key Secret's data. Raises KeyRefused where it was not sealed to us, or for
    another node or epoch, or is not the private half of `expected`, the public key that the operator
    published."""
    key = _open(sealed, sealing_key, node, str(epoch), f"key of epoch {epoch}")
    held = HeldKey(epoch, public_key(key), key)
    if held.public_key != expected:
        raise KeyRefused(f"the sealed key of epoch {epoch} is not the one the operator published")
    return held


def open_epoch_secret(
    sealed: bytes, sealing_key: SecretKey, *, node: str, epoch: int, expected: str
) -> SecretKey:
    """The epoch secret in a key Secret's data. Raises KeyRefused where it was not sealed to us, or for
    another node or epoch, or has another digest than `expected`, the one that the operator published."""
    secret = _open(sealed, sealing_key, node, preshared.sealed_as(epoch), f"secret of epoch {epoch}")
    if not hmac.compare_digest(preshared.digest(secret.reveal(), epoch), expected):
        raise KeyRefused(f"the sealed secret of epoch {epoch} is not the one the operator published")
    return secret


def _open(sealed: bytes, sealing_key: SecretKey, node: str, label: str, title: str) -> SecretKey:
    try:
        opened = SealedBox(PrivateKey(sealing_key.reveal())).decrypt(sealed)
        name, what, raw = base64.b64decode(opened, validate=True).split(b"\0", 2)
        secret = SecretKey(raw)
    except nacl.exceptions.CryptoError:
        raise KeyRefused(f"the {title} is not sealed to this node's sealing key") from None
    except (binascii.Error, ValueError):
        raise KeyRefused(f"the sealed {title} is malformed") from None
    if (name, what) != (node.encode(), label.encode()):
        raise KeyRefused(f"the sealed {title} was made for another node or epoch")
    return secret


def read_held(path: Path) -> dict[int, HeldKey]:
    """Keys by epoch, so that a restart needs no API server. Raises KeyRefused and OSError."""
    raw = _read_secret(path)
    if not raw:
        return {}
    try:
        return {int(epoch): _held(int(epoch), item) for epoch, item in json.loads(raw).items()}
    except (ValueError, AttributeError, TypeError, KeyError):
        raise KeyRefused(f"{path} is damaged: remove it, the keys are fetched again") from None


def _held(epoch: int, item: Any) -> HeldKey:
    # Before there were preshared keys, it was the private key alone.
    fields = {"privateKey": item} if isinstance(item, str) else item
    private, secret = (
        SecretKey(base64.b64decode(text, validate=True)) if text is not None else None
        for text in (fields["privateKey"], fields.get("epochSecret"))
    )
    if private is None:
        raise ValueError("no private key")
    return HeldKey(epoch, public_key(private), private, secret)


def write_held(path: Path, held: Mapping[int, HeldKey]) -> None:
    """Replaces the file in one step. Raises OSError."""
    items = {
        str(epoch): {
            name: base64.b64encode(secret.reveal()).decode()
            for name, secret in (("privateKey", key.private_key), ("epochSecret", key.epoch_secret))
            if secret
        }
        for epoch, key in sorted(held.items())
    }
    _write_secret(path, json.dumps(items).encode())


def _read_secret(path: Path) -> bytes:
    """Empty where there is no file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    with os.fdopen(fd, "rb") as stream:
        status = os.fstat(fd)
        if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid != os.geteuid():
            raise KeyRefused(f"{path} can be read by others: it has to be 0600 and the agent's own")
        return stream.read()


def _write_secret(path: Path, content: bytes) -> None:
    """All or nothing, on disk when this returns, and 0600 from its first moment."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(fd)
    temporary.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
