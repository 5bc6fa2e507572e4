from __future__ import annotations

import pytest

from meshwire.lab.model import (
    LabError,
    Node,
    Settings,
    State,
    api_service_address,
    check_node_name,
    control_addresses,
    free_index,
    gateway_addresses,
    overlay_mac,
)


def test_a_nodes_addresses_read_alike_in_both_families() -> None:
    assert [str(address) for address in Node("a", 1).addresses(("v4", "v6"))] == [
        "198.18.0.11",
        "fd00:198:18::11",
    ]
    assert [str(address) for address in Node("b", 190).addresses(("v6", "v4"))] == [
        "fd00:198:18::200",
        "198.18.0.200",
    ]
    assert [str(address) for address in control_addresses(("v4", "v6"))] == ["198.18.0.2", "fd00:198:18::2"]
    assert [str(address) for address in gateway_addresses(("v4",))] == ["198.18.0.1"]
    assert str(api_service_address("v6")) == "fd00:10:96::1"


def test_no_two_machines_share_an_address_or_a_mac() -> None:
    nodes = [Node(f"n{index}", index) for index in range(1, 201)]
    families = ("v4", "v6")
    addresses = [address for node in nodes for address in node.addresses(families)]
    addresses += [*control_addresses(families), *gateway_addresses(families)]
    assert len(set(addresses)) == len(addresses)
    assert len({node.mac for node in nodes} | {overlay_mac(node.name) for node in nodes}) == 400


def test_a_removed_nodes_index_is_used_again() -> None:
    assert free_index([]) == 1
    assert free_index([Node("a", 1), Node("c", 3)]) == 2
    with pytest.raises(LabError, match="at most"):
        free_index([Node(f"n{index}", index) for index in range(1, 201)])


@pytest.mark.parametrize(
    "name", ["", "Node1", "a_b", "-a", "a-", "a" * 16, "control", "underlay", "wire", "lo"]
)
def test_names_that_can_be_no_device_or_are_taken_are_refused(name: str) -> None:
    with pytest.raises(LabError, match="node name"):
        check_node_name(name)


@pytest.mark.parametrize("name", ["a", "node1", "a-b", "a" * 15])
def test_other_names_are_accepted(name: str) -> None:
    check_node_name(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": -1}, "nodes"),
        ({"nodes": 201}, "nodes"),
        ({"families": ()}, "families"),
        ({"families": ("v4", "v4")}, "families"),
        ({"families": ("v5",)}, "families"),
        ({"underlay_mtu": 1279}, "MTU"),
        ({"underlay_mtu": 1300, "overlay": "vxlan"}, "less than IPv6"),
        ({"overlay": "gre"}, "overlay"),
        ({"overlay": "vxlan", "node_cidr": False}, "no-node-cidr"),
    ],
)
def test_settings_that_make_no_lab_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(LabError, match=message):
        Settings(**arguments)  # type: ignore[arg-type]


def test_pods_have_the_wires_mtu_less_the_overlays_header() -> None:
    assert Settings().pod_mtu == 1500
    assert Settings(overlay="vxlan").pod_mtu == 1450
    assert Settings(overlay="vxlan", families=("v6", "v4")).pod_mtu == 1430
    assert Settings(overlay="vxlan", families=("v4",), underlay_mtu=1280).pod_mtu == 1230


def test_state_survives_its_file() -> None:
    state = State(
        lab_id="1",
        settings=Settings(nodes=2, families=("v6",), overlay="vxlan"),
        api_port=16443,
        nodes=(Node("a", 1), Node("b", 2)),
        made_directories=("/var/lib/meshwire",),
        made_netns_mount=True,
    )
    assert State.from_json(state.to_json()) == state


def test_an_unknown_node_is_named_with_those_there_are() -> None:
    state = State(lab_id="1", settings=Settings(), api_port=1, nodes=(Node("a", 1), Node("b", 2)))
    assert state.node("b").index == 2
    with pytest.raises(LabError, match="no node 'c'; there are: a, b"):
        state.node("c")
