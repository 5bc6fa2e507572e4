"""From a model to the kernel's maps: in which order, and what becomes of what they have no room for. The
maps are all it touches; blocking."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Collection, Iterable
from ipaddress import ip_address
from typing import Final, TypeVar

from meshwire.agent.policy.model import CLOSED, EndpointValue, Model
from meshwire.agent.policy.room import LPM_SPARE, Claim, Shortage, admit
from meshwire.agent.policy.tables import AddressTable
from meshwire.api.meshpolicy import Direction
from meshwire.bpf.layouts import Direction as Hook
from meshwire.bpf.policylayouts import StateFlag
from meshwire.bpf.policymaps import Address, CidrEntry, EndpointEntry, PolicyEntry, PolicyKey, PolicyMaps
from meshwire.policy.compile import EVERYTHING, EntryKey, PortKey

V = TypeVar("V")

log = logging.getLogger("meshwire.agent")

FULL: Final = frozenset({errno.ENOSPC, errno.E2BIG, errno.ENOMEM})
"""What the kernel says where a map has no room, or the machine no memory for it."""
ROUNDS: Final = 4
"""Looks at once for room that the last one has made."""

_HOOKS: Final = {Direction.EGRESS: Hook.EGRESS, Direction.INGRESS: Hook.INGRESS}
_DIRECTIONS: Final = {Hook.EGRESS: Direction.EGRESS, Hook.INGRESS: Direction.INGRESS}

_Entry = tuple[tuple[int, EntryKey], tuple[bool, int]]


def write(model: Model, maps: PolicyMaps, *, skips_stack: bool) -> None:
    """Brings the maps to what the model says; what there is no room for, the model leaves out or closes.
    `skips_stack`: traffic between pods of this node does. Raises OSError for anything but want of room;
    whatever was written before stays."""
    flags = StateFlag.SKIP_STACK if skips_stack else StateFlag(0)
    if model.is_settled and maps.state.read() == flags and not _has_room_again(model, maps):
        return
    try:
        _write(model, maps)
    finally:
        # Also after the half of it: the sooner nothing older is remembered, the better.
        maps.state.renew(flags)


def _write(model: Model, maps: PolicyMaps) -> None:
    for _ in range(ROUNDS):
        _Writer(model, maps).write()
        if not model.fit(maps.capacities) and not _has_room_again(model, maps):
            return


def _has_room_again(model: Model, maps: PolicyMaps) -> bool:
    free = _free(model, maps)
    return any(need <= free for audit in (False, True) for need in model.waiting(audit=audit).values())


def _free(model: Model, maps: PolicyMaps) -> int:
    return max(0, maps.capacities["policy"] - LPM_SPARE - model.entries.size)


class _Writer:
    def __init__(self, model: Model, maps: PolicyMaps) -> None:
        self._model = model
        self._maps = maps

    def write(self) -> None:
        # The order, and why:
        #  1. Services; and pods that are to be closed: that is never wrong.
        #  2. Rules that are new or change. Of one group the longest match decides, so the longest goes
        #     first: each port goes from its old verdict to the new one, by way of no third.
        #  3. Blocks that nobody names any more: their addresses fall back to the block around them, which
        #     the old sets have rules for, too.
        #  4. Pods that are gone, and those whose sets are others now. The new sets are whole. Where there is
        #     no room for all new sets beside the old ones, 2 and 4 go in turns.
        #  5. New blocks: every set that is in use has rules for them by now.
        #  6. Pods that are new, and those that are opened: nobody waits for them, so they find all in place.
        #  7. Addresses, whose they are now: a pod of this node comes after its own rules.
        #  8. Rules that go, the shortest first, for the reason of 2.
        #  9. Pods' new revisions: flows that were judged half-way are judged once more by what is whole.
        model, maps = self._model, self._maps
        self._write_addresses(
            model.services, lambda address, value: maps.services.update(address), maps.services.delete
        )
        self._close_pods()
        self._place_sets()
        self._write_blocks()
        self._write_endpoints(lambda address, value: not self._is_open(address))

        for address in model.identities.deletes():
            maps.identities.delete(ip_address(address))
            model.identities.deleted([address])
        self._write_identities()

        self._delete_entries(model.entries.deletes())
        self._write_endpoints(lambda address, value: True)
        for address in model.services.deletes():
            maps.services.delete(ip_address(address))
            model.services.deleted([address])

    # Sets of rules, and the pods that use them

    def _place_sets(self) -> None:
        model = self._model
        pending = self._pending()
        new = sum(self._new(items) for items in pending.values())
        closed = model.waiting(audit=False).keys()
        if new <= _free(model, self._maps) and not closed and not model.waiting(audit=True):
            self._write_entries(pending.keys())
            self._delete_blocks()
            self._move_pods()
            return
        # To enforce comes before to tell what would be denied, and what is in force before what is new.
        for number in pending:
            if (owner := model.owner_of(number)) and owner[1]:
                self._close(owner[0], audit=True)
        self._place(model.is_in_force)
        # Those that only their own old sets were in the way of.
        self._reopen(model.waiting(audit=False).keys() - closed)
        self._place(lambda subject: True, also=closed)
        self._reopen(model.waiting(audit=True).keys(), audit=True)

    def _place(self, is_meant: Callable[[int], bool], also: Collection[int] = ()) -> None:
        """Writes the new sets of the subjects that are meant and opens those of `also`, as many as fit, the
        smallest first; and again with the room of old ones that nobody uses any more. Whose set never fits
        is closed."""
        model = self._model
        while True:
            pending: dict[int, int] = {}
            for number, items in self._pending().items():
                if (owner := model.owner_of(number)) and is_meant(owner[0]):
                    pending[owner[0]] = pending.get(owner[0], 0) + self._new(items)
            waiting = {
                subject: need for subject, need in model.waiting(audit=False).items() if subject in also
            }
            claims = sorted(Claim(need, subject) for subject, need in (pending | waiting).items())
            free = _free(model, self._maps)
            chosen = {claim.subject for claim in admit(claims, free)}
            for subject in sorted(chosen & waiting.keys()):
                model.open(subject)
            self._write_entries(model.sets_of(chosen))
            self._delete_blocks()
            self._move_pods()
            freed = self._delete_unused()
            if chosen or freed:
                continue
            audits = model.open_audits()
            if not claims or claims[0].entries > free + sum(audits.values()):
                break
            for subject in audits:
                self._close(subject, audit=True)
        for subject in sorted(pending):
            self._close(subject)
        self._close_pods()
        self._delete_unused()

    def _reopen(self, subjects: Iterable[int], *, audit: bool = False) -> None:
        model = self._model
        waiting = model.waiting(audit=audit)
        claims = [Claim(waiting[subject], subject) for subject in subjects if subject in waiting]
        opened = {claim.subject for claim in admit(claims, _free(model, self._maps))}
        for subject in sorted(opened):
            model.open(subject, audit=audit)
        self._write_entries(model.sets_of(opened))
        self._move_pods()

    def _pending(self) -> dict[int, list[_Entry]]:
        """Entries to be written, by set."""
        found: dict[int, list[_Entry]] = {}
        for item in self._model.entries.writes():
            found.setdefault(item[0][0], []).append(item)
        return found

    def _new(self, items: Iterable[_Entry]) -> int:
        """How many of them are not in the map under another value."""
        return sum(self._model.entries.held(key) is None for key, _ in items)

    def _close(self, subject: int, *, audit: bool = False) -> None:
        wanted = self._model.size_of(subject, audit=audit)
        shortage = Shortage("policy", self._maps.capacities["policy"], wanted)
        self._model.close(subject, shortage, audit=audit)

    def _write_entries(self, sets: Collection[int]) -> None:
        """What is to be written of these sets. Sets for which the kernel has no room are closed."""
        model, policies = self._model, self._maps.policies
        entries = [item for item in model.entries.writes() if item[0][0] in sets]
        entries.sort(key=lambda item: -_length(item[0][1]))
        try:
            policies.update_many({_policy_key(*key): _policy_entry(value) for key, value in entries})
        except OSError as error:
            if error.errno not in FULL:
                raise
            log.warning("policy: the kernel has no room for entries that were to fit: %s", error)
        else:
            model.entries.wrote(entries)
            return
        # Some are written. One by one, to find out whom it concerns.
        refused: set[int] = set()
        for item in entries:
            key, value = item
            if key[0] in refused:
                continue
            try:
                policies.update(_policy_key(*key), _policy_entry(value))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                refused.add(key[0])
            else:
                model.entries.wrote([item])
        for number in sorted(refused):
            model.refuse_set(number, self._maps.capacities["policy"])
        self._close_pods()
        # Of these sets some may be there that we don't know to be.
        strays = [key for key, _ in entries if key[0] in refused and model.entries.held(key) is None]
        policies.delete_many([_policy_key(*key) for key in strays])

    def _delete_entries(self, keys: Iterable[tuple[int, EntryKey]]) -> None:
        gone = sorted(keys, key=lambda key: _length(key[1]))
        self._maps.policies.delete_many([_policy_key(*key) for key in gone])
        self._model.entries.deleted(gone)

    def _delete_unused(self) -> bool:
        """Entries of sets that no pod uses; whether there were any."""
        values = self._model.endpoints.actual.values()
        used = {number for value in values for number in (value.set, value.audit_set)}
        gone = [key for key in self._model.entries.deletes() if key[0] not in used]
        self._delete_entries(gone)
        return bool(gone)

    def _delete_blocks(self) -> None:
        for block in self._model.cidrs.deletes():
            self._maps.cidrs.delete(block)
            self._model.cidrs.deleted([block])

    def _move_pods(self) -> None:
        """Pods that are gone; then those that have other sets now, where the sets are whole."""
        model = self._model
        for address in model.endpoints.deletes():
            self._maps.endpoints.delete(ip_address(address))
            model.endpoints.deleted([address])
        partly = {key[0] for key, _ in model.entries.writes()}

        def is_meant(address: bytes, value: EndpointValue) -> bool:
            old = model.endpoints.held(address)
            is_moved = old is not None and (old.set, old.audit_set) != (value.set, value.audit_set)
            return is_moved and self._is_open(address) and partly.isdisjoint((value.set, value.audit_set))

        self._write_endpoints(is_meant)

    def _is_open(self, address: bytes) -> bool:
        """The kernel judges by a set of rules what is the pod's."""
        value = self._model.endpoints.held(address)
        return value is not None and value.set != CLOSED

    def _close_pods(self) -> None:
        self._write_endpoints(lambda address, value: value.set == CLOSED and self._is_open(address))

    def _write_endpoints(self, which: Callable[[bytes, EndpointValue], bool]) -> None:
        def update(address: Address, value: EndpointValue) -> None:
            self._maps.endpoints.update(
                address,
                EndpointEntry(
                    value.ifindex,
                    value.identity,
                    value.set,
                    value.audit_set,
                    value.revision,
                    value.born,
                    value.flags,
                ),
            )

        self._write_addresses(self._model.endpoints, update, self._maps.endpoints.delete, which)

    # Blocks and addresses

    def _write_blocks(self) -> None:
        model, cidrs = self._model, self._maps.cidrs
        blocks = model.cidrs.writes()
        refused = False
        try:
            for block, (number, flags) in blocks:
                if model.cidrs.desired.get(block) != (number, flags):
                    # Given up since, for another one that was refused.
                    continue
                try:
                    cidrs.update(block, CidrEntry(number, flags))
                except OSError as error:
                    if error.errno not in FULL:
                        raise
                    log.warning("policy: the kernel has no room for a block that was to fit: %s", error)
                    refused = True
                    model.refuse_block(block)
                    # At once: rules that know of the block are in force.
                    self._close_pods()
                else:
                    model.cidrs.wrote([(block, (number, flags))])
        finally:
            # Also after some of them: flows judged before are judged once more.
            if blocks:
                model.cidrs_written()
        if refused:
            self._delete_blocks()

    def _write_identities(self) -> None:
        model, identities = self._model, self._maps.identities
        wanted = model.identities.writes()
        try:
            identities.update_many({ip_address(address): number for address, number in wanted})
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._write_addresses(model.identities, identities.update, identities.delete)
        else:
            model.identities.wrote(wanted)

    def _write_addresses(
        self,
        table: AddressTable[V],
        update: Callable[[Address, V], None],
        delete: Callable[[Address], None],
        which: Callable[[bytes, V], bool] = lambda address, value: True,
    ) -> None:
        """One by one. Where the kernel has no room, what it has of the address goes: it is no longer
        true."""
        for address, value in table.writes():
            if not which(address, value):
                continue
            try:
                update(ip_address(address), value)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                log.warning("policy: the kernel has no room for what was to fit: %s", error)
                delete(ip_address(address))
                table.deleted([address])
                table.refuse(address)
            else:
                table.wrote([(address, value)])


def _length(key: EntryKey) -> int:
    return 0 if key.port == EVERYTHING else 8 + key.port.bits


def _policy_entry(value: tuple[bool, int]) -> PolicyEntry:
    deny, rule = value
    return PolicyEntry(rule, deny)


def _policy_key(number: int, key: EntryKey) -> PolicyKey:
    if key.port == EVERYTHING:
        return PolicyKey(number, key.identity, _HOOKS[key.direction])
    return PolicyKey(
        number, key.identity, _HOOKS[key.direction], key.port.protocol, key.port.port, key.port.bits
    )


def entry_key(key: PolicyKey) -> EntryKey:
    port = EVERYTHING if key.protocol is None else PortKey(key.protocol, key.port, key.port_bits)
    return EntryKey(key.identity, _DIRECTIONS[key.direction], port)
