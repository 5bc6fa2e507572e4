from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwire.lab import cni
from meshwire.lab.cni import ClusterPool, NodePool, Remote
from meshwire.lab.model import LabError, Settings

ip = ipaddress.ip_address
net = ipaddress.ip_network

TWO = Remote(
    "node2",
    (ip("198.18.0.12"), ip("fd00:198:18::12")),
    (net("10.244.2.0/24"), net("fd00:10:244:2::/64")),
)


def test_a_node_object_is_read() -> None:
    node = {
        "metadata": {"name": "node2"},
        "spec": {"podCIDRs": ["10.244.2.0/24", "fd00:10:244:2::/64"]},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": "198.18.0.12"},
                {"type": "Hostname", "address": "node2"},
                {"type": "InternalIP", "address": "fd00:198:18::12"},
            ]
        },
    }
    assert cni.parse_remote(node) == TWO
    # Just registered: neither addresses nor CIDRs.
    assert cni.parse_remote({"metadata": {"name": "a"}, "spec": {}}) == Remote("a", (), ())


def test_each_cidr_is_routed_by_the_nodes_address_of_its_family() -> None:
    assert [entry.add for entry in cni.plan_routes([TWO], Settings())] == [
        "route replace 10.244.2.0/24 via 198.18.0.12 dev eth0 proto 77",
        "route replace fd00:10:244:2::/64 via fd00:198:18::12 dev eth0 proto 77",
    ]
    assert cni.plan_routes([Remote("new", (), TWO.pod_cidrs)], Settings()) == ()
    assert cni.plan_routes([Remote("new", TWO.addresses, ())], Settings()) == ()


def test_an_overlay_needs_forwarding_neighbour_and_route_in_this_order() -> None:
    entries = cni.plan_routes([TWO], Settings(overlay="vxlan"))
    assert [(entry.tool, entry.add.split()[0]) for entry in entries] == [
        ("bridge", "fdb"),
        ("ip", "neigh"),
        ("ip", "route"),
        ("ip", "neigh"),
        ("ip", "route"),
    ]
    assert "dst 198.18.0.12" in entries[0].add
    assert entries[2].add == "route replace 10.244.2.0/24 via 10.244.2.0 dev vxlan.1 onlink proto 77"


def test_without_node_cidrs_every_pod_elsewhere_has_its_route() -> None:
    pods = [(ip("10.244.0.9"), "node2"), (ip("fd00:10:244::9"), "node2"), (ip("10.244.0.8"), "unknown")]
    assert [entry.add for entry in cni.plan_pod_routes(pods, [TWO])] == [
        "route replace 10.244.0.9/32 via 198.18.0.12 dev eth0 proto 77",
        "route replace fd00:10:244::9/128 via fd00:198:18::12 dev eth0 proto 77",
    ]


def pod(node: str, address: str, **fields: Any) -> dict[str, Any]:
    status = {"podIPs": [{"ip": address}], "phase": fields.pop("phase", "Running")}
    return {"spec": {"nodeName": node, **fields}, "status": status}


def test_pods_that_need_no_route_are_passed_over() -> None:
    pods: dict[str, dict[str, Any]] = {
        "elsewhere": pod("node2", "10.244.0.2"),
        "here": pod("node1", "10.244.0.3"),
        "host": pod("node2", "198.18.0.12", hostNetwork=True),
        "over": pod("node2", "10.244.0.4", phase="Succeeded"),
        "unbound": {"spec": {}},
    }
    assert list(cni.pods_elsewhere(pods, "node1")) == [(ip("10.244.0.2"), "node2")]


def test_changes_are_only_what_differs() -> None:
    moved = Remote("node2", (ip("198.18.0.99"), TWO.addresses[1]), TWO.pod_cidrs)
    before, after = cni.plan_routes([TWO], Settings()), cni.plan_routes([moved], Settings())
    add, remove = cni.changes(before, after)
    assert [entry.add for entry in add] == ["route replace 10.244.2.0/24 via 198.18.0.99 dev eth0 proto 77"]
    # It names the old gateway, so it can't hit the route that has just taken its place.
    assert [entry.remove for entry in remove] == ["route delete 10.244.2.0/24 via 198.18.0.12 dev eth0"]
    assert cni.changes(after, after) == ((), ())


def test_addresses_are_given_out_in_turn_and_returned_ones_rest() -> None:
    pool = NodePool([net("10.244.2.0/29"), net("fd00::/64")])
    first = pool.allocate("n")
    assert first == (ip("10.244.2.2"), ip("fd00::2"))
    second = pool.allocate("n")
    pool.release(first)
    assert [str(pool.allocate("n")[0]) for _ in range(4)] == [
        "10.244.2.4",
        "10.244.2.5",
        "10.244.2.6",
        "10.244.2.2",
    ]
    with pytest.raises(LabError, match="no pod address"):
        pool.allocate("n")
    pool.release(second)
    assert pool.allocate("n") == second


def test_the_clusters_pool_is_one_for_all_nodes(tmp_path: Path) -> None:
    one, two = (ClusterPool(tmp_path / "pool.json", ("v6", "v4")) for _ in range(2))
    first, second = one.allocate("node1"), two.allocate("node2")
    assert first == (ip("fd00:10:244::2"), ip("10.244.0.2"))
    assert second == (ip("fd00:10:244::3"), ip("10.244.0.3"))
    one.release_all("node1")
    two.release(second)
    assert one.allocate("node1") == (ip("fd00:10:244::4"), ip("10.244.0.4"))


@given(st.sets(st.integers(2, 30)), st.integers(0, 30))
def test_a_picked_number_is_free_and_the_next_one(taken: set[int], last: int) -> None:
    free = set(range(2, 31)) - taken
    if not free:
        with pytest.raises(LabError):
            cni.pick(taken, last, 31)
        return
    later = {number for number in free if number > last}
    assert cni.pick(taken, last, 31) == min(later or free)


def test_pod_devices_have_a_gateway_and_a_route_per_family() -> None:
    addresses, node = (ip("10.244.1.2"), ip("fd00::2")), (ip("198.18.0.11"), ip("fd00:198:18::11"))
    commands = cni.pod_device_commands("veth1", "mw-a", "default/p", addresses, node, 1450)
    assert commands[0] == "link add veth1 mtu 1450 type veth peer name eth0 mtu 1450 netns mw-a"
    assert "route replace 10.244.1.2/32 dev veth1 src 198.18.0.11" in commands
    assert "route replace fd00::2/128 dev veth1 src fd00:198:18::11" in commands
    only = cni.pod_device_commands("veth1", "mw-a", "default/p", addresses[:1], node[:1], 1450)
    assert not [command for command in only if "fe80" in command]
    assert "route add default via fe80::1 dev eth0" in cni.pod_commands(addresses)


def test_only_traffic_that_leaves_the_cluster_is_masqueraded() -> None:
    rules = cni.masquerade_rules(("v4", "v6"))
    assert "oifname eth0 ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade" in rules
    assert "ip6" not in cni.masquerade_rules(("v4",))
