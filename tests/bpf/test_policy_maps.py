"""Loading the policy programs, and their maps as Python values."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from meshwire.bpf import loader
from meshwire.bpf._libbpf import library
from meshwire.bpf.layouts import Direction, Reason
from meshwire.bpf.maps import Counter
from meshwire.bpf.packets import TCP, UDP
from meshwire.bpf.policylayouts import MAX_ENDPOINTS, CidrFlag, EndpointFlag
from meshwire.bpf.policymaps import (
    CidrEntry,
    EndpointEntry,
    PolicyEntry,
    PolicyKey,
    PolicyMaps,
)

pytestmark = pytest.mark.bpf

ALL = {
    loader.FROM_POD,
    loader.TO_POD,
    loader.POLICY_OUT,
    loader.POLICY_OUT_L3,
    loader.POLICY_IN,
    loader.POLICY_IN_L3,
}
MAPS = {
    "identities",
    "cidrs",
    "endpoints",
    "services",
    "policy",
    "flows",
    "fragments",
    "policy_state",
    "verdicts",
    "pod_links",
    "policy_metrics",
    "events",
    "event_budget",
}
VERIFIER_LIMIT = 1_000_000


def test_all_programs_load_into_one_set_of_maps(bpffs: Path, objects: Path) -> None:
    pins = bpffs / "own"
    with loader.Programs.load(pins, objects=loader.POLICY_OBJECTS) as programs:
        assert programs.names() == ALL
        assert {path.name for path in pins.iterdir()} == MAPS
        for name in ALL:
            # What arrives is only looked up, never judged.
            is_pods = name in (loader.FROM_POD, loader.TO_POD)
            assert (len(programs.get(name).map_ids) == len(MAPS)) is is_pods
            _, verified = loader.instructions(programs.get(name))
            # Linux 6.1 goes through up to three times as many as 6.18.
            assert verified < VERIFIER_LIMIT / 3


def test_the_encrypting_programs_are_loaded_without_them(bpffs: Path, objects: Path) -> None:
    with loader.Programs.load(bpffs / "encrypting", objects=objects) as programs:
        assert not programs.names() & ALL


def test_an_agent_that_comes_back_recognises_its_programs(bpffs: Path, objects: Path) -> None:
    pins = bpffs / "back"
    with (
        loader.Programs.load(pins, objects=loader.POLICY_OBJECTS) as before,
        loader.Programs.load(pins, objects=loader.POLICY_OBJECTS) as after,
    ):
        for name in ALL:
            attached, wanted = before.get(name), after.get(name)
            assert loader.program_info(attached.id) == (name[:15], wanted.tag, wanted.map_ids)
        assert len({before.get(name).tag for name in ALL}) == len(ALL)


def test_maps_nobody_loaded_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PolicyMaps.open(tmp_path)


def test_maps_give_back_what_they_were_given(policy_maps: PolicyMaps) -> None:
    four, six = ip_address("10.1.1.9"), ip_address("0a01:109::")
    policy_maps.identities.update(four, 2**32 - 1)
    policy_maps.identities.update_many({six: 256, four: 257})
    assert policy_maps.identities.read() == {four: 257, six: 256}
    assert policy_maps.identities.read_packed() == {four.packed: 257, six.packed: 256}
    assert (policy_maps.identities.find(four), policy_maps.identities.find(ip_address("10.1.1.8"))) == (
        257,
        None,
    )

    blocks = {
        ip_network("0.0.0.0/0"): CidrEntry(2**24 - 1, CidrFlag(0)),
        ip_network("fd00::/8"): CidrEntry(0, CidrFlag.CLUSTER),
    }
    for block, cidr in blocks.items():
        policy_maps.cidrs.update(block, cidr)
    assert policy_maps.cidrs.read() == blocks

    pod = EndpointEntry(
        7, 256, 1, 2, 2**32 - 1, 3, EndpointFlag.EGRESS_CIDRS | EndpointFlag.INGRESS_ENFORCED
    )
    policy_maps.endpoints.update(six, pod)
    assert policy_maps.endpoints.read() == {six: pod}

    policy_maps.services.update(four)
    assert policy_maps.services.read() == {four}

    for block in blocks:
        policy_maps.cidrs.delete(block)
        policy_maps.cidrs.delete(block)
    for each in (four, six, six):
        policy_maps.identities.delete(each)
        policy_maps.endpoints.delete(each)
        policy_maps.services.delete(each)
    assert not policy_maps.identities.read()
    assert not policy_maps.cidrs.read()
    assert not policy_maps.endpoints.read()
    assert not policy_maps.services.read()


def test_a_full_map_is_an_error_with_a_name(policy_maps: PolicyMaps) -> None:
    pod = EndpointEntry(1, 256, 1, 0, 1, 1, EndpointFlag(0))
    made = [ip_address(0x0A000000 + number) for number in range(MAX_ENDPOINTS)]
    for each in made:
        policy_maps.endpoints.update(each, pod)
    with pytest.raises(OSError, match="writing 10.99.0.1 to endpoints"):
        policy_maps.endpoints.update(ip_address("10.99.0.1"), pod)
    for each in made:
        policy_maps.endpoints.delete(each)


@pytest.mark.parametrize("batches", [True, False], ids=["batches", "one by one"])
def test_policy_entries_are_written_and_deleted_in_numbers(
    policy_maps: PolicyMaps, monkeypatch: pytest.MonkeyPatch, batches: bool
) -> None:
    if not batches:
        for name in ("bpf_map_lookup_batch", "bpf_map_update_batch", "bpf_map_delete_batch"):
            monkeypatch.setattr(library(), name, lambda *_: -524)
    entries = {
        PolicyKey(1, number, Direction(number % 2), UDP, number << 4 & 0xFFFF, 12): PolicyEntry(
            number, number % 3 == 0
        )
        for number in range(10_000)
    }
    entries[PolicyKey(2, 5, Direction.INGRESS)] = PolicyEntry(1, True)
    entries[PolicyKey(2, 5, Direction.INGRESS, TCP)] = PolicyEntry(2, False)
    policies = policy_maps.policies
    policies.update_many(entries)
    assert policies.read() == entries

    key = PolicyKey(3, 5, Direction.EGRESS, TCP, 80, 16)
    policies.update(key, PolicyEntry(4, True))
    assert policies.read() == entries | {key: PolicyEntry(4, True)}
    policies.delete(key)
    policies.delete(key)
    # The first of a batch is not there.
    policies.delete_many([key, *entries])
    assert not policies.read()


def test_nothing_has_happened_yet(policy_maps: PolicyMaps) -> None:
    assert not policy_maps.flows.read()
    assert policy_maps.flows.count() == 0
    assert policy_maps.lost_events() == 0
    assert policy_maps.metrics.read() == {
        (reason, direction): Counter(0, 0) for reason in Reason for direction in Direction
    }
    with policy_maps.open_events() as events:
        assert events.fileno() > 0
        assert not events.read(timeout_s=0.01)


def test_many_addresses_are_read_as_bytes(policy_maps: PolicyMaps) -> None:
    many = {ip_address(0x0A000000 + number): 256 + number for number in range(10_000)}
    policy_maps.identities.update_many(many)
    assert policy_maps.identities.read_packed() == {each.packed: number for each, number in many.items()}
