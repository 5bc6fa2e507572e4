from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from meshwire.lab import pods
from meshwire.lab.model import Node
from meshwire.lab.pods import InvalidPod, Progress

ADDRESSES = (ipaddress.ip_address("10.244.1.2"), ipaddress.ip_address("fd00::2"))
HOST = ipaddress.ip_address("198.18.0.11")
NOW = "2026-01-01T00:00:00Z"


def pod(**container: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
        "spec": {"containers": [{"name": "c", "image": "i", **container}]},
    }


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$(A) $(B)", "1 $(B)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$A ${A} $(A", "$A ${A} $(A"),
    ],
)
def test_variables_are_expanded_as_in_a_cluster(text: str, expanded: str) -> None:
    assert pods.expand(text, {"A": "1"}) == expanded


def test_a_command_is_command_and_arguments() -> None:
    container = {"command": ["sh", "-c"], "args": ["echo $(A)"]}
    assert pods.container_command(pod(**container), {"A": "1"}) == ["sh", "-c", "echo 1"]


def test_an_image_alone_is_no_command() -> None:
    with pytest.raises(InvalidPod, match="give it a `command`") as error:
        pods.container_command(pod(args=["x"]), {})
    assert error.value.reason == "CreateContainerError"


def test_the_environment_has_values_and_fields() -> None:
    env = [
        {"name": "A", "value": "1"},
        {"name": "B", "value": "$(A)2"},
        {"name": "EMPTY"},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "IPS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIPs"}}},
    ]
    found = pods.container_environment(pod(env=env), Node("node1", 1), ADDRESSES, HOST)
    assert found == {"A": "1", "B": "12", "EMPTY": "", "NODE": "node1", "IPS": "10.244.1.2,fd00::2"}


@pytest.mark.parametrize(
    "source", [{"secretKeyRef": {"name": "s"}}, {"fieldRef": {"fieldPath": "metadata.labels"}}]
)
def test_other_sources_of_the_environment_are_refused_by_name(source: dict[str, Any]) -> None:
    env = [{"name": "SECRET", "valueFrom": source}]
    with pytest.raises(InvalidPod, match="SECRET"):
        pods.container_environment(pod(env=env), Node("node1", 1), ADDRESSES, HOST)


def conditions(status: dict[str, Any]) -> dict[str, str]:
    return {item["type"]: item["status"] for item in status["conditions"]}


def test_a_running_pods_status() -> None:
    progress = Progress(
        phase="Running", addresses=ADDRESSES, ready=True, state={"running": {"startedAt": NOW}}
    )
    status = pods.pod_status(pod(), progress, [HOST], NOW, NOW)
    assert (status["phase"], status["podIP"]) == ("Running", "10.244.1.2")
    assert status["podIPs"] == [{"ip": "10.244.1.2"}, {"ip": "fd00::2"}]
    assert set(conditions(status).values()) == {"True"}
    assert status["containerStatuses"][0]["started"]


def test_a_pod_without_network_is_pending_and_has_no_address() -> None:
    status = pods.pod_status(pod(), Progress(), [HOST], NOW, NOW)
    assert status["phase"] == "Pending" and "podIP" not in status
    assert conditions(status)["Ready"] == "False"
    assert status["containerStatuses"][0]["state"]["waiting"]["reason"] == "ContainerCreating"


def test_a_condition_keeps_its_time_while_it_holds() -> None:
    progress = Progress(phase="Running", addresses=ADDRESSES, ready=True)
    old = pod()
    old["status"] = pods.pod_status(old, progress, [HOST], NOW, NOW)
    later = "2026-01-01T00:01:00Z"
    times = {
        item["type"]: item["lastTransitionTime"]
        for item in pods.pod_status(old, Progress(phase="Running", addresses=ADDRESSES), [HOST], NOW, later)[
            "conditions"
        ]
    }
    assert times == {
        "PodReadyToStartContainers": NOW,
        "Initialized": NOW,
        "ContainersReady": later,
        "Ready": later,
    }


def test_further_containers_say_that_they_do_not_run() -> None:
    two = pod()
    two["spec"]["containers"].append({"name": "side", "image": "i"})
    statuses = pods.pod_status(two, Progress(phase="Running", ready=True), [HOST], NOW, NOW)[
        "containerStatuses"
    ]
    assert statuses[1]["state"] == {"waiting": {"reason": "NotRunInLab"}} and not statuses[1]["ready"]


def test_a_pod_knows_its_own_name() -> None:
    assert pods.hosts_file("p", ADDRESSES).splitlines()[2:] == ["10.244.1.2 p", "fd00::2 p"]
