"""Loading: shared pins, recognising programs, and clear refusals."""

from __future__ import annotations

import os
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path

import pytest

from meshwire.bpf import loader
from meshwire.bpf._libbpf import library
from meshwire.bpf.layouts import MAX_NODES, AddressFlag, Direction, Reason, SettingsFlag
from meshwire.bpf.maps import AddressEntry, Counter, Maps, SettingsEntry

pytestmark = pytest.mark.bpf

ALL = {
    loader.TO_NETDEV,
    loader.TO_NETDEV_L3,
    loader.FROM_NETDEV,
    loader.FROM_NETDEV_L3,
    loader.FROM_WIREGUARD,
}

# Reads an address that may not be there, which the verifier must not accept.
UNCHECKED = """
#include <meshwire/maps.h>

SEC("tc")
int mw_good(struct __sk_buff *skb)
{
	return skb->len;
}

SEC("tc")
int mw_unchecked(struct __sk_buff *skb)
{
	struct mw_prefix prefix = {};
	struct mw_address *address = bpf_map_lookup_elem(&ipcache, &prefix);

	return address->node + skb->len;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
"""

OTHER_MAP = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct other_settings {
	FIELDS;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ENTRIES);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct other_settings);
} settings SEC(".maps");

SEC("tc")
int mw_other(struct __sk_buff *skb)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&settings, &zero) ? skb->len : 2;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
"""


@pytest.fixture
def own_pins(bpffs: Path, request: pytest.FixtureRequest) -> Path:
    """A pin directory nobody has used."""
    return bpffs / f"own-{abs(hash(request.node.name))}"


def test_all_programs_load_into_one_set_of_maps(own_pins: Path, objects: Path) -> None:
    with loader.Programs.load(own_pins, objects=objects) as programs:
        assert programs.names() == ALL
        assert {path.name for path in own_pins.iterdir()} == {
            "ipcache",
            "nodes",
            "settings",
            "metrics",
            "icmp_budget",
        }
        to_netdev = programs.get(loader.TO_NETDEV)
        assert len(to_netdev.map_ids) == 5
        for name in ALL:
            assert programs.get(name).map_ids <= to_netdev.map_ids


def test_an_agent_that_comes_back_recognises_its_programs(own_pins: Path, objects: Path) -> None:
    with loader.Programs.load(own_pins, objects=objects) as before:
        with loader.Programs.load(own_pins, objects=objects) as after:
            for name in ALL:
                attached, wanted = before.get(name), after.get(name)
                assert attached.id != wanted.id
                assert loader.program_info(attached.id) == (name[:15], wanted.tag, wanted.map_ids)
        assert len({before.get(name).tag for name in ALL}) == len(ALL)


def test_programs_on_other_maps_are_others(own_pins: Path, objects: Path) -> None:
    with (
        loader.Programs.load(own_pins, objects=objects) as ours,
        loader.Programs.load(own_pins.with_name(f"{own_pins.name}-b"), objects=objects) as theirs,
    ):
        for name in ALL:
            assert not ours.get(name).map_ids & theirs.get(name).map_ids


def test_descriptors_are_closed_and_programs_go_with_them(own_pins: Path, objects: Path) -> None:
    with loader.Programs.load(own_pins, objects=objects) as programs:
        program = programs.get(loader.FROM_NETDEV)
        assert os.fstat(program.fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(program.fd)


def test_a_program_that_is_gone_is_not_found() -> None:
    with pytest.raises(FileNotFoundError):
        loader.program_info(2**32 - 2)


def test_a_refused_program_is_named_with_the_verifiers_log(
    own_pins: Path, compiled: Callable[[str], Path]
) -> None:
    with pytest.raises(loader.Refused) as refused:
        loader.Programs.load(own_pins, objects=compiled(UNCHECKED))
    assert refused.value.program == "mw_unchecked"
    assert "invalid mem access 'map_value_or_null'" in refused.value.log
    assert "mw_unchecked" in str(refused.value)
    assert "invalid mem access 'map_value_or_null'" in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "entries", "difference"),
    [
        ("__u32 flags; __u16 local_node", 1, None),
        ("__u32 flags; __u16 local_node; __u16 tunnel_mtu; __u32 more", 1, "value size"),
        ("__u16 local_node; __u16 tunnel_mtu; __u32 flags", 1, "fields of its value"),
        ("__u32 flags; __u16 local_node; __u16 tunnel_mtu", 7, "capacity"),
    ],
    ids=["padding where there was a field", "a larger value", "fields moved", "more entries"],
)
def test_a_map_of_another_version_is_refused(
    own_pins: Path,
    objects: Path,
    compiled: Callable[[str], Path],
    fields: str,
    entries: int,
    difference: str | None,
) -> None:
    text = OTHER_MAP.replace("FIELDS", fields).replace("ENTRIES", str(entries))
    loader.Programs.load(own_pins, objects=compiled(text)).close()
    with pytest.raises(loader.IncompatibleMap) as refused:
        loader.Programs.load(own_pins, objects=objects)
    assert refused.value.path == own_pins / "settings"
    assert (difference or "fields of its value") in refused.value.difference


def test_a_pin_directory_outside_of_a_bpffs_is_named(tmp_path: Path, objects: Path) -> None:
    with pytest.raises(OSError, match="is not on BPF FS"):
        loader.Programs.load(tmp_path / "pins", objects=objects)


def test_missing_objects_are_named(tmp_path: Path, own_pins: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make -C bpf"):
        loader.Programs.load(own_pins, objects=tmp_path)


def test_maps_nobody_loaded_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Maps.open(tmp_path)


def test_ipcache_gives_back_what_it_was_given(maps: Maps) -> None:
    entries = {
        ip_network(prefix): entry
        for prefix, entry in (
            ("0.0.0.0/0", AddressEntry(0, 0, AddressFlag.CLUSTER)),
            ("::/0", AddressEntry(0, 0, AddressFlag.CLUSTER)),
            ("10.1.0.0/16", AddressEntry(2**32 - 1, MAX_NODES - 1, AddressFlag.POD)),
            ("10.1.2.3/32", AddressEntry(5, 2, AddressFlag.POD | AddressFlag.HOST)),
            ("0a01::/16", AddressEntry(6, 3, AddressFlag.HOST)),
            ("fd00::1/128", AddressEntry(7, 4, AddressFlag.HOST)),
        )
    }
    for network, entry in entries.items():
        maps.ipcache.update(network, entry)
    assert maps.ipcache.read() == entries

    changed = AddressEntry(8, 9, AddressFlag.POD)
    maps.ipcache.update(ip_network("10.1.0.0/16"), changed)
    maps.ipcache.delete(ip_network("::/0"))
    maps.ipcache.delete(ip_network("::/0"))
    del entries[ip_network("::/0")]
    assert maps.ipcache.read() == entries | {ip_network("10.1.0.0/16"): changed}

    for network in entries:
        maps.ipcache.delete(network)
    assert maps.ipcache.read() == {}


def test_single_pod_addresses_are_written_and_read_compactly(maps: Maps) -> None:
    host, block = ip_network("10.1.2.3/32"), ip_network("10.1.0.0/16")
    others = {
        host: AddressEntry(0, 2, AddressFlag.HOST),
        block: AddressEntry(0, 0, AddressFlag.CLUSTER),
        # Not what pods have.
        ip_network("fd00::1/128"): AddressEntry(7, 4, AddressFlag.POD),
    }
    for network, entry in others.items():
        maps.ipcache.update(network, entry)
    ours = [(0x0A020000 + number).to_bytes(4) for number in range(5000)]
    theirs = [((0xFD01 << 112) + number).to_bytes(16) for number in range(3)]
    maps.ipcache.update_singles(ours, AddressEntry(0, 5, AddressFlag.POD))
    maps.ipcache.update_singles(theirs, AddressEntry(0, 0, AddressFlag.CLUSTER))
    found = maps.ipcache.read_compact()
    assert found.prefixes == others
    assert found.singles == {(5, AddressFlag.POD): set(ours), (0, AddressFlag.CLUSTER): set(theirs)}
    assert maps.ipcache.read()[ip_network("10.2.19.135/32")] == AddressEntry(0, 5, AddressFlag.POD)

    maps.ipcache.delete_singles([*ours, *ours[:3], *theirs[:1]])
    assert maps.ipcache.read_compact().singles == {(0, AddressFlag.CLUSTER): set(theirs[1:])}
    maps.ipcache.delete_singles(theirs)
    for network in others:
        maps.ipcache.delete(network)


def test_more_prefixes_than_one_batch_are_read_whole(maps: Maps, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {
        ip_network((0x0A000000 + (number << 8), 24)): AddressEntry(number, number % 100, AddressFlag.POD)
        for number in range(10_000)
    }
    for network, entry in wanted.items():
        maps.ipcache.update(network, entry)
    assert maps.ipcache.read() == wanted
    # As a kernel does whose tries don't know batches.
    monkeypatch.setattr(library(), "bpf_map_lookup_batch", lambda *_: -524)
    assert maps.ipcache.read() == wanted
    for network in wanted:
        maps.ipcache.delete(network)


def test_nodes_are_those_with_a_device(maps: Maps) -> None:
    assert maps.nodes.read() == {}
    maps.nodes.update(1, 17)
    maps.nodes.update(MAX_NODES - 1, 2**31)
    assert maps.nodes.read() == {1: 17, MAX_NODES - 1: 2**31}
    maps.nodes.update(1, 0)
    maps.nodes.update(MAX_NODES - 1, 0)
    assert maps.nodes.read() == {}
    with pytest.raises(OSError, match="writing node"):
        maps.nodes.update(MAX_NODES, 1)


def test_settings_are_kept(maps: Maps) -> None:
    entry = SettingsEntry(SettingsFlag.STRICT | SettingsFlag.PASS_OVERSIZED, 65535, 65535)
    maps.settings.write(entry)
    assert maps.settings.read() == entry


def test_metrics_start_at_zero_for_every_reason(maps: Maps) -> None:
    assert maps.metrics.read() == {
        (reason, direction): Counter(0, 0) for reason in Reason for direction in Direction
    }
