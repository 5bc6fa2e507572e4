"""What the node's policy maps should hold, by what the API server says, in whatever order it comes."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwire.agent.policy.feed import Feed, News
from meshwire.agent.policy.model import (
    EndpointValue,
    Model,
    Surroundings,
)
from meshwire.agent.policy.objects import (
    Backends,
    Namespace,
    Pod,
    Refused,
    Service,
    compact,
    parse_pod,
    parse_service,
)
from meshwire.agent.policy.tables import Table
from meshwire.api import names
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshendpointslice import Endpoint, MeshEndpointSlice, NamedPort, PodRef
from meshwire.api.meshidentity import MeshIdentity
from meshwire.api.meshpolicy import (
    NAMESPACE_LABEL,
    CidrPeer,
    Direction,
    Kind,
    Operator,
    Policy,
    PortRange,
    Protocol,
    Requirement,
    Rule,
    Selector,
)
from meshwire.bpf.policylayouts import CidrFlag, EndpointFlag
from meshwire.policy import identity
from meshwire.policy.compile import EVERYTHING, EntryKey, PortKey


def packed(text: str) -> bytes:
    return ip_address(text).packed


def pod(name: str, address: str = "10.1.1.5", app: str = "web", *, uid: str = "", created: str = "1") -> Pod:
    return Pod(
        uid=uid or name,
        namespace="shop",
        name=name,
        created=created,
        labels=(("app", app),),
        service_account="default",
        addresses=(packed(address),) if address else (),
    )


def labels_of(app: str) -> identity.Labels:
    return identity.identity_labels(
        namespace="shop", namespace_labels={}, service_account="default", pod_labels={"app": app}
    )


def app(name: str) -> Selector:
    return Selector((Requirement("app", Operator.IN, (name,)),))


def allow(name: str, of: str, by: str, port: int = 80, **fields: Any) -> Policy:
    """Pods of app `of` get TCP on a port from those of app `by` alone."""
    return Policy(
        kind=Kind.MESH_POLICY,
        namespace="shop",
        name=name,
        uid=name,
        selector=app(of),
        default_deny=frozenset({Direction.INGRESS}),
        rules=(
            Rule(
                direction=Direction.INGRESS,
                path="spec.ingress[0]",
                peers=(app(by),),
                ports=(PortRange(Protocol.TCP, port, port),),
            ),
        ),
        **fields,
    )


def remote(number: int, address: str, uid: str) -> Endpoint:
    return Endpoint(
        addresses=(IPv4Address(address),), identity=number, node="b", pod=PodRef("shop", uid, uid)
    )


@pytest.fixture
def model() -> Model:
    model = Model()
    model.put_namespace(Namespace(uid="n", name="shop", labels={}))
    return model


def endpoint(model: Model, address: str) -> EndpointValue | None:
    return model.endpoints.desired.get(packed(address))


def add(model: Model, added: Pod, device: int = 7) -> None:
    model.put_pod(added)
    model.set_device(added.uid, device)
    model.update()


def rules(model: Model, address: str) -> dict[EntryKey, bool]:
    found = endpoint(model, address)
    assert found
    return {key: deny for (number, key), (deny, _) in model.entries.desired.items() if number == found.set}


def test_an_own_pod_is_known_without_the_operator(model: Model) -> None:
    model.put_policy(allow("p", "web", "client"))
    add(model, pod("web"))
    add(model, pod("client", "10.1.1.6", "client"), 8)
    web, client = endpoint(model, "10.1.1.5"), endpoint(model, "10.1.1.6")
    assert web and client
    assert web.identity >= identity.PROVISIONAL and client.identity >= identity.PROVISIONAL
    assert (web.ifindex, web.flags, client.flags) == (7, EndpointFlag.INGRESS_ENFORCED, 0)
    key = EntryKey(client.identity, Direction.INGRESS, PortKey(6, 80, 16))
    assert rules(model, "10.1.1.5") == {key: False}
    assert model.identities.desired == {
        packed("10.1.1.5"): web.identity,
        packed("10.1.1.6"): client.identity,
    }


def test_the_operators_number_takes_the_place_of_ones_own(model: Model) -> None:
    model.put_policy(allow("p", "web", "web"))
    add(model, pod("web"))
    before = endpoint(model, "10.1.1.5")
    model.put_identity(MeshIdentity(number=300, labels=labels_of("web")))
    model.update()
    after = endpoint(model, "10.1.1.5")
    assert before and after and after.identity == 300
    assert after.set != before.set and after.revision > before.revision and after.born == before.born
    # Whoever refers to it by its old number finds nothing any more.
    assert {key.identity for _, key in model.entries.desired} == {300}
    model.remove_identity(300)
    model.update()
    assert (found := endpoint(model, "10.1.1.5")) and found.identity >= identity.PROVISIONAL


def test_of_two_numbers_the_lower_counts(model: Model) -> None:
    add(model, pod("web"))
    for number in (301, 300, 302):
        model.put_identity(MeshIdentity(number=number, labels=labels_of("web")))
    model.update()
    assert (found := endpoint(model, "10.1.1.5")) and found.identity == 300


def test_a_pod_is_no_endpoint_before_everything_about_it_is_known() -> None:
    model = Model()
    model.put_pod(pod("web"))
    model.set_device("web", 7)
    model.update()
    assert not model.endpoints.desired
    model.put_namespace(Namespace(uid="n", name="shop", labels={}))
    model.update()
    assert endpoint(model, "10.1.1.5")
    model.set_device("web", None)
    assert not model.endpoints.desired


def test_a_changed_policy_comes_as_a_new_set(model: Model) -> None:
    model.put_policy(allow("p", "web", "client"))
    model.put_identity(MeshIdentity(number=300, labels=labels_of("client")))
    add(model, pod("web"))
    before = endpoint(model, "10.1.1.5")
    model.put_policy(allow("p", "web", "client", 81))
    model.update()
    after = endpoint(model, "10.1.1.5")
    assert before and after and after.set != before.set and after.revision > before.revision
    assert {number for number, _ in model.entries.desired} == {after.set}


def test_a_new_identity_joins_the_set_that_is_there(model: Model) -> None:
    model.put_policy(allow("p", "web", "client"))
    add(model, pod("web"))
    before = endpoint(model, "10.1.1.5")
    assert rules(model, "10.1.1.5") == {}
    model.put_identity(MeshIdentity(number=300, labels=labels_of("client")))
    model.update()
    after = endpoint(model, "10.1.1.5")
    assert before and after and after.set == before.set and after.revision > before.revision
    assert rules(model, "10.1.1.5") == {EntryKey(300, Direction.INGRESS, PortKey(6, 80, 16)): False}


def test_an_address_that_changes_hands_is_born_again(model: Model) -> None:
    add(model, pod("old"))
    old = endpoint(model, "10.1.1.5")
    model.remove_pod("old")
    model.update()
    assert endpoint(model, "10.1.1.5") is None and not model.identities.desired
    add(model, pod("new"), 9)
    new = endpoint(model, "10.1.1.5")
    assert old and new and new.born > old.revision


@pytest.mark.parametrize(("device", "is_same"), [(7, True), (8, False)])
def test_a_restart_makes_no_pod_another(model: Model, device: int, is_same: bool) -> None:
    """Flows of before are its own if it still is where it was."""
    add(model, pod("web"), 7)
    before = endpoint(model, "10.1.1.5")
    assert before
    again = Model(revision=before.revision, first_set=before.set)
    again.endpoints.found({packed("10.1.1.5"): before})
    again.put_namespace(Namespace(uid="n", name="shop", labels={}))
    add(again, pod("web"), device)
    after = endpoint(again, "10.1.1.5")
    assert after and after.revision > before.revision and after.set > before.set
    assert (after.born == before.born) is is_same


def test_whoever_gets_an_address_inherits_nothing_at_the_same_device_either(model: Model) -> None:
    add(model, pod("old"))
    old = endpoint(model, "10.1.1.5")
    model.endpoints.wrote(model.endpoints.writes())
    add(model, pod("new", created="2"))
    new = endpoint(model, "10.1.1.5")
    assert old and new and new.born > old.revision


def test_new_labels_are_a_new_revision_also_where_their_rules_are_old(model: Model) -> None:
    """Else what the pod had open under its old labels would stay."""
    model.put_policy(allow("p", "db", "client"))
    add(model, pod("db", "10.1.1.6", "db"), 8)
    add(model, pod("web"))
    before = endpoint(model, "10.1.1.5")
    add(model, pod("web", app="db"))
    after, other = endpoint(model, "10.1.1.5"), endpoint(model, "10.1.1.6")
    assert before and after and other and after.set == other.set
    assert after.revision > before.revision and after.born == before.born


def test_ports_of_a_pod_here_stay_when_others_no_longer_hear_of_them(model: Model) -> None:
    """The operator takes it out of its slices, and the pod goes on."""
    named = PortRange(Protocol.TCP, 0, 0, "http")
    policy = allow("p", "web", "client")
    rule = replace(policy.rules[0], peers=None, ports=(named,))
    model.put_policy(replace(policy, rules=(rule,)))
    model.put_identity(MeshIdentity(number=300, labels=labels_of("web")))
    add(model, replace(pod("web"), ports=(("http", 6, 8080),)))
    expected = {EntryKey(identity.ANY, Direction.INGRESS, PortKey(6, 8080, 16)): False}
    assert rules(model, "10.1.1.5") == expected
    shown = replace(remote(300, "10.1.1.5", "web"), ports=(NamedPort("http", Protocol.TCP, 8080),))
    model.put_slice(compact(MeshEndpointSlice(name="s", endpoints=(shown,))))
    model.update()
    assert rules(model, "10.1.1.5") == expected
    model.put_slice(compact(MeshEndpointSlice(name="s", endpoints=())))
    model.update()
    assert rules(model, "10.1.1.5") == expected


def test_of_two_pods_with_one_address_the_younger_has_it(model: Model) -> None:
    add(model, pod("old", created="1"))
    add(model, pod("new", app="client", created="2"), 9)
    found = endpoint(model, "10.1.1.5")
    assert found and found.ifindex == 9
    model.remove_pod("new")
    model.update()
    found = endpoint(model, "10.1.1.5")
    assert found and found.ifindex == 7


def test_pods_elsewhere_are_known_by_slices(model: Model) -> None:
    first = remote(300, "10.1.2.5", "a")
    model.put_slice(compact(MeshEndpointSlice(name="s", endpoints=(first, remote(301, "10.1.2.6", "b")))))
    assert model.identities.desired == {packed("10.1.2.5"): 300, packed("10.1.2.6"): 301}
    assert model.pod_name(packed("10.1.2.6")) == ("shop", "b")
    model.put_slice(compact(MeshEndpointSlice(name="s", endpoints=(first,))))
    assert model.identities.desired == {packed("10.1.2.5"): 300}
    model.remove_slice("s")
    assert model.identities.desired == {} and model.pod_name(packed("10.1.2.5")) is None


def test_a_pod_of_this_node_is_nobody_until_it_is_known_here(model: Model) -> None:
    model.set_surroundings(Surroundings(own=(ip_network("10.1.1.0/24"),)))
    model.put_slice(compact(MeshEndpointSlice(name="s", endpoints=(remote(300, "10.1.1.5", "web"),))))
    assert model.identities.desired == {}
    add(model, pod("web"))
    assert list(model.identities.desired) == [packed("10.1.1.5")]
    # Nodes' CIDRs come by a watch of their own, before or after.
    model.set_surroundings(Surroundings(own=(ip_network("10.1.2.0/24"),)))
    model.remove_pod("web")
    assert model.identities.desired == {packed("10.1.1.5"): 300}


def test_without_pod_cidr_a_pod_of_this_node_is_told_by_its_slice(model: Model) -> None:
    model.set_surroundings(Surroundings(shared=(ip_network("10.1.0.0/16"),), node="a"))
    here = replace(remote(300, "10.1.1.5", "web"), node="a")
    model.put_slice(compact(MeshEndpointSlice(name="s", endpoints=(here, remote(301, "10.1.1.6", "b")))))
    assert model.identities.desired == {packed("10.1.1.6"): 301}
    # Who is in no map may be a pod of this node that nothing guards yet.
    assert model.cidrs.desired == {ip_network("10.1.0.0/16"): (0, CidrFlag.CLUSTER | CidrFlag.LOCAL)}
    add(model, pod("web"))
    assert model.identities.desired.keys() == {packed("10.1.1.5"), packed("10.1.1.6")}


def test_a_pod_that_moves_to_another_slice_stays_known(model: Model) -> None:
    """The operator writes it there first, and takes it out of the old one then."""
    moving = Endpoint(
        addresses=(IPv4Address("10.1.2.5"),),
        identity=300,
        node="b",
        pod=PodRef("shop", "a", "a"),
        ports=(NamedPort("http", Protocol.TCP, 8080),),
    )
    to_http = Policy(
        kind=Kind.MESH_POLICY,
        namespace="shop",
        name="p",
        uid="p",
        selector=app("web"),
        default_deny=frozenset({Direction.EGRESS}),
        rules=(
            Rule(
                direction=Direction.EGRESS,
                path="spec.egress[0]",
                peers=(app("db"),),
                ports=(PortRange(Protocol.TCP, 0, 0, "http"),),
            ),
        ),
    )
    model.put_policy(to_http)
    model.put_identity(MeshIdentity(number=300, labels=labels_of("db")))
    add(model, pod("web"))
    model.put_slice(compact(MeshEndpointSlice(name="s", endpoints=(moving,))))
    model.put_slice(compact(MeshEndpointSlice(name="t", endpoints=(moving,))))
    model.put_slice(compact(MeshEndpointSlice(name="s", endpoints=())))
    model.update()
    assert model.identities.desired[packed("10.1.2.5")] == 300
    assert model.pod_name(packed("10.1.2.5")) == ("shop", "a")
    assert rules(model, "10.1.1.5") == {EntryKey(300, Direction.EGRESS, PortKey(6, 8080, 16)): False}
    model.remove_slice("t")
    model.update()
    assert packed("10.1.2.5") not in model.identities.desired and rules(model, "10.1.1.5") == {}


def test_an_address_that_two_pods_claim_is_unknown(model: Model) -> None:
    model.put_slice(compact(MeshEndpointSlice(name="s", endpoints=(remote(300, "10.1.2.5", "a"),))))
    model.put_slice(compact(MeshEndpointSlice(name="t", endpoints=(remote(301, "10.1.2.5", "b"),))))
    assert model.identities.desired == {packed("10.1.2.5"): identity.UNKNOWN}
    model.remove_slice("s")
    assert model.identities.desired == {packed("10.1.2.5"): 301}


def test_nodes_and_api_servers_have_identities_of_their_own(model: Model) -> None:
    model.set_surroundings(
        Surroundings(
            local=frozenset({packed("192.0.2.1"), packed("192.0.2.4")}),
            remote=frozenset({packed("192.0.2.2"), packed("192.0.2.5")}),
        )
    )
    api = ("192.0.2.4", "192.0.2.5", "192.0.2.6")
    model.put_backends(
        Backends(uid="u", namespace="default", service="kubernetes", addresses=tuple(map(packed, api)))
    )
    # No pod passes for a node.
    model.put_slice(compact(MeshEndpointSlice(name="s", endpoints=(remote(300, "192.0.2.2", "a"),))))
    assert model.identities.desired == {
        packed("192.0.2.1"): identity.HOST,
        packed("192.0.2.2"): identity.REMOTE_NODE,
        packed("192.0.2.4"): identity.APISERVER_HOST,
        packed("192.0.2.5"): identity.APISERVER_NODE,
        packed("192.0.2.6"): identity.APISERVER,
    }


def test_blocks_say_all_there_is_to_know_of_them(model: Model) -> None:
    blocks = Policy(
        kind=Kind.NETWORK_POLICY,
        namespace="shop",
        name="p",
        uid="p",
        selector=app("web"),
        default_deny=frozenset({Direction.EGRESS}),
        rules=(
            Rule(
                direction=Direction.EGRESS,
                path="spec.egress[0]",
                peers=(CidrPeer(ip_network("10.0.0.0/8"), (ip_network("10.1.1.128/25"),), pods=True),),
            ),
        ),
    )
    model.put_policy(blocks)
    model.set_surroundings(
        Surroundings(cluster=(ip_network("10.1.0.0/16"),), own=(ip_network("10.1.1.0/24"),))
    )
    add(model, pod("web"))
    cidrs = model.cidrs.desired
    outer, inner = cidrs[ip_network("10.0.0.0/8")], cidrs[ip_network("10.1.1.128/25")]
    assert outer[1] == 0 and inner[1] == CidrFlag.CLUSTER | CidrFlag.LOCAL and 0 != outer[0] != inner[0] != 0
    assert cidrs[ip_network("10.1.0.0/16")] == (outer[0], CidrFlag.CLUSTER)
    assert cidrs[ip_network("10.1.1.0/24")] == (outer[0], CidrFlag.CLUSTER | CidrFlag.LOCAL)
    both = {outer[0] | identity.CIDR, outer[0] | identity.CIDR_INSIDE}
    assert {key.identity for key in rules(model, "10.1.1.5")} == both
    found = endpoint(model, "10.1.1.5")
    model.cidrs_written()
    after = endpoint(model, "10.1.1.5")
    assert found and after and found.flags & EndpointFlag.EGRESS_ENFORCED and after.revision > found.revision


def test_a_policy_that_can_not_be_read_leaves_the_last_one_in_force(model: Model) -> None:
    model.put_policy(allow("p", "web", "web"))
    add(model, pod("web"))
    before = rules(model, "10.1.1.5")
    model.refuse_policy(Refused("p", 2, InvalidSpec("spec", "no")))
    model.update()
    assert rules(model, "10.1.1.5") == before and "p" in model.refused
    model.put_policy(allow("p", "web", "web", 82))
    assert not model.refused
    model.remove_policy("p")
    model.update()
    assert rules(model, "10.1.1.5") == {}


def test_the_datapath_names_rules_by_number(model: Model) -> None:
    model.put_policy(allow("p", "web", "web"))
    add(model, pod("web"))
    ((_, number),) = model.entries.desired.values()
    assert (found := model.rule(number)) and found[0].name == "p" and found[1] == "spec.ingress[0]"
    model.remove_policy("p")
    assert model.rule(number) is None


def test_addresses_of_services_go_with_the_last_of_them(model: Model) -> None:
    def service(uid: str) -> Service:
        return Service(
            uid=uid, namespace="shop", name=uid, labels={}, selector={}, addresses=(packed("10.9.0.1"),)
        )

    model.put_service(service("a"))
    model.put_service(service("b"))
    model.remove_service("a")
    assert packed("10.9.0.1") in model.services.desired
    model.remove_service("b")
    assert not model.services.desired


def test_a_new_list_takes_away_what_is_no_longer_there(model: Model) -> None:
    feed = Feed(model)
    one, other = (MeshIdentity(number=number, labels=labels_of(str(number))) for number in (300, 301))
    feed.take(News(names.MESHIDENTITIES, "LISTED", [one, other]))
    feed.take(News(names.MESHIDENTITIES, "LISTED", [other]))
    assert model.labels_of(300) == () and model.labels_of(301) == labels_of("301")
    feed.take(News(names.MESHIDENTITIES, "DELETED", [other]))
    assert model.labels_of(301) == ()
    assert feed.listed() == {names.MESHIDENTITIES}


def test_pods_without_a_network_of_their_own_are_none() -> None:
    metadata = {"uid": "u", "namespace": "shop", "name": "p"}
    for spec, status in (
        ({"hostNetwork": True}, {}),
        ({}, {"phase": "Succeeded"}),
        ({}, {"phase": "Failed"}),
    ):
        assert parse_pod({"metadata": metadata, "spec": spec, "status": status}) is None
    found = parse_pod(
        {
            "metadata": metadata,
            "spec": {
                "containers": [{"ports": [{"name": "http", "containerPort": 80}, {"containerPort": 81}]}]
            },
            "status": {"phase": "Running", "podIPs": [{"ip": "10.1.1.5"}, {"ip": "fd00::5"}]},
        }
    )
    assert found and found.ports == (("http", 6, 80),)
    assert found.addresses == (packed("10.1.1.5"), packed("fd00::5"))


def test_a_headless_service_has_no_address() -> None:
    service = {"metadata": {"uid": "u", "namespace": "n", "name": "s"}, "spec": {"clusterIP": "None"}}
    assert parse_service(service).addresses == ()


def test_a_service_hides_destinations_behind_its_own_addresses_alone() -> None:
    """External addresses are as users wrote them, perhaps somebody else's; and what kube-proxy leads on
    from there it masquerades: nobody could judge it later."""
    service = {
        "metadata": {"uid": "u", "namespace": "n", "name": "s"},
        "spec": {
            "type": "LoadBalancer",
            "clusterIPs": ["10.96.0.10", "fd00:96::10"],
            "externalIPs": ["203.0.113.9"],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.10"}, {"hostname": "example.org"}]}},
    }
    assert parse_service(service).addresses == (packed("10.96.0.10"), packed("fd00:96::10"))


OPERATIONS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3), st.integers(0, 3)), max_size=30)


@settings(max_examples=300, deadline=None)
@given(operations=OPERATIONS, seed=st.integers(0, 1000))
def test_the_way_there_makes_no_difference(operations: list[tuple[int, int, int]], seed: int) -> None:
    """After whatever happened, a model says what one says that was told only how it ended."""
    apps = ("web", "client", "db", "other")
    ended: dict[tuple[str, Any], Any] = {}
    model = Model()
    model.put_namespace(Namespace(uid="n", name="shop", labels={}))
    for kind, which, what in operations:
        match kind:
            case 0:
                ended["pod", which] = pod(f"p{which}", f"10.1.1.{what + 5}", apps[what])
                model.put_pod(ended["pod", which])
                model.set_device(f"p{which}", which + 10)
            case 1:
                if ended.pop(("pod", which), None):
                    model.remove_pod(f"p{which}")
            case 2:
                ended["identity", which] = MeshIdentity(number=300 + which, labels=labels_of(apps[what]))
                model.put_identity(ended["identity", which])
            case 3:
                if ended.pop(("identity", which), None):
                    model.remove_identity(300 + which)
            case 4:
                ended["policy", which] = allow(str(which), apps[what], apps[which], 80 + what)
                model.put_policy(ended["policy", which])
            case 5:
                if ended.pop(("policy", which), None):
                    model.remove_policy(str(which))
            case 6:
                ended["slice", which] = compact(
                    MeshEndpointSlice(
                        name=str(which), endpoints=(remote(300 + what, f"10.1.2.{what}", str(which)),)
                    )
                )
                model.put_slice(ended["slice", which])
            case 7:
                model.update()
    model.update()

    fresh = Model()
    fresh.put_namespace(Namespace(uid="n", name="shop", labels={}))
    items = list(ended.items())
    random.Random(seed).shuffle(items)
    for (kind_of, which), item in items:
        match kind_of:
            case "pod":
                fresh.put_pod(item)
                fresh.set_device(item.uid, which + 10)
            case "identity":
                fresh.put_identity(item)
            case "policy":
                fresh.put_policy(item)
            case "slice":
                fresh.put_slice(item)
    fresh.update()
    assert meaning(model) == meaning(fresh)


def meaning(model: Model) -> Any:
    """All that the tables say, by names instead of numbers that depend on the order of events."""

    def who(number: int) -> Any:
        own = identity.PROVISIONAL <= number < 2 * identity.PROVISIONAL
        return model.labels_of(number) if own else number

    rules_by_set: dict[int, set[Any]] = {}
    for (number, key), (deny, rule) in model.entries.desired.items():
        found = model.rule(rule)
        assert found, "an entry names a rule that is gone"
        rules_by_set.setdefault(number, set()).add(
            (who(key.identity), key.direction, key.port, deny, found[0].name, found[1])
        )
    for value in model.endpoints.desired.values():
        assert value.born <= value.revision
    return (
        {address: who(number) for address, number in model.identities.desired.items()},
        {
            address: (value.ifindex, who(value.identity), value.flags, rules_by_set.get(value.set, set()))
            for address, value in model.endpoints.desired.items()
        },
        model.cidrs.desired,
    )


@settings(max_examples=200)
@given(
    before=st.dictionaries(st.integers(0, 5), st.integers(0, 3)),
    steps=st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(0, 3))),
    lost=st.sets(st.integers(0, 5)),
)
def test_a_table_writes_what_differs_and_nothing_else(
    before: dict[int, int], steps: list[tuple[int, int | None]], lost: set[int]
) -> None:
    table: Table[int, int] = Table()
    kernel = dict(before)
    table.found(dict(kernel))
    for key, value in steps:
        if value is None:
            table.discard(key)
        else:
            table.set(key, value)
        if key in lost:
            # Somebody else's doing, which only a look reveals.
            kernel.pop(key, None)
            table.found(dict(kernel))
    for key, value in table.writes():
        assert kernel.get(key) != value
        kernel[key] = value
        table.wrote([(key, value)])
    for key in table.deletes():
        del kernel[key]
        table.deleted([key])
    assert kernel == table.desired and table.is_settled


def test_a_table_that_was_found_as_it_should_be_has_nothing_to_look_at() -> None:
    table: Table[int, int] = Table()
    table.found({key: key for key in range(100)})
    assert table.differing == table.size == 100
    for key in range(100):
        table.set(key, key)
    assert (table.differing, table.size, table.is_settled) == (0, 100, True)
    table.set(5, 6)
    table.discard(7)
    assert (table.differing, table.size, table.held(5), table.held(7)) == (2, 100, 5, 7)
    table.set(5, 5)
    table.deleted([7])
    assert (table.differing, table.size, table.held(7)) == (0, 99, None)


def test_every_port_of_a_rule_without_ports(model: Model) -> None:
    anything = Policy(
        kind=Kind.CLUSTER_MESH_POLICY,
        namespace="",
        name="all",
        uid="all",
        selector=Selector((Requirement(NAMESPACE_LABEL, Operator.EXISTS),)),
        default_deny=frozenset({Direction.EGRESS}),
        rules=(Rule(direction=Direction.EGRESS, path="spec.egress[0]"),),
    )
    model.put_policy(anything)
    add(model, pod("web"))
    assert rules(model, "10.1.1.5") == {EntryKey(identity.ANY, Direction.EGRESS, EVERYTHING): False}
