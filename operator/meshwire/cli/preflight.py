"""`meshwire preflight`: what this node and this cluster lack for Meshwire, why it matters and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any, Final, TypeVar

import click
from pyroute2 import NetlinkError

from meshwire.api import names
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import BootGuard, MeshConfig
from meshwire.cli import checks, cluster, probes
from meshwire.cli.cluster import ClusterUnavailable
from meshwire.cli.facts import ClusterFacts, ClusterNode
from meshwire.cli.findings import Finding, Level, make_console, print_findings, skipped, worst

Facts = TypeVar("Facts")

INSTALLED: Final = (
    ("apiextensions.k8s.io", "customresourcedefinitions"),
    ("rbac.authorization.k8s.io", "clusterroles"),
    ("rbac.authorization.k8s.io", "clusterrolebindings"),
    ("admissionregistration.k8s.io", "validatingadmissionpolicies"),
    ("admissionregistration.k8s.io", "validatingadmissionpolicybindings"),
    ("apps", "daemonsets"),
    ("apps", "deployments"),
    ("", "namespaces"),
    ("", "serviceaccounts"),
)
"""API group and resource of what `kubectl apply -k config` makes."""
NAMESPACED: Final = frozenset({"daemonsets", "deployments", "serviceaccounts"})
POD_SAMPLE: Final = 500


def check(
    name: str, probe: Callable[[], Facts], judge: Callable[[Facts], Iterable[Finding]]
) -> list[Finding]:
    """Looks, then judges; what can't be looked at is skipped with the reason."""
    try:
        return list(judge(probe()))
    except (OSError, NetlinkError, subprocess.SubprocessError) as error:
        return [skipped(name, f"can't be examined: {getattr(error, 'strerror', None) or error}")]


def check_node(config: MeshConfig, nodes: Sequence[ClusterNode]) -> Iterator[Finding]:
    """All checks of this node, for this MeshConfig and among these nodes, as far as they are known."""
    yield from check("kernel", probes.find_kernel, checks.judge_kernel)
    yield from check("privileges", probes.find_capabilities, checks.judge_privileges)
    yield from check("btf", probes.find_btf, checks.judge_btf)
    yield from check("bpffs", probes.find_bpffs, checks.judge_bpffs)
    attempts = probes.try_kernel()
    yield from checks.judge_bpf(attempts)
    yield from checks.judge_tc(attempts)
    yield from check("wireguard", lambda: probes.find_wireguard(attempts), checks.judge_wireguard)
    yield from check("libbpf", probes.find_libbpf, checks.judge_libbpf)
    port = config.encryption.port
    yield from check("ports", lambda: probes.find_ports(port), checks.judge_ports)
    yield from check("forwarding", probes.find_forwarding, checks.judge_forwarding)
    asked = config.encryption.boot_guard is BootGuard.SYSTEMD
    yield from check(
        "boot guard", probes.find_boot, lambda boot: checks.judge_boot(replace(boot, asked=asked))
    )
    try:
        devices = probes.find_devices(
            uplinks=config.network.uplinks, overlays=config.network.overlays, nodes=nodes
        )
    except (OSError, NetlinkError) as error:
        yield skipped("devices", f"can't be examined: {error}")
        return
    yield from check("rp_filter", lambda: probes.find_reverse_path(devices), checks.judge_reverse_path)
    yield from checks.judge_mtu(devices, config.network.mtu)
    yield from checks.judge_conflicts(devices)
    yield from check("tcx", lambda: probes.find_tcx(devices), checks.judge_tcx)
    yield from check("tc filters", lambda: probes.find_filters(devices), checks.judge_filters)
    yield from check(
        "firewall", probes.find_firewall, lambda firewall: checks.judge_firewall(firewall, (port, port + 1))
    )


def read_cluster(reader: cluster.Reader) -> ClusterFacts:
    """Raises ClusterUnavailable where not even the version can be read; what else is forbidden is left
    out."""
    unread: dict[str, str] = {}

    def items(what: str, path: str, **query: str) -> list[cluster.Object]:
        try:
            return reader.items(path, **query)
        except (cluster.Forbidden, cluster.NotFound) as error:
            unread[what] = f"can't be examined: {error}"
            return []

    version = str(reader.get("/version").get("gitVersion", ""))
    definitions = items("crds", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions")
    nodes = items("nodes", "/api/v1/nodes")
    pods = items("pods", "/api/v1/pods", limit=str(POD_SAMPLE), fieldSelector="status.phase=Running")
    return ClusterFacts(
        version=version,
        definitions=frozenset(
            definition["metadata"]["name"] for definition in definitions if is_established(definition)
        ),
        nodes=tuple(cluster_node(node, pods) for node in nodes),
        denied=tuple(resource for group, resource in INSTALLED if not _may_create(reader, group, resource)),
        config=_read_config(reader),
        unread=unread,
    )


def _read_config(reader: cluster.Reader) -> MeshConfig:
    """Where there is none, or none this client understands, the one that holds by default."""
    try:
        found = reader.find(f"{cluster.API}/{names.MESHCONFIGS}/{names.CONFIG_NAME}")
        return MeshConfig() if found is None else MeshConfig.from_object(found)
    except (cluster.Forbidden, InvalidSpec):
        return MeshConfig()


def is_established(definition: cluster.Object) -> bool:
    conditions = definition.get("status", {}).get("conditions") or []
    return any(each["type"] == "Established" and each["status"] == "True" for each in conditions)


def cluster_node(node: cluster.Object, pods: Iterable[cluster.Object]) -> ClusterNode:
    """From a Node and the Pods of any node; those on the host's network have no address of their own."""
    spec, status, name = node.get("spec", {}), node.get("status", {}), node["metadata"]["name"]
    cidrs = tuple(spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else []))
    networks = [ip_network(cidr, strict=False) for cidr in cidrs]
    outside = tuple(
        f"{pod['metadata']['namespace']}/{pod['metadata']['name']} {address}"
        for pod in pods
        if pod["spec"].get("nodeName") == name and not pod["spec"].get("hostNetwork")
        for address in (item["ip"] for item in pod["status"].get("podIPs") or [])
        if not any(ip_address(address) in network for network in networks)
    )
    return ClusterNode(
        name=name,
        kernel=status.get("nodeInfo", {}).get("kernelVersion", ""),
        addresses=tuple(
            each["address"] for each in status.get("addresses") or [] if each["type"] == "InternalIP"
        ),
        pod_cidrs=cidrs,
        outside=outside if cidrs else (),
    )


def _may_create(reader: cluster.Reader, group: str, resource: str) -> bool:
    attributes: dict[str, Any] = {"verb": "create", "group": group, "resource": resource}
    if resource in NAMESPACED:
        attributes["namespace"] = names.NAMESPACE
    review = reader.post(
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        },
    )
    return bool(review["status"].get("allowed"))


@click.command()
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option(
    "--node/--no-node", "look_at_node", default=True, help="Examine this machine.", show_default=True
)
@click.option(
    "--cluster/--no-cluster",
    "look_at_cluster",
    default=None,
    help="Examine the cluster; default: where there is a kubeconfig.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    help="Uplink of this node; can be repeated. Default: the MeshConfig's, or found from the routes.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65534),
    help="First of the two UDP ports. Default: the MeshConfig's, or 51871.",
)
@cluster.options
def preflight(
    output: str,
    look_at_node: bool,
    look_at_cluster: bool | None,
    devices: tuple[str, ...],
    port: int | None,
    kubeconfig: str | None,
    context: str | None,
) -> None:
    """Check what this node and this cluster lack for Meshwire, why it matters and what to do.

    Run it as root on a node to have everything tried; as anybody, anywhere, it checks what it can. What it
    tries it tries in a network namespace of its own: it changes nothing.

    Exit code: 0 where nothing fails (there may be warnings), 1 where something does, 2 where --cluster was
    given and the cluster can't be asked.
    """
    if look_at_node and not sys.platform.startswith("linux"):
        raise click.UsageError("this machine is no Linux node; --no-node examines the cluster only")
    choice = cluster.Choice(kubeconfig, context)
    facts = ClusterFacts(version="")
    found: list[Finding] = []
    if look_at_cluster or (look_at_cluster is None and choice.is_configured()):
        try:
            facts = read_cluster(cluster.Reader(choice))
            found += checks.judge_cluster(facts)
        except ClusterUnavailable as error:
            if look_at_cluster:
                click.echo(f"meshwire: {error}", err=True)
                raise SystemExit(2) from None
            found.append(skipped("cluster", str(error)))
    if look_at_node:
        config = facts.config
        config = replace(
            config,
            encryption=replace(config.encryption, port=port or config.encryption.port),
            network=replace(config.network, uplinks=devices or config.network.uplinks),
        )
        found = [*check_node(config, facts.nodes), *found]
    level = worst(found)
    if output == "json":
        findings = [finding.as_json() for finding in found]
        click.echo(json.dumps({"ok": level is not Level.FAIL, "findings": findings}, indent=2))
    else:
        print_findings(make_console(), found)
    raise SystemExit(1 if level is Level.FAIL else 0)
