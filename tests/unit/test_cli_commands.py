"""The commands against a small HTTP server that answers as an API server would."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from click.testing import CliRunner, Result

from meshwire.api import names
from meshwire.cli.__main__ import COMMANDS, main

API = "/apis/meshwire.dev/v1alpha1"
READY = [{"type": "Ready", "status": "True", "reason": "Ready", "observedGeneration": 1}]
CONFIG = {
    "metadata": {"name": "default", "generation": 1},
    "spec": {"encryption": {"enabled": True}},
    "status": {
        "conditions": [{"type": "Accepted", "status": "True", "reason": "Accepted", "observedGeneration": 1}]
    },
}
STATUS = {
    "metadata": {"name": "mesh", "generation": 1},
    "status": {
        "encryption": "WireGuard",
        "phase": "Enforcing",
        "epoch": 1,
        "epochStartedAt": "2026-01-01T00:00:00Z",
        "nodes": 1,
        "nodesReady": 1,
        "leaked": 0,
        "conditions": READY,
    },
}
MESHNODE = {
    "metadata": {"name": "node-1", "generation": 1},
    "spec": {"id": 1, "encryption": {"phase": "Enforcing", "epoch": 1}},
    "status": {
        "observedGeneration": 1,
        "implementation": "Kernel",
        "preparedEpoch": 1,
        "activeEpoch": 1,
        "strict": True,
        "agentVersion": "0.1.0",
        "conditions": READY,
    },
}
NODE = {
    "metadata": {"name": "node-1"},
    "spec": {"podCIDRs": ["10.244.0.0/24"]},
    "status": {
        "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
        "nodeInfo": {"kernelVersion": "6.1.0"},
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
    },
}
DEFINITIONS = [
    {
        "metadata": {"name": f"{plural}.meshwire.dev"},
        "status": {"conditions": [{"type": "Established", "status": "True"}]},
    }
    for plural in names.RESOURCES
]


class Cluster:
    """`answers` maps a path to the object that GET gives, or to the code it fails with; 404 for all else."""

    def __init__(self, answers: dict[str, Any], directory: Path) -> None:
        self.answers = answers
        self.kubeconfig = directory / "kubeconfig"
        handler = type("Handler", (_Handler,), {"answers": answers})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.kubeconfig.write_text(yaml.safe_dump(kubeconfig(self.url)))
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    answers: dict[str, Any]

    def do_GET(self) -> None:
        self._answer(self.answers.get(urlsplit(self.path).path, 404))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(self.answers.get(f"POST {self.path}", 404))

    def _answer(self, answer: Any) -> None:
        if isinstance(answer, list):
            answer = {"items": answer}
        code = answer if isinstance(answer, int) else 200
        body = json.dumps(answer if code == 200 else {"kind": "Status", "code": code}).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def kubeconfig(server: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server}}],
        "users": [{"name": "test", "user": {"token": "unused"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster in force; tests change its answers."""
    cluster = Cluster(
        {
            "/version": {"gitVersion": "v1.35.4"},
            "/api/v1/nodes": [NODE],
            "/api/v1/pods": [],
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions": DEFINITIONS,
            "POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews": {"status": {"allowed": True}},
            f"{API}/meshconfigs/default": CONFIG,
            f"{API}/meshstatuses/mesh": STATUS,
            f"{API}/meshnodes": [MESHNODE],
        },
        tmp_path,
    )
    yield cluster
    cluster.close()


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def ask(cluster: Cluster, command: str, *options: str) -> Result:
    return run(command, "--kubeconfig", cluster.kubeconfig, *options)


def test_status_of_a_mesh_in_force(cluster: Cluster) -> None:
    result = ask(cluster, "status")
    assert result.exit_code == 0
    assert "WireGuard" in result.stdout and "node-1" in result.stdout


def test_status_as_json(cluster: Cluster) -> None:
    result = ask(cluster, "status", "-o", "json")
    answer = json.loads(result.stdout)
    assert (answer["ready"], answer["findings"]) == (True, [])
    assert answer["nodes"][0] == {
        "name": "node-1",
        "live": True,
        "ready": True,
        "phase": "Enforcing",
        "epoch": 1,
        **{name: MESHNODE["status"].get(name, 0) for name in
           ("observedGeneration", "implementation", "preparedEpoch", "activeEpoch", "strict", "peers",
            "handshakes", "leaked", "dropped", "agentVersion")},
        "unreached": [],
        "revoked": [],
        "unreachable": [],
        "unreachableCount": 0,
        "conditions": [{**READY[0], "message": "", "lastTransitionTime": ""}],
    }  # fmt: skip


def test_the_matrix_in_words_and_as_json(cluster: Cluster) -> None:
    result = ask(cluster, "status", "--matrix")
    assert result.exit_code == 0 and "1 nodes; directions that work: 0, dead: 0" in result.stdout
    answer = json.loads(ask(cluster, "status", "--matrix", "-o", "json").stdout)
    assert answer["matrix"]["pairs"] == {"answer": 0, "dead": 0, "unknown": 0}


def test_a_status_that_is_not_ready_fails_and_says_why(cluster: Cluster) -> None:
    cluster.answers[f"{API}/meshstatuses/mesh"] = 404
    result = ask(cluster, "status")
    assert result.exit_code == 1
    assert "operator" in result.stdout


def test_waiting_for_a_mesh_that_is_never_ready_ends(cluster: Cluster) -> None:
    cluster.answers[f"{API}/meshstatuses/mesh"] = 404
    assert ask(cluster, "status", "--wait", "--timeout", "0").exit_code == 1


def test_waiting_ends_when_the_mesh_is_ready(cluster: Cluster) -> None:
    cluster.answers[f"{API}/meshstatuses/mesh"] = 404
    threading.Timer(0.3, cluster.answers.update, ({f"{API}/meshstatuses/mesh": STATUS},)).start()
    assert ask(cluster, "status", "--wait", "--timeout", "60").exit_code == 0


def test_status_does_without_the_right_to_list_nodes(cluster: Cluster) -> None:
    cluster.answers["/api/v1/nodes"] = 403
    assert ask(cluster, "status").exit_code == 0


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        (f"{API}/meshnodes", 404, "Meshwire isn't installed in this cluster"),
        (f"{API}/meshnodes", 401, "does not accept the kubeconfig's credentials"),
        (f"{API}/meshnodes", 403, "does not let you GET"),
        (f"{API}/meshnodes", 500, "answers 500"),
        (f"{API}/meshnodes", [{"metadata": {"name": "a"}, "spec": {"id": "one"}}], "spec.id"),
    ],
)
def test_a_cluster_that_can_not_be_asked_is_one_line(
    cluster: Cluster, path: str, answer: Any, words: str
) -> None:
    cluster.answers[path] = answer
    result = ask(cluster, "status")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("meshwire: ") and result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(kubeconfig("https://127.0.0.1:1")))
    result = run("status", "--kubeconfig", path)
    assert result.exit_code == 2
    assert "can't be reached" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["", "not: [yaml", "current-context: gone\n"])
def test_a_kubeconfig_that_can_not_be_used_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    result = run("status", "--kubeconfig", path)
    assert result.exit_code == 2
    assert result.stderr.startswith("meshwire: ") and result.stderr.count("\n") == 1


def test_watching_is_for_people() -> None:
    assert run("status", "--watch", "-o", "json").exit_code == 2


def test_version_of_client_and_agents(cluster: Cluster) -> None:
    result = ask(cluster, "version", "-o", "json")
    answer = json.loads(result.stdout)
    assert answer["agents"] == {"0.1.0": 1}
    assert answer["client"]


def test_version_without_meshwire_in_the_cluster_still_tells_the_client(cluster: Cluster) -> None:
    cluster.answers[f"{API}/meshnodes"] = 404
    result = ask(cluster, "version")
    assert result.exit_code == 0 and result.stdout.startswith("client")
    assert "isn't installed" in result.stderr
    assert ask(cluster, "version", "--cluster").exit_code == 2


def test_preflight_of_a_cluster_that_has_all(cluster: Cluster) -> None:
    result = ask(cluster, "preflight", "--no-node", "-o", "json")
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["ok"]) == (0, True)
    assert {finding["level"] for finding in answer["findings"]} == {"pass"}


def test_preflight_fails_where_pods_live_outside_their_nodes_ranges(cluster: Cluster) -> None:
    pod = {"metadata": {"namespace": "default", "name": "web"}, "status": {"podIPs": [{"ip": "172.16.0.9"}]}}
    on_host = {
        "metadata": {"namespace": "default", "name": "agent"},
        "status": {"podIPs": [{"ip": "192.0.2.1"}]},
    }
    cluster.answers["/api/v1/pods"] = [
        {**pod, "spec": {"nodeName": "node-1"}},
        {**on_host, "spec": {"nodeName": "node-1", "hostNetwork": True}},
    ]
    result = ask(cluster, "preflight", "--no-node")
    assert result.exit_code == 1
    assert "default/web 172.16.0.9" in result.stdout and "default/agent" not in result.stdout


def test_preflight_of_a_cluster_that_does_not_answer_fails_only_where_asked_for(cluster: Cluster) -> None:
    cluster.answers["/version"] = 500
    assert ask(cluster, "preflight", "--no-node").exit_code == 0
    assert ask(cluster, "preflight", "--no-node", "--cluster").exit_code == 2


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "lab"])
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Exit code:" in result.stdout


def test_an_unknown_command_is_refused() -> None:
    assert run("nonsense").exit_code == 2


def test_version_loads_neither_client_nor_tables() -> None:
    code = (
        "import sys; from meshwire.cli.__main__ import main; "
        "main(['version', '--no-cluster'], standalone_mode=False);"
        "print(sorted({'kubernetes', 'rich', 'pyroute2', 'yaml'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"
