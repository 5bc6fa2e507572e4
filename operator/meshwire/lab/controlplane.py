"""The control plane's command lines, its credentials, and the objects a cluster installer leaves behind."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from meshwire.api import names
from meshwire.lab import pki
from meshwire.lab.model import (
    AGENT_ACCOUNT,
    API_PORT,
    HELPER,
    NODE_MONITOR_GRACE_SECONDS,
    NODE_PREFIX,
    PODS,
    SERVICES,
    Node,
    Paths,
    Settings,
    api_service_address,
    control_addresses,
    with_port,
)

ETCD: Final = "http://127.0.0.1:2379"
"""On the loopback device of the control plane's namespace, which nothing else can reach."""

CONTROLLERS: Final = (
    "clusterrole-aggregation-controller",
    "daemonset-controller",
    "deployment-controller",
    "disruption-controller",
    "endpointslice-controller",
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "node-ipam-controller",
    "node-lifecycle-controller",
    "pod-garbage-collector-controller",
    "replicaset-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "statefulset-controller",
    "taint-eviction-controller",
    "validatingadmissionpolicy-status-controller",
)
"""Those of a cluster without storage, autoscaling and cloud; every further one costs watches."""


def api_server_url(settings: Settings) -> str:
    """As the nodes reach it: on the underlay, because an agent has to work before kube-proxy does."""
    return f"https://{with_port(control_addresses(settings.families)[0], API_PORT)}"


def make_credentials(paths: Paths, settings: Settings, api_port: int) -> None:
    """All but the nodes' own. `api_port` is the relay's, in the caller's namespace."""
    authority = pki.make_authority(paths.pki)
    pki.make_signing_key(paths.pki / "service-accounts.key")
    services = [api_service_address(family) for family in settings.families]
    pki.make_server_certificate(
        authority,
        paths.pki / "apiserver",
        names=("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"),
        addresses=[
            *(ipaddress.ip_address(address) for address in ("127.0.0.1", "::1")),
            *control_addresses(settings.families),
            *services,
        ],
    )
    local = f"https://127.0.0.1:{API_PORT}" if "v4" in settings.families else f"https://[::1]:{API_PORT}"
    remote = api_server_url(settings)
    for identity, user, groups, server in (
        ("admin", "meshwire-lab:admin", ("system:masters",), f"https://127.0.0.1:{api_port}"),
        ("controller-manager", "system:kube-controller-manager", (), local),
        ("scheduler", "system:kube-scheduler", (), local),
        ("control", "meshwire-lab:control", ("system:masters",), local),
        ("proxy", "system:kube-proxy", (), remote),
        ("cni", HELPER, (), remote),
    ):
        pki.make_client_certificate(authority, paths.pki / identity, user=user, groups=groups)
        path = paths.kubeconfig if identity == "admin" else paths.kubeconfig_of(identity)
        pki.write_kubeconfig(path, server=server, directory=paths.pki, identity=identity)


def make_node_credentials(paths: Paths, settings: Settings, node: Node) -> None:
    """A kubelet's client certificate, from which the Node authorizer knows it."""
    identity = f"node-{node.name}"
    user = f"system:node:{node.name}"
    authority = pki.read_authority(paths.pki)
    pki.make_client_certificate(authority, paths.pki / identity, user=user, groups=("system:nodes",))
    pki.write_kubeconfig(
        paths.kubeconfig_of(identity),
        server=api_server_url(settings),
        directory=paths.pki,
        identity=identity,
    )


def etcd_command(binaries: Path, paths: Paths) -> list[str]:
    return [
        str(binaries / "etcd"),
        "--name=lab",
        f"--data-dir={paths.root / 'etcd'}",
        f"--listen-client-urls={ETCD}",
        f"--advertise-client-urls={ETCD}",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--initial-advertise-peer-urls=http://127.0.0.1:2380",
        "--initial-cluster=lab=http://127.0.0.1:2380",
        # A lab that loses its power loses its processes too: there is nothing to sync for.
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def apiserver_command(binaries: Path, paths: Paths, settings: Settings) -> list[str]:
    certificates = paths.pki
    return [
        str(binaries / "kube-apiserver"),
        f"--etcd-servers={ETCD}",
        f"--bind-address={'::' if 'v6' in settings.families else '0.0.0.0'}",
        f"--advertise-address={control_addresses(settings.families)[0]}",
        f"--secure-port={API_PORT}",
        f"--service-cluster-ip-range={_service_networks(settings)}",
        f"--client-ca-file={certificates / 'ca.crt'}",
        f"--tls-cert-file={certificates / 'apiserver.crt'}",
        f"--tls-private-key-file={certificates / 'apiserver.key'}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={certificates / 'service-accounts.key'}",
        f"--service-account-signing-key-file={certificates / 'service-accounts.key'}",
        "--allow-privileged=true",
        "--profiling=false",
        "--event-ttl=1h",
        *(
            (f"--audit-policy-file={paths.audit_policy}", f"--audit-log-path={paths.log('audit')}")
            if settings.audit
            else ()
        ),
    ]


def audit_policy() -> str:
    """One line for each request, when it has been answered; a watch is one when it ends."""
    return yaml.safe_dump(
        {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived", "ResponseStarted"],
            "rules": [{"level": "Metadata", "omitManagedFields": True}],
        }
    )


def controller_manager_command(binaries: Path, paths: Paths, settings: Settings) -> list[str]:
    kubeconfig = paths.kubeconfig_of("controller-manager")
    controllers = [name for name in CONTROLLERS if settings.node_cidr or name != "node-ipam-controller"]
    allocation = ["--allocate-node-cidrs=false"]
    if settings.node_cidr:
        allocation = [
            "--allocate-node-cidrs=true",
            f"--cluster-cidr={pod_networks(settings)}",
            f"--service-cluster-ip-range={_service_networks(settings)}",
            *(f"--node-cidr-mask-size-ip{family}={NODE_PREFIX[family]}" for family in settings.families),
        ]
        if len(settings.families) == 1:
            allocation[3:] = [f"--node-cidr-mask-size={NODE_PREFIX[settings.families[0]]}"]
    return [
        str(binaries / "kube-controller-manager"),
        f"--kubeconfig={kubeconfig}",
        f"--controllers={','.join(controllers)}",
        *allocation,
        f"--root-ca-file={paths.pki / 'ca.crt'}",
        "--use-service-account-credentials=true",
        "--leader-elect=false",
        "--secure-port=0",
        "--profiling=false",
        "--node-monitor-period=2s",
        f"--node-monitor-grace-period={NODE_MONITOR_GRACE_SECONDS}s",
    ]


def scheduler_command(binaries: Path, paths: Paths) -> list[str]:
    return [
        str(binaries / "kube-scheduler"),
        f"--kubeconfig={paths.kubeconfig_of('scheduler')}",
        "--leader-elect=false",
        "--secure-port=0",
        "--profiling=false",
    ]


def proxy_command(binaries: Path, configuration: Path) -> list[str]:
    return [str(binaries / "kube-proxy"), f"--config={configuration}"]


def proxy_configuration(paths: Paths, settings: Settings, node: Node) -> str:
    """A KubeProxyConfiguration. nftables: the same rules work on every kernel since 5.13, both families."""
    unspecified = "0.0.0.0" if settings.families[0] == "v4" else "::"
    configuration: Mapping[str, Any] = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(paths.kubeconfig_of("proxy"))},
        "mode": "nftables",
        "hostnameOverride": node.name,
        "bindAddress": unspecified,
        "clusterCIDR": pod_networks(settings),
        "detectLocalMode": "ClusterCIDR",
        "healthzBindAddress": f"{'[::]' if unspecified == '::' else unspecified}:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "nftables": {"minSyncPeriod": "100ms", "syncPeriod": "30s"},
        # Of the whole machine, which a namespace neither can nor should set.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpCloseWaitTimeout": "0s", "tcpEstablishedTimeout": "0s"},
    }
    return yaml.safe_dump(dict(configuration), sort_keys=False)


def pod_networks(settings: Settings) -> str:
    return ",".join(str(PODS[family]) for family in settings.families)


def _service_networks(settings: Settings) -> str:
    return ",".join(str(SERVICES[family]) for family in settings.families)


def bootstrap_objects(settings: Settings) -> list[dict[str, Any]]:
    """What kubeadm leaves behind and Meshwire reads, and the rights of the nodes' network part."""
    networking = {"podSubnet": pod_networks(settings), "serviceSubnet": _service_networks(settings)}
    cluster = {
        "apiVersion": "kubeadm.k8s.io/v1beta4",
        "kind": "ClusterConfiguration",
        "networking": networking,
    }
    rules: list[dict[str, Any]] = [
        {"apiGroups": [""], "resources": ["nodes", "pods"], "verbs": ["get", "list", "watch"]},
        {
            "apiGroups": [""],
            "resources": ["serviceaccounts/token"],
            "resourceNames": [AGENT_ACCOUNT],
            "verbs": ["create"],
        },
    ]
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "kubeadm-config", "namespace": "kube-system"},
            "data": {"ClusterConfiguration": yaml.safe_dump(cluster, sort_keys=False)},
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": HELPER},
            "rules": rules,
        },
        _binding(HELPER, HELPER, HELPER),
        _binding(f"{HELPER}-proxy", "system:node-proxier", "system:kube-proxy"),
    ]


def _binding(name: str, role: str, user: str) -> dict[str, Any]:
    group = "rbac.authorization.k8s.io"
    return {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
    }


def pod_environment(settings: Settings, **extra: str) -> dict[str, str]:
    """What tells a process of Meshwire that it runs in a pod of this cluster."""
    return {
        "KUBERNETES_SERVICE_HOST": str(control_addresses(settings.families)[0]),
        "KUBERNETES_SERVICE_PORT": str(API_PORT),
        "POD_NAMESPACE": names.NAMESPACE,
        **extra,
    }
