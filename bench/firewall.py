"""Policy against iptables and nftables that say the same: N sources may reach a port of a pod, all else is
dropped, and what was let in once goes on. Two pods of one node, whose stack forwards between them with
conntrack on, as on every node with kube-proxy; a node of its own for every kind and N, measured in turns
within one run. Stands by itself too: `python -m bench firewall` (root)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Final

from bench.figures import Figure, percentile, ratio
from bench.load import PORT, Load, Mode

from meshwire.agent.policy.kernel import PolicyKernel
from meshwire.agent.policy.model import Surroundings
from meshwire.agent.policy.objects import Namespace, Pod, compact
from meshwire.agent.settings import Settings
from meshwire.api import policyobjects
from meshwire.api.meshendpointslice import Endpoint, MeshEndpointSlice, PodRef
from meshwire.api.meshidentity import FIRST, MeshIdentity
from meshwire.lab import cni
from meshwire.policy.identity import identity_labels

RULES: Final = (10, 1_000, 10_000)
ROUNDS: Final = 24
CONNECT_SECONDS: Final = 0.15
REQUEST_SECONDS: Final = 0.1
PACKETS: Final = 15_000
TRANSFER_ROUNDS: Final = 5
SOURCES: Final = IPv4Address("10.64.0.0")
"""Of those that may: this address plus their number, but for the one in the middle, which is the client."""
CLIENT: Final = IPv4Address("10.244.1.2")
SERVER: Final = IPv4Address("10.244.1.3")
NODE_ADDRESS: Final = IPv4Address("198.18.0.11")


class By(StrEnum):
    """What judges."""

    NOTHING = "nothing"
    CONNTRACK = "conntrack alone"
    MESHWIRE = "Meshwire"
    IPTABLES = "iptables"
    NFT_RULES = "nftables, a rule each"
    NFT_SET = "nftables, one set"


RIVALS: Final = (By.IPTABLES, By.NFT_RULES, By.NFT_SET)


@dataclass(frozen=True, slots=True)
class Kind:
    """A node of its own. `rules` 0: none."""

    number: int
    by: By
    rules: int = 0

    @property
    def name(self) -> str:
        return f"{self.by}, {self.rules:,} rules" if self.rules else str(self.by)

    @property
    def node(self) -> str:
        return f"fw{self.number}"

    @property
    def client(self) -> str:
        return f"fw{self.number}c"

    @property
    def server(self) -> str:
        return f"fw{self.number}s"


def _kinds() -> tuple[Kind, ...]:
    judging = [(by, rules) for rules in RULES for by in (By.MESHWIRE, *RIVALS)]
    return tuple(
        Kind(number, *what) for number, what in enumerate([(By.NOTHING, 0), (By.CONNTRACK, 0), *judging])
    )


KINDS: Final = _kinds()
BARE: Final = KINDS[1]
"""What all others are compared with."""


@dataclass(frozen=True, slots=True)
class Found:
    """Of one round, medians: what else runs on the machine takes time of a few, not of most."""

    connection_us: float
    """Connecting, a request and its answer, one after the other."""
    request_us: float
    """The same on an open connection."""
    packet_ns: float
    """Of a UDP flow that was answered."""
    new_packet_ns: float
    """Of a UDP flow that nobody has answered yet, which conntrack takes for new each time."""


def measure() -> list[Figure]:
    """In namespaces of its own (bench.isolated). About five minutes. Raises CalledProcessError."""
    with ExitStack() as resources:
        directory = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        # Both ends on one CPU: what a connection takes is then what it costs, wherever that is spent.
        load = Load(directory, together=True)
        for kind in KINDS:
            _make(kind)
            _JUDGES[kind.by](kind)
        rounds: defaultdict[Kind, list[Found]] = defaultdict(list)
        with ExitStack() as servers:
            for kind in KINDS:
                servers.enter_context(load.serving(kind.server))
                _check(load, kind)
            for number in range(ROUNDS):
                for kind, found in _round(load, _turned(KINDS, number)):
                    rounds[kind].append(found)
        transfers: defaultdict[Kind, list[float]] = defaultdict(list)
        largest = [kind for kind in KINDS if kind.rules in (0, RULES[-1])]
        for kind in largest:
            # On the port that is allowed. They end with the namespace of their processes.
            _run(*_enter(kind.server, "iperf3", "--server", "--daemon", "--port", str(PORT)))
        for number in range(TRANSFER_ROUNDS):
            for kind in _turned(largest, number):
                transfers[kind].append(_transfer(kind))
        return [*_figures(rounds), *_transfer_figures(transfers)]


def _turned(kinds: Sequence[Kind], by: int) -> Sequence[Kind]:
    """Another one begins each time."""
    by = by * 5 % len(kinds)
    return (*kinds[by:], *kinds[:by])


# Nodes


def _make(kind: Kind) -> None:
    for netns in (kind.node, kind.client, kind.server):
        _run("ip", "netns", "add", netns)
    for line in (
        "net.ipv4.ip_forward=1",
        "net.ipv4.conf.all.rp_filter=0",
        "net.ipv4.conf.default.rp_filter=0",
    ):
        _run(*_enter(kind.node, "sysctl", "-qw", line))
    _ip(kind.node, ["link set lo up", f"address add {NODE_ADDRESS}/32 dev lo"])
    for netns, address in ((kind.client, CLIENT), (kind.server, SERVER)):
        _ip(kind.node, cni.pod_device_commands(netns, netns, netns, [address], [NODE_ADDRESS], 1500))
        _ip(netns, cni.pod_commands([address]))
    if kind.by is not By.NOTHING:
        # A node's own address translation, which is why it tracks connections at all.
        _run(*_enter(kind.node, "nft", "-f", "-"), stdin=cni.masquerade_rules(["v4"]))


def _sources(rules: int) -> list[IPv4Address]:
    return [CLIENT if number == rules // 2 else SOURCES + number for number in range(rules)]


def _iptables(kind: Kind) -> None:
    """The way NetworkPolicies are mostly carried out: a chain for the pod, with a rule for each source."""
    rules = [
        "*filter",
        ":FORWARD ACCEPT",
        ":POD -",
        "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        f"-A FORWARD -d {SERVER}/32 -j POD",
        *(
            f"-A POD -s {source}/32 -p {protocol} -m {protocol} --dport {PORT} -j ACCEPT"
            for source in _sources(kind.rules)
            for protocol in _protocols(source)
        ),
        "-A POD -j DROP",
        "COMMIT\n",
    ]
    _run(*_enter(kind.node, "iptables-legacy-restore"), stdin="\n".join(rules))


def _protocols(source: IPv4Address) -> tuple[str, ...]:
    """The client has one rule more: it is measured by both."""
    return ("tcp", "udp") if source == CLIENT else ("tcp",)


def _nft_rules(kind: Kind) -> None:
    rules = "\n".join(
        f"ip saddr {source} {protocol} dport {PORT} accept"
        for source in _sources(kind.rules)
        for protocol in _protocols(source)
    )
    _nft(kind, "", f"{rules}\ndrop")


def _nft_set(kind: Kind) -> None:
    elements = ", ".join(
        f"{source} . {protocol} . {PORT}"
        for source in _sources(kind.rules)
        for protocol in _protocols(source)
    )
    found = f"set allowed {{ type ipv4_addr . inet_proto . inet_service\n elements = {{ {elements} }} }}\n"
    _nft(kind, found, "ip saddr . meta l4proto . th dport @allowed accept\ndrop")


def _nft(kind: Kind, sets: str, rules: str) -> None:
    forward = f"ct state established,related accept\nip daddr {SERVER} jump pod"
    _run(
        *_enter(kind.node, "nft", "-f", "-"),
        stdin=f"table ip measured {{\n{sets}chain pod {{\n{rules}\n}}\n"
        f"chain forward {{ type filter hook forward priority filter; policy accept;\n{forward}\n}}\n}}\n",
    )


def _meshwire(kind: Kind) -> None:
    """By the agent's own code, in the node's network namespace."""
    _run(*_enter(kind.node, sys.executable, "-m", "bench.firewall", kind.node, str(kind.rules)))


def fill(node: str, rules: int) -> None:
    """Policy as the agent has it on a node with two pods, one of which N pods may reach, each with labels of
    its own. To be called in the node's network namespace. Raises what PolicyKernel raises."""
    settings = Settings(
        node=node,
        namespace="meshwire-system",
        state_directory=Path("/nonexistent"),
        pin_directory=Path(f"/sys/fs/bpf/{node}"),
        run_directory=Path("/nonexistent"),
        proc_sys=Path("/proc/sys"),
        metrics_address=("", 0),
    )
    with closing(PolicyKernel(settings)) as kernel:
        links = kernel.links(fresh=True)
        model = kernel.new_model()
        networks = (ip_network("10.244.0.0/16"), ip_network("10.64.0.0/16"))
        model.set_surroundings(
            Surroundings(
                local=frozenset({NODE_ADDRESS.packed}), cluster=networks, own=(ip_network("10.244.1.0/24"),)
            )
        )
        model.put_namespace(Namespace(uid="namespace", name="default", labels={}))
        endpoints = []
        for number, source in enumerate(_sources(rules)):
            labels = identity_labels(
                namespace="default",
                namespace_labels={},
                service_account="default",
                pod_labels=_labels(number),
            )
            model.put_identity(MeshIdentity(number=FIRST + number, labels=labels))
            if source != CLIENT:
                pod = PodRef("default", f"pod-{number}", f"uid-{number}")
                endpoints.append(
                    Endpoint(addresses=(source,), identity=FIRST + number, node="elsewhere", pod=pod)
                )
        for at in range(0, len(endpoints), 100):
            found = MeshEndpointSlice(name=f"slice-{at}", endpoints=tuple(endpoints[at : at + 100]))
            model.put_slice(compact(found))
        for name, address, own in (
            ("client", CLIENT, _labels(rules // 2)),
            ("server", SERVER, {"app": "server"}),
        ):
            pod_labels = tuple(sorted(own.items()))
            pod_here = Pod(
                uid=name,
                namespace="default",
                name=name,
                labels=pod_labels,
                service_account="default",
                addresses=(address.packed,),
            )
            model.put_pod(pod_here)
            model.set_device(name, kernel.find_device(pod_here.addresses))
        ports = [{"port": str(PORT), "protocol": protocol} for protocol in ("TCP", "UDP")]
        model.put_policy(
            policyobjects.mesh_policy(
                {
                    "kind": "MeshPolicy",
                    "metadata": {"name": "server", "namespace": "default", "uid": "policy"},
                    "spec": {
                        "endpointSelector": {"matchLabels": {"app": "server"}},
                        "ingress": [
                            {
                                "fromEndpoints": [{"matchLabels": {"role": "client"}}],
                                "toPorts": [{"ports": ports}],
                            }
                        ],
                    },
                }
            )
        )
        assert links and not model.waiting_for_device()
        kernel.apply(model, (), (), skips_stack=True, resync=True, fresh=True)


def _labels(number: int) -> dict[str, str]:
    return {"app": f"client-{number}", "role": "client"}


_JUDGES: Final[Mapping[By, Callable[[Kind], None]]] = {
    By.NOTHING: lambda kind: None,
    By.CONNTRACK: lambda kind: None,
    By.MESHWIRE: _meshwire,
    By.IPTABLES: _iptables,
    By.NFT_RULES: _nft_rules,
    By.NFT_SET: _nft_set,
}


def _check(load: Load, kind: Kind) -> None:
    """What is to be judged is judged: another port of the pod answers where nothing judges alone. Raises
    RuntimeError."""
    with load.serving(kind.server, PORT + 1):
        try:
            load.ask(
                kind.client, str(CLIENT), str(SERVER), connections=1, seconds=0.1, mode="new", port=PORT + 1
            )
            open_to_all = True
        except subprocess.CalledProcessError:
            open_to_all = False
    if open_to_all is bool(kind.rules):
        raise RuntimeError(
            f"{kind.name}: a port that no rule allows {'' if open_to_all else 'does not '}answer"
        )


# Figures


def _round(load: Load, kinds: Sequence[Kind]) -> Iterator[tuple[Kind, Found]]:
    """One after the other by each measure, so that what is compared is as near in time as can be."""
    connections = [_ask(load, kind, CONNECT_SECONDS, "new") for kind in kinds]
    requests = [_ask(load, kind, REQUEST_SECONDS, "keep") for kind in kinds]
    packets = [_flood(load, kind, PACKETS, answered=True) for kind in kinds]
    new_packets = [_flood(load, kind, PACKETS // 3, answered=False) for kind in kinds]
    for kind, *found in zip(kinds, connections, requests, packets, new_packets, strict=True):
        yield kind, Found(*found)


def _ask(load: Load, kind: Kind, seconds: float, mode: Mode) -> float:
    """Microseconds."""
    ends = (kind.client, str(CLIENT), str(SERVER))
    return load.ask(*ends, connections=1, seconds=seconds, mode=mode).p50_us


def _flood(load: Load, kind: Kind, packets: int, *, answered: bool) -> float:
    """Nanoseconds."""
    ends = (kind.client, str(CLIENT), kind.server, str(SERVER))
    return load.flood(*ends, packets=packets, answered=answered)


def _transfer(kind: Kind) -> float:
    command = _enter(
        kind.client,
        *("iperf3", "--json", "--client", str(SERVER), "--port", str(PORT)),
        *("--time", "1", "--omit", "0.2"),
    )
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"])


def _figures(rounds: Mapping[Kind, Sequence[Found]]) -> Iterator[Figure]:
    spread = f"median of {ROUNDS} rounds"
    for kind in KINDS[:2]:
        found = rounds[kind]
        for name, unit, value in (
            ("new connection", "µs", percentile([each.connection_us for each in found], 50)),
            ("request on an open connection", "µs", percentile([each.request_us for each in found], 50)),
            ("packet of an answered flow", "ns", percentile([each.packet_ns for each in found], 50)),
            ("packet of a new flow", "ns", percentile([each.new_packet_ns for each in found], 50)),
        ):
            yield Figure(name=f"{kind.name}: {name}", value=value, unit=unit, spread=spread)
    bare = rounds[BARE]
    for kind in KINDS[2:]:
        pairs = list(zip(rounds[kind], bare, strict=True))
        yield _added(
            f"{kind.name}: added to a connection",
            [one.connection_us - other.connection_us for one, other in pairs],
            "µs",
        )
        yield _added(
            f"{kind.name}: added to a packet of an answered flow",
            [one.packet_ns - other.packet_ns for one, other in pairs],
            "ns",
        )
        yield _added(
            f"{kind.name}: added to a packet of a new flow",
            [one.new_packet_ns - other.new_packet_ns for one, other in pairs],
            "ns",
        )
    for rules in RULES:
        ours = rounds[_kind(By.MESHWIRE, rules)]
        for by, others in ((BARE.by, bare), *((by, rounds[_kind(by, rules)]) for by in RIVALS)):
            both = list(zip(ours, others, strict=True))
            what = f"Meshwire to {by}, {rules:,} rules"
            goal = "at least 1.0" if by is not BARE.by else ""
            yield ratio(
                f"new connections/s, {what}",
                [(other.connection_us, one.connection_us) for one, other in both],
                goal=goal,
            )
            yield ratio(
                f"requests/s on an open connection, {what}",
                [(other.request_us, one.request_us) for one, other in both],
                goal=goal,
            )


def _kind(by: By, rules: int) -> Kind:
    return next(kind for kind in KINDS if (kind.by, kind.rules) == (by, rules))


def _added(name: str, values: Sequence[float], unit: str) -> Figure:
    return Figure(
        name=name,
        value=percentile(values, 50),
        unit=unit,
        spread=f"median of {len(values)} rounds, middle half {_short(percentile(values, 25))} to "
        f"{_short(percentile(values, 75))}",
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _transfer_figures(transfers: Mapping[Kind, Sequence[float]]) -> Iterator[Figure]:
    for kind, rates in transfers.items():
        if kind is BARE:
            spread = f"median of {len(rates)}"
            yield Figure(
                name="TCP, conntrack alone", value=percentile(rates, 50) / 1e9, unit="Gbit/s", spread=spread
            )
        else:
            pairs = list(zip(rates, transfers[BARE], strict=True))
            yield ratio(f"TCP throughput, {kind.name} to conntrack alone", pairs)


def _enter(netns: str, *command: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{netns}", "--", *command]


def _ip(netns: str, lines: Sequence[str]) -> None:
    _run("ip", "-n", netns, "-batch", "-", stdin="\n".join(lines))


def _run(*command: str, stdin: str = "") -> None:
    subprocess.run(command, input=stdin, check=True, stdout=sys.stderr, text=True)


if __name__ == "__main__":
    fill(sys.argv[1], int(sys.argv[2]))
