"""Policies as entries of the datapath's map, kept up to date change by change. Pure.

A rule is on somebody (an identity, a block of addresses, anyone) and on ports. The entries of one set, one
direction and one somebody are a *group*: in it the longest match of protocol and port decides, so that an
entry's verdict is made of every rule of the group that covers it. Groups are not folded into each other: the
datapath asks up to three of them and lets deny win."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Final, NamedTuple

from meshwire.api.fields import Address, Network
from meshwire.api.meshpolicy import (
    CidrPeer,
    Direction,
    Entity,
    IcmpType,
    Peer,
    Policy,
    PolicyMode,
    PortRange,
    Rule,
    Selector,
    ServicePeer,
)
from meshwire.policy.blocks import Blocks, BlockUse
from meshwire.policy.identity import ANY, CIDR, CIDR_INSIDE, ENTITIES, PROVISIONAL, is_pod
from meshwire.policy.model import ICMP_FAMILIES, PROTOCOLS, NamedPorts, ServiceInfo, names_service, rank
from meshwire.policy.selectors import matches

MAX_ENTRIES: Final = 65536

_PORT_BITS: Final = 16
_TYPE_BITS: Final = 8


class PortKey(NamedTuple):
    """What an entry covers: the first `bits` (0 to 16) of the port of a protocol, the rest of `port` being
    zero. `protocol` is an IPPROTO number; 0, with `port` and `bits` 0, is every protocol. An ICMP type is
    the port's first byte. A tuple, as EntryKey: there are many, and they are hashed a lot."""

    protocol: int
    port: int
    bits: int


EVERYTHING: Final = PortKey(0, 0, 0)


class EntryKey(NamedTuple):
    """`identity` is a pod's or a reserved number, ANY, or CIDR or CIDR_INSIDE plus the number of a block."""

    identity: int
    direction: Direction
    port: PortKey


@dataclass(frozen=True, slots=True)
class RuleRef:
    """The policy's uid and the rule's path in it."""

    policy: str
    path: str


@dataclass(frozen=True, slots=True)
class EntryValue:
    """`rule` decides; of several the first by `model.rank`. An entry that would repeat the verdict of a
    shorter one of its group is left out, so that the shorter one's rule is named for it."""

    deny: bool
    rule: RuleRef


@dataclass(frozen=True, slots=True)
class PolicySet:
    """The rules of one subject. `enforced`: what no entry matches is dropped. `uses_cidrs`: some rule is on
    blocks of addresses."""

    enforced: frozenset[Direction]
    uses_cidrs: frozenset[Direction]
    entries: Mapping[EntryKey, EntryValue]


@dataclass(frozen=True, slots=True)
class SubjectSets:
    """`audit` has the policies in mode Audit as well; None: there are none, or they are too large."""

    enforced: PolicySet
    audit: PolicySet | None


@dataclass(frozen=True, slots=True)
class Deltas:
    """Changes to the sets of a subject; None: the entry goes. `audit` is empty without such a set."""

    enforced: Mapping[EntryKey, EntryValue | None]
    audit: Mapping[EntryKey, EntryValue | None]


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The rules of a subject need more entries than there may be. Not in `audit`: the subject keeps the last
    sets that were not too large, while they still say what they did; without such sets it is closed in both
    directions. In `audit`: it has no audit set."""

    subject: int
    entries: int
    limit: int
    audit: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What to write, by subject. `rebuilt` are whole sets, `removed` subjects that are no more; `cidrs` and
    `problems` are all there are, not only new ones.

    To be written in this order, for an address must not be in a block that has no entries: entries that are
    new or change, `cidrs`, entries that go."""

    rebuilt: Mapping[int, SubjectSets]
    touched: Mapping[int, Deltas]
    removed: frozenset[int]
    cidrs: Mapping[Network, int]
    problems: tuple[TooLarge, ...]


@lru_cache(maxsize=4096)
def split_ports(first: int, last: int) -> tuple[tuple[int, int], ...]:
    """The fewest prefixes (port, bits) that cover exactly `first` to `last`."""
    prefixes = []
    while first <= last:
        # As large a block as begins at `first` and doesn't go beyond `last`.
        size = min(first & -first or 1 << _PORT_BITS, 1 << (last - first + 1).bit_length() - 1)
        prefixes.append((first, _PORT_BITS - size.bit_length() + 1))
        first += size
    return tuple(prefixes)


def port_keys(ports: Iterable[PortRange | IcmpType] | None) -> tuple[PortKey, ...]:
    """What a rule's ports cover, those with names aside; None: everything."""
    if ports is None:
        return (EVERYTHING,)
    keys: dict[PortKey, None] = {}
    for port in ports:
        if isinstance(port, IcmpType):
            keys[PortKey(ICMP_FAMILIES[port.family], port.type << _TYPE_BITS, _TYPE_BITS)] = None
        elif not port.name:
            for protocol in PROTOCOLS[port.protocol]:
                keys |= {PortKey(protocol, *prefix): None for prefix in split_ports(port.first, port.last)}
    return tuple(keys)


class Compiler:
    """All policies, and what they say for the subjects: the identities of this node's pods. Every method but
    `changes` only takes note; `changes` works out what is different since it was asked last. What is not put
    yet matches nothing: before the first `changes` everything known should be in.

    Policies that select no subject cost nothing but their place. An identity that is a subject stays known
    until it is none any more, even if it is removed before: its pods still run, by the rules they have."""

    def __init__(self, *, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._policies: dict[str, _Policy] = {}
        self._by_selector: defaultdict[Selector, set[str]] = defaultdict(set)
        self._identities: dict[int, Mapping[str, str]] = {}
        self._leaving: set[int] = set()
        self._ports: dict[int, NamedPorts] = {}
        self._services: dict[tuple[str, str], ServiceInfo] = {}
        self._wanted: set[int] = set()
        self._subjects: dict[int, _Subject] = {}
        # What the rules of the policies that select a subject depend on; users are uids of policies.
        self._selectors: dict[Selector, _SelectorUse] = {}
        self._blocks = Blocks()
        self._pod_users: set[str] = set()
        self._port_users: set[str] = set()
        self._service_users: defaultdict[ServicePeer, set[str]] = defaultdict(set)
        # Since the last changes().
        # Identities that are new (False) or have new labels (True).
        self._meant: dict[int, bool] = {}
        self._stale: set[int] = set()
        self._touched: defaultdict[int, set[int]] = defaultdict(set)
        self._removed: set[int] = set()

    def put_policy(self, policy: Policy) -> None:
        known = self._policies.get(policy.uid)
        if known is not None:
            if known.policy == policy:
                return
            self.remove_policy(policy.uid)
        self._policies[policy.uid] = _Policy(policy)
        self._by_selector[policy.selector].add(policy.uid)
        for number in self._subjects:
            if matches(policy.selector, self._identities[number]):
                self._select(policy.uid, number)

    def remove_policy(self, uid: str) -> None:
        if (policy := self._policies.get(uid)) is None:
            return
        for number in tuple(policy.subjects):
            self._unselect(uid, number)
        users = self._by_selector[policy.policy.selector]
        users.discard(uid)
        if not users:
            del self._by_selector[policy.policy.selector]
        del self._policies[uid]

    def put_identity(self, number: int, labels: Mapping[str, str]) -> None:
        """Raises ValueError for a number that is no pod's."""
        if not is_pod(number):
            raise ValueError(f"{number} is no pod's identity")
        self._leaving.discard(number)
        known = self._identities.get(number)
        if known == labels:
            return
        self._identities[number] = labels = dict(labels)
        for selector, use in self._selectors.items():
            if matches(selector, labels) is not (number in use.members):
                use.members ^= {number}
                self._touch(use.users, number)
        self._meant.setdefault(number, known is not None)
        if known is None:
            self._touch(self._pod_users, number)
        if number in self._wanted:
            self._choose(number)

    def remove_identity(self, number: int) -> None:
        if number not in self._identities:
            return
        if number in self._wanted:
            self._leaving.add(number)
            return
        del self._identities[number]
        for use in self._selectors.values():
            if number in use.members:
                use.members.discard(number)
                self._touch(use.users, number)
        self._touch(self._pod_users, number)

    def set_named_ports(self, identity: int, ports: NamedPorts) -> None:
        """All that containers of the identity's pods name; empty: nothing (any more)."""
        if self._ports.get(identity, {}) == ports:
            return
        if ports:
            self._ports[identity] = dict(ports)
        else:
            del self._ports[identity]
        self._touch(self._port_users, identity)
        if identity in self._subjects and not self._port_users.isdisjoint(self._subjects[identity].policies):
            self._stale.add(identity)

    def set_service(self, namespace: str, name: str, service: ServiceInfo) -> None:
        known = self._services.get((namespace, name))
        if known != service:
            self._services[namespace, name] = service
            self._rebind(namespace, name, known, service)

    def remove_service(self, namespace: str, name: str) -> None:
        if (known := self._services.pop((namespace, name), None)) is not None:
            self._rebind(namespace, name, known, None)

    def add_subject(self, identity: int) -> None:
        """It has sets as soon as the identity is put."""
        self._wanted.add(identity)
        if identity in self._identities:
            self._choose(identity)

    def remove_subject(self, identity: int) -> None:
        self._wanted.discard(identity)
        if (subject := self._subjects.get(identity)) is not None:
            for uid in tuple(subject.policies):
                self._unselect(uid, identity)
            del self._subjects[identity]
            self._stale.discard(identity)
            self._touched.pop(identity, None)
            self._removed.add(identity)
        if identity in self._leaving:
            self._leaving.discard(identity)
            self.remove_identity(identity)

    def policies_of(self, identity: int) -> tuple[str, ...]:
        """Uids, sorted, of the policies that select a subject; none where it has no labels yet."""
        subject = self._subjects.get(identity)
        return tuple(sorted(subject.policies)) if subject else ()

    def changes(self) -> Changes:
        """Raises OverflowError where rules name more blocks of addresses than there are numbers."""
        cidrs = self._blocks.cidrs
        for block, use in self._blocks.settle():
            self._touch(use.users, CIDR | block)
            if use.peer.pods:
                self._touch(use.users, CIDR_INSIDE | block)
        run = _Run()
        rebuilt: dict[int, SubjectSets] = {}
        touched: dict[int, Deltas] = {}
        for number in sorted(self._stale):
            subject = self._subjects[number]
            before = subject.enforced
            self._build(subject, run)
            if (sets := self._publish(subject, before)) is not None:
                rebuilt[number] = sets
        for number in sorted(self._touched.keys() - self._stale):
            subject = self._subjects[number]
            enforced = self._update(subject, subject.enforced, self._touched[number], run)
            audit = self._update(subject, subject.audit, self._touched[number], run)
            if (self._is_over(subject.enforced), self._is_over(subject.audit)) != subject.over:
                if (sets := self._publish(subject, subject.enforced)) is not None:
                    rebuilt[number] = sets
            elif not self._is_over(subject.enforced):
                if self._is_over(subject.audit):
                    audit = {}
                if enforced or audit:
                    touched[number] = Deltas(enforced, audit)
        if keeping := [subject for subject in self._subjects.values() if subject.kept is not None]:
            moved = _moved(cidrs, self._blocks.cidrs)
            for subject in keeping:
                if self._is_void(subject, moved):
                    subject.kept = None
                    rebuilt[subject.number] = SubjectSets(subject.enforced.closed(), None)
        removed = frozenset(self._removed - self._subjects.keys())
        self._meant.clear()
        self._stale.clear()
        self._touched.clear()
        self._removed.clear()
        return Changes(
            rebuilt=rebuilt,
            touched=touched,
            removed=removed,
            cidrs=self._blocks.cidrs,
            problems=tuple(
                TooLarge(subject.number, layer.size, self._max_entries, layer is subject.audit)
                for _, subject in sorted(self._subjects.items())
                for layer in (subject.enforced, subject.audit)
                if layer is not None and self._is_over(layer)
            ),
        )

    def blocks_of(self, subject: int, *, audit: bool) -> frozenset[Network]:
        """The blocks of addresses that rules of its policies name, exceptions among them: without one of
        these in `cidrs` its sets say something else. `audit`: those of policies in mode Audit as well."""
        found: set[Network] = set()
        if (known := self._subjects.get(subject)) is not None:
            for uid in known.policies:
                policy = self._policies[uid]
                if audit or policy.policy.mode is PolicyMode.ENFORCE:
                    for rule in policy.rules:
                        for use in rule.blocks:
                            found.add(use.peer.cidr)
                            found.update(use.peer.excepts)
        return frozenset(found)

    # Which policies select which subjects, and what their rules then depend on.

    def _choose(self, number: int) -> None:
        """Finds the policies of a subject that is new or has new labels."""
        subject = self._subjects.get(number)
        if subject is None:
            subject = self._subjects[number] = _Subject(number)
            self._stale.add(number)
        labels = self._identities[number]
        chosen: set[str] = set()
        for selector, uids in self._by_selector.items():
            if matches(selector, labels):
                chosen |= uids
        for uid in subject.policies - chosen:
            self._unselect(uid, number)
        for uid in chosen - subject.policies:
            self._select(uid, number)

    def _select(self, uid: str, number: int) -> None:
        policy = self._policies[uid]
        if not policy.subjects:
            self._bind(policy)
        policy.subjects.add(number)
        self._subjects[number].policies.add(uid)
        self._stale.add(number)

    def _unselect(self, uid: str, number: int) -> None:
        policy = self._policies[uid]
        policy.subjects.discard(number)
        self._subjects[number].policies.discard(uid)
        self._stale.add(number)
        if not policy.subjects:
            self._unbind(policy)

    def _bind(self, policy: _Policy) -> None:
        uid = policy.policy.uid
        policy.rules = tuple(
            self._bound(policy.policy, rule)
            for rule in sorted(policy.policy.rules, key=lambda rule: rank(policy.policy, rule))
        )
        for rule in policy.rules:
            for selector in rule.selectors:
                selector.users.add(uid)
            for peer in rule.services:
                self._service_users[peer].add(uid)
            if rule.pods or (rule.named and rule.anyone):
                self._pod_users.add(uid)
            if rule.named:
                self._port_users.add(uid)

    def _bound(self, policy: Policy, rule: Rule) -> _Rule:
        peers: tuple[Peer, ...] = (Entity.ALL,) if rule.peers is None else rule.peers
        entities = {peer for peer in peers if isinstance(peer, Entity)}
        services = tuple(peer for peer in peers if isinstance(peer, ServicePeer))
        selectors = {peer for peer in peers if isinstance(peer, Selector)}
        blocks = {peer for peer in peers if isinstance(peer, CidrPeer)}
        for (namespace, name), service in self._services.items() if services else ():
            if any(names_service(peer, namespace, name, service.labels) for peer in services):
                if (pods := service.pods(namespace)) is not None:
                    selectors.add(pods)
                else:
                    blocks |= _addresses(service)
        return _Rule(
            ref=RuleRef(policy.uid, rule.path),
            direction=rule.direction,
            deny=rule.deny,
            anyone=Entity.ALL in entities,
            pods=Entity.CLUSTER in entities,
            reserved=frozenset[int]().union(*(ENTITIES[entity] for entity in entities)),
            selectors=tuple(self._selector(selector) for selector in selectors),
            blocks=tuple(self._blocks.use(peer, policy.uid) for peer in blocks),
            services=services,
            keys=port_keys(rule.ports),
            named=tuple(port for port in rule.ports or () if isinstance(port, PortRange) and port.name),
        )

    def _selector(self, selector: Selector) -> _SelectorUse:
        if (use := self._selectors.get(selector)) is None:
            use = self._selectors[selector] = _SelectorUse(
                selector,
                {number for number, labels in self._identities.items() if matches(selector, labels)},
            )
        return use

    def _unbind(self, policy: _Policy) -> None:
        uid = policy.policy.uid
        for rule in policy.rules:
            for selector in rule.selectors:
                selector.users.discard(uid)
                if not selector.users:
                    self._selectors.pop(selector.selector, None)
            for use in rule.blocks:
                if uid in use.users:
                    self._blocks.drop(use, uid)
            for peer in rule.services:
                self._service_users[peer].discard(uid)
                if not self._service_users[peer]:
                    del self._service_users[peer]
        self._pod_users.discard(uid)
        self._port_users.discard(uid)
        policy.rules = ()

    def _rebind(self, namespace: str, name: str, old: ServiceInfo | None, new: ServiceInfo | None) -> None:
        """The policies that mean a Service, before or now, depend on something else."""
        affected: set[str] = set()
        for peer, users in self._service_users.items():
            endpoints = [
                (service.pods(namespace), _addresses(service))
                if service is not None and names_service(peer, namespace, name, service.labels)
                else (None, frozenset())
                for service in (old, new)
            ]
            if endpoints[0] != endpoints[1]:
                affected |= users
        for uid in affected:
            policy = self._policies[uid]
            self._unbind(policy)
            self._bind(policy)
            self._stale |= policy.subjects

    def _touch(self, uids: Iterable[str], number: int) -> None:
        """What policies say about somebody may have changed."""
        for uid in uids:
            for subject in self._policies[uid].subjects:
                self._touched[subject].add(number)

    # From rules to entries.

    def _build(self, subject: _Subject, run: _Run) -> None:
        chosen = sorted(
            (self._policies[uid] for uid in subject.policies),
            key=lambda each: (each.policy.kind, each.policy.namespace, each.policy.name, each.policy.uid),
        )
        enforced = [each for each in chosen if each.policy.mode is PolicyMode.ENFORCE]
        subject.enforced = self._layer(enforced, subject.number, run)
        subject.audit = self._layer(chosen, subject.number, run) if len(chosen) > len(enforced) else None

    def _layer(self, policies: list[_Policy], subject: int, run: _Run) -> _Layer:
        halves = {}
        for direction in Direction:
            rules = tuple(
                rule for policy in policies for rule in policy.rules if rule.direction is direction
            )
            terms: defaultdict[int, list[_Term]] = defaultdict(list)
            for rule in rules:
                if (term := self._term(rule, subject)) is not None:
                    for number in self._targets(rule, run):
                        terms[number].append(term)
                if rule.named and direction is Direction.EGRESS:
                    for number in self._ports.keys() & self._pods(rule, run):
                        if (term := rule.term(self._named(rule, number))) is not None:
                            terms[number].append(term)
            halves[direction] = _Half(
                rules, {number: run.group(tuple(listed)) for number, listed in terms.items()}
            )
        return _Layer(
            enforced=frozenset[Direction]().union(*(each.policy.default_deny for each in policies)),
            halves=halves,
            size=sum(len(group) for half in halves.values() for group in half.groups.values()),
        )

    def _update(
        self, subject: _Subject, layer: _Layer | None, numbers: set[int], run: _Run
    ) -> dict[EntryKey, EntryValue | None]:
        """Works out the groups of some numbers again. Returns what is different."""
        delta: dict[EntryKey, EntryValue | None] = {}
        if layer is None:
            return delta
        for direction, half in layer.halves.items():
            for number in numbers:
                old = half.groups.get(number, _NO_ENTRIES)
                terms = self._terms(half, subject.number, number)
                new = run.group(tuple(terms)) if terms else _NO_ENTRIES
                if new == old:
                    continue
                layer.size += len(new) - len(old)
                if new:
                    half.groups[number] = new
                else:
                    del half.groups[number]
                delta |= {EntryKey(number, direction, key): None for key in old.keys() - new.keys()}
                delta |= {
                    EntryKey(number, direction, key): value
                    for key, value in new.items()
                    if old.get(key) != value
                }
        return delta

    def _terms(self, half: _Half, subject: int, number: int) -> list[_Term]:
        """The same as `_layer` makes, for one pod or block."""
        terms: list[_Term] = []
        pod = number in self._identities
        for rule in half.rules:
            if CIDR <= number < PROVISIONAL:
                meant = rule.means_block(number)
            else:
                meant = pod and rule.means_pod(number)
            if meant and not rule.anyone and (term := self._term(rule, subject)) is not None:
                terms.append(term)
            if rule.named and rule.direction is Direction.EGRESS and pod and (meant or rule.anyone):
                if (term := rule.term(self._named(rule, number))) is not None:
                    terms.append(term)
        return terms

    def _term(self, rule: _Rule, subject: int) -> _Term | None:
        """What a rule says to all whom it means; what it says to single ones for the ports they name is
        another term."""
        if rule.named and rule.direction is Direction.INGRESS:
            return rule.term(rule.keys + self._named(rule, subject))
        return rule.term(rule.keys)

    def _named(self, rule: _Rule, receiver: int) -> tuple[PortKey, ...]:
        named = self._ports.get(receiver, {})
        keys = {
            PortKey(protocol, port, _PORT_BITS)
            for wanted in rule.named
            for protocol, port in named.get(wanted.name, ())
            if protocol in PROTOCOLS[wanted.protocol]
        }
        return tuple(sorted(keys))

    def _targets(self, rule: _Rule, run: _Run) -> frozenset[int]:
        if rule.anyone:
            return _ANYONE
        if (targets := run.targets.get(rule)) is None:
            blocks = {CIDR | number for use in rule.blocks for number in use.numbers}
            blocks |= {
                CIDR_INSIDE | number for use in rule.blocks if use.peer.pods for number in use.numbers
            }
            targets = run.targets[rule] = self._pods(rule, run) | rule.reserved | blocks
        return targets

    def _pods(self, rule: _Rule, run: _Run) -> frozenset[int]:
        if (pods := run.pods.get(rule)) is None:
            if rule.pods or rule.anyone:
                pods = frozenset(self._identities)
            else:
                pods = frozenset[int]().union(*(use.members for use in rule.selectors))
            run.pods[rule] = pods
        return pods

    def _is_over(self, layer: _Layer | None) -> bool:
        return layer is not None and layer.size > self._max_entries

    def _is_void(self, subject: _Subject, moved: frozenset[int]) -> bool:
        """Whether the sets that a subject keeps let somebody through for whom they were not made: one whom a
        rule denies, or who has the number of somebody else. `moved` are numbers of blocks."""
        assert subject.kept is not None
        if subject.kept & moved or subject.kept & self._meant.keys():
            return True
        return any(
            value.deny
            for half in subject.enforced.halves.values()
            for number in self._touched.get(subject.number, ())
            for value in half.groups.get(number, _NO_ENTRIES).values()
        )

    def _publish(self, subject: _Subject, before: _Layer) -> SubjectSets | None:
        """The whole sets; None where the last ones have to stay, which were made of `before`, give or take
        what was touched since."""
        was_over = subject.over[0]
        subject.over = self._is_over(subject.enforced), self._is_over(subject.audit)
        over, audit_over = subject.over
        if over and subject.published:
            if not was_over:
                numbers = {number for half in before.halves.values() for number in half.groups}
                numbers |= self._touched.get(subject.number, set())
                subject.kept = frozenset(number for number in numbers if self._meant.get(number, True))
            return None
        subject.published = True
        subject.kept = None
        if over:
            return SubjectSets(subject.enforced.closed(), None)
        return SubjectSets(
            subject.enforced.whole(),
            subject.audit.whole() if subject.audit is not None and not audit_over else None,
        )


Group = Mapping[PortKey, EntryValue]

_NO_ENTRIES: Final[Group] = {}
_ANYONE: Final = frozenset({ANY})


@dataclass(slots=True, eq=False)
class _SelectorUse:
    """A selector of peers, and the pod identities that it matches."""

    selector: Selector
    members: set[int]
    users: set[str] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Term:
    """What one rule says in a group."""

    ref: RuleRef
    deny: bool
    keys: tuple[PortKey, ...]


@dataclass(slots=True, eq=False, kw_only=True)
class _Rule:
    """A rule with its peers sorted by kind. `anyone`, `pods`: the entities `all`, `cluster`; `selectors` and
    `blocks` have those of Services in them. `keys` are of the ports that have no name."""

    ref: RuleRef
    direction: Direction
    deny: bool
    anyone: bool
    pods: bool
    reserved: frozenset[int]
    selectors: tuple[_SelectorUse, ...]
    blocks: tuple[BlockUse, ...]
    services: tuple[ServicePeer, ...]
    keys: tuple[PortKey, ...]
    named: tuple[PortRange, ...]
    _made: dict[tuple[PortKey, ...], _Term] = field(default_factory=dict)

    def term(self, keys: tuple[PortKey, ...]) -> _Term | None:
        """The same term for the same keys: groups of the same terms are worked out once."""
        if not keys:
            return None
        if (term := self._made.get(keys)) is None:
            term = self._made[keys] = _Term(self.ref, self.deny, keys)
        return term

    def means_pod(self, number: int) -> bool:
        return self.pods or any(number in use.members for use in self.selectors)

    def means_block(self, number: int) -> bool:
        """`number` has CIDR or CIDR_INSIDE in it."""
        inside = number & CIDR_INSIDE == CIDR_INSIDE
        block = number & (CIDR - 1)
        return any(block in use.numbers and (use.peer.pods or not inside) for use in self.blocks)


@dataclass(slots=True, eq=False)
class _Policy:
    """`rules` are there while it selects a subject."""

    policy: Policy
    subjects: set[int] = field(default_factory=set)
    rules: tuple[_Rule, ...] = ()


@dataclass(slots=True, eq=False)
class _Half:
    """One direction: groups by the number that they are about."""

    rules: tuple[_Rule, ...]
    groups: dict[int, Group]


@dataclass(slots=True, eq=False)
class _Layer:
    """The set of a subject, enforced or audit, as it should be. `size` in entries."""

    enforced: frozenset[Direction] = frozenset()
    halves: Mapping[Direction, _Half] = field(default_factory=dict)
    size: int = 0

    def whole(self) -> PolicySet:
        return PolicySet(
            self.enforced,
            frozenset(
                direction
                for direction, half in self.halves.items()
                if any(rule.blocks for rule in half.rules)
            ),
            {
                EntryKey(number, direction, key): value
                for direction, half in self.halves.items()
                for number, group in half.groups.items()
                for key, value in group.items()
            },
        )

    def closed(self) -> PolicySet:
        """For want of a set that fits. In both directions: half a pod would be as nobody has written it."""
        return PolicySet(frozenset(Direction), frozenset(), {})


@dataclass(slots=True, eq=False)
class _Subject:
    """`over`: whether `enforced` and `audit` were too large when they were published last. `kept`: whom the
    sets are about that stay in force meanwhile; None: no such sets."""

    number: int
    policies: set[str] = field(default_factory=set)
    enforced: _Layer = field(default_factory=_Layer)
    audit: _Layer | None = None
    over: tuple[bool, bool] = (False, False)
    published: bool = False
    kept: frozenset[int] | None = None


@dataclass(slots=True, eq=False)
class _Run:
    """What one call of `changes` works out but once."""

    targets: dict[_Rule, frozenset[int]] = field(default_factory=dict)
    pods: dict[_Rule, frozenset[int]] = field(default_factory=dict)
    groups: dict[tuple[_Term, ...], Group] = field(default_factory=dict)

    def group(self, terms: tuple[_Term, ...]) -> Group:
        if (group := self.groups.get(terms)) is None:
            group = self.groups[terms] = _resolve(terms)
        return group


def _addresses(service: ServiceInfo) -> frozenset[CidrPeer]:
    """Of a Service without selector. Whoever has the address is meant, pods and nodes too."""
    if service.selector:
        return frozenset()
    return frozenset(CidrPeer(_alone(address), pods=True) for address in service.addresses)


def _alone(address: Address) -> Network:
    """The block that is one address. By way of its number: `ip_network` would read the address as text."""
    return IPv4Network(int(address)) if isinstance(address, IPv4Address) else IPv6Network(int(address))


def _resolve(terms: tuple[_Term, ...]) -> Group:
    """Entries that say for every port what the terms, in the order of rank, say together."""
    none = len(terms)
    first: dict[PortKey, tuple[int, int]] = {}
    """First term that denies, first that allows; those of shorter keys included once they are worked out."""
    for index, term in enumerate(terms):
        for key in term.keys:
            denies, allows = first.get(key, (none, none))
            if term.deny:
                first[key] = min(denies, index), allows
            else:
                first[key] = denies, min(allows, index)
    lengths = sorted({key.bits for key in first}, reverse=True)
    entries: dict[PortKey, EntryValue] = {}
    for key in sorted(first, key=lambda key: (key.protocol > 0, key.bits)):
        denies, allows = first[key]
        if (shorter := _shorter(key, first, lengths)) is not None:
            inherited = first[shorter]
            denies, allows = min(denies, inherited[0]), min(allows, inherited[1])
            first[key] = denies, allows
            if (denies < none) is (inherited[0] < none):
                continue
        deny = denies < none
        entries[key] = EntryValue(deny, terms[denies if deny else allows].ref)
    return entries


def _shorter(key: PortKey, among: Mapping[PortKey, object], lengths: list[int]) -> PortKey | None:
    """The longest other key that covers `key`."""
    protocol, port, bits = key
    if protocol == 0:
        return None
    for length in lengths:
        if length < bits:
            spare = _PORT_BITS - length
            if (shorter := PortKey(protocol, port >> spare << spare, length)) in among:
                return shorter
    return EVERYTHING if EVERYTHING in among else None


def _moved(before: Mapping[Network, int], after: Mapping[Network, int]) -> frozenset[int]:
    """Numbers of blocks, as entries have them, under which there are other addresses than before."""
    found = set()
    if before is not after:
        for network in before.keys() | after.keys():
            if before.get(network) != after.get(network):
                found |= {_smallest(network, before), _smallest(network, after)}
    return frozenset(kind | number for number in found - {0} for kind in (CIDR, CIDR_INSIDE))


def _smallest(network: Network, among: Mapping[Network, int]) -> int:
    """The number of the smallest block that holds all of `network`; 0: there is none."""
    for length in range(network.prefixlen, -1, -1):
        if number := among.get(network.supernet(new_prefix=length)):
            return number
    return 0
