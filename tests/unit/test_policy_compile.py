"""Compiled sets say what the policies say, and stay so change by change."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwire.api.fields import Network
from meshwire.api.meshpolicy import (
    NAMESPACE_LABEL,
    CidrPeer,
    Direction,
    Entity,
    IcmpType,
    Kind,
    Operator,
    Peer,
    Policy,
    PolicyMode,
    PortRange,
    Protocol,
    Requirement,
    Rule,
    Selector,
    ServicePeer,
)
from meshwire.policy.compile import (
    EVERYTHING,
    Changes,
    Compiler,
    EntryKey,
    EntryValue,
    PolicySet,
    PortKey,
    SubjectSets,
    TooLarge,
    port_keys,
    split_ports,
)
from meshwire.policy.evaluate import Decision, Packet, Party, Reason, holds, judge, services_of
from meshwire.policy.identity import (
    ANY,
    APISERVER,
    APISERVER_HOST,
    APISERVER_NODE,
    CIDR,
    CIDR_INSIDE,
    HOST,
    PROVISIONAL,
    REMOTE_NODE,
    UNKNOWN,
    WORLD,
)
from meshwire.policy.model import ICMP, ICMPV6, SCTP, TCP, UDP, NamedPorts, ServiceInfo

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS


# What the datapath does with a set.


def find_block(cidrs: Mapping[Network, int], party: Party) -> int:
    """The longest match of an address in `cidrs`; 0: none."""
    if party.address is None:
        return 0
    around = [network for network in cidrs if party.address in network]
    return cidrs[max(around, key=lambda network: network.prefixlen)] if around else 0


def find_entry(
    found: PolicySet, identity: int, direction: Direction, protocol: int, port: int
) -> EntryValue | None:
    """The longest match in one group."""
    for bits in range(16, -1, -1):
        spare = 16 - bits
        key = PortKey(protocol, port >> spare << spare, bits)
        if (value := found.entries.get(EntryKey(identity, direction, key))) is not None:
            return value
    return found.entries.get(EntryKey(identity, direction, EVERYTHING))


def look_up(
    found: PolicySet, cidrs: Mapping[Network, int], packet: Packet, direction: Direction
) -> tuple[bool, list[EntryValue]]:
    """Whether the packet passes, and the entries that decided."""
    peer = packet.source if direction is INGRESS else packet.destination
    if direction is INGRESS and peer.identity in (HOST, APISERVER_HOST):
        return True, []
    port = packet.port if packet.icmp_type is None else packet.icmp_type << 8
    groups = [peer.identity, ANY]
    if direction in found.uses_cidrs and (block := find_block(cidrs, peer)):
        groups.append(block | (CIDR if peer.identity in (WORLD, APISERVER) else CIDR_INSIDE))
    entries = [
        entry
        for group in groups
        if (entry := find_entry(found, group, direction, packet.protocol, port)) is not None
    ]
    if any(entry.deny for entry in entries):
        return False, [entry for entry in entries if entry.deny]
    if entries:
        return True, entries
    return direction not in found.enforced, []


# A small world, in which much collides.

KEYS: Final = ("app", "tier", NAMESPACE_LABEL)
VALUES: Final = ("a", "b", "c")
PODS: Final = (256, 257, 258, 259, PROVISIONAL)
RESERVED: Final = (UNKNOWN, HOST, WORLD, REMOTE_NODE, APISERVER, APISERVER_NODE, APISERVER_HOST)
NETWORKS: Final = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/0",
        "10.0.0.0/8",
        "10.0.0.0/30",
        "10.0.0.0/31",
        "10.0.0.1/32",
        "10.0.0.2/32",
        "10.0.0.128/25",
        "::/0",
        "fd00::/16",
        "fd00::2/128",
    )
)
ADDRESSES: Final = tuple(
    ip_address(text)
    for text in (
        "10.0.0.0",
        "10.0.0.1",
        "10.0.0.2",
        "10.0.0.200",
        "192.0.2.1",
        "fd00::2",
        "fd00::3",
        "2001:db8::1",
    )
)
NAMES: Final = ("http", "dns")
PORTS: Final = (0, 1, 7, 8, 53, 79, 80, 81, 255, 256, 443, 65535)
SERVICES: Final = (("a", "x"), ("a", "y"), ("b", "x"))

labels = st.fixed_dictionaries(
    {NAMESPACE_LABEL: st.sampled_from("ab")},
    optional={"app": st.sampled_from(VALUES), "tier": st.sampled_from(VALUES)},
)
requirements = st.one_of(
    st.builds(
        lambda key, operator, values: Requirement(key, operator, tuple(sorted(values))),
        st.sampled_from(KEYS),
        st.sampled_from((Operator.IN, Operator.NOT_IN)),
        st.sets(st.sampled_from(VALUES), min_size=1, max_size=2),
    ),
    st.builds(
        Requirement, st.sampled_from(KEYS), st.sampled_from((Operator.EXISTS, Operator.DOES_NOT_EXIST))
    ),
)
selectors = st.builds(lambda found: Selector(tuple(sorted(found))), st.sets(requirements, max_size=2))
blocks = st.builds(
    CidrPeer,
    st.sampled_from(NETWORKS),
    st.lists(st.sampled_from(NETWORKS), max_size=2, unique=True).map(tuple),
    st.booleans(),
)
service_peers = st.one_of(
    st.builds(ServicePeer, st.sampled_from(("", "a", "b")), st.sampled_from("xy")),
    st.builds(ServicePeer, st.sampled_from(("", "a", "b")), st.just(""), selectors),
)
peers: st.SearchStrategy[Peer] = st.one_of(selectors, blocks, st.sampled_from(Entity), service_peers)
ports: st.SearchStrategy[PortRange | IcmpType] = st.one_of(
    st.builds(
        lambda protocol, ends: PortRange(protocol, min(ends), max(ends)),
        st.sampled_from(Protocol),
        st.tuples(st.sampled_from(PORTS), st.sampled_from(PORTS)),
    ),
    st.builds(PortRange, st.sampled_from(Protocol), st.just(0), st.just(0), st.sampled_from(NAMES)),
    st.builds(IcmpType, st.sampled_from((4, 6)), st.sampled_from((0, 8, 255))),
)
rules = st.builds(
    Rule,
    direction=st.sampled_from(Direction),
    path=st.sampled_from("pqr"),
    deny=st.sampled_from((False, False, True)),
    peers=st.none() | st.lists(peers, max_size=3).map(tuple),
    ports=st.none() | st.lists(ports, max_size=3).map(tuple),
)


def policies(uids: Iterable[str]) -> st.SearchStrategy[Policy]:
    return st.builds(
        Policy,
        kind=st.sampled_from(Kind),
        namespace=st.sampled_from(("", "a", "b")),
        name=st.sampled_from("mno"),
        uid=st.sampled_from(tuple(uids)),
        mode=st.sampled_from((PolicyMode.ENFORCE, PolicyMode.ENFORCE, PolicyMode.AUDIT)),
        selector=st.one_of(st.just(Selector()), selectors),
        default_deny=st.frozensets(st.sampled_from(Direction)),
        rules=st.lists(rules, max_size=4).map(tuple),
    )


named_ports: st.SearchStrategy[NamedPorts] = st.dictionaries(
    st.sampled_from(NAMES),
    st.frozensets(
        st.tuples(st.sampled_from((TCP, UDP, SCTP)), st.sampled_from(PORTS)), min_size=1, max_size=2
    ),
)
service_infos = st.builds(
    ServiceInfo,
    st.dictionaries(st.sampled_from(KEYS[:2]), st.sampled_from(VALUES), max_size=1),
    st.none() | st.dictionaries(st.sampled_from(KEYS[:2]), st.sampled_from(VALUES), max_size=1),
    st.frozensets(st.sampled_from(ADDRESSES), max_size=2),
)


def any_packet(source: random.Random, *ends: Party) -> Packet:
    protocol = source.choice((TCP, TCP, UDP, SCTP, ICMP, ICMPV6, 47))
    icmp_type = source.choice((0, 8, 9, 255)) if protocol in (ICMP, ICMPV6) else None
    port = source.choice((*PORTS, source.randrange(65536))) if protocol in (TCP, UDP, SCTP) else 0
    return Packet(source=ends[0], destination=ends[1], protocol=protocol, port=port, icmp_type=icmp_type)


@dataclass
class World:
    """What a Compiler has been told."""

    policies: dict[str, Policy] = field(default_factory=dict)
    identities: dict[int, dict[str, str]] = field(default_factory=dict)
    ports: dict[int, NamedPorts] = field(default_factory=dict)
    services: dict[tuple[str, str], ServiceInfo] = field(default_factory=dict)
    subjects: set[int] = field(default_factory=set)
    leaving: set[int] = field(default_factory=set)

    def compiler(self, **more: Any) -> Compiler:
        """A new one, told only how things are now."""
        compiler = Compiler(**more)
        for policy in self.policies.values():
            compiler.put_policy(policy)
        for number, found in self.identities.items():
            compiler.put_identity(number, found)
        for number, named in self.ports.items():
            compiler.set_named_ports(number, named)
        for (namespace, name), service in self.services.items():
            compiler.set_service(namespace, name, service)
        for number in self.subjects:
            compiler.add_subject(number)
        return compiler

    def party(self, identity: int, address: Any) -> Party:
        found = self.identities.get(identity, {})
        return Party(
            identity=identity,
            labels=found,
            address=address,
            named_ports=self.ports.get(identity, {}) if found else {},
            services=services_of(self.services, identity=identity, labels=found, address=address),
        )


worlds = st.builds(
    lambda listed, identities, ports, services: World(
        {policy.uid: policy for policy in listed}, identities, ports, services, set(identities)
    ),
    st.lists(policies("0123"), max_size=5),
    st.fixed_dictionaries({256: labels, 257: labels}, optional={258: labels, PROVISIONAL: labels}),
    st.dictionaries(st.sampled_from(PODS), named_ports, max_size=3),
    st.dictionaries(st.sampled_from(SERVICES), service_infos, max_size=3),
)


def check_against_the_evaluator(
    world: World, sets: Mapping[int, SubjectSets], cidrs: Mapping[Network, int], packet: Packet
) -> None:
    """Both directions, with and without audit."""
    listed = tuple(world.policies.values())
    by_ref = {(policy.uid, rule.path, rule) for policy in listed for rule in policy.rules}
    for direction in Direction:
        subject = packet.destination if direction is INGRESS else packet.source
        if subject.identity not in sets:
            continue
        both = sets[subject.identity]
        for audit, found in ((False, both.enforced), (True, both.audit or both.enforced)):
            expected = judge(listed, packet, direction, audit=audit)
            allowed, entries = look_up(found, cidrs, packet, direction)
            assert allowed is expected.allowed, (direction, audit, expected)
            assert bool(entries) is (expected.rule is not None)
            for entry in entries:
                assert any(
                    (uid, path) == (entry.rule.policy, entry.rule.path)
                    and rule.direction is direction
                    and rule.deny is entry.deny
                    and holds(rule, packet)
                    for uid, path, rule in by_ref
                )


@settings(max_examples=1000, deadline=None)
@given(worlds, st.integers(0, 2**32))
def test_looking_up_a_set_gives_what_the_evaluator_says(world: World, seed: int) -> None:
    changes = world.compiler().changes()
    assert set(changes.rebuilt) == world.subjects and not changes.problems
    source = random.Random(seed)
    numbers = (*world.identities, *RESERVED)
    for _ in range(30):
        ends = [
            world.party(source.choice(pool), source.choice((*ADDRESSES, None)))
            for pool in (sorted(world.subjects), numbers)
        ]
        source.shuffle(ends)
        packet = any_packet(source, *ends)
        check_against_the_evaluator(world, changes.rebuilt, changes.cidrs, packet)


# Change by change.

operations = st.one_of(
    st.tuples(st.just("policy"), policies("012345")),
    st.tuples(st.just("no policy"), st.sampled_from("012345")),
    st.tuples(st.just("identity"), st.tuples(st.sampled_from(PODS), labels)),
    st.tuples(st.just("no identity"), st.sampled_from(PODS)),
    st.tuples(st.just("ports"), st.tuples(st.sampled_from(PODS), named_ports)),
    st.tuples(st.just("service"), st.tuples(st.sampled_from(SERVICES), service_infos)),
    st.tuples(st.just("no service"), st.sampled_from(SERVICES)),
    st.tuples(st.just("subject"), st.sampled_from(PODS)),
    st.tuples(st.just("no subject"), st.sampled_from(PODS)),
    st.tuples(st.just("changes"), st.none()),
)


def carry_out(compiler: Compiler, world: World, operation: str, value: Any) -> None:
    match operation:
        case "policy":
            compiler.put_policy(value)
            world.policies[value.uid] = value
        case "no policy":
            compiler.remove_policy(value)
            world.policies.pop(value, None)
        case "identity":
            compiler.put_identity(*value)
            world.identities[value[0]] = value[1]
            world.leaving.discard(value[0])
        case "no identity":
            compiler.remove_identity(value)
            if value in world.subjects and value in world.identities:
                world.leaving.add(value)
            else:
                world.identities.pop(value, None)
        case "ports":
            compiler.set_named_ports(*value)
            world.ports[value[0]] = value[1]
        case "service":
            (namespace, name), service = value
            compiler.set_service(namespace, name, service)
            world.services[namespace, name] = service
        case "no service":
            compiler.remove_service(*value)
            world.services.pop(value, None)
        case "subject":
            compiler.add_subject(value)
            world.subjects.add(value)
        case "no subject":
            compiler.remove_subject(value)
            world.subjects.discard(value)
            if value in world.leaving:
                world.leaving.discard(value)
                world.identities.pop(value)


class Mirror:
    """What a writer of maps has after the changes it was told."""

    def __init__(self) -> None:
        self.sets: dict[int, SubjectSets] = {}
        self.cidrs: Mapping[Network, int] = {}

    def apply(self, changes: Changes) -> None:
        assert changes.removed.isdisjoint(changes.rebuilt)
        for number in changes.removed:
            self.sets.pop(number, None)
        self.sets |= changes.rebuilt
        for number, deltas in changes.touched.items():
            assert deltas.enforced or deltas.audit
            known = self.sets[number]
            assert known.audit is not None or not deltas.audit
            self.sets[number] = SubjectSets(
                self._changed(known.enforced, deltas.enforced),
                self._changed(known.audit, deltas.audit) if known.audit is not None else None,
            )
        for network in self.cidrs.keys() & changes.cidrs.keys():
            assert self.cidrs[network] == changes.cidrs[network], "a number is stable"
        assert len(set(changes.cidrs.values())) == len(changes.cidrs)
        assert 0 not in changes.cidrs.values()
        self.cidrs = changes.cidrs

    def _changed(self, known: PolicySet, delta: Mapping[EntryKey, EntryValue | None]) -> PolicySet:
        entries = dict(known.entries)
        for key, value in delta.items():
            assert entries.get(key) != value, "only what is different"
            if value is None:
                del entries[key]
            else:
                entries[key] = value
        return replace(known, entries=entries)

    def plain(self) -> tuple[set[Network], dict[int, list[Any]]]:
        """With blocks in the place of their numbers, which depend on what has been before."""
        networks = {number: network for network, number in self.cidrs.items()}

        def identity(number: int) -> object:
            if CIDR <= number < PROVISIONAL:
                inside = number & CIDR_INSIDE == CIDR_INSIDE
                return networks[number & (CIDR - 1)], inside
            return number

        return set(self.cidrs), {
            number: [
                None
                if each is None
                else (
                    each.enforced,
                    each.uses_cidrs,
                    {(identity(key.identity), *key[1:]): value for key, value in each.entries.items()},
                )
                for each in (sets.enforced, sets.audit)
            ]
            for number, sets in self.sets.items()
        }


@settings(max_examples=1000, deadline=None)
@given(worlds, st.lists(operations, max_size=25))
def test_after_any_changes_everything_is_as_if_made_anew(
    world: World, listed: list[tuple[str, Any]]
) -> None:
    compiler, mirror = world.compiler(), Mirror()
    mirror.apply(compiler.changes())
    for operation, value in (*listed, ("changes", None)):
        if operation == "changes":
            mirror.apply(compiler.changes())
            fresh = Mirror()
            fresh.apply(world.compiler().changes())
            assert mirror.plain() == fresh.plain()
        else:
            carry_out(compiler, world, operation, value)
    idle = compiler.changes()
    assert not idle.rebuilt and not idle.touched and not idle.removed and idle.cidrs == mirror.cidrs
    assert not any(users for users in unused(compiler, world))


def unused(compiler: Compiler, world: World) -> list[object]:
    """What a Compiler still keeps though nothing needs it."""
    for uid in world.policies:
        compiler.remove_policy(uid)
    compiler.changes()
    blocks = compiler._blocks
    return [
        compiler._selectors,
        compiler._service_users,
        compiler._pod_users,
        compiler._port_users,
        compiler._by_selector,
        blocks.cidrs,
        blocks._uses,
        blocks._by_block,
        blocks._named,
        blocks._networks,
        blocks._given,
    ]


# Sentences.


def select(**pairs: str) -> Selector:
    return Selector(tuple(Requirement(key, Operator.IN, (pairs[key],)) for key in sorted(pairs)))


def policy(uid: str, *listed: Rule, on: Selector | None = None, **more: Any) -> Policy:
    fields: dict[str, Any] = {
        "kind": Kind.MESH_POLICY,
        "namespace": "a",
        "selector": on or Selector(),
        "default_deny": frozenset({INGRESS}),
        **more,
    }
    return Policy(name=uid, uid=uid, rules=listed, **fields)


def rule(
    *peers: Peer, ports: Any = None, deny: bool = False, direction: Direction = INGRESS, path: str = "r"
) -> Rule:
    return Rule(direction=direction, path=path, deny=deny, peers=peers or None, ports=ports)


def tcp(first: int, last: int | None = None) -> PortRange:
    return PortRange(Protocol.TCP, first, first if last is None else last)


def started(*listed: Policy, subjects: Iterable[int] = (256,), **more: Any) -> tuple[Compiler, Changes]:
    world = World(
        {each.uid: each for each in listed},
        {256: {"app": "a"}, 257: {"app": "b"}, 258: {"app": "c"}},
        subjects=set(subjects),
    )
    compiler = world.compiler(**more)
    return compiler, compiler.changes()


def entries(found: PolicySet) -> dict[tuple[int, PortKey], str]:
    """(identity, ports) -> the rule, with a minus in front if it denies."""
    return {
        (key.identity, key.port): f"{'-' if value.deny else ''}{value.rule.policy}.{value.rule.path}"
        for key, value in found.entries.items()
    }


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 65535), st.integers(0, 65535))
def test_a_port_range_is_split_into_few_prefixes(one: int, another: int) -> None:
    first, last = min(one, another), max(one, another)
    prefixes = split_ports(first, last)
    expected = first
    for port, bits in prefixes:
        size = 1 << (16 - bits)
        assert port == expected and port % size == 0
        expected += size
    assert expected == last + 1 and len(prefixes) <= 30


def test_ports_are_keys_of_their_protocols() -> None:
    assert port_keys(None) == (EVERYTHING,)
    assert port_keys(()) == ()
    assert port_keys((PortRange(),)) == (PortKey(TCP, 0, 0), PortKey(UDP, 0, 0), PortKey(SCTP, 0, 0))
    assert port_keys((tcp(80), tcp(80))) == (PortKey(TCP, 80, 16),)
    assert port_keys((tcp(8000, 8002),)) == (PortKey(TCP, 8000, 15), PortKey(TCP, 8002, 16))
    assert port_keys((IcmpType(4, 8), IcmpType(6, 128))) == (
        PortKey(ICMP, 8 << 8, 8),
        PortKey(ICMPV6, 128 << 8, 8),
    )
    assert port_keys((PortRange(Protocol.TCP, 0, 0, "http"),)) == ()


def test_an_entry_is_made_of_every_rule_that_covers_it() -> None:
    _, changes = started(
        policy("p", rule(ports=(tcp(0, 65535),), path="all"), rule(ports=(tcp(80),), path="web")),
        policy("q", rule(ports=(tcp(80, 81),), deny=True, path="no"), rule(ports=(tcp(81),), path="yes")),
    )
    assert entries(changes.rebuilt[256].enforced) == {
        (ANY, PortKey(TCP, 0, 0)): "p.all",
        (ANY, PortKey(TCP, 80, 15)): "-q.no",
    }


def test_groups_are_not_folded_into_each_other() -> None:
    _, changes = started(policy("p", rule(path="any"), rule(select(app="b"), ports=(tcp(80),), path="b")))
    assert entries(changes.rebuilt[256].enforced) == {
        (ANY, EVERYTHING): "p.any",
        (257, PortKey(TCP, 80, 16)): "p.b",
    }


def test_the_rule_that_is_named_is_the_first_of_those_that_decide() -> None:
    _, changes = started(
        policy("b", rule(), kind=Kind.CLUSTER_MESH_POLICY, namespace=""),
        policy("a", rule(path="z"), rule(path="y")),
        policy("c", rule(ports=(tcp(1),), path="deny", deny=True)),
    )
    assert entries(changes.rebuilt[256].enforced) == {
        (ANY, EVERYTHING): "b.r",
        (ANY, PortKey(TCP, 1, 16)): "-c.deny",
    }


def test_a_block_in_a_block_has_the_entries_of_both() -> None:
    outer = CidrPeer(ip_network("10.0.0.0/8"), (ip_network("10.1.0.0/16"),))
    compiler, changes = started(policy("p", rule(outer)))
    big, hole = (changes.cidrs[ip_network(text)] for text in ("10.0.0.0/8", "10.1.0.0/16"))
    assert entries(changes.rebuilt[256].enforced) == {(CIDR | big, EVERYTHING): "p.r"}
    assert changes.rebuilt[256].enforced.uses_cidrs == {INGRESS}

    compiler.add_subject(257)
    small = CidrPeer(ip_network("10.2.0.0/16"), pods=True)
    compiler.put_policy(policy("q", rule(small), on=select(app="b")))
    changes = compiler.changes()
    assert (
        changes.cidrs[ip_network("10.0.0.0/8")] == big and changes.cidrs[ip_network("10.1.0.0/16")] == hole
    )
    number = changes.cidrs[ip_network("10.2.0.0/16")]
    assert set(changes.rebuilt) == {257}
    assert {key.identity for key in changes.touched[256].enforced} == {CIDR | number}
    assert entries(changes.rebuilt[257].enforced) == {
        (CIDR | big, EVERYTHING): "p.r",
        (CIDR | number, EVERYTHING): "p.r",
        (CIDR_INSIDE | number, EVERYTHING): "q.r",
    }

    compiler.remove_policy("q")
    changes = compiler.changes()
    assert ip_network("10.2.0.0/16") not in changes.cidrs
    assert list(changes.touched[256].enforced.values()) == [None]
    compiler.put_policy(policy("r", rule(CidrPeer(ip_network("192.0.2.0/24")))))
    assert compiler.changes().cidrs[ip_network("192.0.2.0/24")] != number, "no number is soon given again"


def test_a_new_block_is_told_apart_by_who_is_in_it() -> None:
    big = ip_network("10.0.0.0/8")
    compiler, _ = started(
        policy("p", rule(CidrPeer(big), deny=True, path="no"), rule(CidrPeer(big, pods=True), path="yes"))
    )
    compiler.add_subject(257)
    compiler.put_policy(policy("q", rule(CidrPeer(ip_network("10.2.0.0/16"))), on=select(app="b")))
    changes = compiler.changes()
    number = changes.cidrs[ip_network("10.2.0.0/16")]
    assert {key.identity: value and value.deny for key, value in changes.touched[256].enforced.items()} == {
        CIDR | number: True,
        CIDR_INSIDE | number: False,
    }


def test_a_new_block_in_a_hole_is_none_of_the_rules() -> None:
    outer = CidrPeer(ip_network("10.0.0.0/8"), (ip_network("10.1.0.0/16"),))
    compiler, _ = started(policy("p", rule(outer), on=select(app="a")), subjects=(256, 257))
    compiler.put_policy(policy("q", rule(CidrPeer(ip_network("10.1.5.0/24"))), on=select(app="b")))
    changes = compiler.changes()
    assert set(changes.rebuilt) == {257} and not changes.touched


def test_a_subject_with_new_labels_has_other_policies() -> None:
    compiler, _ = started(policy("p", rule(), on=select(app="a")), policy("q", on=select(app="d")))
    compiler.put_identity(256, {"app": "d"})
    found = compiler.changes().rebuilt[256].enforced
    assert found.enforced == {INGRESS} and not found.entries


def test_a_policy_that_selects_no_subject_costs_no_block() -> None:
    _, changes = started(policy("p", rule(CidrPeer(ip_network("10.0.0.0/8"))), on=select(app="b")))
    assert not changes.cidrs


def test_a_new_identity_touches_only_what_is_on_it() -> None:
    compiler, _ = started(
        policy("p", rule(select(app="d")), on=select(app="a")),
        policy("q", rule(select(app="e")), on=select(app="b")),
        policy("r", rule(Entity.CLUSTER), on=select(app="c")),
        subjects=(256, 257, 258),
    )
    compiler.put_identity(300, {"app": "d"})
    changes = compiler.changes()
    assert not changes.rebuilt and set(changes.touched) == {256, 258}
    [(key, value)] = changes.touched[256].enforced.items()
    assert key == EntryKey(300, INGRESS, EVERYTHING) and value is not None and not value.deny
    compiler.remove_identity(300)
    assert compiler.changes().touched[256].enforced == {key: None}


def test_a_policy_rebuilds_only_those_that_it_selects_or_did() -> None:
    compiler, _ = started(
        policy("p", rule(), on=select(app="a")), policy("q", rule()), subjects=(256, 257, 258)
    )
    compiler.put_policy(policy("p", rule(), on=select(app="b")))
    changes = compiler.changes()
    assert set(changes.rebuilt) == {256, 257} and not changes.touched
    compiler.put_policy(policy("p", rule(), on=select(app="b")))
    assert not compiler.changes().rebuilt


def test_a_subject_whose_identity_is_unknown_has_no_set_yet() -> None:
    compiler, changes = started(policy("p"), subjects=(300,))
    assert not changes.rebuilt
    compiler.put_identity(300, {"app": "z"})
    assert compiler.changes().rebuilt[300].enforced.enforced == {INGRESS}


def test_a_subject_outlives_its_identity() -> None:
    compiler, _ = started(policy("p", rule(select(app="a"))), subjects=(256, 257))
    compiler.remove_identity(256)
    assert not compiler.changes().touched
    compiler.remove_subject(256)
    changes = compiler.changes()
    assert changes.removed == {256}
    assert changes.touched[257].enforced == {EntryKey(256, INGRESS, EVERYTHING): None}


def test_an_identity_that_comes_back_while_it_is_a_subject_stays() -> None:
    compiler, _ = started(policy("p", rule(select(app="a"))), subjects=(256, 257))
    compiler.remove_identity(256)
    compiler.put_identity(256, {"app": "a"})
    compiler.remove_subject(256)
    assert not compiler.changes().touched


def test_whom_a_rule_on_everyone_also_names_needs_no_entry() -> None:
    compiler, changes = started(policy("p", rule(Entity.ALL, select(app="b"))))
    assert entries(changes.rebuilt[256].enforced) == {(ANY, EVERYTHING): "p.r"}
    compiler.put_identity(300, {"app": "b"})
    assert not compiler.changes().touched


def test_a_named_port_is_of_the_protocol_that_the_rule_wants() -> None:
    http = (PortRange(Protocol.TCP, 0, 0, "http"),)
    compiler, _ = started(policy("p", rule(ports=http)))
    compiler.set_named_ports(
        256, {"http": frozenset({(TCP, 80), (UDP, 443)}), "dns": frozenset({(TCP, 53)})}
    )
    assert entries(compiler.changes().rebuilt[256].enforced) == {(ANY, PortKey(TCP, 80, 16)): "p.r"}


def test_a_subject_that_is_back_is_not_removed() -> None:
    compiler, _ = started(policy("p"))
    compiler.remove_subject(256)
    compiler.add_subject(256)
    changes = compiler.changes()
    assert set(changes.rebuilt) == {256} and not changes.removed


def test_only_pods_have_labels() -> None:
    with pytest.raises(ValueError, match="no pod"):
        Compiler().put_identity(WORLD, {})


def test_audit_has_a_set_of_its_own() -> None:
    compiler, changes = started(
        policy("p", rule(select(app="b")), default_deny=frozenset()),
        policy("q", rule(select(app="b"), deny=True), mode=PolicyMode.AUDIT),
        subjects=(256, 258),
    )
    sets = changes.rebuilt[256]
    assert sets.audit is not None
    assert not sets.enforced.enforced and sets.audit.enforced == {INGRESS}
    assert entries(sets.enforced) == {(257, EVERYTHING): "p.r"}
    assert entries(sets.audit) == {(257, EVERYTHING): "-q.r"}
    compiler.put_identity(300, {"app": "b"})
    deltas = compiler.changes().touched[256]
    assert len(deltas.enforced) == len(deltas.audit) == 1
    compiler.remove_policy("q")
    assert compiler.changes().rebuilt[256].audit is None


def test_named_ports_are_those_of_whoever_receives() -> None:
    http = (PortRange(Protocol.ANY, 0, 0, "http"),)
    compiler, changes = started(
        policy(
            "p",
            rule(Entity.REMOTE_NODE, select(app="c"), ports=http),
            rule(ports=http, direction=EGRESS, path="out"),
        ),
    )
    assert not changes.rebuilt[256].enforced.entries
    compiler.set_named_ports(257, {"http": frozenset({(TCP, 8080)})})
    changes = compiler.changes()
    assert not changes.rebuilt
    assert list(changes.touched[256].enforced) == [EntryKey(257, EGRESS, PortKey(TCP, 8080, 16))]
    compiler.set_named_ports(256, {"http": frozenset({(UDP, 53)})})
    assert entries(compiler.changes().rebuilt[256].enforced) == {
        (REMOTE_NODE, PortKey(UDP, 53, 16)): "p.r",
        (APISERVER_NODE, PortKey(UDP, 53, 16)): "p.r",
        (258, PortKey(UDP, 53, 16)): "p.r",
        (256, PortKey(UDP, 53, 16)): "p.out",
        (257, PortKey(TCP, 8080, 16)): "p.out",
    }
    compiler.set_named_ports(300, {"http": frozenset({(TCP, 80)})})
    assert not compiler.changes().touched, "nobody knows this identity yet"
    compiler.put_identity(300, {})
    assert list(compiler.changes().touched[256].enforced) == [EntryKey(300, EGRESS, PortKey(TCP, 80, 16))]
    compiler.remove_identity(300)
    compiler.set_named_ports(256, {})
    compiler.set_named_ports(257, {})
    assert not compiler.changes().rebuilt[256].enforced.entries


def test_a_service_is_its_pods_or_its_addresses() -> None:
    compiler, _ = started(policy("p", rule(ServicePeer("a", "x"), direction=EGRESS)))
    compiler.set_service(
        "a", "x", ServiceInfo(selector={}, addresses=frozenset({ADDRESSES[1], ADDRESSES[5]}))
    )
    changes = compiler.changes()
    numbers = [changes.cidrs[ip_network(text)] for text in ("10.0.0.1/32", "fd00::2/128")]
    assert {key.identity for key in changes.rebuilt[256].enforced.entries} == {
        kind | number for number in numbers for kind in (CIDR, CIDR_INSIDE)
    }
    compiler.set_service("a", "x", ServiceInfo(selector={"app": "b"}))
    changes = compiler.changes()
    assert not changes.cidrs and not changes.rebuilt[256].enforced.entries
    compiler.put_identity(300, {"app": "b", NAMESPACE_LABEL: "a"})
    assert {key.identity for key in compiler.changes().touched[256].enforced} == {300}
    compiler.set_service("a", "x", ServiceInfo({"x": "y"}, {"app": "b"}, frozenset(ADDRESSES)))
    compiler.set_service("a", "y", ServiceInfo(selector={"app": "c"}))
    assert not compiler.changes().rebuilt


def test_a_set_that_is_too_large_is_not_published() -> None:
    compiler, changes = started(policy("p", rule(Selector())), subjects=(256,), max_entries=3)
    assert len(changes.rebuilt[256].enforced.entries) == 3 and not changes.problems
    compiler.put_identity(300, {})
    changes = compiler.changes()
    assert not changes.rebuilt and not changes.touched
    assert changes.problems == (TooLarge(256, 4, 3, False),)
    compiler.remove_identity(257)
    changes = compiler.changes()
    assert not changes.problems
    assert {key.identity for key in changes.rebuilt[256].enforced.entries} == {256, 258, 300}

    compiler.put_policy(policy("p", rule(Selector(), ports=(tcp(1, 2),))))
    assert [problem.entries for problem in compiler.changes().problems] == [6]
    compiler.put_identity(301, {})
    changes = compiler.changes()
    assert not changes.touched and [problem.entries for problem in changes.problems] == [8]


CLOSED = SubjectSets(PolicySet(frozenset({INGRESS, EGRESS}), frozenset(), {}), None)


def cidr_rule(*blocks: str, deny: bool = True) -> Rule:
    return rule(*(CidrPeer(ip_network(block)) for block in blocks), direction=EGRESS, deny=deny)


def test_a_kept_set_whose_block_is_divided_is_closed() -> None:
    """Its entries are about the wider block, in which the addresses of the narrower one no longer are."""
    ours: dict[str, Any] = {"on": select(app="a"), "default_deny": frozenset()}
    compiler, _ = started(policy("p", cidr_rule("10.0.0.0/8"), **ours), max_entries=3)
    compiler.put_policy(policy("q", rule(Selector(), ports=(tcp(1, 9),)), **ours))
    changes = compiler.changes()
    assert changes.problems and not changes.rebuilt and not changes.touched
    # Other blocks are nothing to it.
    compiler.put_policy(policy("r", cidr_rule("192.0.2.0/24"), on=select(app="nobody")))
    compiler.add_subject(257)
    compiler.put_policy(policy("s", cidr_rule("192.0.2.0/24"), on=select(app="b")))
    assert 256 not in compiler.changes().rebuilt
    compiler.put_policy(policy("s", cidr_rule("10.1.0.0/16"), on=select(app="b")))
    assert compiler.changes().rebuilt[256] == CLOSED
    compiler.put_policy(policy("s", cidr_rule("10.2.0.0/16"), on=select(app="b")))
    assert 256 not in compiler.changes().rebuilt
    compiler.remove_policy("q")
    assert compiler.changes().rebuilt[256].enforced.entries


def test_a_kept_set_does_not_get_another_block_under_its_number() -> None:
    allow = policy("p", cidr_rule("10.0.0.0/8", deny=False))
    compiler, changes = started(allow, max_entries=3)
    assert changes.rebuilt[256].enforced.entries
    compiler.put_policy(policy("p", rule(Selector(), ports=(tcp(1, 9),))))
    changes = compiler.changes()
    assert changes.problems
    assert changes.rebuilt[256] == CLOSED, "its own block is in no policy any more"


def test_a_kept_set_that_denies_is_closed_where_somebody_new_may_be_meant() -> None:
    deny = policy("p", rule(select(app="b"), deny=True), default_deny=frozenset())
    compiler, _ = started(deny, max_entries=3)
    compiler.put_policy(policy("q", rule(Selector(), ports=(tcp(1, 9),)), default_deny=frozenset()))
    assert not compiler.changes().rebuilt
    compiler.put_identity(300, {"app": "b"})
    assert compiler.changes().rebuilt[256] == CLOSED
    compiler.remove_policy("q")
    assert 300 in {key.identity for key in compiler.changes().rebuilt[256].enforced.entries}


def test_a_kept_set_does_not_let_others_in_by_a_number_that_they_got() -> None:
    allow = policy("p", rule(select(app="b")))
    compiler, _ = started(allow, max_entries=3)
    compiler.put_policy(policy("q", rule(Selector(), ports=(tcp(1, 9),))))
    assert not compiler.changes().rebuilt
    compiler.remove_identity(257)
    assert not compiler.changes().rebuilt
    compiler.put_identity(257, {"app": "c"})
    assert compiler.changes().rebuilt[256] == CLOSED


@pytest.mark.parametrize("direction", [INGRESS, EGRESS])
def test_a_subject_whose_first_set_is_too_large_is_closed(direction: Direction) -> None:
    _, changes = started(
        policy("p", rule(Selector(), direction=direction), default_deny=frozenset({direction})),
        max_entries=2,
    )
    assert changes.rebuilt[256] == SubjectSets(
        PolicySet(frozenset({INGRESS, EGRESS}), frozenset(), {}), None
    )
    assert changes.problems == (TooLarge(256, 3, 2, False),)


def test_an_audit_set_that_is_too_large_leaves_the_other_alone() -> None:
    compiler, changes = started(
        policy("p", rule(select(app="b"))),
        policy("q", rule(Selector(), ports=(tcp(1),)), mode=PolicyMode.AUDIT),
        max_entries=2,
    )
    assert len(changes.rebuilt[256].enforced.entries) == 1 and changes.rebuilt[256].audit is None
    assert changes.problems == (TooLarge(256, 3, 2, True),)
    compiler.put_identity(300, {"app": "b"})
    changes = compiler.changes()
    assert len(changes.touched[256].enforced) == 1 and not changes.touched[256].audit
    compiler.remove_identity(257)
    compiler.remove_identity(258)
    changes = compiler.changes()
    assert changes.rebuilt[256].audit is not None and not changes.problems


def test_the_compiler_agrees_in_a_cluster_of_some_size() -> None:
    """Many policies at once, unlike in the examples above."""
    world = cluster(random.Random(7), identities=60, policies=120, subjects=10)
    changes = world.compiler().changes()
    source = random.Random(8)
    numbers = (*world.identities, *RESERVED)
    reasons = set()
    for _ in range(400):
        ends = [
            world.party(source.choice(pool), source.choice(ADDRESSES))
            for pool in (sorted(world.subjects), numbers)
        ]
        source.shuffle(ends)
        packet = Packet(
            source=ends[0],
            destination=ends[1],
            protocol=source.choice((TCP, UDP)),
            port=source.choice(PORTS),
        )
        check_against_the_evaluator(world, changes.rebuilt, changes.cidrs, packet)
        reasons |= {
            decision.reason
            for direction in Direction
            if isinstance(decision := judge(world.policies.values(), packet, direction), Decision)
        }
    assert reasons == set(Reason)


def cluster(source: random.Random, *, identities: int, policies: int, subjects: int) -> World:
    """Namespaces with some applications each, whose policies name each other, blocks and ports."""
    spaces = max(2, identities // 10)
    found: dict[int, dict[str, str]] = {
        256 + number: {
            NAMESPACE_LABEL: f"n{number % spaces}",
            "app": f"a{number // spaces}",
            "tier": source.choice(VALUES),
        }
        for number in range(identities)
    }

    def peer() -> Peer:
        kind = source.random()
        if kind < 0.75:
            chosen = found[256 + source.randrange(identities)]
            keys = source.choice(((NAMESPACE_LABEL, "app"), (NAMESPACE_LABEL,), ("tier",)))
            return select(**{key: chosen[key] for key in keys})
        if kind < 0.85:
            return source.choice((Entity.CLUSTER, Entity.WORLD, Entity.KUBE_APISERVER))
        return CidrPeer(ip_network((source.randrange(256) << 16 | 10 << 24, 16)), pods=source.random() < 0.5)

    made = {}
    for number in range(policies):
        chosen = found[256 + source.randrange(identities)]
        keys = (NAMESPACE_LABEL, "app") if source.random() < 0.8 else (NAMESPACE_LABEL,)
        listed = tuple(
            rule(
                *(peer() for _ in range(source.randrange(1, 4))),
                ports=source.choice(
                    (None, (tcp(80), tcp(443)), (tcp(8000, 8100),), (PortRange(Protocol.UDP, 53, 53),))
                ),
                deny=source.random() < 0.1,
                direction=source.choice(tuple(Direction)),
                path=f"r{index}",
            )
            for index in range(source.randrange(1, 5))
        )
        made[str(number)] = policy(
            str(number),
            *listed,
            on=select(**{key: chosen[key] for key in keys}),
            namespace=chosen[NAMESPACE_LABEL],
            default_deny=frozenset({each.direction for each in listed if not each.deny}),
        )
    return World(made, found, subjects=set(source.sample(sorted(found), subjects)))
