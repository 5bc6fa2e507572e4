"""What the API server makes of our CRDs, policies and manifests: clear refusals, documentation."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from meshwire.lab.lab import SOURCE, Lab
from meshwire.lab.model import LabError


def config(name: str = "default", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "meshwire.dev/v1alpha1",
        "kind": "MeshConfig",
        "metadata": {"name": name},
        "spec": spec,
    }


def try_to_apply(lab: Lab, *objects: dict[str, Any], account: str = "") -> str:
    """As far as the API server's checks go: nothing is stored."""
    impersonation = [f"--as=system:serviceaccount:meshwire-system:{account}"] if account else []
    return lab.kubectl(
        *("apply", "--dry-run=server", "--validate=strict", "-f", "-", *impersonation),
        stdin=yaml.safe_dump_all(objects),
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
        (config(encryption={"enabeld": True}), 'unknown field "spec.encryption.enabeld"'),
        (config(network={"uplinks": ["eth0"], "overlays": ["eth0"]}), "under uplinks and under overlays"),
        (config(network={"uplinks": ["a/b"]}), "is not a device name"),
        (config(network={"uplinks": ["sixteen-letters-"]}), "may not be more than 15 bytes"),
        (config(network={"overlays": ["meshwire_wg0"]}), "named like Meshwire's own devices"),
        (config(network={"uplinks": ["lo"]}), "nothing leaves the node through the loopback device"),
        (config(network={"mtu": 1000}), "must be 0 (found by itself) or 1280 to 65535"),
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
        config(network={"clusterCIDRs": ["10.244.0.0/16", "fd00:10:244::/48"], "mtu": 1280}),
        config(network={"uplinks": ["eth0", "bond0.100"], "overlays": ["flannel.1"], "mtu": 0}),
    ],
)
def test_a_config_that_can_be_is_accepted(lab: Lab, accepted: dict[str, Any]) -> None:
    assert "created" in try_to_apply(lab, accepted)


def test_the_sample_and_the_whole_installation_are_accepted(lab: Lab) -> None:
    sample = (SOURCE / "config/samples/meshconfig.yaml").read_text()
    assert "created" in lab.kubectl(
        "apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=sample
    )
    installed = lab.kubectl("apply", "--dry-run=server", "--validate=strict", "-k", str(SOURCE / "config"))
    assert "daemonset.apps/meshwire-agent" in installed
    assert "deployment.apps/meshwire-operator" in installed


@pytest.mark.parametrize("kind", ["meshconfigs", "meshnodes", "meshstatuses"])
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
