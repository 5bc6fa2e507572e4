"""The boot guard: what a node's init loads before kubelet, so that pods which start before the agent send
nothing in clear. A ruleset for nft and a unit of systemd, as text. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Final

from meshwire.api.fields import Network
from meshwire.encryption.model import AddressFlags, Desired, sorted_networks

TABLE: Final = "meshwire_boot"
"""Of family inet. There is none while the datapath is in force."""
UNIT: Final = "meshwire-boot.service"
WANTED_BY: Final = "multi-user.target"

IN_PLACE: Final = "InPlace"
NOT_MOUNTED: Final = "NotMounted"
NO_SYSTEMD: Final = "NoSystemd"
NOT_WRITABLE: Final = "NotWritable"
NOT_KEPT: Final = "NotKept"
NO_NFT: Final = "NoNft"
NOT_LOADED: Final = "NotLoaded"

_FLUSHERS: Final = (
    "nftables",
    "firewalld",
    "ufw",
    "iptables",
    "ip6tables",
    "netfilter-persistent",
    "shorewall",
)
"""Services that flush nftables as they start, or may: whoever loads something before them loses it."""
_STARTERS: Final = (
    "kubelet",
    "containerd",
    "crio",
    "docker",
    "k3s",
    "k3s-agent",
    "rke2-server",
    "rke2-agent",
    "k0scontroller",
    "k0sworker",
    "snap.microk8s.daemon-kubelite",
)
"""Services that start pods."""


@dataclass(frozen=True, slots=True)
class Scope:
    """`pods` holds every address that a pod of the cluster may have, as far as this node knows; `own` those
    of them that are this node's alone. Without pod CIDRs `own` is empty: which of the cluster's addresses
    its pods will get is not known before they start."""

    pods: frozenset[Network]
    own: frozenset[Network]


def scope_of(desired: Desired) -> Scope | None:
    """What the guard has to cover. None: there is nothing to keep back at the next boot, as Strict isn't
    asked for, or covers nothing."""
    if desired.settings is None or not desired.strict:
        return None
    pods = {
        network: AddressFlags.POD in entry.flags and entry.node == desired.settings.local_node
        for network, entry in desired.addresses.items()
        if entry.flags & (AddressFlags.POD | AddressFlags.CLUSTER)
    }
    others = [network for network, is_own in pods.items() if not is_own]
    # A block in which somebody else has a part is nobody's alone.
    own = [
        network
        for network, is_own in pods.items()
        if is_own
        and not any(
            other.version == network.version
            and other.prefixlen >= network.prefixlen
            and other.network_address in network
            for other in others
        )
    ]
    return Scope(frozenset(pods), frozenset(own)) if pods else None


def render(scope: Scope) -> str:
    """For `nft -f`; loading it twice is loading it once. Forwarded packets from one pod address to another
    are dropped, unless both are the node's own. At that hook a service's address has been translated
    already, and a pod's has not been masqueraded yet. Everything else passes: what pods exchange with nodes
    and with the world is nothing that Strict holds back."""
    sets, rules = [], []
    for family, version in (("ip", 4), ("ip6", 6)):
        pods, own = (_blocks(networks, version) for networks in (scope.pods, scope.own))
        if not pods:
            continue
        sets.append(_set(f"pods{version}", version, pods))
        if own:
            sets.append(_set(f"own{version}", version, own))
            rules.append(f"    {family} saddr @own{version} {family} daddr @own{version} accept\n")
        rules.append(f"    {family} saddr @pods{version} {family} daddr @pods{version} counter drop\n")
    return (
        "# Written by Meshwire's agent (spec.encryption.bootGuard of the MeshConfig).\n"
        f"table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n"
        f"{''.join(sets)}"
        "  chain forward {\n    type filter hook forward priority -300; policy accept;\n"
        f"{''.join(rules)}  }}\n}}\n"
    )


def _blocks(networks: Iterable[Network], version: int) -> list[Network]:
    """Disjoint ones, as older versions of nft want a set's elements."""
    if version == 4:
        return sorted_networks(collapse_addresses(n for n in networks if isinstance(n, IPv4Network)))
    return sorted_networks(collapse_addresses(n for n in networks if isinstance(n, IPv6Network)))


def _set(name: str, version: int, blocks: Iterable[Network]) -> str:
    elements = ",\n      ".join(map(str, blocks))
    return (
        f"  set {name} {{\n    type ipv{version}_addr\n    flags interval\n"
        f"    elements = {{\n      {elements}\n    }}\n  }}\n"
    )


def unit(rules_file: str) -> str:
    """Text of the unit that loads the file, a path on the host.

    It is no requirement of kubelet's: a node whose guard can't be loaded comes up without, and its agent
    says so. It is not ordered before the network, on which a remote /var may depend."""
    services = {
        kind: " ".join(f"{name}.service" for name in names)
        for kind, names in (("After", _FLUSHERS), ("Before", _STARTERS))
    }
    return f"""\
# Written by Meshwire's agent (spec.encryption.bootGuard of the MeshConfig), which takes it away again.
[Unit]
Description=Hold back what pods send to other nodes until Meshwire's datapath is in force
ConditionPathExists={rules_file}
RequiresMountsFor={rules_file}
After={services["After"]}
Before={services["Before"]}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/env nft -f {rules_file}

[Install]
WantedBy={WANTED_BY}
"""
