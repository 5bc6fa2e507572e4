"""Selectors, and policies read word by word."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

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
from meshwire.policy.evaluate import (
    MissKind,
    Packet,
    Party,
    Reason,
    decide,
    judge,
    near_misses,
    services_of,
)
from meshwire.policy.identity import (
    APISERVER,
    APISERVER_HOST,
    APISERVER_NODE,
    HOST,
    REMOTE_NODE,
    UNKNOWN,
    WORLD,
)
from meshwire.policy.model import ICMP, ICMPV6, SCTP, TCP, UDP, ServiceInfo
from meshwire.policy.selectors import matches

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
IN, NOT_IN, EXISTS, ABSENT = Operator.IN, Operator.NOT_IN, Operator.EXISTS, Operator.DOES_NOT_EXIST


def select(**labels: str) -> Selector:
    """`ns` is the namespace."""
    pairs = {NAMESPACE_LABEL if key == "ns" else key: value for key, value in labels.items()}
    return Selector(tuple(Requirement(key, IN, (pairs[key],)) for key in sorted(pairs)))


def pod(identity: int, address: str | None = None, **labels: str) -> Party:
    pairs = {NAMESPACE_LABEL: labels.pop("ns", "shop"), **labels}
    return Party(identity=identity, labels=pairs, address=ip_address(address) if address else None)


def other(identity: int, address: str | None = None) -> Party:
    return Party(identity=identity, address=ip_address(address) if address else None)


def allow(*peers: Peer, ports: Any = None, direction: Direction = INGRESS, deny: bool = False) -> Rule:
    section = direction + ("Deny" if deny else "")
    return Rule(direction=direction, path=f"spec.{section}[0]", deny=deny, peers=peers or None, ports=ports)


def policy(name: str, *rules: Rule, on: Selector | None = None, **more: Any) -> Policy:
    fields: dict[str, Any] = {
        "kind": Kind.NETWORK_POLICY,
        "namespace": "shop",
        "uid": name,
        "selector": on or select(ns="shop"),
        "default_deny": frozenset({rule.direction for rule in rules} or {INGRESS}),
        **more,
    }
    return Policy(name=name, rules=rules, **fields)


WEB = pod(300, "10.0.1.1", app="web")
DB = pod(301, "10.0.2.1", app="db")
FOREIGN = pod(302, "10.0.3.1", app="web", ns="blog")
OUTSIDE = other(WORLD, "198.51.100.7")


def enters(
    policies: list[Policy], source: Party, *, port: int = 80, protocol: int = TCP, **more: Any
) -> bool:
    packet = Packet(source=source, destination=DB, protocol=protocol, port=port, **more)
    return judge(policies, packet, INGRESS).allowed


@pytest.mark.parametrize(
    ("requirement", "labels", "expected"),
    [
        (Requirement("app", IN, ("db", "web")), {"app": "web"}, True),
        (Requirement("app", IN, ("db", "web")), {"app": "cache"}, False),
        (Requirement("app", IN, ("db", "web")), {}, False),
        (Requirement("app", IN, ("",)), {"app": ""}, True),
        (Requirement("app", IN, ("",)), {}, False),
        (Requirement("app", NOT_IN, ("db",)), {"app": "web"}, True),
        (Requirement("app", NOT_IN, ("db",)), {"app": "db"}, False),
        (Requirement("app", NOT_IN, ("db",)), {}, True),
        (Requirement("app", EXISTS), {"app": ""}, True),
        (Requirement("app", EXISTS), {"role": "x"}, False),
        (Requirement("app", ABSENT), {"app": ""}, False),
        (Requirement("app", ABSENT), {"role": "x"}, True),
    ],
)
def test_a_requirement_is_read_as_kubernetes_does(
    requirement: Requirement, labels: Mapping[str, str], expected: bool
) -> None:
    assert matches(Selector((requirement,)), labels) is expected


def test_all_requirements_hold_or_the_selector_doesnt() -> None:
    assert matches(Selector(), {})
    assert matches(select(app="web", tier="front"), {"app": "web", "tier": "front", "more": "x"})
    assert not matches(select(app="web", tier="front"), {"app": "web"})


def test_without_policies_everything_passes() -> None:
    assert enters([], OUTSIDE)
    assert judge([], Packet(source=WEB, destination=DB, protocol=TCP), INGRESS).reason is Reason.NOT_ISOLATED


def test_default_deny_shuts_one_direction() -> None:
    closed = [policy("closed")]
    packet = Packet(source=WEB, destination=DB, protocol=TCP, port=80)
    assert judge(closed, packet, INGRESS).reason is Reason.DEFAULT_DENY
    assert judge(closed, packet, EGRESS).allowed
    assert decide(closed, packet).allowed is False
    assert decide(closed, packet).egress is not None


def test_an_end_that_is_no_pod_is_not_asked() -> None:
    verdict = decide([policy("closed")], Packet(source=OUTSIDE, destination=WEB, protocol=TCP))
    assert verdict.egress is None and verdict.ingress is not None and not verdict.allowed
    assert decide([], Packet(source=OUTSIDE, destination=OUTSIDE, protocol=TCP)).allowed


def test_a_policy_that_does_not_select_the_pod_does_nothing() -> None:
    assert enters([policy("closed", on=select(ns="blog"))], WEB)


def test_allow_all_beats_default_deny_of_another_policy() -> None:
    policies = [policy("closed"), policy("open", allow())]
    assert enters(policies, WEB) and enters(policies, OUTSIDE) and enters(policies, other(UNKNOWN))
    assert enters(policies, WEB, protocol=ICMP, icmp_type=8)


def test_allow_rules_add_up() -> None:
    policies = [
        policy("web", allow(select(app="web", ns="shop"))),
        policy("blog", allow(select(ns="blog"), ports=(PortRange(Protocol.TCP, 80, 80),))),
    ]
    assert enters(policies, WEB, port=1)
    assert enters(policies, FOREIGN, port=80) and not enters(policies, FOREIGN, port=81)
    assert not enters(policies, OUTSIDE)


def test_a_selector_selects_by_namespace() -> None:
    policies = [policy("blog", allow(select(ns="blog")))]
    assert enters(policies, FOREIGN) and not enters(policies, WEB)


def test_an_ipblock_has_holes_and_means_pods_too() -> None:
    block = CidrPeer(ip_network("10.0.0.0/16"), (ip_network("10.0.3.0/24"),), pods=True)
    policies = [policy("block", allow(block))]
    assert enters(policies, WEB) and enters(policies, other(UNKNOWN, "10.0.9.9"))
    assert not enters(policies, FOREIGN) and not enters(policies, OUTSIDE)


@pytest.mark.parametrize(
    ("party", "expected"),
    [(WORLD, True), (APISERVER, True), (UNKNOWN, False), (REMOTE_NODE, False), (APISERVER_NODE, False)],
)
def test_a_cidr_means_addresses_outside_of_the_cluster(party: int, expected: bool) -> None:
    policies = [policy("block", allow(CidrPeer(ip_network("10.0.0.0/8"))))]
    assert enters(policies, other(party, "10.1.1.1")) is expected
    assert not enters(policies, other(party, "fd00::1"))
    assert not enters(policies, WEB)


def test_port_ranges_include_both_ends() -> None:
    policies = [policy("range", allow(ports=(PortRange(Protocol.TCP, 8000, 8002),)))]
    assert [port for port in range(7998, 8005) if enters(policies, WEB, port=port)] == [8000, 8001, 8002]
    assert not enters(policies, WEB, port=8001, protocol=UDP)


def test_any_protocol_is_tcp_udp_and_sctp() -> None:
    policies = [policy("any", allow(ports=(PortRange(),)))]
    passing = [
        number for number in (TCP, UDP, SCTP, ICMP, ICMPV6, 47) if enters(policies, WEB, protocol=number)
    ]
    assert passing == [TCP, UDP, SCTP]


def test_an_icmp_rule_is_of_one_family_and_type() -> None:
    policies = [policy("ping", allow(ports=(IcmpType(4, 8),)))]
    assert enters(policies, WEB, protocol=ICMP, icmp_type=8)
    assert not enters(policies, WEB, protocol=ICMP, icmp_type=0)
    assert not enters(policies, WEB, protocol=ICMPV6, icmp_type=8)
    assert not enters(policies, WEB, protocol=TCP, port=8)


def test_a_named_port_is_the_receivers() -> None:
    named = {"http": frozenset({(TCP, 8080), (UDP, 8443)})}
    server = Party(identity=301, labels=DB.labels, address=DB.address, named_ports=named)
    rules = [policy("http", allow(ports=(PortRange(Protocol.TCP, 0, 0, "http"),)))]

    def passes(protocol: int, port: int, destination: Party = server) -> bool:
        return judge(
            rules, Packet(source=WEB, destination=destination, protocol=protocol, port=port), INGRESS
        ).allowed

    assert passes(TCP, 8080)
    assert not passes(UDP, 8443) and not passes(TCP, 8443) and not passes(TCP, 8080, DB)


@pytest.mark.parametrize(
    ("peers", "expected"),
    [
        (None, True),
        ((select(app="db"),), True),
        ((Entity.CLUSTER,), True),
        ((CidrPeer(ip_network("10.0.0.0/8"), pods=True),), False),
        ((select(app="web"),), False),
    ],
)
def test_a_named_port_of_egress_is_that_of_a_pod_and_not_of_an_address(
    peers: tuple[Peer, ...] | None, expected: bool
) -> None:
    server = Party(
        identity=301,
        labels=DB.labels,
        address=DB.address,
        named_ports={"http": frozenset({(TCP, 8080)})},
    )
    rule = Rule(direction=EGRESS, path="x", peers=peers, ports=(PortRange(Protocol.ANY, 0, 0, "http"),))
    packet = Packet(source=WEB, destination=server, protocol=TCP, port=8080)
    assert judge([policy("http", rule)], packet, EGRESS).allowed is expected


def test_deny_beats_allow_and_needs_no_default_deny() -> None:
    denies = policy(
        "deny",
        allow(select(app="web"), ports=(PortRange(Protocol.TCP, 80, 80),), deny=True),
        default_deny=frozenset(),
    )
    assert not enters([denies, policy("open", allow())], WEB)
    assert not enters([denies], WEB) and enters([denies], WEB, port=81) and enters([denies], OUTSIDE)


@pytest.mark.parametrize(
    ("entity", "identities"),
    [
        (Entity.ALL, {UNKNOWN, WORLD, REMOTE_NODE, APISERVER, APISERVER_NODE, 300}),
        (Entity.CLUSTER, {UNKNOWN, REMOTE_NODE, APISERVER_NODE, 300}),
        (Entity.HOST, set()),
        (Entity.KUBE_APISERVER, {APISERVER, APISERVER_NODE}),
        (Entity.REMOTE_NODE, {REMOTE_NODE, APISERVER_NODE}),
        (Entity.WORLD, {WORLD, APISERVER}),
    ],
)
def test_an_entity_is_its_numbers(entity: Entity, identities: set[int]) -> None:
    everyone = {UNKNOWN, WORLD, REMOTE_NODE, APISERVER, APISERVER_NODE, 300}
    policies = [policy("entity", allow(entity))]
    assert {number for number in everyone if enters(policies, other(number))} == identities


def test_the_own_node_always_gets_in() -> None:
    policies = [policy("closed", allow(deny=True))]
    for number in (HOST, APISERVER_HOST):
        packet = Packet(source=other(number), destination=DB, protocol=TCP)
        assert judge(policies, packet, INGRESS).reason is Reason.OWN_NODE
    assert not enters(policies, other(REMOTE_NODE))


def test_the_own_node_is_let_out_to_only_by_a_rule() -> None:
    packet = Packet(source=WEB, destination=other(HOST), protocol=TCP)
    assert not judge([policy("closed", default_deny=frozenset({EGRESS}))], packet, EGRESS).allowed
    assert judge([policy("node", allow(Entity.HOST, direction=EGRESS))], packet, EGRESS).allowed


def test_no_selector_selects_an_unknown_identity() -> None:
    policies = [policy("pods", allow(Selector()))]
    assert enters(policies, WEB)
    for number in (UNKNOWN, WORLD, REMOTE_NODE, APISERVER):
        assert not enters(policies, other(number))
    assert not enters(
        [policy("not", allow(Selector((Requirement("app", NOT_IN, ("db",)),))))], other(UNKNOWN)
    )


def test_an_empty_list_matches_nothing() -> None:
    nobody = Rule(direction=INGRESS, path="x", peers=())
    nothing = Rule(direction=INGRESS, path="y", ports=())
    assert not enters([policy("nobody", nobody, nothing)], WEB)


SERVICES = {
    ("shop", "db"): ServiceInfo({"tier": "back"}, {"app": "db"}),
    ("shop", "legacy"): ServiceInfo({"tier": "back"}, None, frozenset({ip_address("198.51.100.7")})),
    ("blog", "db"): ServiceInfo({}, {"app": "db"}),
}


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (ServicePeer("shop", "db"), {"db"}),
        (ServicePeer("shop", "legacy"), {"outside"}),
        (ServicePeer("blog", "db"), set()),
        (ServicePeer("", "db"), {"db"}),
        (ServicePeer("shop", "", select(tier="back")), {"db", "outside"}),
        (ServicePeer("", "", select(tier="back")), {"db", "outside"}),
        (ServicePeer("blog", "", Selector()), set()),
    ],
)
def test_a_service_is_its_endpoints(peer: ServicePeer, expected: set[str]) -> None:
    policies = [policy("services", allow(peer, direction=EGRESS))]
    found = set()
    for name, party in {"db": DB, "outside": OUTSIDE, "foreign": FOREIGN}.items():
        services = services_of(SERVICES, identity=party.identity, labels=party.labels, address=party.address)
        receiver = Party(
            identity=party.identity, labels=party.labels, address=party.address, services=services
        )
        packet = Packet(source=WEB, destination=receiver, protocol=TCP, port=80)
        if judge(policies, packet, EGRESS).allowed:
            found.add(name)
    assert found == expected


def test_audit_policies_take_part_only_in_the_audit() -> None:
    policies = [policy("closed", mode=PolicyMode.AUDIT)]
    packet = Packet(source=WEB, destination=DB, protocol=TCP)
    assert judge(policies, packet, INGRESS).allowed
    assert not judge(policies, packet, INGRESS, audit=True).allowed
    assert not decide(policies, packet, audit=True).allowed


def test_of_several_rules_the_first_by_kind_namespace_name_and_path_is_named() -> None:
    policies = [
        policy("b", allow()),
        policy("a", allow()),
        policy("z", allow(), kind=Kind.CLUSTER_MESH_POLICY, namespace=""),
    ]
    decision = judge(policies, Packet(source=WEB, destination=DB, protocol=TCP), INGRESS)
    assert decision.rule is not None and decision.rule[0].name == "z"


def misses(*rules: Rule, source: Party = WEB, destination: Party = DB, **packet: Any) -> list[str]:
    fields = {"protocol": TCP, "port": 80, **packet}
    found = near_misses(
        [policy("p", *rules)], Packet(source=source, destination=destination, **fields), rules[0].direction
    )
    return ["; ".join(miss.text for miss in near.misses) for near in found]


NARROW = CidrPeer(ip_network("198.51.100.0/24"), (ip_network("198.51.100.0/28"),))


@pytest.mark.parametrize(
    ("rule", "packet", "text"),
    [
        (allow(select(app="cache")), {}, "label app is web, not cache"),
        (allow(select(role="x")), {}, "label role is missing, not x"),
        (allow(select(ns="blog")), {}, "namespace is shop, not blog"),
        (allow(Selector((Requirement("app", NOT_IN, ("web",)),))), {}, "label app is web, and must not be"),
        (allow(Selector((Requirement("role", EXISTS),))), {}, "label role is missing"),
        (
            allow(Selector((Requirement("app", ABSENT),))),
            {},
            "label app is web, and must not be there",
        ),
        (allow(select(app="web"), ports=(PortRange(Protocol.TCP, 443, 443),)), {}, "port is 80, not 443"),
        (allow(ports=(PortRange(Protocol.TCP, 443, 445),)), {}, "port is 80, not 443 to 445"),
        (allow(ports=(PortRange(Protocol.UDP, 80, 80),)), {}, "protocol is TCP, not UDP"),
        (allow(ports=(IcmpType(4, 8),)), {}, "protocol is TCP, not ICMP"),
        (
            allow(ports=(IcmpType(4, 8),)),
            {"protocol": ICMP, "port": 0, "icmp_type": 0},
            "ICMP type is 0, not 8",
        ),
        (
            allow(ports=(PortRange(Protocol.TCP, 0, 0, "http"),)),
            {},
            "port is 80, not http: no container gives a port this name",
        ),
        (
            allow(ports=(PortRange(Protocol.TCP, 0, 0, "http"),), direction=EGRESS),
            {"destination": OUTSIDE},
            "port is 80, not http: only pods have named ports",
        ),
        (
            allow(select(app="web")),
            {"source": OUTSIDE},
            "world is no pod: label selectors match pods only",
        ),
        (allow(Entity.WORLD), {}, "pod identity 300 is not of entity world"),
        (allow(NARROW), {"source": other(WORLD, "203.0.113.1")}, "203.0.113.1 is not in 198.51.100.0/24"),
        (
            allow(NARROW),
            {"source": OUTSIDE},
            "198.51.100.7 is in 198.51.100.0/28, which 198.51.100.0/24 excepts",
        ),
        (
            allow(CidrPeer(ip_network("10.0.0.0/8"))),
            {},
            "10.0.1.1 is of the cluster (pod identity 300), 10.0.0.0/8 means addresses outside of it",
        ),
        (
            allow(NARROW),
            {"source": other(WORLD)},
            "world has no known address, 198.51.100.0/24 is one of addresses",
        ),
        (
            allow(ServicePeer("shop", "db"), direction=EGRESS),
            {},
            "pod identity 301 is no endpoint of Service db in namespace shop",
        ),
        (
            Rule(direction=INGRESS, path="x", peers=()),
            {},
            "the rule names no peers: it matches nothing",
        ),
        (
            Rule(direction=INGRESS, path="x", ports=()),
            {},
            "the rule names no ports: it matches nothing",
        ),
    ],
)
def test_a_miss_says_what_is_and_what_should_be(rule: Rule, packet: dict[str, Any], text: str) -> None:
    assert misses(rule, **packet) == [text]


def test_a_miss_names_the_ports_of_a_name() -> None:
    server = Party(identity=301, labels=DB.labels, named_ports={"http": frozenset({(TCP, 8080), (UDP, 9)})})
    rule = allow(ports=(PortRange(Protocol.TCP, 0, 0, "http"),))
    assert misses(rule, destination=server) == ["port is 80, not http (8080)"]


def test_the_nearest_rule_comes_first_with_its_nearest_peer() -> None:
    far = Rule(direction=INGRESS, path="a", peers=(Entity.WORLD,), ports=(PortRange(Protocol.UDP, 1, 1),))
    near = Rule(
        direction=INGRESS, path="b", peers=(Entity.WORLD, select(app="cache"), select(app="x", ns="y"))
    )
    matching = Rule(direction=INGRESS, path="c")
    denying = Rule(direction=INGRESS, path="d", deny=True)
    found = near_misses(
        [policy("p", far, near, matching, denying)],
        Packet(source=WEB, destination=DB, protocol=TCP, port=80),
        INGRESS,
    )
    assert [miss.rule.path for miss in found] == ["b", "a"]
    assert [miss.kind for miss in found[0].misses] == [MissKind.LABEL]
    assert [miss.kind for miss in found[1].misses] == [MissKind.PEER, MissKind.PROTOCOL]
