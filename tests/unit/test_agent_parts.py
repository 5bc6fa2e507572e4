"""Reading Nodes and MeshConfigs, the environment, logs and the metrics page."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from base64 import b64encode
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from meshwire.agent import state
from meshwire.agent.logs import JsonFormatter
from meshwire.agent.loop import Health
from meshwire.agent.metrics import format_metrics
from meshwire.agent.policy.room import Fill
from meshwire.agent.settings import InvalidEnvironment, read_settings
from meshwire.agent.watch import parse_config, parse_node
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshnode import Phase
from meshwire.bpf.layouts import Direction, Reason
from meshwire.bpf.maps import Counter
from meshwire.encryption.model import (
    ClusterNode,
    Desired,
    Device,
    DeviceState,
    HeldKey,
    Observed,
    Peer,
    PeerState,
    SecretKey,
)


def node(**parts: Any) -> dict[str, Any]:
    return {"metadata": {"name": "a"}, **parts}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (node(), ClusterNode(name="a")),
        (
            node(spec={"podCIDR": "10.244.1.0/24"}),
            ClusterNode(name="a", pod_cidrs=(ip_network("10.244.1.0/24"),)),
        ),
        (
            node(
                spec={"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00::/64"]},
                status={
                    "addresses": [
                        {"type": "Hostname", "address": "a"},
                        {"type": "InternalIP", "address": "198.18.0.1"},
                        {"type": "ExternalIP", "address": "192.0.2.1"},
                    ],
                    "conditions": [
                        {"type": "MemoryPressure", "status": "False"},
                        {"type": "Ready", "status": "True"},
                    ],
                },
            ),
            ClusterNode(
                name="a",
                ready=True,
                addresses=(ip_address("198.18.0.1"),),
                pod_cidrs=(ip_network("10.244.1.0/24"), ip_network("fd00::/64")),
            ),
        ),
        (node(status={"conditions": [{"type": "Ready", "status": "Unknown"}]}), ClusterNode(name="a")),
    ],
)
def test_nodes(body: dict[str, Any], expected: ClusterNode) -> None:
    assert parse_node(body) == expected


def test_a_config_that_is_wrong_is_kept_as_what_is_wrong_with_it() -> None:
    config, spec = parse_config({"metadata": {"generation": 2}, "spec": {"encryption": {"port": 1234}}})
    assert isinstance(config, MeshConfig)
    assert (config.encryption.port, config.generation) == (1234, 2)
    assert spec == {"encryption": {"port": 1234}}
    config, _ = parse_config({"metadata": {}, "spec": {"encryption": {"port": 70000}}})
    assert isinstance(config, InvalidSpec)
    assert "port" in str(config)


def test_the_environment() -> None:
    settings = read_settings(
        {"NODE_NAME": "a", "MESHWIRE_METRICS_ADDRESS": "[::1]:9", "MESHWIRE_STATE_DIR": "/s"}
    )
    assert settings.node == "a"
    assert settings.metrics_address == ("::1", 9)
    assert settings.sealing_key_file == Path("/s/sealing.key")
    assert settings.namespace == "meshwire-system"
    with pytest.raises(InvalidEnvironment, match="MESHWIRE_METRICS_ADDRESS"):
        read_settings({"MESHWIRE_METRICS_ADDRESS": "localhost"})


def test_the_last_good_config_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "state" / "config.json"
    assert state.read_config(path) is None
    state.write_config(path, {"encryption": {"port": 1234}})
    kept = state.read_config(path)
    assert kept is not None
    assert kept.encryption.port == 1234
    written = path.stat().st_mtime_ns
    state.write_config(path, {"encryption": {"port": 1234}})
    assert path.stat().st_mtime_ns == written
    for damaged in ("{", "[]", '{"encryption": {"port": 0}}'):
        path.write_text(damaged)
        assert state.read_config(path) is None


def test_a_log_line_is_one_json_object() -> None:
    record = logging.LogRecord("meshwire.agent", logging.WARNING, "", 0, "two\nlines of %s", ("text",), None)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    parsed = json.loads(line)
    assert (parsed["event"], parsed["level"], parsed["logger"]) == (
        "two\nlines of text",
        "warning",
        "meshwire.agent",
    )


def test_the_metrics_page() -> None:
    health = Health()
    assert "meshwire_loop_runs_total 0" in list(format_metrics(health, 0.0))
    key = b64encode(bytes(32)).decode()
    peer = Peer(node="b", public_key=key, endpoint=None, allowed_ips=frozenset(), keepalive=25)
    device = Device(
        name="meshwire_wg1",
        epoch=1,
        key=HeldKey(1, key, SecretKey(bytes(32))),
        port=1,
        mtu=1420,
        peers=(peer,),
    )
    health.desired = Desired(phase=Phase.ENFORCING, devices=(device,))
    state_of_device = DeviceState(
        name="meshwire_wg1", peers={key: PeerState(public_key=key, handshake=90.0)}
    )
    health.observed = Observed(links={}, wireguard={"meshwire_wg1": state_of_device})
    health.metrics = {
        (Reason.DROP_NO_TUNNEL, Direction.EGRESS): Counter(3, 300),
        (Reason.DROP_POLICY_INGRESS, Direction.INGRESS): Counter(0, 0),
    }
    health.policy_metrics = {(Reason.DROP_POLICY_INGRESS, Direction.INGRESS): Counter(5, 500)}
    health.policy_maps = {"policy": Fill(7, 100, 3)}
    health.policy_closed_pods = 2
    lines = list(format_metrics(health, 100.0))
    assert 'meshwire_datapath_packets_total{reason="drop_no_tunnel",direction="egress"} 3' in lines
    assert 'meshwire_datapath_bytes_total{reason="drop_no_tunnel",direction="egress"} 300' in lines
    assert not any(line.startswith("meshwire_datapath") and "policy" in line for line in lines)
    assert 'meshwire_policy_packets_total{reason="drop_policy_ingress",direction="ingress"} 5' in lines
    assert 'meshwire_policy_map_entries{map="policy"} 7' in lines
    assert 'meshwire_policy_map_capacity{map="policy"} 100' in lines
    assert 'meshwire_policy_map_left_out{map="policy"} 3' in lines
    assert "meshwire_policy_closed_pods 2" in lines
    assert 'meshwire_peers{device="meshwire_wg1"} 1' in lines
    assert 'meshwire_handshake_age_seconds{device="meshwire_wg1",node="b"} 10.0' in lines
    assert all(line.startswith("# ") or " " in line for line in lines)


def test_the_agent_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from meshwire.agent import memory\n"
        "memory.import_parts_only()\n"
        "import meshwire.agent.daemon\n"
        "heavy = 'kubernetes.client', 'rich', 'click', 'structlog', 'sqlite3', 'pyroute2.ndb'\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
