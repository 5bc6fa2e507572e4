"""Another version's programs take over: what maps of another layout hold is carried over, nothing is lost
and nothing in clear, and what goes wrong on the way leaves the version before in force."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from tests.bpf import test_redirect
from tests.bpf.spaces import inside
from tests.bpf.test_redirect import FAMILIES, Node, families, joined, pod_address

from meshwire.bpf import loader, migrate, policylayouts, tc
from meshwire.bpf import packets as p
from meshwire.bpf._elements import items, open_pinned, update
from meshwire.bpf.layouts import AddressFlag, Direction, Reason, SettingsFlag
from meshwire.bpf.loader import IncompatibleMap, Programs
from meshwire.bpf.maps import AddressEntry, Counter, Maps, SettingsEntry
from meshwire.bpf.testrun import run

pytestmark = [pytest.mark.bpf, pytest.mark.netns]

ROOT = Path(__file__).parents[2]
STRICT = SettingsFlag.STRICT | SettingsFlag.ENFORCING
Changes = dict[str, str]

HARMLESS: Changes = {"#define MW_SECOND 1000000000ULL": "#define MW_SECOND 1000000001ULL"}
SMALLER: Changes = {"#define MW_MAX_PREFIXES 131072": "#define MW_MAX_PREFIXES 4096"}
MORE_REASONS: Changes = {"#define MW_MAX_REASONS 256": "#define MW_MAX_REASONS 300"}
OTHER_LAYOUT: Changes = {
    "struct mw_node {\n\t__u32 wg_ifindex;": "struct mw_node {\n\t__u64 since;\n\t__u32 wg_ifindex;",
    "\t__u32 flags; /* enum mw_settings_flags */\n\t__u16 local_node;": (
        "\t__u32 more;\n\t__u16 local_node;\n\t__u16 pad;\n\t__u32 flags;"
    ),
    "\t__u32 identity; /* 0 until": "\t__u32 more;\n\t__u32 identity; /* 0 until",
    **SMALLER,
    **MORE_REASONS,
}

pair = test_redirect.pair


@pytest.fixture
def rebuilt(objects: Path, tmp_path: Path) -> Callable[[Changes], Path]:
    """Compiles the programs with changes of types.h; answers with the folder of the objects."""

    def build(changes: Changes) -> Path:
        folder = tmp_path / f"bpf-{len(list(tmp_path.iterdir()))}"
        for part in ("include", "src"):
            shutil.copytree(ROOT / "bpf" / part, folder / part)
        shutil.copy(ROOT / "bpf" / "Makefile", folder)
        headers = [folder / "include" / "meshwire" / name for name in ("types.h", "policy_types.h")]
        for old, new in changes.items():
            (header,) = (each for each in headers if old in each.read_text())
            header.write_text(header.read_text().replace(old, new))
        subprocess.run(["make", "-s", "-C", folder, "programs"], check=True)
        return folder / loader.OBJECTS.relative_to(ROOT / "bpf")

    return build


@pytest.fixture
def own_pins(bpffs: Path) -> Path:
    """A pin directory nobody has used."""
    return bpffs / f"own-{time.monotonic_ns()}"


ENTRIES = {
    ip_network("10.1.0.0/16"): AddressEntry(0, 0, AddressFlag.CLUSTER),
    ip_network("10.1.2.0/24"): AddressEntry(7, 2, AddressFlag.POD),
    ip_network("fd00:1:0:2::/64"): AddressEntry(8, 2, AddressFlag.POD),
    ip_network("192.168.0.2/32"): AddressEntry(0, 2, AddressFlag.HOST),
}


def fill(pins: Path) -> None:
    with Maps.open(pins) as maps:
        for network, entry in ENTRIES.items():
            maps.ipcache.update(network, entry)
        maps.nodes.update(2, 17)
        maps.settings.write(SettingsEntry(STRICT, 1, 1420))


def check_content(pins: Path) -> None:
    with Maps.open(pins) as maps:
        assert maps.ipcache.read() == ENTRIES
        assert maps.nodes.read() == {2: 17}
        assert maps.settings.read() == SettingsEntry(STRICT, 1, 1420)


@pytest.mark.parametrize(
    "changes", [SMALLER, MORE_REASONS, OTHER_LAYOUT], ids=["size", "counters", "layout"]
)
def test_what_the_maps_hold_goes_to_the_other_version_and_back(
    own_pins: Path, objects: Path, rebuilt: Callable[[Changes], Path], changes: Changes
) -> None:
    with Programs.load(own_pins, objects=objects) as before:
        fill(own_pins)
        names = {pin.name for pin in own_pins.iterdir()}
        with pytest.raises(IncompatibleMap):
            Programs.load(own_pins, objects=rebuilt(changes))
        with migrate.load(own_pins, objects=rebuilt(changes)) as after:
            assert {pin.name for pin in own_pins.iterdir()} == names
            assert after.get(loader.TO_NETDEV).map_ids != before.get(loader.TO_NETDEV).map_ids
            with migrate.load(own_pins, objects=objects):
                check_content(own_pins)
                assert not own_pins.with_name(f"{own_pins.name}_next").exists()


def test_counters_are_carried_over_for_every_cpu(
    own_pins: Path, objects: Path, rebuilt: Callable[[Changes], Path]
) -> None:
    with Programs.load(own_pins, objects=objects) as before:
        fill(own_pins)
        data = p.frame(p.udp(ip_address("10.1.9.9"), ip_address("10.1.8.8"), b"x"))
        run(before.get(loader.TO_NETDEV).fd, data, repeat=5)
        with migrate.load(own_pins, objects=rebuilt(MORE_REASONS)) as after, Maps.open(own_pins) as maps:
            key = Reason.DROP_UNKNOWN_NODE, Direction.EGRESS
            assert maps.metrics.read()[key] == Counter(5, 5 * len(data))
            run(after.get(loader.TO_NETDEV).fd, data)
            assert maps.metrics.read()[key].packets == 6


def test_what_does_not_fit_is_refused_and_nothing_changes(
    own_pins: Path, objects: Path, rebuilt: Callable[[Changes], Path]
) -> None:
    tiny = {"#define MW_MAX_PREFIXES 131072": "#define MW_MAX_PREFIXES 3"}
    with Programs.load(own_pins, objects=objects) as before:
        fill(own_pins)
        with pytest.raises(IncompatibleMap, match="holds more than 3"):
            migrate.load(own_pins, objects=rebuilt(tiny))
        assert not own_pins.with_name(f"{own_pins.name}_next").exists()
        check_content(own_pins)
        with Programs.load(own_pins, objects=objects) as again:
            assert again.get(loader.TO_NETDEV).map_ids == before.get(loader.TO_NETDEV).map_ids


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_stopped_on_the_way_the_next_one_begins_where_it_was(
    own_pins: Path,
    objects: Path,
    rebuilt: Callable[[Changes], Path],
    monkeypatch: pytest.MonkeyPatch,
    renames: int,
) -> None:
    other = rebuilt(OTHER_LAYOUT)
    Programs.load(own_pins, objects=objects).close()
    fill(own_pins)
    done: list[Path] = []
    rename = Path.rename

    def stops(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stops)
        with pytest.raises(KeyboardInterrupt):
            migrate.load(own_pins, objects=other)
    migrate.load(own_pins, objects=other).close()
    # Python reads the layout that it was built with.
    migrate.load(own_pins, objects=objects).close()
    check_content(own_pins)


def test_what_policy_has_let_through_is_let_through_after(
    own_pins: Path, objects: Path, rebuilt: Callable[[Changes], Path]
) -> None:
    """Connections that are open don't end by an upgrade: the other version knows them."""
    wanted = {}
    with Programs.load(own_pins, objects=loader.POLICY_OBJECTS), ExitStack() as resources:
        flows = open_pinned(own_pins / "flows", resources)
        for number in range(100):
            key = policylayouts.FlowKey(
                src=(ctypes.c_uint8 * 16)(10, 1, 1, 9),
                dst=(ctypes.c_uint8 * 16)(10, 1, 2, number),
                sport=number,
                family=4,
                protocol=17,
                direction=number % 2,
            )
            value = policylayouts.Flow(
                expires=2**60 + number, revision=7, peer=number, reason=Reason.POLICY_ALLOWED
            )
            update(flows, key, value, "a flow")
            wanted[bytes(key)] = bytes(value)
        other = rebuilt(
            {
                "#define MW_MAX_FLOWS 262144": "#define MW_MAX_FLOWS 1024",
                "struct mw_flow {\n\t__u64 expires;": "struct mw_flow {\n\t__u64 since;\n\t__u64 expires;",
            }
        )
        with migrate.load(own_pins, objects=other / "policy"):
            with migrate.load(own_pins, objects=loader.POLICY_OBJECTS):
                carried = open_pinned(own_pins / "flows", resources)
                found = items(carried, policylayouts.FlowKey, policylayouts.Flow)
                assert {bytes(key): bytes(value) for key, value in found} == wanted


@families
def test_programs_are_replaced_under_traffic_without_a_packet_lost_or_in_clear(
    pair: tuple[Node, Node], rebuilt: Callable[[Changes], Path], bpffs: Path, objects: Path, family: int
) -> None:
    one, two = pair
    versions = [rebuilt(HARMLESS), rebuilt(OTHER_LAYOUT), objects]
    pins = {node.number: pins_of(node, bpffs) for node in pair}
    for node, other in ((one, two), (two, one)):
        node.attach("up0", Direction.INGRESS, loader.FROM_NETDEV)
        node.set(STRICT, tunnel_to=other.number)
    kept: list[Programs] = []
    with joined(one, two), Flow(one, two, family) as there, Flow(two, one, family) as back:
        for objects_of in versions:
            for node in pair:
                time.sleep(0.2)
                programs = migrate.load(pins[node.number], objects=objects_of)
                kept.append(programs)
                for device, direction, name in (
                    ("up0", Direction.EGRESS, loader.TO_NETDEV),
                    ("up0", Direction.INGRESS, loader.FROM_NETDEV),
                    ("mwt0", Direction.INGRESS, loader.FROM_WIREGUARD),
                ):
                    index = node.ipr.link_lookup(ifname=device)[0]
                    tc.attach(node.ipr, index, direction, programs.get(name))
        time.sleep(0.3)
    for flow in (there, back):
        print(f"{flow.sent} packets, {flow.sent - len(flow.received)} lost")
        assert flow.sent > 1000 and flow.received == set(range(flow.sent))
    for node in pair:
        assert node.pod_frames_on_the_wire() == []
        with Maps.open(pins[node.number]) as maps:
            counters = maps.metrics.read()
            # Not all of them: what the programs before count after the copy is not carried over.
            assert counters[Reason.ENCRYPTED, Direction.EGRESS].packets > 1000
            dropped = {
                key: each.packets for key, each in counters.items() if key[0].dropped and each.packets
            }
            assert not dropped
    for each in kept:
        each.close()


def pins_of(node: Node, bpffs: Path) -> Path:
    """Where its programs' maps are pinned: the latest, one process gives its namespaces the same names."""
    return max(
        bpffs.glob(f"{os.path.basename(node.host)}-*"), key=lambda path: int(path.name.split("-")[-1])
    )


class Flow:
    """Numbered datagrams from one node's pod to the other's."""

    def __init__(self, source: Node, target: Node, family: int) -> None:
        address = pod_address(target.number, family)
        with inside(target.pod):
            self._receiver = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
        self._receiver.setsockopt(socket.SOL_SOCKET, test_redirect.SO_RCVBUFFORCE, 64 << 20)
        self._receiver.bind((address, 5353))
        self._receiver.settimeout(1.0)
        self._sender = test_redirect.udp_socket(source.pod, family, address)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._send)
        self.sent = 0
        self.received: set[int] = set()

    def _send(self) -> None:
        while not self._ends.is_set():
            self._sender.send(struct.pack("!I", self.sent) * 8)
            self.sent += 1
            time.sleep(0.0005)

    def __enter__(self) -> Flow:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        with self._receiver, self._sender:
            while True:
                try:
                    self.received.add(struct.unpack("!I", self._receiver.recv(100)[:4])[0])
                except TimeoutError:
                    return
