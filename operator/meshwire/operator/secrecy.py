"""Whether an epoch has preshared keys, and by which secret: docs/architecture.md, Keys. Pure.

It is decided once, before the epoch's first key: by the Secret that is made, or by a key issued without."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto

from meshwire.operator.objects import EpochSecret


class Next(Enum):
    """What an epoch needs before keys of it can be issued."""

    NOTHING = auto()
    SECRET = auto()
    """Its secret has to be made."""
    ANOTHER_EPOCH = auto()
    """Keys go by a secret that is gone or was replaced. To make a second one would part the nodes."""


@dataclass(frozen=True, slots=True)
class Secrecy:
    """Of one epoch. `digest`: of the secret that goes with its keys; empty: they go without."""

    next: Next
    digest: str = ""


def of_epoch(digests: Collection[str], secret: EpochSecret | None, *, wanted: bool) -> Secrecy:
    """`digests` are those of all keys of the epoch that were issued, `secret` is its Secret, `wanted` what
    is to be of an epoch that has no key yet."""
    if secret and secret.digest in {each for each in digests if each}:
        return Secrecy(Next.NOTHING, secret.digest)
    if digests:
        # A crash may have left a Secret that was not used, if the setting was changed since.
        without = not any(digests)
        return Secrecy(Next.NOTHING if without else Next.ANOTHER_EPOCH)
    if secret:
        return Secrecy(Next.NOTHING, secret.digest) if secret.digest else Secrecy(Next.ANOTHER_EPOCH)
    return Secrecy(Next.SECRET if wanted else Next.NOTHING)
