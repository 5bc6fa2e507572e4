"""What a node should be, by what the API says and what is found on it."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import Encryption, MeshConfig, Mode, NetworkSettings
from meshwire.api.meshnode import Implementation, Key, Phase, Spec
from meshwire.encryption.desired import Inputs, desired, judge_config, tunnel_mtu
from meshwire.encryption.model import (
    AddressEntry,
    AddressFlags,
    Attachment,
    ClusterNode,
    Desired,
    Direction,
    Endpoint,
    HeldKey,
    Link,
    Member,
    Route,
    SecretKey,
    SettingsFlags,
)

KEYS = {name: b64encode(sha256(name.encode()).digest()).decode() for name in "abcd"}
HELD = {1: HeldKey(1, KEYS["a"], SecretKey(bytes(32)))}


def member(name: str, number: int, *, phase: Phase = Phase.ENFORCING, **spec: Any) -> Member:
    fields = {
        "addresses": (ip_address(f"198.18.0.{number}"), ip_address(f"fd00:198:18::{number}")),
        "pod_cidrs": (ip_network(f"10.244.{number}.0/24"), ip_network(f"fd00:10:244:{number}::/64")),
        "keys": (Key(epoch=1, public_key=KEYS[name]),),
        **spec,
    }
    return Member(
        name=name,
        created=f"2026-01-01T00:00:{number:02}Z",
        spec=Spec(id=number, phase=phase, epoch=1, **fields),
    )


def inputs(*members: Member, **more: Any) -> Inputs:
    fields: dict[str, Any] = {
        "node": "a",
        "members": {each.name: each for each in members},
        "nodes": {each.name: ClusterNode(name=each.name, ready=True) for each in members},
        "config": MeshConfig(encryption=Encryption(enabled=True)),
        "held": HELD,
        "links": {
            "eth0": Link(index=2, name="eth0", up=True, addresses=frozenset({ip_address("198.18.0.1")})),
        },
        **more,
    }
    return Inputs(**fields)


def want(*members: Member, **more: Any) -> Desired:
    wanted = desired(inputs(*members, **more))
    assert wanted is not None
    return wanted


def reasons(wanted: Desired) -> list[str]:
    return [problem.reason for problem in wanted.problems]


def test_a_peer_has_its_nodes_pod_cidrs_and_addresses() -> None:
    [device] = want(member("a", 1), member("b", 2)).devices
    [peer] = device.peers
    assert (device.name, device.port, device.mtu) == ("meshwire_wg1", 51872, 1420)
    assert peer.endpoint == Endpoint(ip_address("198.18.0.2"), 51872)
    assert sorted(map(str, peer.allowed_ips)) == [
        "10.244.2.0/24",
        "198.18.0.2/32",
        "fd00:10:244:2::/64",
        "fd00:198:18::2/128",
    ]


def test_an_endpoint_has_a_family_that_both_nodes_have() -> None:
    own = member("a", 1, addresses=(ip_address("fd00:198:18::1"),))
    [device] = want(own, member("b", 2)).devices
    assert device.peers[0].endpoint == Endpoint(ip_address("fd00:198:18::2"), 51872)
    [device] = want(own, member("b", 2, addresses=(ip_address("198.18.0.2"),))).devices
    assert device.peers[0].endpoint is None


def test_addresses_say_who_lives_where() -> None:
    own = member("a", 1, cluster_cidrs=(ip_network("10.244.0.0/16"),))
    entries = want(own, member("b", 2)).addresses
    assert entries[ip_network("10.244.1.0/24")] == AddressEntry(1, AddressFlags.POD)
    assert entries[ip_network("198.18.0.2/32")] == AddressEntry(2, AddressFlags.HOST)
    assert entries[ip_network("10.244.0.0/16")] == AddressEntry(0, AddressFlags.CLUSTER)


@pytest.mark.parametrize(
    ("phase", "mode", "flags"),
    [
        (Phase.ENABLING, Mode.STRICT, SettingsFlags.PASS_OVERSIZED),
        (Phase.ENFORCING, Mode.STRICT, SettingsFlags.STRICT | SettingsFlags.ENFORCING),
        (Phase.ENFORCING, Mode.PERMISSIVE, SettingsFlags.ENFORCING),
        (Phase.DISABLING, Mode.STRICT, SettingsFlags.PASS_OVERSIZED),
        (Phase.DRAINING, Mode.STRICT, SettingsFlags.PASS_OVERSIZED),
    ],
)
def test_flags_follow_the_phase(phase: Phase, mode: Mode, flags: SettingsFlags) -> None:
    config = MeshConfig(encryption=Encryption(enabled=True, mode=mode))
    wanted = want(member("a", 1, phase=phase), config=config)
    assert wanted.settings is not None
    assert wanted.settings.flags == flags


def test_off_wants_nothing_but_a_place_for_programs() -> None:
    wanted = want(member("a", 1, phase=Phase.OFF), member("b", 2))
    assert wanted == Desired(phase=Phase.OFF, hooked=frozenset({"eth0"}))


def test_only_enforcing_sends_before_the_handshake() -> None:
    for phase in (Phase.ENABLING, Phase.DISABLING):
        assert want(member("a", 1, phase=phase), member("b", 2)).redirects[2].when_proven
    assert not want(member("a", 1), member("b", 2)).redirects[2].when_proven
    assert not want(member("a", 1, phase=Phase.DRAINING), member("b", 2)).redirects


def test_draining_devices_still_receive() -> None:
    wanted = want(member("a", 1, phase=Phase.DRAINING), member("b", 2))
    assert [peer.node for peer in wanted.devices[0].peers] == ["b"]
    assert Attachment("meshwire_wg1", Direction.INGRESS, "mw_from_wireguard") in wanted.attachments


def test_a_node_nobody_made_a_meshnode_for_is_guarded() -> None:
    new = ClusterNode(name="new", ready=True, pod_cidrs=(ip_network("10.244.9.0/24"),))
    wanted = want(member("a", 1), nodes={"new": new})
    assert wanted.addresses[ip_network("10.244.9.0/24")] == AddressEntry(0, AddressFlags.CLUSTER)


def test_a_node_without_a_key_is_known_and_not_reached() -> None:
    wanted = want(member("a", 1), member("b", 2, keys=()))
    assert wanted.addresses[ip_network("10.244.2.0/24")].node == 2
    assert not wanted.redirects
    assert not wanted.devices[0].peers


def test_before_its_own_meshnode_a_node_joins_an_enforcing_cluster_enforcing() -> None:
    own = ClusterNode(name="a", ready=True, pod_cidrs=(ip_network("10.244.1.0/24"),))
    wanted = want(member("b", 2), nodes={"a": own}, held={})
    assert wanted.strict
    assert wanted.settings is not None
    local = wanted.settings.local_node
    assert local not in {0, 2}
    assert wanted.addresses[ip_network("10.244.1.0/24")] == AddressEntry(local, AddressFlags.POD)
    assert wanted.addresses[ip_network("10.244.2.0/24")] == AddressEntry(2, AddressFlags.POD)


@pytest.mark.parametrize("phase", [Phase.OFF, Phase.ENABLING, Phase.DISABLING])
def test_before_its_own_meshnode_a_node_waits_in_any_other_cluster(phase: Phase) -> None:
    assert desired(inputs(member("b", 2, phase=phase), nodes={"a": ClusterNode(name="a")})) is None


def test_a_member_whose_meshnode_is_away_goes_on_as_it_is() -> None:
    own = ClusterNode(name="a", ready=True, pod_cidrs=(ip_network("10.244.1.0/24"),))
    assert desired(inputs(member("b", 2), nodes={"a": own}, in_place=True)) is None
    assert want(member("b", 2), nodes={"a": own}, in_place=False).strict, (
        "after a reboot there is nothing to go on"
    )
    assert want(member("b", 2), nodes={"a": own}, in_place=True, held={}).strict, "it was never a member"


def test_own_pod_cidrs_count_before_the_operator_has_seen_them() -> None:
    own = ClusterNode(name="a", pod_cidrs=(ip_network("10.244.77.0/24"),))
    assert want(member("a", 1), nodes={"a": own}).addresses[ip_network("10.244.77.0/24")].node == 1


def test_the_older_node_keeps_a_key() -> None:
    wanted = want(member("a", 1), member("b", 2), member("c", 3, keys=(Key(epoch=1, public_key=KEYS["b"]),)))
    assert [peer.node for peer in wanted.devices[0].peers] == ["b"]
    [problem] = wanted.problems
    assert problem.reason == "DuplicateKey"
    assert not problem.blocking
    assert "b" in problem.message and "c" in problem.message


def test_a_node_whose_own_key_belongs_to_another_says_so() -> None:
    thief = replace(
        member("a", 1, keys=(Key(epoch=1, public_key=KEYS["b"]),)), created="2026-02-01T00:00:00Z"
    )
    held = {1: HeldKey(1, KEYS["b"], SecretKey(bytes(32)))}
    wanted = want(thief, member("b", 2), held=held)
    assert not wanted.devices
    assert reasons(wanted) == ["DuplicateKey", "DuplicateKey"]
    assert wanted.problems[0].blocking


@pytest.mark.parametrize("stolen", ["10.244.2.0/24", "10.244.2.128/25", "10.244.0.0/16", "198.18.0.2/32"])
def test_the_older_node_keeps_its_addresses(stolen: str) -> None:
    wanted = want(member("a", 1), member("b", 2), member("c", 3, pod_cidrs=(ip_network(stolen),)))
    owners = {peer.node: peer.allowed_ips for peer in wanted.devices[0].peers}
    assert ip_network(stolen) not in owners["c"]
    assert ip_network("10.244.2.0/24") in owners["b"]
    assert wanted.addresses[ip_network("10.244.2.0/24")].node == 2
    assert "DuplicateAddress" in reasons(wanted)


def test_two_nodes_of_one_number_are_told_apart() -> None:
    wanted = want(member("a", 1), replace(member("b", 2), spec=replace(member("b", 2).spec, id=1)))
    assert wanted.settings is not None
    assert wanted.settings.local_node == 1
    assert wanted.addresses[ip_network("10.244.2.0/24")].node not in {0, 1}
    assert reasons(wanted) == ["DuplicateID"]


def test_without_wireguard_an_enforcing_node_guards_and_any_other_stays_off() -> None:
    wanted = want(member("a", 1), member("b", 2), implementation=Implementation.NONE)
    assert wanted.strict and not wanted.devices and wanted.attachments
    assert reasons(wanted) == ["WireGuardUnavailable"]
    wanted = want(member("a", 1, phase=Phase.ENABLING), member("b", 2), implementation=Implementation.NONE)
    assert wanted.settings is None
    assert reasons(wanted) == ["WireGuardUnavailable"]


def test_a_published_key_that_is_not_opened_yet_is_waited_for() -> None:
    wanted = want(member("a", 1), member("b", 2), held={})
    assert not wanted.devices
    assert reasons(wanted) == ["WaitingForKey"]


def test_live_nodes_are_the_others_whose_node_is_ready() -> None:
    nodes = {name: ClusterNode(name=name, ready=name != "c") for name in "abc"}
    assert want(member("a", 1), member("b", 2), member("c", 3), nodes=nodes).live_ids == {2}


def test_devices_without_ethernet_get_the_other_programs() -> None:
    links = {
        "eth0": Link(index=2, name="eth0", addresses=frozenset({ip_address("198.18.0.1")})),
        "tunl0": Link(index=3, name="tunl0", kind="ipip", ethernet=False),
    }
    routes = (Route(ip_network("10.244.2.0/24"), (3,)),)
    attached = want(member("a", 1), member("b", 2), links=links, routes=routes, held={}).attachments
    assert attached == {
        Attachment("eth0", Direction.EGRESS, "mw_to_netdev"),
        Attachment("eth0", Direction.INGRESS, "mw_from_netdev"),
        Attachment("tunl0", Direction.EGRESS, "mw_to_netdev_l3"),
        Attachment("tunl0", Direction.INGRESS, "mw_from_netdev_l3"),
    }


def test_named_devices_replace_found_ones() -> None:
    links = {
        name: Link(index=index, name=name, mtu=mtu)
        for index, (name, mtu) in enumerate([("eth0", 1500), ("eth1", 9000)], start=2)
    }
    config = MeshConfig(
        encryption=Encryption(enabled=True), network=NetworkSettings(uplinks=("eth1",), overlays=())
    )
    routes = (Route(ip_network("0.0.0.0/0"), (2,)),)
    wanted = want(member("a", 1), links=links, routes=routes, config=config, held={})
    assert {attachment.device for attachment in wanted.attachments} == {"eth1"}
    assert wanted.ways_known
    assert wanted.settings is not None
    assert wanted.settings.tunnel_mtu == 8920


@pytest.mark.parametrize(
    ("uplinks", "found", "known"),
    [(("eth0",), ("eth0",), True), (("eth0", "bond0"), ("eth0",), False), ((), (), False)],
)
def test_whether_all_ways_off_the_node_are_known(
    uplinks: tuple[str, ...], found: tuple[str, ...], known: bool
) -> None:
    links = {name: Link(index=index, name=name) for index, name in enumerate(found, start=2)}
    config = MeshConfig(encryption=Encryption(enabled=True), network=NetworkSettings(uplinks=uplinks))
    assert want(member("a", 1), links=links, routes=(), config=config, held={}).ways_known is known


@pytest.mark.parametrize(
    ("mtus", "configured", "expected"),
    [
        ([1500], 0, 1420),
        ([1500, 9001], 0, 1420),
        ([9001], 0, 8921),
        ([1300], 0, 1280),
        ([], 0, 1420),
        ([1500], 1300, 1300),
    ],
)
def test_tunnel_mtu(mtus: list[int], configured: int, expected: int) -> None:
    config = MeshConfig(network=NetworkSettings(mtu=configured))
    assert (
        tunnel_mtu(config, [Link(index=n, name=f"eth{n}", mtu=mtu) for n, mtu in enumerate(mtus)])
        == expected
    )


def test_a_config_that_names_a_missing_device_is_not_taken() -> None:
    good = MeshConfig(encryption=Encryption(enabled=True, port=1234))
    bad = MeshConfig(network=NetworkSettings(uplinks=("eth7",)))
    links = {"eth0": Link(index=2, name="eth0")}
    in_force, problem = judge_config(bad, good, links)
    assert in_force is good
    assert problem is not None
    assert problem.reason == "DeviceNotFound"
    assert "eth7" in problem.message
    assert judge_config(bad, good, {"eth7": Link(index=3, name="eth7")}) == (bad, None)
    in_force, problem = judge_config(InvalidSpec("spec.x", "is bad"), good, links)
    assert (in_force, problem and problem.reason) == (good, "ConfigRejected")
    assert judge_config(None, good, links) == (good, None)
    assert judge_config(None, None, links) == (MeshConfig(), None)


def test_a_node_that_does_not_encrypt_yet_does_not_begin_with_a_refused_config() -> None:
    own = member("a", 1, phase=Phase.ENABLING)
    assert want(own, member("b", 2), config_refused=True).settings is None
    assert want(own, member("b", 2), config_refused=True, in_place=True).settings is not None
    assert want(member("a", 1), member("b", 2), config_refused=True).strict


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 255), st.integers(20, 32)).map(
                lambda pair: ip_network((0x0A000000 + (pair[0] << 5), pair[1]), strict=False)
            ),
            max_size=3,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_no_address_ever_has_two_nodes(claims: list[list[Any]]) -> None:
    members = [member("a", 1)] + [
        member(name, number, pod_cidrs=tuple(dict.fromkeys(networks)))
        for number, (name, networks) in enumerate(zip("bcd", claims, strict=False), start=2)
    ]
    [device] = want(*members).devices
    owned = [(peer.node, network) for peer in device.peers for network in peer.allowed_ips]
    for name, network in owned:
        for other, elsewhere in owned:
            if name != other and network.version == elsewhere.version:
                assert not network.overlaps(elsewhere)
    # The oldest has all it asked for.
    assert {network for name, network in owned if name == "b"} >= set(claims[0])


def test_order_of_members_changes_nothing() -> None:
    members = [member("a", 1), member("b", 2), member("c", 3)]
    assert want(*members) == want(*reversed(members))
