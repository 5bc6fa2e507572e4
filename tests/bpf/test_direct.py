"""Pods of one node, with real packets: what goes from one to the other directly, and what has to go through
the host's stack. The stack has conntrack, a service of kube-proxy's kind, and its rule against what
conntrack doesn't understand."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from pyroute2 import IPRoute, netns
from tests.bpf.spaces import inside, ip

from meshwire.bpf import loader, tc
from meshwire.bpf.layouts import Direction, Reason
from meshwire.bpf.loader import Programs
from meshwire.bpf.maps import Counter
from meshwire.bpf.policylayouts import CidrFlag, EndpointFlag, StateFlag
from meshwire.bpf.policymaps import CidrEntry, EndpointEntry, PolicyEntry, PolicyKey, PolicyMaps

pytestmark = [pytest.mark.bpf, pytest.mark.netns]

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
families = pytest.mark.parametrize("family", FAMILIES, ids=["IPv4", "IPv6"])
PATIENCE = 10.0
"""Seconds until something that has to happen counts as not happening."""
SILENCE = 0.5
"""Seconds in which what must not arrive would have."""
PORT = 8080
CLIENT_PORTS = itertools.count(20000)
ENFORCED = EndpointFlag.INGRESS_ENFORCED | EndpointFlag.EGRESS_ENFORCED
ETH_P_ALL = 0x0003
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DO = 10, 23, 2

PODS = ("client", "server", "other")


def address(pod: str, family: int) -> str:
    number = 11 + PODS.index(pod)
    return f"10.1.1.{number}" if family == 4 else f"fd00:1:0:1::{number}"


def pods_of(family: int) -> str:
    return "10.1.1.0/24" if family == 4 else "fd00:1:0:1::/64"


def service(family: int) -> str:
    return "10.96.0.10" if family == 4 else "fd00:96::10"


def run(namespace: str, *command: str) -> str:
    return subprocess.run(
        ["ip", "netns", "exec", namespace, *command], check=True, capture_output=True, text=True
    ).stdout


@dataclass
class Node:
    host: str
    pods: dict[str, str]
    """Name -> network namespace."""
    ipr: IPRoute
    programs: Programs
    maps: PolicyMaps
    revision: int = 1
    counters: dict[tuple[Reason, Direction], Counter] = field(default_factory=dict)

    def device(self, pod: str) -> int:
        index: int
        [index] = self.ipr.link_lookup(ifname=f"v-{pod}")
        return index

    def guard(self, *, direct: bool = True, flags: EndpointFlag = EndpointFlag(0)) -> None:  # noqa: B008
        """As the agent does, with these flags for every pod."""
        self.revision += 1
        for number, pod in enumerate(self.pods):
            for family in FAMILIES:
                entry = EndpointEntry(self.device(pod), 300 + number, 5 + number, 0, self.revision, 1, flags)
                self.maps.endpoints.update(ip_address(address(pod, family)), entry)
                self.maps.identities.update(ip_address(address(pod, family)), 300 + number)
        self.maps.state.renew(StateFlag.SKIP_STACK if direct else StateFlag(0))

    def attach(self) -> None:
        hooks = ((Direction.INGRESS, loader.FROM_POD), (Direction.EGRESS, loader.TO_POD))
        for pod in self.pods:
            for hook, program in hooks:
                tc.attach(self.ipr, self.device(pod), hook, self.programs.get(program), tc.POLICY_POD)

    def forwarded(self, family: int) -> int:
        """Packets that the stack has forwarded, whatever became of them."""
        tool = "iptables-legacy" if family == 4 else "ip6tables-legacy"
        for line in run(self.host, tool, "-t", "raw", "-L", "PREROUTING", "-vnx").splitlines():
            if "pods" in line:
                return int(line.split()[0])
        raise AssertionError("no counter")

    def dropped(self, reason: Reason) -> int:
        """Packets since the last call."""
        before, self.counters = self.counters, self.maps.metrics.read()
        return sum(
            self.counters[reason, direction].packets - (before[reason, direction].packets if before else 0)
            for direction in Direction
        )

    def socket(self, pod: str, family: int, kind: socket.SocketKind, port: int = 0) -> socket.socket:
        with inside(self.pods[pod]):
            made = socket.socket(FAMILIES[family], kind)
        made.settimeout(PATIENCE)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address(pod, family), port))
        return made


@pytest.fixture(scope="module")
def namespaces() -> Iterator[Callable[[str], str]]:
    """Makes network namespaces; answers with their names."""
    if os.geteuid() != 0:
        pytest.skip("needs root: creates network namespaces")
    made: list[str] = []

    def make(label: str) -> str:
        name = f"mwd-{os.getpid()}-{len(made)}-{label}"
        netns.create(name)
        made.append(name)
        ip(name, "link set lo up")
        return name

    yield make
    for name in made:
        netns.remove(name)


def build(namespaces: Callable[[str], str], wiring: str) -> tuple[str, dict[str, str]]:
    host = namespaces("node")
    run(
        host,
        *("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"),
        *("net.ipv6.conf.default.accept_dad=0", "net.ipv4.conf.all.rp_filter=0"),
    )
    if wiring == "bridge":
        ip(
            host,
            "link add cni0 type bridge",
            "addr add 10.1.1.1/24 dev cni0",
            "addr add fd00:1:0:1::1/64 dev cni0 nodad",
            "link set cni0 up",
        )
        # As kube-proxy needs it, for replies to come back through its translation.
        subprocess.run(["modprobe", "br_netfilter"], capture_output=True)
        settings = (f"net.bridge.bridge-nf-call-{tool}=1" for tool in ("iptables", "ip6tables"))
        run(host, "sysctl", "-qw", *settings)
    pods = {}
    for pod in PODS:
        pods[pod] = within = namespaces(pod)
        run(within, "sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
        ip(host, f"link add v-{pod} type veth peer name eth0 netns {within}", f"link set v-{pod} up")
        v4, v6 = address(pod, 4), address(pod, 6)
        if wiring == "bridge":
            ip(host, f"link set v-{pod} master cni0")
            ip(
                within,
                *(f"addr add {v4}/24 dev eth0", f"addr add {v6}/64 dev eth0 nodad", "link set eth0 up"),
                *("route add default via 10.1.1.1", "route add default via fd00:1:0:1::1"),
            )
        else:
            ip(
                host,
                *(f"addr add 169.254.1.1/32 dev v-{pod}", f"addr add fe80::1/64 dev v-{pod} nodad"),
                *(f"route add {v4}/32 dev v-{pod}", f"route add {v6}/128 dev v-{pod}"),
            )
            ip(
                within,
                *(f"addr add {v4}/32 dev eth0", f"addr add {v6}/128 dev eth0 nodad", "link set eth0 up"),
                *("route add 169.254.1.1 dev eth0", "route add default via 169.254.1.1 dev eth0"),
                "route add default via fe80::1 dev eth0",
            )
    for family, tool in ((4, "iptables-legacy"), (6, "ip6tables-legacy")):
        rules = (
            ("-t", "raw", "-A", "PREROUTING", "-s", pods_of(family), "-m", "comment", "--comment", "pods"),
            *(
                ("-t", "nat", "-A", "PREROUTING", "-d", service(family), "-p", protocol)
                + ("-j", "DNAT", "--to-destination", address("server", family))
                for protocol in ("tcp", "udp")
            ),
            ("-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"),
        )
        for rule in rules:
            run(host, tool, *rule)
    return host, pods


@pytest.fixture(scope="module", params=["routed", "bridge"])
def built(
    namespaces: Callable[[str], str], bpffs: Path, objects: Path, request: pytest.FixtureRequest
) -> Iterator[Node]:
    host, pods = build(namespaces, request.param)
    with (
        Programs.load(bpffs / host, objects=loader.POLICY_OBJECTS) as programs,
        PolicyMaps.open(bpffs / host) as maps,
        ExitStack() as resources,
    ):
        with inside(host):
            ipr = resources.enter_context(IPRoute())
        for block in ("10.1.0.0/16", "fd00:1::/48"):
            maps.cidrs.update(ip_network(block), CidrEntry(0, CidrFlag.CLUSTER))
        for family in FAMILIES:
            maps.services.update(ip_address(service(family)))
        node = Node(host, pods, ipr, programs, maps)
        node.guard()
        node.attach()
        # Before a pod has been heard of, its packets go through the stack.
        for pod in pods.values():
            run(pod, "ping", "-qc1", "10.1.1.1" if request.param == "bridge" else "169.254.1.1")
        yield node


@pytest.fixture
def node(built: Node) -> Node:
    built.maps.policies.delete_many(built.maps.policies.read())
    built.maps.flows.purge([ip_address(address(pod, family)) for pod in PODS for family in FAMILIES])
    built.guard()
    built.counters = built.maps.metrics.read()
    return built


@pytest.fixture
def client_port() -> int:
    """One that conntrack knows nothing about."""
    return next(CLIENT_PORTS)


def connect(node: Node, family: int, target: str, port: int = 0) -> socket.socket:
    made = node.socket("client", family, socket.SOCK_STREAM, port)
    made.connect((target, PORT))
    return made


@contextmanager
def server(node: Node, family: int) -> Iterator[socket.socket]:
    with closing(node.socket("server", family, socket.SOCK_STREAM, PORT)) as listening:
        listening.listen()
        yield listening


def exchange(one: socket.socket, other: socket.socket, rounds: int = 50) -> None:
    for number in range(rounds):
        for sender, receiver in ((one, other), (other, one)):
            said = struct.pack("!I", number) * 256
            sender.sendall(said)
            heard = b""
            while len(heard) < len(said):
                heard += receiver.recv(4096)
            assert heard == said


def is_heard(sender: socket.socket, receiver: socket.socket) -> bool:
    """Whether what is written to a connection arrives."""
    receiver.settimeout(SILENCE)
    sender.sendall(b"?")
    try:
        return receiver.recv(1) == b"?"
    except TimeoutError:
        return False
    finally:
        receiver.settimeout(PATIENCE)


@families
def test_a_connection_between_pods_does_not_touch_the_stack(node: Node, family: int) -> None:
    before = node.forwarded(family)
    with server(node, family) as listening, closing(connect(node, family, address("server", family))) as one:
        other, peer = listening.accept()
        with closing(other):
            assert peer[0] == address("client", family)
            exchange(one, other)
    time.sleep(0.1)
    # IPv6 neighbours ask each other.
    assert node.forwarded(family) - before <= (4 if family == 6 else 0)


@families
def test_the_frames_are_as_they_would_have_been(node: Node, family: int) -> None:
    """Whoever looks at addresses of the link, as a guest behind a TAP device does, gets what it expects."""
    with server(node, family) as listening:
        connect(node, family, address("server", family)).close()
        listening.accept()[0].close()
        with inside(node.pods["server"]):
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            own = Path("/sys/class/net/eth0/address")
        with closing(wire), closing(connect(node, family, address("server", family))):
            wire.settimeout(PATIENCE)
            listening.accept()[0].close()
            mac = bytes.fromhex(run(node.pods["server"], "cat", str(own)).strip().replace(":", ""))
            while True:
                frame, (_, _, kind, *_) = wire.recvfrom(2048)
                if (
                    kind == socket.PACKET_HOST
                    and socket.inet_pton(FAMILIES[family], address("client", family)) in frame
                ):
                    assert frame[:6] == mac
                    break


@families
def test_a_service_goes_through_the_stack_both_ways(node: Node, family: int) -> None:
    with server(node, family) as listening:
        before = node.forwarded(family)
        with closing(connect(node, family, service(family))) as one:
            other, peer = listening.accept()
            with closing(other):
                assert peer[0] == address("client", family)
                exchange(one, other)
        assert node.forwarded(family) - before > 100


@families
def test_a_service_that_leads_to_a_connection_that_is_there_is_kept_from_it(
    node: Node, family: int, client_port: int
) -> None:
    with (
        server(node, family) as listening,
        closing(connect(node, family, address("server", family), client_port)) as direct,
    ):
        first, _ = listening.accept()
        with (
            closing(first),
            closing(node.socket("client", family, socket.SOCK_STREAM, client_port)) as second,
        ):
            exchange(direct, first)
            second.settimeout(SILENCE)
            with pytest.raises(TimeoutError):
                second.connect((service(family), PORT))
            assert node.dropped(Reason.DROP_PORTS_IN_USE) > 0
            exchange(direct, first)


@families
def test_a_connection_beside_that_of_a_service_is_kept_apart(
    node: Node, family: int, client_port: int
) -> None:
    """The same ports to the same pod, by its service first: conntrack gives the second other ports."""
    with (
        server(node, family) as listening,
        closing(connect(node, family, service(family), client_port)) as served,
    ):
        first, _ = listening.accept()
        with (
            closing(first),
            closing(connect(node, family, address("server", family), client_port)) as direct,
        ):
            second, peer = listening.accept()
            with closing(second):
                assert peer[1] != client_port
                exchange(direct, second)
                exchange(served, first)


@families
@pytest.mark.parametrize(
    "ways", [("pod", "service"), ("service", "pod")], ids=["direct first", "service first"]
)
def test_ports_may_be_used_again_at_once_by_another_way(
    node: Node, family: int, client_port: int, ways: tuple[str, str]
) -> None:
    """What is remembered of the connection before doesn't show its packets the way."""
    with server(node, family) as listening:
        for way in ways:
            target = service(family) if way == "service" else address("server", family)
            with closing(connect(node, family, target, client_port)) as one:
                other, _ = listening.accept()
                with closing(other):
                    other.settimeout(PATIENCE)
                    exchange(one, other, rounds=3)
                    if way == ways[0]:
                        # Without TIME_WAIT, which would keep the ports.
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@families
@pytest.mark.parametrize("built", ["routed"], indirect=True)
def test_what_does_not_fit_the_other_pod_is_left_to_the_stack(node: Node, family: int) -> None:
    """Which says so. A bridge would tell nobody."""
    ip(node.host, "link set v-server mtu 1300")
    ip(node.pods["server"], "link set eth0 mtu 1300")
    try:
        with (
            closing(node.socket("client", family, socket.SOCK_DGRAM)) as one,
            closing(node.socket("server", family, socket.SOCK_DGRAM, PORT)) as other,
        ):
            level, option = (
                (socket.IPPROTO_IP, IP_MTU_DISCOVER)
                if family == 4
                else (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER)
            )
            one.setsockopt(level, option, PMTUDISC_DO)
            one.connect((address("server", family), PORT))
            for _ in range(3):
                one.send(b"?")
                other.recv(16)
            one.send(bytes(1400))
            deadline = time.monotonic() + PATIENCE
            with pytest.raises(OSError) as refusal:
                while time.monotonic() < deadline:
                    time.sleep(0.05)
                    one.send(bytes(1400))
            assert refusal.value.errno == errno.EMSGSIZE
    finally:
        ip(node.host, "link set v-server mtu 1500")
        ip(node.pods["server"], "link set eth0 mtu 1500")


@families
def test_datagrams_go_directly_once_they_came_out_as_they_went_in(node: Node, family: int) -> None:
    with (
        closing(node.socket("client", family, socket.SOCK_DGRAM)) as one,
        closing(node.socket("server", family, socket.SOCK_DGRAM, PORT)) as other,
    ):
        before = node.forwarded(family)
        for _ in range(50):
            one.sendto(b"?", (address("server", family), PORT))
            _, peer = other.recvfrom(16)
            other.sendto(b"!", peer)
            assert one.recvfrom(16)[1][:2] == (address("server", family), PORT)
        time.sleep(0.1)
        assert 1 <= node.forwarded(family) - before <= (5 if family == 6 else 1)


@families
def test_answers_of_a_service_come_from_it_whatever_else_the_socket_says(node: Node, family: int) -> None:
    """One socket asks the pod and its service: same ports, same pod. Each answer has to come from whom it
    was asked of."""
    with (
        closing(node.socket("client", family, socket.SOCK_DGRAM)) as one,
        closing(node.socket("server", family, socket.SOCK_DGRAM, PORT)) as other,
    ):
        for number in range(60):
            asked = service(family) if number in (20, 40, 41) else address("server", family)
            one.sendto(b"%d" % number, (asked, PORT))
            said, peer = other.recvfrom(16)
            assert said == b"%d" % number
            other.sendto(said, peer)
            heard, source = one.recvfrom(16)
            assert (heard, source[0]) == (said, asked)


@families
def test_errors_about_datagrams_arrive(node: Node, family: int) -> None:
    with closing(node.socket("client", family, socket.SOCK_DGRAM)) as one:
        one.connect((address("server", family), PORT))
        with closing(node.socket("server", family, socket.SOCK_DGRAM, PORT)) as other:
            for _ in range(3):
                one.send(b"?")
                other.recv(16)
                time.sleep(0.6)
        one.send(b"?")
        with pytest.raises(ConnectionRefusedError):
            one.recv(16)


@families
def test_both_pods_policies_count(node: Node, family: int) -> None:
    def allow(direction: Direction, pod: str, peer: str) -> None:
        key = PolicyKey(5 + PODS.index(pod), 300 + PODS.index(peer), direction, socket.IPPROTO_TCP, PORT, 16)
        node.maps.policies.update(key, PolicyEntry(1, deny=False))

    def is_refused() -> bool:
        with closing(node.socket("client", family, socket.SOCK_STREAM)) as attempt:
            attempt.settimeout(SILENCE)
            try:
                attempt.connect((address("server", family), PORT))
            except TimeoutError:
                return True
            return False

    with server(node, family) as listening:
        connect(node, family, address("server", family)).close()
        node.guard(flags=ENFORCED)
        assert is_refused() and node.dropped(Reason.DROP_POLICY_EGRESS) > 0
        allow(Direction.EGRESS, "client", "server")
        node.guard(flags=ENFORCED)
        assert is_refused() and node.dropped(Reason.DROP_POLICY_INGRESS) > 0
        allow(Direction.INGRESS, "server", "client")
        node.guard(flags=ENFORCED)
        listening.accept()[0].close()
        with closing(connect(node, family, address("server", family))) as one:
            other, _ = listening.accept()
            with closing(other):
                exchange(one, other)
                for key in node.maps.policies.read():
                    if key.direction is Direction.INGRESS:
                        node.maps.policies.delete(key)
                node.guard(flags=ENFORCED)
                assert not is_heard(one, other)
                assert not is_heard(other, one)


@families
def test_turned_off_and_on_connections_go_on(node: Node, family: int) -> None:
    """Through a stack that has not seen them begin, and drops what it thinks invalid."""
    with server(node, family) as listening, closing(connect(node, family, address("server", family))) as one:
        other, _ = listening.accept()
        with closing(other):
            for direct in (True, False, True, False, True):
                node.guard(direct=direct)
                exchange(one, other)


@families
def test_a_pod_gets_nothing_of_a_spoofers_directly(node: Node, family: int) -> None:
    with closing(node.socket("server", family, socket.SOCK_DGRAM, PORT)) as other:
        with closing(node.socket("client", family, socket.SOCK_DGRAM)) as one:
            one.sendto(b"?", (address("server", family), PORT))
            other.recv(16)
        others = f"{address('other', family)}/{32 if family == 4 else 128}"
        ip(node.pods["client"], f"addr add {others} dev eth0" + (" nodad" * (family == 6)))
        with inside(node.pods["client"]):
            spoofer = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
        with closing(spoofer):
            spoofer.bind((address("other", family), 0))
            spoofer.sendto(b"!", (address("server", family), PORT))
            other.settimeout(SILENCE)
            with pytest.raises(TimeoutError):
                other.recv(16)
        ip(node.pods["client"], f"addr del {others} dev eth0")
        assert node.dropped(Reason.DROP_SPOOFED_SOURCE) > 0
