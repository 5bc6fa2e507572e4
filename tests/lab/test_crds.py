"""What the API server makes of our CRDs, policies and manifests: clear refusals, documentation."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwire.lab.lab import SOURCE, Lab, documents
from meshwire.lab.model import LabError

ACCEPTED = "(server dry run)"
"""Said of what is new, and of what is there already."""


def config(name: str = "default", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "meshwire.dev/v1alpha1",
        "kind": "MeshConfig",
        "metadata": {"name": name},
        "spec": spec,
    }


def policy(spec: dict[str, Any], kind: str = "MeshPolicy") -> dict[str, Any]:
    return {
        "apiVersion": "meshwire.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": "p", **({"namespace": "default"} if kind == "MeshPolicy" else {})},
        "spec": {"endpointSelector": {}, **spec},
    }


def from_items(*items: dict[str, Any]) -> dict[str, Any]:
    return policy({"ingress": list(items)})


def to_items(*items: dict[str, Any]) -> dict[str, Any]:
    return policy({"egressDeny": list(items)}, kind="ClusterMeshPolicy")


def to_port(**port: Any) -> dict[str, Any]:
    return from_items({"toPorts": [{"ports": [port]}]})


def identity(name: str = "300", **labels: str) -> dict[str, Any]:
    return {
        "apiVersion": "meshwire.dev/v1alpha1",
        "kind": "MeshIdentity",
        "metadata": {"name": name},
        "spec": {"labels": {"io.kubernetes.pod.namespace": "default"} | labels},
    }


def endpoints(*items: dict[str, Any], **spec: Any) -> dict[str, Any]:
    whole = {
        "addresses": ["10.244.1.2", "fd00:10:244:1::2"],
        "identity": 300,
        "node": "node1",
        "pod": {"namespace": "default", "name": "web", "uid": "u"},
    }
    return {
        "apiVersion": "meshwire.dev/v1alpha1",
        "kind": "MeshEndpointSlice",
        "metadata": {"name": "s"},
        "spec": {"endpoints": [whole | item for item in items], **spec},
    }


def try_to_apply(lab: Lab, *objects: dict[str, Any], account: str = "") -> str:
    """As far as the API server's checks go: nothing is stored."""
    impersonation = [f"--as=system:serviceaccount:meshwire-system:{account}"] if account else []
    return lab.kubectl(
        *("apply", "--dry-run=server", "--validate=strict", "-f", "-", *impersonation),
        stdin=documents(objects),
    )


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (config("second"), 'a cluster has one MeshConfig, and its name is "default"'),
        (config(network={"clusterCIDRs": ["10.244.0.0/33"]}), "must be a CIDR block such as 10.244.0.0/16"),
        (config(network={"clusterCIDRs": ["pods"]}), "must be a CIDR block such as 10.244.0.0/16"),
        (config(network={"clusterCIDRs": ["10.244.1.0/16"]}), "address bits set beyond its prefix"),
        (config(network={"clusterCIDRs": ["0.0.0.0/0"]}), "covers more than a cluster's pods"),
        (config(network={"clusterCIDRs": ["fe80::/64"]}), "loopback, link-local or multicast"),
        (config(network={"clusterCIDRs": ["10.0.0.0/8", "10.244.0.0/16"]}), "two of these blocks overlap"),
        (config(encryption={"port": 0}), "should be greater than or equal to 1"),
        (config(encryption={"port": 65535}), "should be less than or equal to 65534"),
        (config(encryption={"port": "https"}), "must be of type integer"),
        (config(encryption={"port": 8471}), "belongs to an overlay network"),
        (config(encryption={"mode": "Hard"}), 'supported values: "Strict", "Permissive"'),
        (config(encryption={"bootGuard": "Initd"}), 'supported values: "Off", "Systemd"'),
        (config(encryption={"enabeld": True}), 'unknown field "spec.encryption.enabeld"'),
        (config(network={"uplinks": ["eth0"], "overlays": ["eth0"]}), "under uplinks and under overlays"),
        (config(network={"uplinks": ["a/b"]}), "is not a device name"),
        (config(network={"uplinks": ["sixteen-letters-"]}), "may not be more than 15 bytes"),
        (config(network={"overlays": ["meshwire_wg0"]}), "named like Meshwire's own devices"),
        (config(network={"uplinks": ["lo"]}), "nothing leaves the node through the loopback device"),
        (config(network={"mtu": 1000}), "must be 0 (found by itself) or 1280 to 65535"),
        (config(policy={"excludedLabels": ["a", "a"]}), "duplicate value"),
        (config(policy={"excludedLabels": ["k8s:a"]}), "should match"),
        (config(policy={"sameNodePath": "Fast"}), "supported values"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_config_that_cannot_be_is_refused_with_a_reason(
    lab: Lab, refused: dict[str, Any], message: str
) -> None:
    with pytest.raises(LabError) as refusal:
        try_to_apply(lab, refused)
    # kubectl wraps nothing, but the API server's lists differ in spaces and quotes between releases.
    assert message.lower() in str(refusal.value).lower()


@pytest.mark.parametrize(
    "accepted",
    [
        config(),
        config(encryption={"enabled": True, "mode": "Permissive", "userspace": "Always", "port": 4790}),
        config(encryption={"enabled": True, "bootGuard": "Systemd"}),
        config(network={"clusterCIDRs": ["10.244.0.0/16", "fd00:10:244::/48"], "mtu": 1280}),
        config(network={"uplinks": ["eth0", "bond0.100"], "overlays": ["flannel.1"], "mtu": 0}),
    ],
)
def test_a_config_that_can_be_is_accepted(lab: Lab, accepted: dict[str, Any]) -> None:
    assert ACCEPTED in try_to_apply(lab, accepted)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (policy({}), "the policy says nothing: give it ingress"),
        (policy({"endpointSelector": None, "ingress": []}), "spec.endpointSelector: required value"),
        (policy({"nodeSelector": {}, "ingress": []}), 'unknown field "spec.nodeSelector"'),
        (policy({"mode": "Deny", "ingress": []}), 'supported values: "Enforce", "Audit"'),
        (policy({"enableDefaultDeny": {}}), "should have at least 1 properties"),
        (from_items({"fromEndpoints": [], "fromCIDR": []}), "one of fromEndpoints, fromCIDR"),
        (to_items({"toServices": [], "toEntities": []}), "one of toEndpoints, toCIDR, toCIDRSet"),
        (from_items({"toEndpoints": []}), 'unknown field "spec.ingress[0].toEndpoints"'),
        (
            from_items({"toPorts": [{"ports": [{}]}], "icmps": [{"fields": [{"type": 8}]}]}),
            "an item has toPorts or icmps",
        ),
        (from_items({"fromRequires": [{"matchLabels": {"a": "b"}}]}), "fromRequires, fromNodes"),
        (to_items({"toFQDNs": [{"matchName": "example.com"}]}), "toFQDNs, toRequires, toNodes"),
        (
            from_items({"toPorts": [{"ports": [{"port": "80"}], "rules": {"http": [{"path": "/"}]}}]}),
            "HTTP rules are not supported yet",
        ),
        (
            from_items({"toPorts": [{"ports": [{"port": "80"}], "serverNames": ["a"]}]}),
            "listener, serverNames, terminatingTLS",
        ),
        (from_items({"toPorts": []}), "should have at least 1 items"),
        (from_items({"toPorts": [{}]}), "toPorts[0].ports: required value"),
        (from_items({"toPorts": [{"ports": [{}] * 41}]}), "must have at most 40 items"),
        (from_items(*[{}] * 65), "must have at most 64 items"),
        (to_port(port=80), "must be of type string"),
        (to_port(port="65536"), "must be a number, 0 to 65535, in quotes, or a port's name"),
        (to_port(port="080"), "must be a number, 0 to 65535, in quotes, or a port's name"),
        (to_port(port="a--b"), "must be a number, 0 to 65535, in quotes, or a port's name"),
        (to_port(port="HTTP"), "must be a number, 0 to 65535, in quotes, or a port's name"),
        (to_port(port="80", endPort=79), "is below port, where the range starts"),
        (to_port(port="http", endPort=80), "a range starts at a port's number"),
        (to_port(port="0", endPort=80), "a range starts at a port's number"),
        (to_port(endPort=80), "a range starts at a port's number"),
        (to_port(port="80", protocol="ICMP"), 'supported values: "ANY", "TCP", "UDP", "SCTP"'),
        (from_items({"icmps": [{"fields": [{"type": 256}]}]}), "less than or equal to 255"),
        (from_items({"icmps": [{"fields": [{"type": "256"}]}]}), "should match"),
        (
            from_items({"icmps": [{"fields": [{"type": "PacketTooBig"}]}]}),
            "no name of a type of this family",
        ),
        (
            from_items({"icmps": [{"fields": [{"type": "Photuris", "family": "IPv6"}]}]}),
            "no name of a type of this family",
        ),
        (from_items({"fromEntities": ["init"]}), 'supported values: "all", "cluster", "host"'),
        (from_items({"fromCIDR": ["pods"]}), "must be a CIDR block such as 192.0.2.0/24"),
        (from_items({"fromCIDR": ["10.0.0.1/8"]}), "address bits set beyond its prefix"),
        (from_items({"fromCIDR": ["::ffff:10.0.0.0/104"]}), "must be a CIDR block such as 192.0.2.0/24"),
        (from_items({"fromCIDRSet": [{"cidr": "10.0.0.1"}]}), "must be a CIDR block such as 192.0.2.0/24"),
        (
            from_items({"fromCIDRSet": [{"cidrGroupRef": "a"}]}),
            'unknown field "spec.ingress[0].fromCIDRSet[0].cidrGroupRef"',
        ),
        (
            to_items({"toCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}]}),
            "a block under except is not inside of cidr",
        ),
        (
            to_items({"toCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["10.0.0.0/7"]}]}),
            "a block under except is not inside of cidr",
        ),
        (
            to_items({"toCIDRSet": [{"cidr": "0.0.0.0/0", "except": ["::/0"]}]}),
            "a block under except is not inside of cidr",
        ),
        (from_items({"fromEndpoints": [{"matchLabels": {"reserved:host": ""}}]}), "is named by entities"),
        (
            from_items(
                {"fromEndpoints": [{"matchExpressions": [{"key": "reserved:a", "operator": "Exists"}]}]}
            ),
            "is named by entities",
        ),
        (
            from_items(
                {"fromEndpoints": [{"matchExpressions": [{"key": "mesos:a", "operator": "Exists"}]}]}
            ),
            "should match",
        ),
        (
            from_items({"fromEndpoints": [{"role": "a"}]}),
            'unknown field "spec.ingress[0].fromEndpoints[0].role"',
        ),
        (
            policy(
                {"endpointSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}, "ingress": []}
            ),
            "In and NotIn need values, Exists and DoesNotExist take none",
        ),
        (
            policy(
                {
                    "endpointSelector": {
                        "matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]
                    },
                    "ingress": [],
                }
            ),
            "In and NotIn need values, Exists and DoesNotExist take none",
        ),
        (to_items({"toServices": [{}]}), "must have either k8sService or k8sServiceSelector"),
        (to_items({"toServices": [{"k8sService": {}}]}), "serviceName: required value"),
        (identity("255"), "an identity's name is its number, 256 to 16777215"),
        (identity("16777216"), "an identity's name is its number, 256 to 16777215"),
        (identity("web"), "an identity's name is its number, 256 to 16777215"),
        (identity() | {"spec": {"labels": {}}}, "every identity is of one namespace"),
        (endpoints({"identity": 7}), "greater than or equal to 256"),
        (endpoints({"addresses": ["10.0.0.1", "10.0.0.2"]}), "two addresses are one of each family"),
        (endpoints({"addresses": ["web"]}), "must be an IP address"),
        (endpoints({}, count=2), "must be how many endpoints there are"),
        (endpoints(*[{}] * 101), "must have at most 100 items"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_policy_that_cannot_be_is_refused_with_a_reason(
    lab: Lab, refused: dict[str, Any], message: str
) -> None:
    with pytest.raises(LabError, match=f"(?i){re.escape(message)}"):
        try_to_apply(lab, refused)


@pytest.mark.parametrize(
    "accepted",
    [
        config(policy={"enabled": True, "networkPolicies": False, "excludedLabels": []}),
        config(policy={"excludedLabels": ["app.kubernetes.io/version"]}),
        config(policy={"sameNodePath": "Stack"}),
        from_items(),
        from_items({}),
        policy({"enableDefaultDeny": {"egress": True}, "mode": "Audit", "description": "all"}),
        from_items(
            {
                "fromEndpoints": [
                    {},
                    {"matchLabels": {"k8s:io.kubernetes.pod.namespace": "pay", "any:a": ""}},
                ]
            },
            {
                "fromEndpoints": [
                    {"matchExpressions": [{"key": "k8s:a/b", "operator": "In", "values": ["c"]}]}
                ]
            },
            {"fromEndpoints": [{"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}]},
            {"fromCIDR": ["192.0.2.1", "192.0.2.0/24", "2001:db8::/32", "2001:DB8::1"]},
            {"fromCIDRSet": [{"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8", "192.168.0.0/16"]}]},
            {"fromEntities": ["all", "cluster", "host", "kube-apiserver", "remote-node", "world"]},
            {"fromEndpoints": []},
        ),
        to_items(
            {"toServices": [{"k8sService": {"serviceName": "web", "namespace": "pay"}}]},
            {"toServices": [{"k8sServiceSelector": {"selector": {"matchLabels": {"a": "b"}}}}]},
            {"toCIDRSet": [{"cidr": "2001:db8::/32", "except": ["2001:db8::/32"]}]},
            {"toEntities": ["world"], "toPorts": [{"ports": [{"port": "443", "protocol": "TCP"}, {}]}]},
            {"icmps": [{"fields": [{"type": 8}, {"type": "EchoRequest"}, {"type": "8"}]}]},
            {"icmps": [{"fields": [{"type": "PacketTooBig", "family": "IPv6"}]}]},
        ),
        to_port(port="http"),
        to_port(port="http-2", protocol="UDP", endPort=0),
        to_port(port="0", protocol="SCTP"),
        to_port(port="80", endPort=80),
        to_port(port="1", endPort=65535),
        identity("256", app="a"),
        identity("16777215"),
        endpoints(count=0),
        endpoints(
            {"addresses": ["fd00::1"]},
            {"ports": [{"name": "http", "protocol": "TCP", "port": 80}]},
            count=2,
        ),
    ],
)
def test_a_policy_that_can_be_is_accepted(lab: Lab, accepted: dict[str, Any]) -> None:
    assert ACCEPTED in try_to_apply(lab, accepted)


def test_the_sample_and_the_whole_installation_are_accepted(lab: Lab) -> None:
    sample = (SOURCE / "config/samples/meshconfig.yaml").read_text()
    assert ACCEPTED in lab.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=sample)
    installed = lab.kubectl("apply", "--dry-run=server", "--validate=strict", "-k", str(SOURCE / "config"))
    assert "daemonset.apps/meshwire-agent" in installed
    assert "deployment.apps/meshwire-operator" in installed


@pytest.mark.parametrize(
    "kind",
    [
        *("meshconfigs", "meshnodes", "meshstatuses", "meshpolicies", "clustermeshpolicies"),
        *("meshidentities", "meshendpointslices", "meshpolicyreports"),
    ],
)
def test_every_field_is_documented(lab: Lab, kind: str) -> None:
    crd = lab.get("crd", f"{kind}.meshwire.dev")
    [version] = crd["spec"]["versions"]

    def undocumented(schema: dict[str, Any], path: str) -> list[str]:
        own = [] if schema.get("description") or path.endswith(("metadata", "[]")) else [path]
        for name, field in schema.get("properties", {}).items():
            own += undocumented(field, f"{path}.{name}")
        if items := schema.get("items"):
            own += undocumented(items, f"{path}[]")
        return own

    assert undocumented(version["schema"]["openAPIV3Schema"], kind) == []
    conditions = {condition["type"]: condition["status"] for condition in crd["status"]["conditions"]}
    # Set by the API server where a schema isn't structural; absent where it is.
    assert "NonStructuralSchema" not in conditions and conditions["Established"] == "True"


def test_explain_reads_like_documentation(lab: Lab) -> None:
    said = lab.kubectl("explain", "meshconfig.spec.encryption")
    assert "Encrypt every packet between pods on different nodes" in said
    assert "loses no packet" in said
    for field in ("enabled", "mode", "port", "userspace", "persistentKeepaliveSeconds"):
        assert f"\n  {field}\t" in said


def test_the_operators_account_changes_no_node_but_our_taint(lab: Lab) -> None:
    """Its RBAC has to allow it to patch Nodes; the admission policy says what of them."""
    for patch, accepted in (
        ('{"metadata":{"labels":{"a":"b"}}}', False),
        ('{"spec":{"unschedulable":true}}', False),
        ('{"spec":{"taints":[{"key":"other","effect":"NoSchedule"}]}}', False),
        ('{"spec":{"taints":[]}}', True),
    ):
        arguments = ["patch", "node", "node1", "--dry-run=server", "-p", patch]
        arguments.append("--as=system:serviceaccount:meshwire-system:meshwire-operator")
        if accepted:
            lab.kubectl(*arguments)
        else:
            with pytest.raises(LabError, match="the operator may"):
                lab.kubectl(*arguments)


@pytest.mark.parametrize(
    ("component", "mount"),
    [("userspace", "/var/run/wireguard"), ("bootguard", "/host/etc/systemd/system")],
)
def test_components_add_to_the_installation(lab: Lab, tmp_path: Path, component: str, mount: str) -> None:
    config = os.path.relpath(SOURCE / "config", tmp_path)
    (tmp_path / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [{config}]\ncomponents: [{config}/{component}]\n"
    )
    made = yaml.safe_load_all(lab.kubectl("kustomize", str(tmp_path)))
    (agent,) = (
        each for each in made if (each["kind"], each["metadata"]["name"]) == ("DaemonSet", "meshwire-agent")
    )
    spec = agent["spec"]["template"]["spec"]
    mounts = {each["mountPath"]: each["name"] for each in spec["containers"][0]["volumeMounts"]}
    assert mounts[mount] in {each["name"] for each in spec["volumes"]}
