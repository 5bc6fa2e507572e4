"""The agent against a real kernel: two nodes with real userspace WireGuard devices, filters, maps and
packets."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from meshwire.api import preshared

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(shutil.which("wireguard-go") is None, reason="needs wireguard-go"),
]

DEVICE = "meshwire_wg1"
MATCH_NOTHING = "protocol all bpf bytecode 1,6_0_0_0, flowid 1:1"
"""A filter of somebody else's, in classic BPF; `_` stands for a space."""
GUARDS = ["eth0 egress", "eth0 ingress", f"{DEVICE} ingress"]


@dataclass
class Node:
    """One child process (see node_process.py), its supervisor, and commands in its namespaces."""

    name: str
    number: int
    process: subprocess.Popen[str]
    directory: Path
    key: str = ""
    pid: int = 0
    supervisor: subprocess.Popen[bytes] | None = None

    def ask(self, verb: str, what: Any = None) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({verb: what}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def say(self, phase: str, *others: tuple[str, int, int, bool], **more: Any) -> None:
        self.ask("say", {"phase": phase, "others": others, **more})

    def enter(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", f"--mount=/proc/{self.pid}/ns/mnt", "--"]

    def run(self, command: str, *, check: bool = True) -> str:
        words = [word.replace("6_0_0_0", "6 0 0 0") for word in command.split()]
        done = subprocess.run([*self.enter(), *words], capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def supervise(self) -> None:
        environment = {**os.environ, "MESHWIRE_RUN_DIR": str(self.directory)}
        with (self.directory / "supervisor.log").open("ab") as log:
            command = [*self.enter(), sys.executable, "-m", "meshwire.agent.userspace"]
            self.supervisor = subprocess.Popen(command, env=environment, stderr=log)
        until(lambda: (self.directory / "userspace.sock").exists())

    def condition(self) -> dict[str, Any]:
        status = self.ask("tell")["status"]
        return dict(status["conditions"][0]) if status else {"reason": None}

    def is_ready(self, phase: str = "Enforcing") -> bool:
        reason = "Off" if phase == "Off" else "Ready"
        condition = self.condition()
        return (condition["reason"], condition.get("status")) == (reason, "True")

    def wake(self) -> None:
        """A harmless change that the kernel tells of."""
        mtu = int(self.run("cat /sys/class/net/lo/mtu"))
        self.run(f"ip link set lo mtu {mtu - 1}")


def all_ready(nodes: Iterable[Node], phase: str) -> Callable[[], bool]:
    return lambda: all(node.is_ready(phase) for node in nodes)


def until(done: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def wait_for_actions(node: Node) -> list[str]:
    """What the agent does next."""
    applied: list[str] = []

    def ask() -> bool:
        applied.extend(node.ask("tell")["applied"])
        return bool(applied)

    until(ask)
    return applied


def start(name: str, number: int, directory: Path) -> Node:
    directory.mkdir()
    script = Path(__file__).with_name("node_process.py")
    command = ["unshare", "--net", "--mount", "--propagation", "private", sys.executable, str(script)]
    process = subprocess.Popen(
        [*command, name, str(number), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    node = Node(name, number, process, directory)
    hello = json.loads(process.stdout.readline())
    node.pid, node.key = hello["pid"], hello["key"]
    node.supervise()
    return node


def end(node: Node) -> None:
    node.run(f"ip link del {DEVICE}", check=False)
    for process in (node.supervisor, node.process):
        if process:
            process.kill()
            process.wait()
    for file in node.directory.glob("*.pid"):
        with open(file) as stream:
            pid = int(stream.read().split()[0])
        if Path(f"/proc/{pid}/comm").exists() and "wireguard" in Path(f"/proc/{pid}/comm").read_text():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Node]:
    """Node `a`, number 1, whose uplink leads nowhere."""
    with ExitStack() as stack:
        node = start("a", 1, tmp_path / "a")
        stack.callback(end, node)
        node.run("ip link add eth0 type veth peer name far0")
        node.run("ip addr add 198.18.0.1/24 dev eth0")
        for name in ("eth0", "far0"):
            node.run(f"ip link set {name} up")
        yield node


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Nodes `a` and `b`, numbers 1 and 2, one wire between them; pod addresses 10.244.N.1 are on a device of
    their own and routed by the wire."""
    with ExitStack() as stack:
        nodes = []
        for number, name in enumerate("ab", start=1):
            nodes.append(start(name, number, tmp_path / name))
            stack.callback(end, nodes[-1])
        a, b = nodes
        a.run(f"ip link add eth0 type veth peer name eth0 netns /proc/{b.pid}/ns/net")
        for node, other in ((a, b), (b, a)):
            for command in (
                f"ip addr add 198.18.0.{node.number}/24 dev eth0",
                "ip link set eth0 up",
                "ip link add pod0 type veth peer name pod1",
                f"ip addr add 10.244.{node.number}.1/24 dev pod0",
                "ip link set pod0 up",
                "ip link set pod1 up",
                f"ip route add 10.244.{other.number}.0/24 via 198.18.0.{other.number}",
            ):
                node.run(command)
        until(lambda: all("tentative" not in node.run("ip -o addr") for node in nodes))
        yield a, b


SEND = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind((sys.argv[1], 0))
    sock.settimeout(1)
    sock.sendto(b"ping", (sys.argv[2], 4444))
    try: print(sock.recv(100).decode())
    except TimeoutError: print("nothing")
"""
ECHO = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind((sys.argv[1], 4444))
    print("ready", flush=True)
    while True:
        data, sender = sock.recvfrom(100)
        sock.sendto(data, sender)
"""


@pytest.fixture
def echo(pair: tuple[Node, Node]) -> Iterator[Callable[[], str]]:
    """Sends from a's pod to b's and says what came back."""
    a, b = pair
    python = [sys.executable, "-c"]
    server = subprocess.Popen([*b.enter(), *python, ECHO, "10.244.2.1"], stdout=subprocess.PIPE, text=True)
    assert server.stdout and server.stdout.readline() == "ready\n"

    def send() -> str:
        done = subprocess.run(
            [*a.enter(), *python, SEND, "10.244.1.1", "10.244.2.1"],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    yield send
    server.kill()
    server.wait()


A, B = ("a", 1, 1, True), ("b", 2, 2, True)


def enforce(pair: tuple[Node, Node]) -> None:
    a, b = pair
    for phase in ("Enabling", "Enforcing"):
        a.say(phase, B)
        b.say(phase, A)
        until(all_ready(pair, phase))
    until(lambda: all(node.ask("tell")["status"]["strict"] for node in pair))


def test_two_nodes_meet_and_talk_by_tunnel_alone(pair: tuple[Node, Node], echo: Callable[[], str]) -> None:
    a, b = pair
    assert echo() == "ping"
    enforce(pair)
    before = a.ask("see")["counters"].get("ENCRYPTED EGRESS", 0)
    assert echo() == "ping"
    a.wake()
    until(lambda: a.ask("see")["counters"].get("ENCRYPTED EGRESS", 0) > before)
    assert not [name for name in a.ask("see")["counters"] if "LEAKED" in name]
    # Without its tunnel a node sends nothing rather than in clear.
    b.say("Enforcing", A)
    a.say("Enforcing", (*B[:3], False))
    until(lambda: not a.ask("see")["devices"][DEVICE])
    assert echo() == "nothing"
    a.say("Enforcing", B)
    until(lambda: echo() == "ping")


def test_off_leaves_the_node_as_it_was(pair: tuple[Node, Node], echo: Callable[[], str]) -> None:
    a, b = pair
    shown = ["ip -o link", "ip -o addr", "ip route show table all", "ip -6 route show table all", "ip rule"]
    before = [a.run(command) for command in shown]
    enforce(pair)
    process = int((a.directory / f"{DEVICE}.pid").read_text().split()[0])
    for phase in ("Disabling", "Draining", "Off"):
        for node, other in ((a, B), (b, A)):
            node.say(phase, other)
        until(all_ready(pair, phase))
        assert echo() == "ping"
    until(lambda: not Path(f"/proc/{process}").exists())
    assert [a.run(command) for command in shown] == before
    seen = a.ask("see")
    assert (seen["filters"], seen["devices"], seen["pinned"]) == ([], {}, False)


def test_a_second_look_writes_nothing_and_a_restart_only_loads(pair: tuple[Node, Node]) -> None:
    enforce(pair)
    a, _ = pair
    a.ask("tell")
    looks = a.ask("tell")["looks"]
    a.wake()
    until(lambda: a.ask("tell")["looks"] > looks)
    assert a.ask("tell")["applied"] == []
    a.ask("stop")
    a.ask("start", True)
    until(lambda: a.ask("tell")["looks"] >= 2)
    until(lambda: a.is_ready())
    a.ask("stop")
    a.ask("start", True)
    assert wait_for_actions(a) == ["LoadDatapath: load programs and maps"]


def test_what_others_have_on_the_node_stays(alone: Node) -> None:
    alone.run("wireguard-go foreign0")
    try:
        alone.run("ip link set foreign0 up")
        alone.run("ip route add 192.0.2.0/24 dev foreign0")
        alone.run("tc qdisc add dev eth0 clsact")
        for direction in ("egress", "ingress"):
            for priority in (1, 7):
                alone.run(f"tc filter add dev eth0 {direction} pref {priority} {MATCH_NOTHING}")

        def theirs() -> list[str]:
            lines = [
                alone.run(f"tc filter show dev eth0 {way}").splitlines() for way in ("egress", "ingress")
            ]
            kept = [line for way in lines for line in way if "mw_" not in line]
            return [*kept, alone.run("ip route show dev foreign0"), alone.run("wg show foreign0")]

        before = theirs()
        for phase in ("Enforcing", "Off"):
            alone.say(phase, B)
            until(all_ready([alone], phase))
            assert theirs() == before
    finally:
        alone.run("ip link del foreign0", check=False)


@pytest.fixture
def enforcing(alone: Node) -> Node:
    alone.say("Enforcing", B)
    until(lambda: alone.is_ready())
    assert alone.ask("see")["filters"] == GUARDS
    return alone


@pytest.mark.parametrize(
    ("harm", "restored"),
    [
        (f"ip link del {DEVICE}", "CreateDevice"),
        (f"ip link set {DEVICE} down", "SetLink"),
        (f"ip link set {DEVICE} mtu 1300", "SetLink"),
        (f"ip addr flush dev {DEVICE}", "SetLink"),
        ("tc qdisc del dev eth0 clsact", "Attach"),
        ("tc filter del dev eth0 egress", "Attach"),
        (f"tc qdisc del dev {DEVICE} clsact", "Attach"),
    ],
)
def test_what_is_taken_away_is_put_back(enforcing: Node, harm: str, restored: str) -> None:
    """By the kernel's own message: the next look by the clock is half a minute away."""
    enforcing.ask("tell")
    enforcing.run(harm)
    applied = wait_for_actions(enforcing)
    until(lambda: enforcing.ask("see")["filters"] == GUARDS)
    assert restored in {action.partition(":")[0] for action in applied}
    until(lambda: len(enforcing.ask("see")["devices"][DEVICE]) == 1)


def test_a_program_that_somebody_put_before_ours_is_overtaken(enforcing: Node) -> None:
    enforcing.run(f"tc filter add dev eth0 egress pref 1 {MATCH_NOTHING}")

    def order() -> list[bool]:
        lines = enforcing.run("tc filter show dev eth0 egress").splitlines()
        return ["mw_to_netdev" in line for line in lines if "handle" in line]

    until(lambda: order() == [True, False])


def test_a_device_that_is_made_anew_gets_its_programs(enforcing: Node) -> None:
    """As when a CNI makes its overlay again."""
    enforcing.run("ip link add vxlan0 type vxlan id 7 dev eth0 dstport 4789")
    for _ in range(2):
        enforcing.run("ip link set vxlan0 up")
        enforcing.run("ip route add 10.244.2.0/24 dev vxlan0")
        until(lambda: set(enforcing.ask("see")["filters"]) >= {"vxlan0 egress", "vxlan0 ingress"})
        enforcing.run("ip link del vxlan0")
        enforcing.run("ip link add vxlan0 type vxlan id 7 dev eth0 dstport 4789")


def test_peers_change_one_by_one(enforcing: Node) -> None:
    key_of = {peer["allowed"][0]: key for key, peer in enforcing.ask("see")["devices"][DEVICE].items()}
    enforcing.run(f"wg set {DEVICE} peer {key_of['10.244.2.0/24']} endpoint 198.18.0.99:4242")
    enforcing.ask("tell")
    enforcing.say("Enforcing", B, ("c", 3, 3, True))
    until(lambda: len(enforcing.ask("see")["devices"][DEVICE]) == 2)
    # b's pod CIDRs go to c, and c's to nobody.
    enforcing.say("Enforcing", ("b", 2, 7, True), ("c", 3, 2, True))

    def allowed() -> list[list[str]]:
        peers = enforcing.ask("see")["devices"][DEVICE].values()
        return sorted([each for each in peer["allowed"] if "10.244" in each] for peer in peers)

    until(lambda: allowed() == [["10.244.2.0/24"], ["10.244.7.0/24"]])
    enforcing.say("Enforcing", ("c", 3, 2, True))
    until(lambda: allowed() == [["10.244.2.0/24"]])
    assert "fresh" not in " ".join(enforcing.ask("tell")["applied"])


def test_a_roamed_endpoint_stays_after_a_handshake(pair: tuple[Node, Node]) -> None:
    enforce(pair)
    a, b = pair
    a.run(f"wg set {DEVICE} peer {b.key} endpoint 198.18.0.2:4242")
    a.say("Enforcing", B, ("c", 3, 3, True))
    until(lambda: len(a.ask("see")["devices"][DEVICE]) == 2)
    assert a.ask("see")["devices"][DEVICE][b.key]["endpoint"] != "198.18.0.2:51872"


def test_a_node_that_loses_its_address_sends_from_another(pair: tuple[Node, Node]) -> None:
    """The other has heard nothing of it and finds out by what arrives."""
    enforce(pair)
    _, b = pair
    ping = "ping -c 1 -W 1 -I 10.244.2.1 10.244.1.1"
    assert "1 received" in b.run(ping)
    b.run("sysctl -q net.ipv4.conf.eth0.promote_secondaries=1")
    b.run("ip addr add 198.18.0.22/24 dev eth0")
    b.run("ip addr del 198.18.0.2/24 dev eth0")
    until(lambda: "1 received" in b.run(ping, check=False))


def test_without_keepalives_nodes_still_meet(pair: tuple[Node, Node]) -> None:
    a, b = pair
    a.say("Enabling", B, keepalive=0)
    b.say("Enabling", A, keepalive=0)
    until(lambda: all(node.is_ready() for node in pair))
    until(lambda: [p["keepalive"] for p in a.ask("see")["devices"][DEVICE].values()] == [0])


def test_a_config_that_names_a_missing_device_changes_nothing(enforcing: Node) -> None:
    enforcing.ask("tell")
    enforcing.say("Enforcing", B, uplinks=["eth7"])
    until(lambda: enforcing.condition()["reason"] == "DeviceNotFound")
    assert enforcing.ask("see")["filters"] == GUARDS
    enforcing.run("ip link add eth7 type veth peer name far7")
    until(lambda: "eth7 egress" in enforcing.ask("see")["filters"])
    until(lambda: enforcing.is_ready())


def test_a_dead_supervisor_takes_no_device_along(enforcing: Node) -> None:
    process = enforcing.supervisor
    assert process
    index = enforcing.ask("see")["links"][DEVICE]
    process.kill()
    process.wait()
    time.sleep(0.2)
    assert enforcing.ask("see")["links"][DEVICE] == index
    enforcing.run(f"ip link del {DEVICE}")
    until(lambda: enforcing.condition()["reason"] == "WireGuardUnavailable")
    assert enforcing.ask("see")["filters"] == GUARDS[:2], "it still guards"
    enforcing.supervise()
    until(lambda: enforcing.is_ready())


def test_a_device_process_comes_first_and_works_in_batches(enforcing: Node) -> None:
    pid = int((enforcing.directory / f"{DEVICE}.pid").read_text().split()[0])
    assert os.sched_getscheduler(pid) == os.SCHED_BATCH
    assert os.getpriority(os.PRIO_PROCESS, pid) == -10


def test_a_killed_device_process_is_replaced(enforcing: Node) -> None:
    file = enforcing.directory / f"{DEVICE}.pid"
    before = file.read_text()
    os.kill(int(before.split()[0]), signal.SIGKILL)
    until(lambda: file.exists() and file.read_text() != before)
    until(lambda: enforcing.is_ready() and enforcing.ask("see")["filters"] == GUARDS)


def test_the_supervisor_makes_nothing_but_our_devices(alone: Node) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(alone.directory / "userspace.sock"))
        connection.sendall(b"ensure eth9\n")
        assert connection.recv(200) == b"error eth9 is not a device of Meshwire\n"
    assert oct((alone.directory / "userspace.sock").stat().st_mode)[-3:] == "600"
    assert "eth9" not in alone.run("ip link")


SET_PRESHARED_KEY = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(f"/var/run/wireguard/{sys.argv[1]}.sock")
connection.sendall(f"set=1\\npublic_key={sys.argv[2]}\\npreshared_key={sys.argv[3]}\\n\\n".encode())
assert connection.recv(99) == b"errno=0\\n\\n"
"""


@pytest.mark.parametrize("other", ["00" * 32, "ab" * 32])
def test_both_ends_have_the_preshared_key_of_the_pair_and_get_it_back(
    pair: tuple[Node, Node], other: str
) -> None:
    enforce(pair)
    one, two = pair
    expected = preshared.pair_key(sha256(b"epoch").digest(), 1, one.key, two.key).hex()

    def present(node: Node) -> list[str]:
        return [peer["preshared"] for peer in node.ask("see")["devices"][DEVICE].values()]

    assert present(one) == present(two) == [expected]
    one.ask("stop")
    public = base64.b64decode(two.key).hex()
    done = subprocess.run([*one.enter(), sys.executable, "-c", SET_PRESHARED_KEY, DEVICE, public, other])
    assert done.returncode == 0
    one.ask("start", True)
    until(lambda: present(one) == [expected])
    [change] = [each for each in one.ask("tell")["applied"] if each.startswith("ConfigureDevice")]
    assert "set the preshared key" in change and "+" not in change and expected not in change


def test_no_key_is_in_what_the_node_wrote(pair: tuple[Node, Node]) -> None:
    enforce(pair)
    [peer] = pair[0].ask("see")["devices"][DEVICE].values()
    for raw in (sha256(b"a").digest(), sha256(b"epoch").digest(), bytes.fromhex(peer["preshared"])):
        for file in pair[0].directory.iterdir():
            if file.is_file() and file.name != "keys.json":
                content = file.read_bytes()
                assert raw.hex().encode() not in content and raw not in content, file.name
    assert oct((pair[0].directory / "keys.json").stat().st_mode)[-3:] == "600"


def test_a_rebooted_node_guards_before_it_hears_from_the_api_server(enforcing: Node) -> None:
    enforcing.ask("stop")
    for command in (f"ip link del {DEVICE}", "tc qdisc del dev eth0 clsact", "rm -r /sys/fs/bpf/meshwire"):
        enforcing.run(command)
    enforcing.ask("tell")
    # What init has loaded.
    enforcing.run("nft add table inet meshwire_boot")
    enforcing.ask("start", False)
    until(lambda: enforcing.ask("see")["filters"] == GUARDS[:2])
    assert enforcing.ask("see")["devices"] == {}
    until(lambda: not enforcing.run("nft list tables"))
    told = enforcing.ask("tell")["applied"]
    applied = [each.split(":")[0] for each in told]
    written = [each for each in told if "set flags" in each]
    assert "STRICT" in written[0]
    # Once, after everything that guards.
    assert applied.count("RemoveBootGuard") == 1
    assert applied.index("RemoveBootGuard") == 1 + max(
        number for number, each in enumerate(applied) if each in ("Attach", "WriteSettings")
    )
    # Somebody does it by hand.
    enforcing.run("nft add table inet meshwire_boot")
    enforcing.wake()
    until(lambda: not enforcing.run("nft list tables"))
    # A device that appears while the API server is still away is guarded too.
    enforcing.run("ip link add eth1 type veth peer name far1")
    enforcing.run("ip link set eth1 up")
    enforcing.run("ip route add 10.244.2.0/24 dev eth1")
    until(lambda: "eth1 egress" in enforcing.ask("see")["filters"])
