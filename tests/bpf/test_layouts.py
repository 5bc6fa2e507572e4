"""Python's idea of the shared types against the compiler's."""

from __future__ import annotations

import ctypes
import re
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest

from meshwire.bpf import btf, layouts, policylayouts

pytestmark = pytest.mark.bpf

BPF = Path(__file__).parents[2] / "bpf"

STRUCTS: dict[str, type[ctypes.Structure]] = {
    "mw_prefix": layouts.Prefix,
    "mw_address": layouts.Address,
    "mw_node": layouts.Node,
    "mw_settings": layouts.Settings,
    "mw_counter": layouts.Counter,
}
ENUMS: dict[str, tuple[type[IntEnum] | type[IntFlag], str]] = {
    "mw_family": (layouts.Family, "MW_"),
    "mw_address_flags": (layouts.AddressFlag, "MW_ADDRESS_"),
    "mw_settings_flags": (layouts.SettingsFlag, "MW_"),
    "mw_direction": (layouts.Direction, "MW_"),
    "mw_reason": (layouts.Reason, "MW_"),
}
POLICY_STRUCTS: dict[str, type[ctypes.Structure]] = {
    "mw_ip": policylayouts.Ip,
    "mw_identity": policylayouts.Identity,
    "mw_cidr": policylayouts.Cidr,
    "mw_endpoint": policylayouts.Endpoint,
    "mw_service": policylayouts.Service,
    "mw_policy_key": policylayouts.PolicyKey,
    "mw_policy_value": policylayouts.PolicyValue,
    "mw_flow_key": policylayouts.FlowKey,
    "mw_flow": policylayouts.Flow,
    "mw_policy_state": policylayouts.State,
    "mw_verdict_key": policylayouts.VerdictKey,
    "mw_verdict": policylayouts.Verdict,
    "mw_pod_link": policylayouts.PodLink,
    "mw_fragment_key": policylayouts.FragmentKey,
    "mw_fragment": policylayouts.Fragment,
    "mw_event": policylayouts.Event,
    "mw_event_budget": policylayouts.EventBudget,
}
POLICY_ENUMS: dict[str, tuple[type[IntEnum] | type[IntFlag], str]] = {
    "mw_cidr_flags": (policylayouts.CidrFlag, "MW_CIDR_"),
    "mw_endpoint_flags": (policylayouts.EndpointFlag, "MW_"),
    "mw_flow_flags": (policylayouts.FlowFlag, "MW_FLOW_"),
    "mw_hook": (policylayouts.Hook, "MW_"),
    "mw_policy_state_flags": (policylayouts.StateFlag, "MW_"),
    "mw_verdict_flows": (policylayouts.VerdictFlow, "MW_"),
}
ALL_STRUCTS, ALL_ENUMS = STRUCTS | POLICY_STRUCTS, ENUMS | POLICY_ENUMS
POLICY_CONSTANTS = (
    "MAX_IDENTITIES",
    "MAX_CIDRS",
    "MAX_ENDPOINTS",
    "MAX_SERVICES",
    "MAX_POLICY",
    "MAX_FLOWS",
    "MAX_FRAGMENTS",
    "MAX_VERDICTS",
    "MAX_POD_LINKS",
    "EVENTS_PER_SECOND",
    "POLICY_BITS_ALL",
    "POLICY_BITS_PROTOCOL",
)
COUNTS = {"MW_DIRECTIONS": len(layouts.Direction), "MW_REASONS": max(layouts.Reason) + 1}


@pytest.fixture(scope="module")
def described(objects: Path) -> dict[str, btf.Layout]:
    with (
        btf.read_elf(BPF / "ut" / "types.bpf.o") as types,
        btf.read_elf(BPF / "ut" / "policy_types.bpf.o") as policy_types,
    ):
        return types.named("mw_") | policy_types.named("mw_")


def test_every_shared_type_has_a_mirror(described: dict[str, btf.Layout]) -> None:
    headers = [(BPF / "include" / "meshwire" / name).read_text() for name in ("types.h", "policy_types.h")]
    declared = {
        " ".join(found)
        for header in headers
        for found in re.findall(r"^(struct|enum) (mw_\w+) \{", header, re.M)
    }
    assert declared == {f"struct {name}" for name in ALL_STRUCTS} | {f"enum {name}" for name in ALL_ENUMS}
    assert set(described) == declared


@pytest.mark.parametrize("name", ALL_STRUCTS)
def test_structs_agree_in_size_and_offsets(name: str, described: dict[str, btf.Layout]) -> None:
    mirror, layout = ALL_STRUCTS[name], described[f"struct {name}"]
    fields = [(field[0], getattr(mirror, field[0])) for field in mirror._fields_]
    assert ctypes.sizeof(mirror) == layout.size
    assert [(field, place.offset, place.size) for field, place in fields] == [
        (field, bits // 8, kind.size) for field, bits, kind in layout.members
    ]


@pytest.mark.parametrize("name", ALL_ENUMS)
def test_enums_agree_in_names_and_values(name: str, described: dict[str, btf.Layout]) -> None:
    mirror, prefix = ALL_ENUMS[name]
    in_c = {key: value for key, value in described[f"enum {name}"].values if key not in COUNTS}
    assert in_c == {f"{prefix}{member.name}": member.value for member in mirror}


def test_there_is_room_for_every_reason() -> None:
    header = (BPF / "include" / "meshwire" / "types.h").read_text()
    assert max(layouts.Reason) < int(re.findall(r"#define MW_MAX_REASONS (\d+)", header)[0])


def test_counts_and_sizes_agree(described: dict[str, btf.Layout]) -> None:
    values = dict(described["enum mw_reason"].values) | dict(described["enum mw_direction"].values)
    assert {name: values[name] for name in COUNTS} == COUNTS
    header = (BPF / "include" / "meshwire" / "types.h").read_text()
    assert f"#define MW_MAX_PREFIXES {layouts.MAX_PREFIXES}\n" in header
    assert f"#define MW_MAX_NODES {layouts.MAX_NODES}\n" in header


@pytest.mark.parametrize("name", POLICY_CONSTANTS)
def test_constants_of_the_policy_programs_agree(name: str) -> None:
    header = (BPF / "include" / "meshwire" / "policy_types.h").read_text()
    assert re.search(rf"^#define MW_{name} {getattr(policylayouts, name)}\b", header, re.M)


@pytest.mark.parametrize("path", ["from_pod", "to_pod", "policy_out"])
def test_the_policy_programs_were_compiled_with_the_same_types(
    path: str, objects: Path, described: dict[str, btf.Layout]
) -> None:
    with btf.read_elf(objects / "policy" / f"{path}.bpf.o") as types:
        found = types.named("mw_")
    shared = set(found) & set(described)
    # A record of the ring buffer is described nowhere: the kernel has no use for its type.
    expected = set(POLICY_STRUCTS) - {"mw_event"}
    if path == "policy_out":
        expected.remove("mw_pod_link")
    assert {f"struct {name}" for name in expected} <= shared
    assert {name: found[name] for name in shared} == {name: described[name] for name in shared}


@pytest.mark.parametrize("path", ["to_netdev", "from_netdev", "from_wireguard"])
def test_the_programs_were_compiled_with_the_same_types(
    path: str, objects: Path, described: dict[str, btf.Layout]
) -> None:
    with btf.read_elf(objects / f"{path}.bpf.o") as types:
        found = types.named("mw_")
    shared = set(found) & set(described)
    assert {"struct mw_prefix", "struct mw_address", "struct mw_settings", "struct mw_counter"} <= shared
    assert {name: found[name] for name in shared} == {name: described[name] for name in shared}
