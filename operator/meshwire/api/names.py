"""Names and numbers that several parts of Meshwire, or the people who use it, rely on."""

from __future__ import annotations

from typing import Final

GROUP: Final = "meshwire.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"

MESHCONFIGS: Final = "meshconfigs"
MESHNODES: Final = "meshnodes"
MESHSTATUSES: Final = "meshstatuses"
MESHPOLICIES: Final = "meshpolicies"
CLUSTERMESHPOLICIES: Final = "clustermeshpolicies"
MESHIDENTITIES: Final = "meshidentities"
MESHENDPOINTSLICES: Final = "meshendpointslices"
MESHPOLICYREPORTS: Final = "meshpolicyreports"
RESOURCES: Final = (
    MESHCONFIGS,
    MESHNODES,
    MESHSTATUSES,
    MESHPOLICIES,
    CLUSTERMESHPOLICIES,
    MESHIDENTITIES,
    MESHENDPOINTSLICES,
    MESHPOLICYREPORTS,
)
"""All of our own."""

CONFIG_NAME: Final = "default"
"""The one MeshConfig the API server accepts."""
STATUS_NAME: Final = "mesh"
"""The one MeshStatus the operator writes."""

NAMESPACE: Final = "meshwire-system"
"""Where operator, agents and the nodes' key Secrets live unless POD_NAMESPACE says otherwise."""

OPERATOR_NAMESPACE: Final = "meshwire-operator"
"""Where the operator keeps epoch secrets: agents may read every Secret of their own namespace."""

NOT_READY_TAINT: Final = "meshwire.dev/agent-not-ready"
"""Nodes that register with this taint run no pods before their datapath is in force."""

EPOCH_LABEL: Final = "meshwire.dev/epoch"
NODE_LABEL: Final = "meshwire.dev/node"
SEALED_TO_ANNOTATION: Final = "meshwire.dev/sealed-to"
"""On a key Secret: the public sealing key its private half was sealed to (base64)."""

PUBLIC_KEY_ANNOTATION: Final = "meshwire.dev/public-key-epoch-"
"""On a key Secret, followed by the epoch: the public half (base64) of the private key under the data key
`epoch-N`."""

SECRET_DIGEST_ANNOTATION: Final = "meshwire.dev/epoch-secret-digest-"
"""The same: the digest (base64) of the epoch secret that is sealed under the data key `epoch-N-secret`."""

EPOCH_SECRET_LABEL: Final = "meshwire.dev/epoch-secret"
"""On a Secret in the operator's namespace: the epoch whose secret it holds."""
EPOCH_SECRET_DATA_KEY: Final = "secret"

ROTATE_ANNOTATION: Final = "meshwire.dev/rotate"
"""On the MeshConfig: every new value asks for new WireGuard keys."""

UNUSED_SINCE_ANNOTATION: Final = "meshwire.dev/unused-since"
"""On a MeshIdentity that no pod has: since when (RFC 3339)."""

CLUSTER_CIDR_MISSING: Final = "ClusterCIDRMissing"
"""Reason of conditions: nodes have no pod CIDR, and no cluster CIDR covers pods that are not known yet."""

MAX_NODE_ID: Final = 16383
"""Node numbers run from 1; 0 stands for a node nobody knows. Bounds the datapath's `nodes` map."""


def device_name(epoch: int) -> str:
    """The WireGuard device that carries `epoch`: even epochs share one device, odd ones the other."""
    return f"meshwire_wg{epoch % 2}"


def listen_port(base_port: int, epoch: int) -> int:
    """The UDP port of the device that carries `epoch`; `base_port` is the even epochs'."""
    return base_port + epoch % 2


def secret_name(node: str) -> str:
    """The Secret of the node's WireGuard private keys: one data key per epoch, each sealed to the node."""
    return f"meshwire-key-{node}"


def secret_data_key(epoch: int) -> str:
    """Where in that Secret's data the sealed key of `epoch` is."""
    return f"epoch-{epoch}"


def sealed_secret_data_key(epoch: int) -> str:
    """The same of the sealed epoch secret."""
    return f"epoch-{epoch}-secret"


def epoch_secret_name(epoch: int) -> str:
    """The Secret in the operator's namespace that holds an epoch's secret."""
    return f"meshwire-epoch-{epoch}"
