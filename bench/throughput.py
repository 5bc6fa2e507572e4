"""What the redirect costs: pod traffic by `to_netdev` into the tunnel, against plain routes into the same
WireGuard device, in turns within one run.

Two nodes and a pod on each, as network namespaces. A pod has an address in two ranges: the node routes the
other node's `REDIRECTED` range to the uplink, where the program redirects it, and its `ROUTED` range to the
WireGuard device. All else is the same for both: peers, keys, MTU, the programs that see what arrives.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Final

from bench.figures import Figure, percentile, ratio

UNDERLAY_MTU: Final = 1500
TUNNEL_MTU: Final = 1420
PORT: Final = 51871
ECHO_PORT: Final = 7007
ROUNDS: Final = 20
TRANSFER_SECONDS: Final = 2
EXCHANGES: Final = 2000
GOAL: Final = "at least 0.97"


@dataclass(frozen=True, slots=True)
class Node:
    """`number` 1 or 2, as in the datapath's maps and in every address."""

    number: int

    @property
    def netns(self) -> str:
        return f"node{self.number}"

    @property
    def pod_netns(self) -> str:
        return f"pod{self.number}"

    @property
    def device(self) -> str:
        """Named apart although in two namespaces: userspace implementations put their sockets in one
        folder."""
        return f"wg{self.number}"

    @property
    def address(self) -> str:
        return f"192.0.2.{self.number}"

    @property
    def redirected(self) -> IPv4Network:
        return IPv4Network(f"10.1.{self.number}.0/24")

    @property
    def routed(self) -> IPv4Network:
        return IPv4Network(f"10.2.{self.number}.0/24")


NODES: Final = (Node(1), Node(2))


def measure() -> list[Figure]:
    """In namespaces of its own (bench.isolated). Three minutes. Raises CalledProcessError, RuntimeError or
    OSError where a part does not do what it should."""
    with ExitStack() as resources:
        implementation = resources.enter_context(two_nodes())
        redirects = resources.enter_context(datapath(Path("/sys/fs/bpf")))
        return compare(implementation, redirects)


@contextmanager
def two_nodes() -> Iterator[str]:
    """Nodes, pods and tunnels; which WireGuard they have: `kernel` or `wireguard-go`."""
    with ExitStack() as resources:
        for node in NODES:
            for name in (node.netns, node.pod_netns):
                _run("ip", "netns", "add", name)
                _sysctl(name, "net/ipv4/conf/all/rp_filter", "0")
                _sysctl(name, "net/ipv4/conf/default/rp_filter", "0")
                _ip(name, "link set lo up")
        first, second = NODES
        _ip(
            first.netns,
            f"link add eth0 mtu {UNDERLAY_MTU} type veth "
            f"peer name eth0 mtu {UNDERLAY_MTU} netns {second.netns}",
        )
        implementation = "kernel" if _kernel_has_wireguard() else "wireguard-go"
        keys = {}
        for node in NODES:
            _connect_pod(node)
            if implementation == "kernel":
                _ip(node.netns, f"link add {node.device} type wireguard")
            else:
                resources.enter_context(_wireguard_go(node))
            keys[node] = _output("wg", "genkey").strip()
        for node, peer in ((first, second), (second, first)):
            _connect_nodes(node, peer, keys[node], _output("wg", "pubkey", stdin=keys[peer]).strip())
        yield implementation


def _connect_pod(node: Node) -> None:
    _sysctl(node.netns, "net/ipv4/ip_forward", "1")
    # Both ranges carry packets that fit the tunnel, so that neither path has to say that they don't.
    _ip(
        node.netns,
        f"link add pod mtu {TUNNEL_MTU} type veth peer name eth0 mtu {TUNNEL_MTU} netns {node.pod_netns}",
        "link set pod up",
        *(f"address add {network[1]}/24 dev pod" for network in (node.redirected, node.routed)),
    )
    _ip(
        node.pod_netns,
        "link set eth0 up",
        *(f"address add {network[2]}/24 dev eth0" for network in (node.redirected, node.routed)),
        f"route add default via {node.redirected[1]}",
    )


def _connect_nodes(node: Node, peer: Node, private_key: str, peer_key: str) -> None:
    _ip(node.netns, "link set eth0 up", f"address add {node.address}/24 dev eth0")
    allowed = f"{peer.redirected},{peer.routed}"
    settings = ["listen-port", str(PORT), "peer", peer_key, "endpoint", f"{peer.address}:{PORT}"]
    _output(
        *("ip", "netns", "exec", node.netns, "wg", "set", node.device, "private-key", "/dev/stdin"),
        *(*settings, "allowed-ips", allowed),
        stdin=private_key,
    )
    _ip(
        node.netns,
        f"link set {node.device} mtu {TUNNEL_MTU} up",
        f"route add {peer.redirected} via {peer.address}",
        f"route add {peer.routed} dev {node.device}",
    )


@contextmanager
def _wireguard_go(node: Node) -> Iterator[None]:
    command = ["ip", "netns", "exec", node.netns, "wireguard-go", "-f", node.device]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: Path(f"/var/run/wireguard/{node.device}.sock").exists(), "wireguard-go")
        yield
    finally:
        process.terminate()
        process.wait()


@contextmanager
def datapath(bpffs: Path) -> Iterator[Callable[[], int]]:
    """The programs as the agent attaches them, and the maps as it fills them, on both nodes; a function that
    tells how many packets were redirected so far."""
    from pyroute2 import NetNS

    from meshwire.bpf import loader, tc
    from meshwire.bpf.layouts import AddressFlag, Direction, Reason, SettingsFlag
    from meshwire.bpf.maps import AddressEntry, Maps, SettingsEntry

    with ExitStack() as resources:
        opened = []
        for node in NODES:
            pins = bpffs / node.netns
            programs = resources.enter_context(loader.Programs.load(pins))
            maps = resources.enter_context(Maps.open(pins))
            opened.append(maps)
            ipr = resources.enter_context(NetNS(node.netns))
            (uplink,), (tunnel,) = ipr.link_lookup(ifname="eth0"), ipr.link_lookup(ifname=node.device)
            for each in NODES:
                for network in (each.redirected, each.routed):
                    maps.ipcache.update(network, AddressEntry(0, each.number, AddressFlag.POD))
                maps.nodes.update(each.number, 0 if each is node else tunnel)
            flags = SettingsFlag.STRICT | SettingsFlag.ENFORCING
            maps.settings.write(SettingsEntry(flags, node.number, TUNNEL_MTU))
            for ifindex, direction, program in (
                (uplink, Direction.EGRESS, loader.TO_NETDEV),
                (uplink, Direction.INGRESS, loader.FROM_NETDEV),
                (tunnel, Direction.INGRESS, loader.FROM_WIREGUARD),
            ):
                tc.attach(ipr, ifindex, direction, programs.get(program))
        encrypted = (Reason.ENCRYPTED, Direction.EGRESS)
        yield lambda: sum(maps.metrics.read()[encrypted].packets for maps in opened)


def compare(implementation: str, redirects: Callable[[], int]) -> list[Figure]:
    """Rounds of both paths, which goes first by turns. Raises RuntimeError where a path is not what it is
    meant to be."""
    client, server = NODES
    with _server(server, "iperf3", "-s"), _server(server, sys.executable, "-m", "bench.throughput", "echo"):
        counts = [redirects()]
        for redirected, network in ((False, server.routed), (True, server.redirected)):
            _wait_for(lambda redirected=redirected: _answers(client, server, redirected), str(network))  # type: ignore[misc]
            counts.append(redirects())
        if counts[1] != counts[0] or counts[2] == counts[1]:
            raise RuntimeError(
                f"redirected packets before, after the routed and the redirected path: {counts}"
            )
        transfers = list(_in_turns(lambda redirected: _throughput(client, server, redirected)))
        exchanges = list(_in_turns(lambda redirected: _exchange(client, server, redirected)))
    spread = f"{implementation}; median of {ROUNDS}"
    rate = percentile([routed for _, routed in transfers], 50) / 1e9
    latency = percentile([routed for _, routed in exchanges], 50)
    # Of times the inverse: below one is worse, as for throughput.
    rates = [(1 / redirected, 1 / routed) for redirected, routed in exchanges]
    return [
        Figure(name="TCP, routed into WireGuard", value=rate, unit="Gbit/s", spread=spread),
        ratio("TCP throughput, redirected to routed", transfers, goal=GOAL),
        Figure(name="request latency, routed into WireGuard", value=latency, unit="µs", spread=spread),
        ratio("requests per second, redirected to routed", rates, goal=GOAL),
    ]


def _in_turns(measurement: Callable[[bool], float]) -> Iterator[tuple[float, float]]:
    """(redirected, routed) of each round."""
    for number in range(ROUNDS):
        found = {redirected: measurement(redirected) for redirected in (number % 2 == 0, number % 2 == 1)}
        yield found[True], found[False]


def _throughput(client: Node, server: Node, redirected: bool) -> float:
    """Bits per second that arrived."""
    source, target = _ends(client, server, redirected)
    output = _output(
        *("ip", "netns", "exec", client.pod_netns, "iperf3", "--json"),
        *("--client", target, "--bind", source, "--time", str(TRANSFER_SECONDS), "--omit", "0.5"),
    )
    return float(json.loads(output)["end"]["sum_received"]["bits_per_second"])


def _exchange(client: Node, server: Node, redirected: bool) -> float:
    """Median microseconds of a request and its answer, one after the other on one TCP connection."""
    source, target = _ends(client, server, redirected)
    command = ["ip", "netns", "exec", client.pod_netns, sys.executable, "-m", "bench.throughput", "ask"]
    return float(_output(*command, source, target))


def _ends(client: Node, server: Node, redirected: bool) -> tuple[str, str]:
    """Addresses of the client's and of the server's pod."""
    ranges = [node.redirected if redirected else node.routed for node in (client, server)]
    return str(ranges[0][2]), str(ranges[1][2])


def echo() -> None:
    """The server of `_exchange`: answers every request with as many bytes, for ever."""
    with socket.create_server(("", ECHO_PORT)) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while request := connection.recv(1024):
                    connection.sendall(request)


def ask(source: str, target: str) -> float:
    """Median microseconds of EXCHANGES requests of 64 bytes, after some that don't count."""
    times = []
    with socket.create_connection((target, ECHO_PORT), timeout=10, source_address=(source, 0)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(EXCHANGES):
            began = time.perf_counter_ns()
            connection.sendall(b"?" * 64)
            received = 0
            while received < 64:
                received += len(connection.recv(64))
            times.append((time.perf_counter_ns() - began) / 1000)
    return percentile(times[EXCHANGES // 10 :], 50)


@contextmanager
def _server(node: Node, *command: str) -> Iterator[None]:
    process = subprocess.Popen(
        ["ip", "netns", "exec", node.pod_netns, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _answers(client: Node, server: Node, redirected: bool) -> bool:
    """Tries both pods' ends once, which also wakes the path up: neighbours, handshake, conntrack."""
    try:
        _exchange(client, server, redirected)
    except subprocess.CalledProcessError:
        return False
    return True


def _kernel_has_wireguard() -> bool:
    probe = ["ip", "link", "add", "mwprobe", "type", "wireguard"]
    if subprocess.run(probe, capture_output=True).returncode:
        return False
    _run("ip", "link", "delete", "mwprobe")
    return True


def _wait_for(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not answer within {seconds:.0f} s")
        time.sleep(0.05)


def _ip(netns: str, *lines: str) -> None:
    subprocess.run(["ip", "-n", netns, "-batch", "-"], input="\n".join(lines), text=True, check=True)


def _sysctl(netns: str, name: str, value: str) -> None:
    _run("ip", "netns", "exec", netns, "sh", "-c", f"echo {value} > /proc/sys/{name}")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


def _output(*command: str, stdin: str | None = None) -> str:
    return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["echo"]:
            echo()
        case ["ask", source, target]:
            print(ask(source, target))
