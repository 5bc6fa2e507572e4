"""What the boot guard holds back, where it is kept, and what is said where it can't be."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwire.agent.bootguard import BootGuard, Kept, file_system
from meshwire.agent.settings import Settings
from meshwire.api import conditions
from meshwire.api.fields import Address, InvalidSpec, Network
from meshwire.api.meshconfig import BootGuard as Asked
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshnode import Phase, Status
from meshwire.encryption import bootguard
from meshwire.encryption.bootguard import Scope, render, scope_of
from meshwire.encryption.model import AddressEntry, AddressFlags, Desired, SettingsFlags
from meshwire.encryption.model import Settings as DatapathSettings
from meshwire.lab import init

# What the ruleset says, read by nothing that wrote it.


def drops(text: str, source: Address, destination: Address) -> bool:
    """Whether the forward chain drops such a packet."""
    sets = {
        name: [ip_network(each.strip()) for each in elements.split(",")]
        for name, elements in re.findall(r"set (\w+) \{.*?elements = \{(.*?)\}", text, re.DOTALL)
    }
    assert all(
        not one.overlaps(other)
        for blocks in sets.values()
        for i, one in enumerate(blocks)
        for other in blocks[i + 1 :]
    ), "an interval set takes no overlapping elements"
    rule = re.compile(
        r"^ +(ip6?) saddr @(\w+) (ip6?) daddr @(\w+) (?:counter )?(accept|drop)$", re.MULTILINE
    )
    assert "policy accept" in text
    for family, sources, same, destinations, verdict in rule.findall(text):
        assert family == same
        if (
            source.version == (4 if family == "ip" else 6)
            and any(source in network for network in sets[sources])
            and any(destination in network for network in sets[destinations])
        ):
            return bool(verdict == "drop")
    return False


def networks(version: int) -> st.SearchStrategy[Network]:
    """Of a small space, so that blocks nest, touch and hold the same addresses."""
    first, longest = (ip_network("10.244.0.0/24"), 32) if version == 4 else (ip_network("fd00::/120"), 128)
    return st.builds(
        lambda number, bits: (
            ip_network((int(first[number]), longest - bits), strict=False)
            if version == 4
            else ip_network((first[number].packed, longest - bits), strict=False)
        ),
        st.integers(0, 255),
        st.integers(0, 8),
    )


blocks = st.frozensets(st.one_of(networks(4), networks(6)), max_size=8)
addresses = st.tuples(st.integers(0, 300), st.integers(0, 300)).flatmap(
    lambda pair: st.sampled_from(
        [
            tuple(ip_address("10.244.0.0") + number for number in pair),
            tuple(ip_address("fd00::") + number for number in pair),
        ]
    )
)


@settings(max_examples=500, deadline=None)
@given(blocks, blocks, addresses)
def test_what_goes_from_pod_to_pod_is_dropped_unless_both_are_the_nodes_own(
    others: frozenset[Network], own: frozenset[Network], pair: tuple[Address, Address]
) -> None:
    def both_in(some: Iterable[Network]) -> bool:
        return all(any(each in network for network in some) for each in pair)

    scope = Scope(others | own, own)
    assert drops(render(scope), *pair) == (both_in(scope.pods) and not both_in(own))


def test_what_pods_exchange_with_anybody_else_passes() -> None:
    text = render(Scope(frozenset({ip_network("10.244.0.0/16")}), frozenset({ip_network("10.244.1.0/24")})))
    pod, other, node, world = map(ip_address, ("10.244.1.2", "10.244.2.2", "198.18.0.2", "192.0.2.1"))
    assert drops(text, pod, other) and drops(text, other, pod)
    for outside in (node, world):
        assert not drops(text, pod, outside) and not drops(text, outside, pod)
    assert not drops(text, pod, pod + 1)


def wanted(flags: SettingsFlags = SettingsFlags.STRICT, **addresses: str) -> Desired:
    """Addresses by what they are: `own`, `other`, `host`, `cluster`, each a list."""
    kinds = {
        "own": AddressEntry(1, AddressFlags.POD),
        "other": AddressEntry(2, AddressFlags.POD),
        "host": AddressEntry(2, AddressFlags.HOST),
        "cluster": AddressEntry(0, AddressFlags.CLUSTER),
    }
    return Desired(
        phase=Phase.ENFORCING,
        settings=DatapathSettings(flags, 1, 1420),
        addresses={
            ip_network(each): kinds[kind] for kind, some in addresses.items() for each in some.split()
        },
    )


def test_the_scope_has_pods_of_all_and_no_hosts() -> None:
    found = scope_of(
        wanted(own="10.244.1.0/24", other="10.244.2.0/24", cluster="fd00::/56", host="198.18.0.2/32")
    )
    assert found == Scope(
        frozenset(map(ip_network, ("10.244.1.0/24", "10.244.2.0/24", "fd00::/56"))),
        frozenset({ip_network("10.244.1.0/24")}),
    )


def test_without_pod_cidrs_everything_in_the_cluster_is_held() -> None:
    found = scope_of(wanted(cluster="10.244.0.0/16"))
    assert found and not found.own
    assert drops(render(found), ip_address("10.244.1.1"), ip_address("10.244.1.2"))


def test_a_block_that_somebody_else_has_a_part_of_is_not_the_nodes_own() -> None:
    found = scope_of(wanted(own="10.244.0.0/16 fd00::/64", other="10.244.2.0/24"))
    assert found and found.own == {ip_network("fd00::/64")}


@pytest.mark.parametrize(
    "nothing",
    [
        wanted(SettingsFlags.ENFORCING, own="10.244.1.0/24"),
        wanted(host="198.18.0.2/32"),
        Desired(phase=Phase.OFF),
    ],
    ids=["not strict", "no pods", "off"],
)
def test_there_is_no_scope_where_strict_holds_nothing_back(nothing: Desired) -> None:
    assert scope_of(nothing) is None


# On the disk.

SCOPE = Scope(frozenset({ip_network("10.244.0.0/16")}), frozenset({ip_network("10.244.1.0/24")}))


class Host:
    """A node's disk, as the agent is given it."""

    def __init__(self, directory: Path) -> None:
        self.units = directory / "units"
        self.settings = Settings(
            node="a",
            namespace="",
            state_directory=directory / "lib",
            pin_directory=directory / "pins",
            run_directory=directory,
            proc_sys=directory,
            metrics_address=("127.0.0.1", 0),
            systemd_directory=self.units,
            host_usr=directory / "usr",
        )
        (self.units / "getty.target.wants").mkdir(parents=True)
        (directory / "usr/sbin").mkdir(parents=True)
        (directory / "usr/sbin/nft").touch()
        self.rules = self.settings.boot_rules_file
        self.unit = self.units / "meshwire-boot.service"
        self.link = self.units / "multi-user.target.wants/meshwire-boot.service"

    def files(self) -> set[Path]:
        return {each for each in (self.rules, self.unit, self.link) if each.is_symlink() or each.exists()}

    def keep(self, scope: Scope | None = SCOPE, guard: BootGuard | None = None) -> Kept | None:
        guard = guard or BootGuard(self.settings)
        guard.keep(scope, again=True)
        return guard.kept


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_it_is_kept_and_taken_away(host: Host) -> None:
    kept = host.keep()
    assert kept and kept.in_place, kept
    assert host.rules.read_text() == render(SCOPE)
    assert host.rules.stat().st_mode & 0o777 == 0o600
    assert host.unit.stat().st_mode & 0o777 == 0o644
    assert os.readlink(host.link) == "/etc/systemd/system/meshwire-boot.service"
    assert str(host.rules) in host.unit.read_text()
    assert host.keep(None) is None
    assert host.files() == set()
    assert (host.units / "getty.target.wants").exists()


def test_what_is_there_already_is_not_written_again(host: Host) -> None:
    host.keep()
    before = [os.lstat(each).st_ino for each in (host.rules, host.unit, host.link)]
    host.keep()
    assert [os.lstat(each).st_ino for each in (host.rules, host.unit, host.link)] == before


@pytest.mark.parametrize("harm", ["rules", "unit", "link", "elsewhere", "text"])
def test_what_somebody_takes_away_or_changes_comes_back(host: Host, harm: str) -> None:
    guard = BootGuard(host.settings)
    host.keep(guard=guard)
    match harm:
        case "rules":
            host.rules.unlink()
        case "unit":
            host.unit.unlink()
        case "link":
            host.link.unlink()
        case "elsewhere":
            host.link.unlink()
            host.link.symlink_to("/dev/null")
        case "text":
            host.rules.write_text("flush ruleset\n")
    guard.keep(SCOPE, again=False)
    guard.keep(SCOPE, again=True)
    assert len(host.files()) == 3 and host.rules.read_text() == render(SCOPE)
    assert os.readlink(host.link) == "/etc/systemd/system/meshwire-boot.service"


def test_a_node_that_joins_is_held_back_from_at_once(host: Host) -> None:
    guard = BootGuard(host.settings)
    guard.keep(SCOPE, again=True)
    more = Scope(SCOPE.pods | {ip_network("10.9.0.0/24")}, SCOPE.own)
    guard.keep(more, again=False)
    assert host.rules.read_text() == render(more)


def test_without_the_mount_it_is_said_and_the_rules_are_there(host: Host) -> None:
    for each in host.units.iterdir():
        each.rmdir()
    kept = host.keep()
    assert kept and kept.reason == bootguard.NO_SYSTEMD
    host.units.rmdir()
    kept = host.keep()
    assert kept and kept.reason == bootguard.NOT_MOUNTED and "bootguard" in kept.message
    # For a unit that somebody else has made.
    assert host.files() == {host.rules}
    assert host.keep(None) is None and host.files() == set()


def test_without_nft_it_is_said(host: Host) -> None:
    (host.settings.host_usr / "sbin/nft").unlink()
    kept = host.keep()
    assert kept and (kept.reason, kept.in_place) == (bootguard.NO_NFT, False)


def forbid(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Root may write to what is read-only by its mode: the next best thing to a mount."""
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if str(path).startswith(str(directory)) and flags & os.O_CREAT:
            raise OSError(30, "Read-only file system")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)


def test_where_units_cannot_be_written_it_is_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, host.units)
    kept = host.keep()
    assert kept and kept.reason == bootguard.NOT_WRITABLE and "Read-only file system" in kept.message
    assert host.files() == {host.rules}


def test_a_unit_that_was_put_there_by_others_will_do(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.unit.write_text("[Service]\nExecStart=/sbin/nft -f /var/lib/meshwire/boot.nft\n")
    wants = host.units / "kubelet.service.wants"
    wants.mkdir()
    (wants / host.unit.name).symlink_to(f"/etc/systemd/system/{host.unit.name}")
    forbid(monkeypatch, host.units)
    kept = host.keep()
    assert kept and kept.in_place, kept


def test_where_rules_cannot_be_written_it_is_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, host.settings.state_directory)
    kept = host.keep()
    assert kept and kept.reason == bootguard.NOT_KEPT
    assert host.files() == set()


@pytest.mark.parametrize(
    ("boots", "loaded", "reason"),
    [
        (True, False, bootguard.NOT_LOADED),
        (True, True, bootguard.IN_PLACE),
        (False, False, bootguard.IN_PLACE),
    ],
)
def test_a_guard_that_was_not_loaded_is_told_of(host: Host, boots: bool, loaded: bool, reason: str) -> None:
    host.keep()
    if not boots:
        host.settings.pin_directory.mkdir()
    guard = BootGuard(host.settings)
    guard.find_missed(loaded=loaded)
    # The table goes in the course of things; that says nothing.
    guard.find_missed(loaded=False)
    kept = host.keep(guard=guard)
    assert kept and kept.reason == reason
    host.keep(None, guard)
    kept = host.keep(guard=guard)
    assert kept and kept.in_place


def test_its_condition_comes_and_goes(host: Host) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    guard = BootGuard(host.settings)
    assert guard.add_to(Status(), now) == Status()
    guard.keep(SCOPE, again=True)
    status = guard.add_to(Status(observed_generation=3), now)
    found = conditions.find(status.conditions, conditions.BOOT_GUARD)
    assert found and (found.status, found.reason, found.observed_generation) == (True, "InPlace", 3)
    assert guard.add_to(status, now) == status
    guard.keep(None, again=True)
    assert guard.add_to(status, now).conditions == ()


def test_a_file_system_is_the_innermost_mounts() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/")) != ""


# Who asks for it.


def test_it_is_off_unless_asked_for() -> None:
    def asked(**encryption: str) -> Asked:
        return MeshConfig.from_object({"spec": {"encryption": encryption}}).encryption.boot_guard

    assert (asked(), asked(bootGuard="Systemd")) == (Asked.OFF, Asked.SYSTEMD)
    with pytest.raises(InvalidSpec, match="spec.encryption.bootGuard"):
        asked(bootGuard="Initd")


# What systemd makes of the unit.


def test_the_unit_for_those_who_put_it_there_themselves_is_the_agents() -> None:
    shipped = Path(__file__).parents[2] / "config/bootguard" / bootguard.UNIT
    assert shipped.read_text() == bootguard.unit("/var/lib/meshwire/boot.nft")


def test_the_unit_comes_after_who_flushes_and_before_who_starts_pods() -> None:
    unit = init.parse_unit(bootguard.unit("/var/lib/meshwire/boot.nft"))
    (after,), (before,) = unit["Unit", "After"], unit["Unit", "Before"]
    assert {"nftables.service", "firewalld.service", "ufw.service"} <= set(after.split())
    assert {"kubelet.service", "k3s.service", "containerd.service"} <= set(before.split())
    assert unit["Unit", "ConditionPathExists"] == ["/var/lib/meshwire/boot.nft"]
    assert unit["Install", "WantedBy"] == ["multi-user.target"]


def test_the_labs_init_starts_what_is_enabled_and_comes_before_kubelet(host: Host, tmp_path: Path) -> None:
    host.keep()
    done, env = tmp_path / "done", {"PATH": os.environ["PATH"]}
    host.unit.write_text(
        f"[Unit]\nConditionPathExists={host.rules}\nBefore=kubelet.service\n"
        f"[Service]\nExecStart=/usr/bin/env touch {done}\n"
    )
    assert init.boot(host.units, [], env) == ("meshwire-boot.service",) and done.exists()
    done.unlink()
    host.rules.unlink()
    assert init.boot(host.units, [], env) == () and not done.exists()
    host.keep()
    assert init.find_units(host.units)
    host.link.unlink()
    assert init.find_units(host.units) == {}
