"""Which number stands for which labels. Pure.

A number is an object's name, so no two label sets can have it. A label set gets one number, and should it
ever have two, because two operators acted at once, the lowest counts. An identity that nothing uses is
marked with the time, and deleted when GRACE has passed; whoever wants to use it takes the mark away first.
So neither a pod that comes back nor an agent that lags behind ever meets a number that means something
else."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from meshwire.operator.objects import Identity
from meshwire.policy.identity import FIRST_POD, LAST_POD, Labels

GRACE: Final = timedelta(seconds=900)
"""How long an identity that nothing uses is kept, and then its number is kept from others."""


@dataclass(frozen=True, slots=True)
class CreateIdentity:
    number: int
    labels: Labels


@dataclass(frozen=True, slots=True)
class MarkIdentity:
    """`unused_since` None: it is in use."""

    identity: Identity
    unused_since: datetime | None


@dataclass(frozen=True, slots=True)
class DeleteIdentity:
    """Only in the very state in which it was seen: another operator may just have taken it into use."""

    identity: Identity


IdentityAction = CreateIdentity | MarkIdentity | DeleteIdentity


def by_labels(identities: Iterable[Identity]) -> dict[Labels, Identity]:
    """The identity that counts for each label set."""
    result: dict[Labels, Identity] = {}
    for identity in identities:
        other = result.get(identity.labels)
        if other is None or identity.number < other.number:
            result[identity.labels] = identity
    return result


def plan(
    *,
    wanted: Set[Labels],
    referred: Set[int],
    identities: Collection[Identity],
    recent: Mapping[int, datetime],
    now: datetime,
) -> list[IdentityAction]:
    """`wanted` are the label sets of pods, `referred` the numbers that endpoints have in a
    MeshEndpointSlice, `recent` those whose identities were deleted, and when."""
    chosen = by_labels(identities)
    actions: list[IdentityAction] = []
    for identity in sorted(identities, key=lambda identity: identity.number):
        since = identity.unused_since
        if identity.number in referred or (
            identity.labels in wanted and chosen[identity.labels].number == identity.number
        ):
            if since is not None:
                actions.append(MarkIdentity(identity, None))
        elif since is None or since > now:
            actions.append(MarkIdentity(identity, now))
        elif now - since >= GRACE:
            actions.append(DeleteIdentity(identity))
    taken = {
        *(identity.number for identity in identities),
        *referred,
        *(number for number, freed in recent.items() if now - freed < GRACE),
    }
    free = (number for number in range(FIRST_POD, LAST_POD + 1) if number not in taken)
    for labels, number in zip(sorted(wanted - chosen.keys()), free, strict=False):
        actions.append(CreateIdentity(number, labels))
    return actions
