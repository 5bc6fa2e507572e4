"""Nodes without a kernel: what the agent of each would find there if every order were carried out at once
and a handshake proven as soon as both ends have their devices. Pure.

Only what `meshwire.encryption.report` reads is shown, so that one look costs a node's agent microseconds a
peer. Turning encryption off, quarantine and nodes that aren't live are not simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from meshwire.api import names
from meshwire.api.meshnode import Phase
from meshwire.encryption.desired import published_key
from meshwire.encryption.model import (
    Datapath,
    Desired,
    Device,
    DeviceState,
    HeldKey,
    Link,
    Member,
    Observed,
    PeerState,
    Problem,
    Redirect,
    Settings,
    SettingsFlags,
)
from meshwire.encryption.report import MAX_BEHIND

FIRST_INDEX: Final = 10
"""Of the tunnel devices."""
PORT: Final = 51871
MTU: Final = 1420
_FLAGS: Final = {
    Phase.ENABLING: SettingsFlags.PASS_OVERSIZED,
    Phase.ENFORCING: SettingsFlags.ENFORCING | SettingsFlags.STRICT,
}


@dataclass(slots=True)
class Mesh:
    """What all nodes together have, by name: `numbers` of the members; by epoch, which of them publish a key
    (`keyed`) and which have a device with it (`devices`)."""

    numbers: dict[str, int] = field(default_factory=dict)
    keyed: dict[int, set[str]] = field(default_factory=dict)
    devices: dict[int, set[str]] = field(default_factory=dict)

    def put(self, member: Member) -> None:
        """What all others know of a member."""
        if member.spec.id:
            self.numbers[member.name] = member.spec.id
        _assign(self.keyed, member.name, {key.epoch for key in member.spec.keys})

    def set_up(self, name: str, epochs: set[int]) -> None:
        """The node has devices of these epochs, and no others."""
        _assign(self.devices, name, epochs)

    def behind(self, own: Member) -> int:
        """Other nodes that this one doesn't send to by its epoch's device."""
        moved = self.devices.get(own.spec.epoch, set())
        return len(self.numbers) - 1 - (len(moved) - 1 if own.name in moved else 0)

    def concerns(self, own: Member, before: int, *, counters_due: bool) -> bool:
        """What others have done since there were `before` nodes behind changes what the node reports.
        Who is behind is told when few are left, as counters are: a look in between would write nothing."""
        now = self.behind(own)
        if now == before or now > MAX_BEHIND:
            return False
        return now == 0 or before > MAX_BEHIND or counters_due


def _assign(sets: dict[int, set[str]], name: str, epochs: set[int]) -> None:
    for epoch in sets.keys() | epochs:
        if epoch in epochs:
            sets.setdefault(epoch, set()).add(name)
        else:
            sets[epoch].discard(name)


def device_epochs(own: Member, held: Mapping[int, HeldKey]) -> set[int]:
    """Epochs of which the node has a device, as meshwire.encryption.desired decides."""
    spec = own.spec
    if spec.phase is Phase.OFF:
        return set()
    published = {key.epoch: key for key in spec.keys}
    return {
        epoch
        for epoch, key in held.items()
        if epoch in (spec.epoch, spec.retiring) and published.get(epoch) == published_key(key)
    }


def show(own: Member, held: Mapping[int, HeldKey], mesh: Mesh, now: float) -> tuple[Desired, Observed]:
    """What the node should be and what it is, in as far as its report depends on it. Peers go by their names
    instead of their keys. `now`: Unix time in seconds. Raises ValueError for a phase that isn't
    simulated."""
    spec = own.spec
    if spec.phase is Phase.OFF:
        return Desired(phase=Phase.OFF), Observed(links={}, now=now)
    if spec.phase not in _FLAGS:
        raise ValueError(f"{spec.phase} is not simulated")
    epochs = sorted(device_epochs(own, held))
    links = {
        names.device_name(epoch): Link(
            index=FIRST_INDEX + epoch % 2, name=names.device_name(epoch), kind="wireguard", up=True
        )
        for epoch in epochs
    }
    answers, silent = PeerState(public_key="", handshake=now), PeerState(public_key="")
    nobody: set[str] = set()
    wireguard = {}
    redirects: dict[int, Redirect] = {}
    nodes: dict[int, int] = {}
    # The retiring epoch comes first: where the new one is not proven, that way stays.
    for epoch in epochs:
        device, moved = names.device_name(epoch), mesh.devices.get(epoch, nobody)
        peers = {
            name: answers if name in moved else silent
            for name in mesh.keyed.get(epoch, nobody)
            if name != own.name
        }
        wireguard[device] = DeviceState(
            name=device,
            public_key=held[epoch].public_key,
            port=names.listen_port(PORT, epoch),
            peers=peers,
        )
        index, way = links[device].index, Redirect(device, "", False)
        for name, peer in peers.items():
            if not (number := mesh.numbers.get(name)):
                continue
            redirects[number] = way
            if peer is answers or (spec.phase is Phase.ENFORCING and number not in nodes):
                nodes[number] = index
    settings = Settings(_FLAGS[spec.phase], spec.id, MTU)
    desired = Desired(
        phase=spec.phase,
        epoch=spec.epoch,
        retiring=spec.retiring,
        settings=settings,
        devices=tuple(
            Device(
                name=names.device_name(epoch),
                epoch=epoch,
                key=held[epoch],
                port=names.listen_port(PORT, epoch),
                mtu=MTU,
                peers=(),
            )
            for epoch in epochs
        ),
        redirects=redirects,
        live_ids=frozenset(number for name, number in mesh.numbers.items() if name != own.name),
        problems=() if spec.epoch in epochs else (_missing_key(own, blocking=not epochs),),
    )
    observed = Observed(
        links=links, wireguard=wireguard, datapath=Datapath({}, nodes, settings), pinned=True, now=now
    )
    return desired, observed


def _missing_key(own: Member, *, blocking: bool) -> Problem:
    epoch = own.spec.epoch
    text = (
        f"the key of epoch {epoch} is published but not opened here yet"
        if own.spec.public_key(epoch)
        else f"the operator has not published this node's key of epoch {epoch} yet"
    )
    return Problem("WaitingForKey", text, blocking)
